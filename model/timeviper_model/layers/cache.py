"""Mamba states of fixed size, and keys and values (k) of the tokens that TransV left at each layer.

slot 0   mamba: window, state     layer 3: kkkkkkkk__     layer 8: kkk__
slot 1   mamba: window, state     layer 3: kkk__          layer 8: kk__

Each slot has a room at each layer, with space (_) for its answer. One product reads the rooms of a bank.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import NamedTuple

import torch
from torch import Tensor

from timeviper_model.config import HybridConfig, TextConfig
from timeviper_model.layers.attention import continued_attention, grouped_attention
from timeviper_model.layers.mamba2 import Mamba2State
from timeviper_model.ops.precision import wide_dtype

MIN_CAPACITY = 128
"""Tokens of an unreserved room; it grows by half."""

CAPACITY_STEP = 64
"""Capacities are multiples of this many tokens."""

BANK_BYTES = 32 << 20
"""Maximum bytes of a bank with several rooms; long rooms may be read one by one."""

KEPT_BYTES = 16 << 20
"""Bytes per layer that stay allocated while empty; new pages are slow."""

MAX_LENGTH_WASTE = 1.5
"""Maximum padded / real length of slots read by one product."""


class Bank:
    """(num_rooms, Hkv, capacity, E) keys and values. Unwritten values are 0: they are read with weight 0."""

    def __init__(self, shape: tuple[int, int, int, int], device: torch.device, dtype: torch.dtype) -> None:
        self.keys = torch.empty(shape, device=device, dtype=dtype)
        self.values = torch.zeros(shape, device=device, dtype=dtype)
        self.is_taken = [False] * shape[0]

    @property
    def capacity(self) -> int:
        return self.keys.shape[2]

    @property
    def num_bytes(self) -> int:
        return self.keys.nbytes + self.values.nbytes


class Room(NamedTuple):
    bank: Bank
    row: int

    @property
    def num_bytes(self) -> int:
        return self.bank.num_bytes // len(self.bank.is_taken)


class AttentionCache:
    """Keys and values of one layer."""

    def __init__(
        self,
        num_slots: int,
        num_kv_heads: int,
        head_dim: int,
        device: torch.device,
        dtype: torch.dtype,
        *,
        kept_bytes: int = KEPT_BYTES,
    ) -> None:
        self.num_kv_heads, self.head_dim, self.device, self.dtype = num_kv_heads, head_dim, device, dtype
        self.lengths = [0] * num_slots
        self.rooms: list[Room | None] = [None] * num_slots
        self.kept_bytes = kept_bytes
        self._banks: list[Bank] = []

    @property
    def num_bytes(self) -> int:
        return sum(bank.num_bytes for bank in self._banks)

    @property
    def bytes_per_token(self) -> int:
        return 2 * self.num_kv_heads * self.head_dim * self.dtype.itemsize

    def capacity(self, num_tokens: int) -> int:
        """Capacity of a room for `num_tokens`: at most an eighth larger if it can share a bank."""
        step = CAPACITY_STEP
        if 2 * num_tokens * self.bytes_per_token <= BANK_BYTES:
            step = max(step, 2 ** (num_tokens.bit_length() - 4))
        return -(-max(1, num_tokens) // step) * step

    def room_bytes(self, num_tokens: int) -> int:
        return self.capacity(num_tokens) * self.bytes_per_token

    def missing_bytes(self, num_tokens: int) -> int:
        """Bytes to allocate for a room; 0 if one is free."""
        return 0 if self._free_room(self.capacity(num_tokens)) else self.room_bytes(num_tokens)

    def reserve(self, slot: int, num_tokens: int, *, spare_bytes: int | None = None) -> None:
        """Gives the slot a room for `num_tokens`, with its content; `spare_bytes` limit further rooms of a new bank."""
        old, capacity = self.rooms[slot], self.capacity(num_tokens)
        if old is not None and old.bank.capacity >= num_tokens:
            return
        room = self._free_room(capacity) or self._new_room(capacity, spare_bytes)
        room.bank.is_taken[room.row] = True
        if old is not None:
            length = self.lengths[slot]
            room.bank.keys[room.row, :, :length] = old.bank.keys[old.row, :, :length]
            room.bank.values[room.row, :, :length] = old.bank.values[old.row, :, :length]
            self._give_back(old, length)
        self.rooms[slot] = room

    def reset(self, slot: int) -> None:
        """Empties the slot and gives its room back."""
        room = self.rooms[slot]
        if room is not None:
            self._give_back(room, self.lengths[slot])
        self.rooms[slot], self.lengths[slot] = None, 0

    def free_idle(self) -> None:
        """Frees banks without a taken room."""
        self._banks = [bank for bank in self._banks if any(bank.is_taken)]

    def swap(self, first: int, second: int) -> None:
        self.lengths[first], self.lengths[second] = self.lengths[second], self.lengths[first]
        self.rooms[first], self.rooms[second] = self.rooms[second], self.rooms[first]

    def content(self, slot: int) -> tuple[Tensor, Tensor]:
        """Views (Hkv, L, E)."""
        room, length = self.rooms[slot], self.lengths[slot]
        if room is None:
            empty = torch.empty(self.num_kv_heads, 0, self.head_dim, device=self.device, dtype=self.dtype)
            return empty, empty
        return room.bank.keys[room.row, :, :length], room.bank.values[room.row, :, :length]

    def put(self, slot: int, k_GLE: Tensor, v_GLE: Tensor) -> None:
        """Appends (Hkv, L, E)."""
        start = self.lengths[slot]
        stop = start + k_GLE.shape[1]
        room = self.grown_room(slot, stop)
        room.bank.keys[room.row, :, start:stop] = k_GLE
        room.bank.values[room.row, :, start:stop] = v_GLE
        self.lengths[slot] = stop

    def grown_room(self, slot: int, length: int) -> Room:
        """The slot's room, copied into a larger one if it is too small."""
        room = self.rooms[slot]
        if room is None or room.bank.capacity < length:
            capacity = 0 if room is None else room.bank.capacity
            self.reserve(slot, max(length, MIN_CAPACITY, capacity + capacity // 2))
            room = self.rooms[slot]
        assert room is not None
        return room

    def _free_room(self, capacity: int) -> Room | None:
        banks = (bank for bank in self._banks if bank.capacity == capacity and not all(bank.is_taken))
        return next((Room(bank, bank.is_taken.index(False)) for bank in banks), None)

    def _new_room(self, capacity: int, spare_bytes: int | None) -> Room:
        """Doubles the rooms of this capacity, up to BANK_BYTES: few banks with little idle space."""
        room_bytes = capacity * self.bytes_per_token
        num_equal = sum(len(bank.is_taken) for bank in self._banks if bank.capacity == capacity)
        num_rooms = min(num_equal, BANK_BYTES // room_bytes, len(self.rooms) - num_equal)
        if spare_bytes is not None:
            num_rooms = min(num_rooms, 1 + max(0, spare_bytes) // room_bytes)
        bank = Bank((max(1, num_rooms), self.num_kv_heads, capacity, self.head_dim), self.device, self.dtype)
        self._banks.append(bank)
        return Room(bank, 0)

    @torch.inference_mode()  # the engine's tensors are inference tensors, and it cancels outside of that mode
    def _give_back(self, room: Room, length: int) -> None:
        room.bank.is_taken[room.row] = False
        if not any(room.bank.is_taken) and self.num_bytes > self.kept_bytes:
            self._banks.remove(room.bank)
        else:
            room.bank.values[room.row, :, :length] = 0  # 0 times NaN would reach the next sequence


@dataclass(frozen=True, kw_only=True, slots=True)
class SavedSlot:
    """Immutable state of one sequence, by layer."""

    mamba: dict[int, Mamba2State]
    """States with B = 1."""
    attention: dict[int, tuple[Tensor, Tensor]]
    """(Hkv, L, E) each."""

    @property
    def tensors(self) -> list[Tensor]:
        states = [tensor for state in self.mamba.values() for tensor in (state.window_BKD, state.ssm_BHPN)]
        return states + [tensor for pair in self.attention.values() for tensor in pair]

    @property
    def num_bytes(self) -> int:
        return sum(tensor.nbytes for tensor in self.tensors)

    def to(self, device: torch.device | str) -> SavedSlot:
        return SavedSlot(
            mamba={
                layer: Mamba2State(window_BKD=state.window_BKD.to(device), ssm_BHPN=state.ssm_BHPN.to(device))
                for layer, state in self.mamba.items()
            },
            attention={layer: (keys.to(device), values.to(device)) for layer, (keys, values) in self.attention.items()},
        )


class HybridCache:
    def __init__(
        self,
        config: TextConfig,
        num_slots: int,
        *,
        device: torch.device | str,
        dtype: torch.dtype,
        kept_bytes: int = KEPT_BYTES,
    ) -> None:
        if num_slots < 1:
            raise ValueError(f"{num_slots = } must be at least 1")
        self.num_slots = num_slots
        self.num_tokens = [0] * num_slots
        """Tokens read by each slot, dropped ones included."""
        self.device = device = torch.device(device)
        state_dtype = wide_dtype(dtype)
        self.mamba: dict[int, Mamba2State] = {}
        self.attention: dict[int, AttentionCache] = {}
        for layer, block_type in enumerate(config.block_types):
            if block_type == "mamba":
                assert isinstance(config, HybridConfig)
                window_shape = (num_slots, config.conv_kernel - 1, config.conv_dim)
                ssm_shape = (num_slots, config.mamba_num_heads, config.mamba_head_dim, config.ssm_state_size)
                self.mamba[layer] = Mamba2State(
                    window_BKD=torch.zeros(window_shape, device=device, dtype=dtype),
                    ssm_BHPN=torch.zeros(ssm_shape, device=device, dtype=state_dtype),
                )
            elif block_type == "attention":
                self.attention[layer] = AttentionCache(
                    num_slots, config.num_key_value_heads, config.head_dim, device, dtype, kept_bytes=kept_bytes
                )

    def has_space(self, num_tokens: Mapping[int, int], max_bytes: int) -> bool:
        """Whether rooms for `num_tokens` by attention layer keep all keys and values within `max_bytes`.

        Frees idle banks if that is needed.
        """
        if self._spare_bytes(num_tokens, max_bytes) < 0:
            for attention in self.attention.values():
                attention.free_idle()
        return self._spare_bytes(num_tokens, max_bytes) >= 0

    def reserve(self, slot: int, num_tokens: Mapping[int, int], *, max_bytes: int | None = None) -> None:
        """Gives an empty slot rooms for `num_tokens` by attention layer; `max_bytes` limits idle space in new banks."""
        spare = None if max_bytes is None else self._spare_bytes(num_tokens, max_bytes)
        for layer, count in num_tokens.items():
            attention = self.attention[layer]
            expected = attention.num_bytes + attention.missing_bytes(count)
            attention.reserve(slot, count, spare_bytes=spare)
            if spare is not None:
                spare -= attention.num_bytes - expected

    def _spare_bytes(self, num_tokens: Mapping[int, int], max_bytes: int) -> int:
        missing = sum(self.attention[layer].missing_bytes(count) for layer, count in num_tokens.items())
        return max_bytes - self.kv_bytes - missing

    def room_bytes(self, num_tokens: Mapping[int, int]) -> int:
        """Bytes of rooms for `num_tokens` by attention layer."""
        return sum(self.attention[layer].room_bytes(count) for layer, count in num_tokens.items())

    def slot_bytes(self, slot: int) -> int:
        """Bytes of the slot's keys and values, reserved space included."""
        rooms = (attention.rooms[slot] for attention in self.attention.values())
        return sum(room.num_bytes for room in rooms if room is not None)

    def reset(self, slot: int) -> None:
        self.num_tokens[slot] = 0
        for state in self.mamba.values():
            state.window_BKD[slot].zero_()
            state.ssm_BHPN[slot].zero_()
        for attention in self.attention.values():
            attention.reset(slot)

    @torch.inference_mode()
    def swap(self, first: int, second: int) -> None:
        """Exchanges two slots; keys and values stay where they are."""
        self.num_tokens[first], self.num_tokens[second] = self.num_tokens[second], self.num_tokens[first]
        for state in self.mamba.values():
            for tensor in (state.window_BKD, state.ssm_BHPN):
                kept = tensor[first].clone()
                tensor[first] = tensor[second]
                tensor[second] = kept
        for attention in self.attention.values():
            attention.swap(first, second)

    def save(self, slot: int, num_layers: int) -> SavedSlot:
        contents = {layer: kv.content(slot) for layer, kv in self.attention.items() if layer < num_layers}
        return SavedSlot(
            mamba={
                layer: Mamba2State(
                    window_BKD=state.window_BKD[slot : slot + 1].clone(),
                    ssm_BHPN=state.ssm_BHPN[slot : slot + 1].clone(),
                )
                for layer, state in self.mamba.items()
                if layer < num_layers
            },
            attention={layer: (keys.clone(), values.clone()) for layer, (keys, values) in contents.items()},
        )

    def load(self, slot: int, saved: SavedSlot) -> None:
        """Fills an empty slot."""
        for layer, state in saved.mamba.items():
            self.mamba[layer].window_BKD[slot] = state.window_BKD[0]
            self.mamba[layer].ssm_BHPN[slot] = state.ssm_BHPN[0]
        for layer, (keys, values) in saved.attention.items():
            self.attention[layer].put(slot, keys, values)

    @property
    def kv_bytes(self) -> int:
        return sum(attention.num_bytes for attention in self.attention.values())

    @property
    def num_bytes(self) -> int:
        return self.kv_bytes + sum(state.window_BKD.nbytes + state.ssm_BHPN.nbytes for state in self.mamba.values())

    def view(self, slots: Sequence[int]) -> SlotView:
        """Returns the state for one pass; `slots` must ascend."""
        return SlotView(self, slots)


class SlotView:
    """State of some slots by layer; `write_back` must follow changes."""

    def __init__(self, cache: HybridCache, slots: Sequence[int]) -> None:
        self.slots = list(slots)
        if not self.slots or self.slots != sorted(set(self.slots)) or self.slots[0] < 0:
            raise ValueError(f"slots must be distinct, ascending and at least 0, not {self.slots}")
        if self.slots[-1] >= cache.num_slots:
            raise ValueError(f"slot {self.slots[-1]} of a cache with {cache.num_slots} slots")
        self.cache = cache
        self.are_neighbours = self.slots[-1] - self.slots[0] == len(self.slots) - 1
        self._index: Tensor | None = None

    def layer(self, layer: int) -> Mamba2State | SlotStore | None:
        if layer in self.cache.attention:
            return SlotStore(self.cache.attention[layer], self.slots)
        if layer not in self.cache.mamba:
            return None
        state = self.cache.mamba[layer]
        if self.are_neighbours:
            run = slice(self.slots[0], self.slots[-1] + 1)
            return Mamba2State(window_BKD=state.window_BKD[run], ssm_BHPN=state.ssm_BHPN[run])
        index = self._index_on(state.ssm_BHPN.device)
        return Mamba2State(window_BKD=state.window_BKD[index], ssm_BHPN=state.ssm_BHPN[index])

    def write_back(self, layer: int, changed: object) -> None:
        """Stores a Mamba state that `layer()` had to copy."""
        if self.are_neighbours or not isinstance(changed, Mamba2State):
            return
        state = self.cache.mamba[layer]
        index = self._index_on(state.ssm_BHPN.device)
        state.window_BKD.index_copy_(0, index, changed.window_BKD)
        state.ssm_BHPN.index_copy_(0, index, changed.ssm_BHPN)

    def _index_on(self, device: torch.device) -> Tensor:
        if self._index is None:
            self._index = torch.tensor(self.slots, device=device)
        return self._index


class SlotStore:
    def __init__(self, cache: AttentionCache, slots: list[int]) -> None:
        self._cache, self._slots = cache, slots

    def extend(self, q_THE: Tensor, k_THE: Tensor, v_THE: Tensor) -> Tensor:
        (slot,) = self._slots
        self._cache.put(slot, k_THE.transpose(0, 1), v_THE.transpose(0, 1))
        return continued_attention(q_THE, *self._cache.content(slot))

    def attend(self, q_BHE: Tensor, k_BHE: Tensor, v_BHE: Tensor) -> Tensor:
        cache, device = self._cache, q_BHE.device
        outputs, order = [], []
        for group in group_by_bank(cache, self._slots, num_new=1):
            rows, ends = (torch.tensor(each, device=device) for each in (group.rows, group.lengths))
            group.bank.keys[rows, :, ends] = group.take(k_BHE).to(cache.dtype)
            group.bank.values[rows, :, ends] = group.take(v_BHE).to(cache.dtype)
            q = group.take(q_BHE)
            outputs += [_read(q[run], group, run) for run in _even_runs(group)]
            order += group.batch
        for slot in self._slots:
            cache.lengths[slot] += 1
        return in_batch_order(outputs, order)


class BankGroup(NamedTuple):
    """Slots of a batch whose rooms lie in one bank, by ascending row."""

    bank: Bank
    rows: list[int]
    batch: list[int]
    """Indices in the batch."""
    lengths: list[int]

    def take(self, x_B: Tensor) -> Tensor:
        if self.batch == list(range(len(x_B))):
            return x_B
        return x_B.index_select(0, torch.tensor(self.batch, device=x_B.device))


def group_by_bank(cache: AttentionCache, slots: Sequence[int], *, num_new: int) -> list[BankGroup]:
    """Groups slots by bank, with space for `num_new` more tokens in each room."""
    members: dict[int, list[tuple[int, int, int, Bank]]] = {}
    for index, slot in enumerate(slots):
        room = cache.grown_room(slot, cache.lengths[slot] + num_new)
        members.setdefault(id(room.bank), []).append((room.row, index, cache.lengths[slot], room.bank))
    groups = []
    for rooms in members.values():
        rooms.sort(key=lambda room: room[0])
        rows, batch, lengths, banks = map(list, zip(*rooms, strict=True))
        groups.append(BankGroup(banks[0], rows, batch, lengths))
    return groups


def in_batch_order(outputs: Sequence[Tensor], order: Sequence[int]) -> Tensor:
    """Joins outputs whose rows have the batch indices `order`."""
    joined = torch.cat(list(outputs)) if len(outputs) > 1 else outputs[0]
    if list(order) == sorted(order):
        return joined
    index = sorted(range(len(order)), key=order.__getitem__)
    return joined.index_select(0, torch.tensor(index, device=joined.device))


def runs_of(rows: Sequence[int]) -> list[slice]:
    """[0, 1, 2, 5, 7, 8] -> slices [0:3], [3:4], [4:6] of consecutive rows."""
    cuts = [index for index in range(1, len(rows)) if rows[index] != rows[index - 1] + 1]
    return [slice(start, stop) for start, stop in zip([0, *cuts], [*cuts, len(rows)], strict=True)]


def _even_runs(group: BankGroup) -> list[slice]:
    even: list[slice] = []
    for run in runs_of(group.rows):
        lengths = [length + 1 for length in group.lengths[run]]
        if max(lengths) * len(lengths) <= MAX_LENGTH_WASTE * sum(lengths):
            even.append(run)
        else:
            even += [slice(index, index + 1) for index in range(run.start, run.stop)]
    return even


def _read(q_BHE: Tensor, group: BankGroup, run: slice) -> Tensor:
    lengths = [length + 1 for length in group.lengths[run]]
    rows = slice(group.rows[run.start], group.rows[run.start] + len(lengths))
    keys, values = (kv[rows, :, : max(lengths)] for kv in (group.bank.keys, group.bank.values))
    visible = None
    if min(lengths) < max(lengths):
        ends = torch.tensor(lengths, device=q_BHE.device)
        visible = torch.arange(max(lengths), device=q_BHE.device) < ends[:, None]
    return grouped_attention(q_BHE, keys, values, visible)

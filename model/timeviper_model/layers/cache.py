"""Mamba states of fixed size, and keys and values (k) of the tokens that TransV left at each layer.

slot 0   mamba: window, state     layer 3: kkkkkkkk     layer 8: kkk
slot 1   mamba: window, state     layer 3: kkk          layer 8: kk
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from timeviper_model.config import HybridConfig, TextConfig
from timeviper_model.layers.attention import continued_attention, grouped_attention
from timeviper_model.layers.mamba2 import Mamba2State
from timeviper_model.ops.precision import wide_dtype

MIN_CAPACITY = 128
"""Initial tokens per slot; grows by half."""

KEPT_BYTES = 16 << 20
"""Bytes per layer that stay allocated while all slots are empty; new pages are slow."""

MAX_LENGTH_WASTE = 1.5
"""Maximum padded / real length of slots read by one product."""


class AttentionCache:
    """(num_slots, Hkv, capacity, E) keys and values of one layer."""

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
        self.keys = torch.empty(num_slots, num_kv_heads, 0, head_dim, device=device, dtype=dtype)
        self.values = torch.empty_like(self.keys)
        self.lengths = [0] * num_slots
        self.kept_bytes = kept_bytes

    def reset(self, slot: int) -> None:
        """Empties the slot; frees memory above `kept_bytes` once all are empty."""
        self.clear(slot)
        if self.num_bytes > self.kept_bytes and not any(self.lengths):
            self.keys, self.values = self.keys[:, :, :0].clone(), self.values[:, :, :0].clone()

    @torch.inference_mode()  # the engine's tensors are inference tensors, and it cancels outside of that mode
    def clear(self, slot: int) -> None:
        """Removes NaN, which would reach the next sequence."""
        self.values[slot, :, : self.lengths[slot]] = 0
        self.lengths[slot] = 0

    def put(self, slot: int, k_GLE: Tensor, v_GLE: Tensor) -> None:
        """Appends (Hkv, L, E)."""
        start = self.lengths[slot]
        stop = start + k_GLE.shape[1]
        self.reserve(stop)
        self.keys[slot, :, start:stop] = k_GLE
        self.values[slot, :, start:stop] = v_GLE
        self.lengths[slot] = stop

    def reserve(self, length: int) -> None:
        capacity = self.keys.shape[2]
        if length <= capacity:
            return
        grown = max(length, MIN_CAPACITY, capacity + capacity // 2)
        self.keys, self.values = (_grow(old, grown, max(self.lengths)) for old in (self.keys, self.values))

    @property
    def num_bytes(self) -> int:
        return self.keys.nbytes + self.values.nbytes


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
        device = torch.device(device)
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

    def reset(self, slot: int) -> None:
        self.num_tokens[slot] = 0
        for state in self.mamba.values():
            state.window_BKD[slot].zero_()
            state.ssm_BHPN[slot].zero_()
        for attention in self.attention.values():
            attention.reset(slot)

    def save(self, slot: int, num_layers: int) -> SavedSlot:
        return SavedSlot(
            mamba={
                layer: Mamba2State(
                    window_BKD=state.window_BKD[slot : slot + 1].clone(),
                    ssm_BHPN=state.ssm_BHPN[slot : slot + 1].clone(),
                )
                for layer, state in self.mamba.items()
                if layer < num_layers
            },
            attention={
                layer: (kv.keys[slot, :, : kv.lengths[slot]].clone(), kv.values[slot, :, : kv.lengths[slot]].clone())
                for layer, kv in self.attention.items()
                if layer < num_layers
            },
        )

    def load(self, slot: int, saved: SavedSlot) -> None:
        self.num_tokens[slot] = 0
        for layer, state in self.mamba.items():
            if layer not in saved.mamba:
                state.window_BKD[slot].zero_()
                state.ssm_BHPN[slot].zero_()
        for attention in self.attention.values():
            attention.clear(slot)
        for layer, state in saved.mamba.items():
            self.mamba[layer].window_BKD[slot] = state.window_BKD[0]
            self.mamba[layer].ssm_BHPN[slot] = state.ssm_BHPN[0]
        for layer, (keys, values) in saved.attention.items():
            self.attention[layer].put(slot, keys, values)

    @property
    def num_bytes(self) -> int:
        states = sum(state.window_BKD.nbytes + state.ssm_BHPN.nbytes for state in self.mamba.values())
        return states + sum(attention.num_bytes for attention in self.attention.values())

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
        self.runs = _runs(self.slots)
        self._index: Tensor | None = None

    def layer(self, layer: int) -> Mamba2State | SlotStore | None:
        if layer in self.cache.attention:
            return SlotStore(self.cache.attention[layer], self.slots, self.runs)
        if layer not in self.cache.mamba:
            return None
        state = self.cache.mamba[layer]
        if len(self.runs) == 1:
            run = slice(self.slots[0], self.slots[-1] + 1)
            return Mamba2State(window_BKD=state.window_BKD[run], ssm_BHPN=state.ssm_BHPN[run])
        index = self._index_on(state.ssm_BHPN.device)
        return Mamba2State(window_BKD=state.window_BKD[index], ssm_BHPN=state.ssm_BHPN[index])

    def write_back(self, layer: int, changed: object) -> None:
        """Stores a Mamba state that `layer()` had to copy."""
        if len(self.runs) == 1 or not isinstance(changed, Mamba2State):
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
    def __init__(self, cache: AttentionCache, slots: list[int], runs: list[tuple[int, int]]) -> None:
        self._cache, self._slots, self._runs = cache, slots, runs

    def extend(self, q_THE: Tensor, k_THE: Tensor, v_THE: Tensor) -> Tensor:
        (slot,) = self._slots
        self._cache.put(slot, k_THE.transpose(0, 1), v_THE.transpose(0, 1))
        stop = self._cache.lengths[slot]
        return continued_attention(q_THE, self._cache.keys[slot, :, :stop], self._cache.values[slot, :, :stop])

    def attend(self, q_BHE: Tensor, k_BHE: Tensor, v_BHE: Tensor) -> Tensor:
        cache, device = self._cache, q_BHE.device
        cache.reserve(max(cache.lengths[slot] for slot in self._slots) + 1)
        index = torch.tensor([cache.lengths[slot] for slot in self._slots], device=device)
        slots = torch.tensor(self._slots, device=device)
        cache.keys[slots, :, index] = k_BHE.to(cache.keys.dtype)
        cache.values[slots, :, index] = v_BHE.to(cache.values.dtype)
        for slot in self._slots:
            cache.lengths[slot] += 1
        outputs, row = [], 0
        for first, stop in self._even_runs():
            outputs.append(self._read(q_BHE[row : row + stop - first], first, stop))
            row += stop - first
        return torch.cat(outputs) if len(outputs) > 1 else outputs[0]

    def _even_runs(self) -> list[tuple[int, int]]:
        even = []
        for first, stop in self._runs:
            lengths = self._cache.lengths[first:stop]
            if max(lengths) * len(lengths) <= MAX_LENGTH_WASTE * sum(lengths):
                even.append((first, stop))
            else:
                even += [(slot, slot + 1) for slot in range(first, stop)]
        return even

    def _read(self, q_BHE: Tensor, first: int, stop: int) -> Tensor:
        lengths = self._cache.lengths[first:stop]
        keys, values = (kv[first:stop, :, : max(lengths)] for kv in (self._cache.keys, self._cache.values))
        visible = None
        if min(lengths) < max(lengths):
            ends = torch.tensor(lengths, device=q_BHE.device)
            visible = torch.arange(max(lengths), device=q_BHE.device) < ends[:, None]
        return grouped_attention(q_BHE, keys, values, visible)


def _grow(old: Tensor, capacity: int, used: int) -> Tensor:
    grown = old.new_empty(old.shape[0], old.shape[1], capacity, old.shape[3])
    grown[:, :, :used] = old[:, :, :used]
    if len(old) > 1:
        grown[:, :, used:] = 0  # shorter slots are read up to the longest length, and 0 * NaN is NaN
    return grown


def _runs(slots: list[int]) -> list[tuple[int, int]]:
    """[0, 1, 2, 5, 7, 8] -> [(0, 3), (5, 6), (7, 9)]"""
    runs: list[tuple[int, int]] = []
    for slot in slots:
        if runs and runs[-1][1] == slot:
            runs[-1] = (runs[-1][0], slot + 1)
        else:
            runs.append((slot, slot + 1))
    return runs

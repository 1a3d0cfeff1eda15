"""Greedy decode steps of neighbouring slots as one CUDA graph. A CPU runs the same operations one by one."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from timeviper_model.inference.sampling import SampledToken
from timeviper_model.layers.attention import grouped_attention
from timeviper_model.layers.cache import AttentionCache, BankGroup, HybridCache, group_by_bank, runs_of
from timeviper_model.layers.nemotron_h import LayerState
from timeviper_model.timeviper import TimeViper

NUM_WARM_UP_STEPS = 3
"""Steps in which libraries choose kernels and allocate workspaces."""


class DecodeGraph:
    """Up to `max_steps` greedy tokens. Nothing else may use the slots before `finish`."""

    def __init__(
        self, model: TimeViper, cache: HybridCache, slots: Sequence[int], ids: Sequence[int], *, max_steps: int
    ) -> None:
        """Captures a step. Slots without space for `max_steps` tokens get larger rooms.

        `slots` are ascending neighbours that hold prompts, `ids` their last tokens.
        """
        view = cache.view(slots)
        empty = [slot for slot in view.slots if not cache.num_tokens[slot]]
        if not view.are_neighbours or empty or len(ids) != len(view.slots):
            raise ValueError(f"{slots = } with {len(ids)} ids: they must be neighbours with prompts, {empty = }")
        self._model, self._cache, self._slots, self._max_steps = model, cache, view.slots, max_steps
        device = model.lm_head.weight.device
        self._num_steps = 0
        self._ids_B = torch.tensor(ids, device=device)
        self.logprobs_B = torch.zeros(len(ids), dtype=torch.float32, device=device)
        self.is_finite_B = torch.ones(len(ids), dtype=torch.bool, device=device)
        """False for slots with infinite or NaN logits."""
        self._positions_B = torch.tensor([cache.num_tokens[slot] for slot in view.slots], device=device)
        self._num_new = torch.zeros((), dtype=torch.long, device=device)
        self._states: list[LayerState] = [
            FixedStore(cache.attention[layer], view.slots, self._num_new, max_steps)
            if layer in cache.attention
            else view.layer(layer)  # a view of the cache, as the slots are neighbours
            for layer in range(model.config.text.num_hidden_layers)
        ]
        self._graph = None
        if device.type == "cuda":
            with torch.cuda.device(device):  # streams belong to the current device, which need not be the model's
                self._graph = self._capture()

    @property
    def num_steps_left(self) -> int:
        return self._max_steps - self._num_steps

    @torch.inference_mode()
    def step(self) -> Tensor:
        """Returns the next tokens (B,) int64, which the next call overwrites."""
        if not self.num_steps_left:
            raise RuntimeError(f"all {self._max_steps = } steps are done; make another DecodeGraph for more")
        self._num_steps += 1
        if self._graph is None:
            self._advance()
        else:
            self._graph.replay()
        return self._ids_B

    def sampled(self) -> list[SampledToken]:
        """Returns the tokens of the last step; waits for the device once."""
        columns = torch.stack([self._ids_B.double(), self.logprobs_B.double(), self.is_finite_B.double()], dim=1)
        return [SampledToken(int(row[0]), row[1], (), bool(row[2])) for row in columns.tolist()]

    def finish(self) -> None:
        for slot in self._slots:
            self._cache.num_tokens[slot] += self._num_steps
            for attention in self._cache.attention.values():
                attention.lengths[slot] += self._num_steps
        self._max_steps = self._num_steps = 0

    def _advance(self) -> None:
        hidden_BD = self._model.backbone.embeddings(self._ids_B)
        for layer, state in enumerate(self._states):
            hidden_BD = self._model.backbone.block(layer).step(hidden_BD, state, self._positions_B)
        logits_BV = self._model.logits(hidden_BD)
        self.is_finite_B.copy_(logits_BV.isfinite().all(-1))
        logits_BV = logits_BV.nan_to_num()
        self._ids_B.copy_(logits_BV.argmax(-1))
        self.logprobs_B.copy_(torch.log_softmax(logits_BV, -1).gather(1, self._ids_B[:, None])[:, 0])
        self._positions_B.add_(1)
        self._num_new.add_(1)

    @torch.inference_mode()
    def _capture(self) -> torch.cuda.CUDAGraph:
        """Later steps overwrite what the warm-up writes."""
        changed = [self._ids_B, self._positions_B, self._num_new]
        for state in self._cache.mamba.values():
            chunk = slice(self._slots[0], self._slots[-1] + 1)
            changed += [state.window_BKD[chunk], state.ssm_BHPN[chunk]]
        saved = [tensor.clone() for tensor in changed]
        num_steps = min(NUM_WARM_UP_STEPS, self._max_steps)
        side = torch.cuda.Stream()  # type: ignore[no-untyped-call]
        side.wait_stream(torch.cuda.current_stream())
        try:
            with torch.cuda.stream(side):
                for _ in range(num_steps):
                    self._advance()
        finally:  # plain steps continue from here if the device has no memory for a graph
            torch.cuda.current_stream().wait_stream(side)
            for tensor, before in zip(changed, saved, strict=True):
                tensor.copy_(before)
            for layer in self._states:
                if isinstance(layer, FixedStore):
                    layer.clear_unwritten()
        graph = torch.cuda.CUDAGraph()
        with torch.cuda.graph(graph):
            self._advance()
        return graph


class FixedStore:
    """KeyValueStore with the same shapes at every step: a mask over the space for all steps."""

    def __init__(self, cache: AttentionCache, slots: Sequence[int], num_new: Tensor, max_steps: int) -> None:
        """`num_new` is an int64 scalar on the device: tokens gained per slot."""
        groups = group_by_bank(cache, slots, num_new=max_steps)
        self._runs = [_FixedRun(group, run, num_new, max_steps) for group in groups for run in runs_of(group.rows)]
        order = torch.tensor([index for group in groups for index in group.batch]).argsort()
        self._order_B = None if order.tolist() == list(range(len(slots))) else order.to(cache.device)
        self.clear_unwritten()

    @torch.inference_mode()
    def clear_unwritten(self) -> None:
        for run in self._runs:
            run.clear_unwritten()

    def extend(self, q_THE: Tensor, k_THE: Tensor, v_THE: Tensor) -> Tensor:
        raise NotImplementedError("a decode graph reads no prompts; prefill them first")

    def attend(self, q_BHE: Tensor, k_BHE: Tensor, v_BHE: Tensor) -> Tensor:
        mixed = [run.attend(q_BHE, k_BHE, v_BHE) for run in self._runs]
        joined = torch.cat(mixed) if len(mixed) > 1 else mixed[0]
        return joined if self._order_B is None else joined.index_select(0, self._order_B)


class _FixedRun:
    """Consecutive rows of one bank."""

    def __init__(self, group: BankGroup, run: slice, num_new: Tensor, max_steps: int) -> None:
        self._lengths = group.lengths[run]
        rows, length = slice(group.rows[run.start], group.rows[run.stop - 1] + 1), max(self._lengths) + max_steps
        self._keys_BGLE, self._values_BGLE = group.bank.keys[rows, :, :length], group.bank.values[rows, :, :length]
        device = self._keys_BGLE.device
        self._lengths_B = torch.tensor(self._lengths, device=device)
        batch = group.batch[run]
        self._batch: slice | Tensor = slice(batch[0], batch[-1] + 1)
        if batch != list(range(batch[0], batch[-1] + 1)):
            self._batch = torch.tensor(batch, device=device)
        self._rows_B = torch.arange(len(self._lengths), device=device)
        self._indices_L = torch.arange(length, device=device)
        self._num_new = num_new

    def clear_unwritten(self) -> None:
        for row, length in enumerate(self._lengths):
            self._values_BGLE[row, :, length:] = 0  # read with weight 0, and 0 times NaN is NaN

    def attend(self, q_BHE: Tensor, k_BHE: Tensor, v_BHE: Tensor) -> Tensor:
        q, k, v = (x[self._batch] for x in (q_BHE, k_BHE, v_BHE))
        index_B = self._lengths_B + self._num_new
        self._keys_BGLE[self._rows_B, :, index_B] = k.to(self._keys_BGLE.dtype)
        self._values_BGLE[self._rows_B, :, index_B] = v.to(self._values_BGLE.dtype)
        return grouped_attention(q, self._keys_BGLE, self._values_BGLE, self._indices_L <= index_B[:, None])

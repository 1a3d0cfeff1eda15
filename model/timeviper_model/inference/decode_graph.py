"""Greedy decode steps of neighbouring slots as one CUDA graph. A CPU runs the same operations one by one."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from timeviper_model.layers.attention import grouped_attention
from timeviper_model.layers.cache import AttentionCache, HybridCache
from timeviper_model.layers.nemotron_h import LayerState
from timeviper_model.timeviper import TimeViper

NUM_WARM_UP_STEPS = 3
"""Steps in which libraries choose kernels and allocate workspaces."""


class DecodeGraph:
    """Up to `max_steps` greedy tokens. Nothing else may use the slots or resize the cache before `finish`."""

    def __init__(
        self, model: TimeViper, cache: HybridCache, slots: Sequence[int], ids: Sequence[int], *, max_steps: int
    ) -> None:
        """Reserves room in the cache and captures a step.

        `slots` are ascending neighbours that hold prompts, `ids` their last tokens.
        """
        view = cache.view(slots)
        empty = [slot for slot in view.slots if not cache.num_tokens[slot]]
        if len(view.runs) != 1 or empty or len(ids) != len(view.slots):
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
        for attention in cache.attention.values():
            attention.reserve(max(attention.lengths[slot] for slot in view.slots) + max_steps)
        self._states: list[LayerState] = [
            FixedStore(cache.attention[layer], view.slots, self._num_new)
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
        with torch.cuda.stream(side):
            for _ in range(num_steps):
                self._advance()
        torch.cuda.current_stream().wait_stream(side)
        for tensor, before in zip(changed, saved, strict=True):
            tensor.copy_(before)
        graph = torch.cuda.CUDAGraph()
        with torch.cuda.graph(graph):
            self._advance()
        return graph


class FixedStore:
    """KeyValueStore with the same shapes at every step: a mask over all reserved room."""

    def __init__(self, cache: AttentionCache, slots: Sequence[int], num_new: Tensor) -> None:
        """`num_new` is an int64 scalar on the device: tokens gained per slot."""
        rows = slice(slots[0], slots[-1] + 1)
        with torch.inference_mode():
            for slot in slots:
                cache.values[slot, :, cache.lengths[slot] :] = 0  # read with weight 0, and 0 times NaN is NaN
        self._keys_BGLE, self._values_BGLE = cache.keys[rows], cache.values[rows]
        self._lengths_B = torch.tensor([cache.lengths[slot] for slot in slots], device=cache.keys.device)
        self._rows_B = torch.arange(len(slots), device=cache.keys.device)
        self._indices_L = torch.arange(cache.keys.shape[2], device=cache.keys.device)
        self._num_new = num_new

    def extend(self, q_THE: Tensor, k_THE: Tensor, v_THE: Tensor) -> Tensor:
        raise NotImplementedError("a decode graph reads no prompts; prefill them first")

    def attend(self, q_BHE: Tensor, k_BHE: Tensor, v_BHE: Tensor) -> Tensor:
        index_B = self._lengths_B + self._num_new
        self._keys_BGLE[self._rows_B, :, index_B] = k_BHE.to(self._keys_BGLE.dtype)
        self._values_BGLE[self._rows_B, :, index_B] = v_BHE.to(self._values_BGLE.dtype)
        visible_BL = self._indices_L <= index_B[:, None]
        return grouped_attention(q_BHE, self._keys_BGLE, self._values_BGLE, visible_BL)

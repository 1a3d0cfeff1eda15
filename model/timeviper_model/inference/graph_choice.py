"""Which decode steps run as a CUDA graph."""

from __future__ import annotations

import logging
from collections.abc import Sequence

import torch

from timeviper_model.inference.active_request import ActiveRequest
from timeviper_model.inference.decode_graph import DecodeGraph
from timeviper_model.inference.requests import RequestId
from timeviper_model.layers.cache import HybridCache
from timeviper_model.timeviper import TimeViper

logger = logging.getLogger(__name__)

MIN_GRAPH_STEPS = 32
"""Minimum decode steps for a CUDA graph; its capture costs about five steps."""
STEPS_BEFORE_GRAPH = 8
"""Decode steps of the same requests before a capture."""


class DecodeGraphs:
    """The graph of the running requests, made when the same ones have decoded for some steps."""

    def __init__(
        self, model: TimeViper, cache: HybridCache, *, max_steps: int, min_steps: int, steps_before: int
    ) -> None:
        self._model, self._cache = model, cache
        self._max_steps, self._min_steps, self._steps_before = max_steps, min_steps, steps_before
        self._graph: DecodeGraph | None = None
        self._is_on = model.lm_head.weight.device.type == "cuda" and max_steps >= min_steps
        self._ids: list[RequestId] = []
        self._num_same_steps = 0

    def graph(self, rows: Sequence[ActiveRequest]) -> DecodeGraph | None:
        """Returns the graph for the next step; None where plain steps are faster."""
        ids = [active.id for active in rows]
        self._num_same_steps = self._num_same_steps + 1 if ids == self._ids else 0
        self._ids = ids
        if self._graph is not None and self._graph.num_steps_left:
            return self._graph
        self.end()
        params = [active.request.sampling for active in rows]
        left = min(active.num_tokens_left for active in rows)
        if (
            not self._is_on
            or self._num_same_steps < self._steps_before
            or left < self._min_steps
            or any(sampling.temperature > 0 or sampling.num_logprobs or sampling.json_schema for sampling in params)
        ):
            return None
        try:
            self._graph = DecodeGraph(
                self._model,
                self._cache,
                [active.slot for active in rows],
                [active.tokens[-1] for active in rows],
                max_steps=min(left, self._max_steps),
            )
        except torch.OutOfMemoryError:
            logger.warning("no memory for a CUDA graph of decode steps: decoding without graphs from now on")
            self._is_on = False
        return self._graph

    def end(self) -> None:
        """Must precede changes of the slots."""
        if self._graph is not None:
            self._graph.finish()
            self._graph = None

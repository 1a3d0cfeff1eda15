"""Estimates the epoch of a mixture whose sources are partly missing."""

from __future__ import annotations

from collections.abc import Collection, Sequence
from typing import NamedTuple

from timeviper_model.config import TimeViperConfig
from timeviper_platform.training.batches.packing import Pack
from timeviper_platform.training.batches.rows import SampleRows, SourceConfig
from timeviper_platform.training.config import PhaseConfig
from timeviper_platform.training.cost.flops import training_flops

ASSUMED_FILL = 0.98
"""Assumed fill of unplanned packs."""


class SourceShare(NamedTuple):
    uri: str
    num_samples: float | None
    """Samples per epoch; None when unknown."""
    share: float | None
    """Share of an epoch's samples; None when any source is unknown."""
    is_absent: bool


class ExpectedEpoch(NamedTuple):
    num_samples: float
    num_tokens: float
    flops: float
    """Forward and backward operations."""

    def num_packs(self, max_tokens: int) -> float:
        return self.num_tokens / (max_tokens * ASSUMED_FILL)


def source_shares(sources: Sequence[SourceConfig], absent: Collection[str]) -> list[SourceShare]:
    """Returns all sources; missing ones count their expected samples."""
    counts = [_num_samples(source, is_absent=source.uri in absent) for source in sources]
    known = [count for count in counts if count is not None]
    total = sum(known) if len(known) == len(counts) else 0.0
    return [
        SourceShare(source.uri, count, count / total if count is not None and total else None, source.uri in absent)
        for source, count in zip(sources, counts, strict=True)
    ]


def expected_epoch(
    config: TimeViperConfig, phase: PhaseConfig, unplanned: Collection[str], *, trained_share: float
) -> ExpectedEpoch | None:
    """Estimates one epoch of `unplanned`, unpacked. None if it is empty or lacks `expected`."""
    num_samples, num_tokens, flops = 0.0, 0.0, 0.0
    for source in (source for source in phase.samples if source.uri in unplanned):
        if not source.expected:
            return None
        for kind in source.expected:
            frames = min(kind.num_frames, phase.frames.max_frames or kind.num_frames)
            vision = frames * config.vision.num_tokens_per_frame * (1 if config.vision.second is None else 2)
            pack = Pack(
                num_tokens=vision + kind.num_text_tokens,
                vision_counts=(vision,) if vision else (),
                num_targets=kind.num_text_tokens,
            )
            shown = source.weight * kind.num_samples
            num_samples += shown
            num_tokens += shown * pack.num_tokens
            flops += shown * training_flops(config, pack, use_transv=phase.use_transv, trained_share=trained_share)
    return ExpectedEpoch(num_samples, num_tokens, flops) if num_tokens else None


def _num_samples(source: SourceConfig, *, is_absent: bool) -> float | None:
    if not is_absent:
        return float(SampleRows.read([source]).weights.sum())
    return source.weight * sum(kind.num_samples for kind in source.expected) if source.expected else None

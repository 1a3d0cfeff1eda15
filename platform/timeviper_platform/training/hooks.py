"""Extension points of a run."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

from timeviper_platform.training.batches.loader import PrefetchSteps, prefetch_in_thread
from timeviper_platform.training.checkpoint.save_policy import OnCheckpoint
from timeviper_platform.training.eval_worker import EvalProcess
from timeviper_platform.training.interrupts import InterruptSource, no_interrupts
from timeviper_platform.training.metrics.trackers import Tracker
from timeviper_platform.training.validation.async_eval import StartEval


@dataclass(frozen=True, kw_only=True, slots=True)
class RunHooks:
    """Callables that a launcher may replace; the defaults need no Ray."""

    interrupts: InterruptSource = no_interrupts
    on_checkpoint: OnCheckpoint | None = None
    trackers: tuple[Tracker, ...] = ()
    """Trackers that receive every step's metrics on rank 0."""
    prefetch: PrefetchSteps = prefetch_in_thread
    start_eval: StartEval = EvalProcess
    environment: dict[str, Any] | None = None
    """Description of the launcher (attempt_record); None describes this process."""

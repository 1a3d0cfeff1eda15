"""Progress and fixed settings in a checkpoint's state.json."""

from __future__ import annotations

import logging
from dataclasses import asdict, dataclass, replace
from typing import Any

from timeviper_platform.common.devices import Dtype
from timeviper_platform.training.batches.packing import PackPosition
from timeviper_platform.training.optim.lr_schedule import ScheduleConfig

logger = logging.getLogger(__name__)

STATE_VERSION = 3


@dataclass(frozen=True, kw_only=True, slots=True)
class StepPlan:
    """Settings that must stay equal within a phase; only its length may grow."""

    packs_per_step: int
    num_steps: int
    num_epochs: int | None
    schedule: ScheduleConfig

    def differences(self, now: StepPlan) -> list[str]:
        """Returns `name before -> now` for each change, apart from a longer phase."""
        before, after = _flat(self), _flat(now)
        changed = [name for name in before if before[name] != after[name]]
        return [f"{name} {before[name]} -> {after[name]}" for name in changed if not _is_longer(before, after, name)]


@dataclass(frozen=True, kw_only=True, slots=True)
class TrainState:
    """Progress after a step."""

    phase: str
    step: int
    """Finished steps of the phase."""
    global_step: int
    """Finished steps of all phases."""
    position: PackPosition
    plan_hash: str
    step_plan: StepPlan
    world_size: int
    zero_stage: int
    dtype: Dtype
    num_damaged: int = 0
    """Samples left out because of unreadable features."""

    def after_step(self, end: PackPosition, num_damaged: int) -> TrainState:
        return replace(
            self,
            step=self.step + 1,
            global_step=self.global_step + 1,
            position=end,
            num_damaged=self.num_damaged + num_damaged,
        )

    @property
    def layout(self) -> tuple[int, int, Dtype]:
        """(ranks, ZeRO stage, dtype): at equal layouts, DeepSpeed loads its own files."""
        return self.world_size, self.zero_stage, self.dtype

    def to_json(self) -> dict[str, Any]:
        return {"version": STATE_VERSION, **asdict(self), "position": self.position._asdict()}

    @classmethod
    def from_json(cls, values: dict[str, Any], *, source: str) -> TrainState:
        """Raises ValueError for another format version."""
        values = dict(values)
        if (version := values.pop("version", None)) != STATE_VERSION:
            raise ValueError(
                f"{source}: state version {version}, this release reads {STATE_VERSION}; resume with the release that"
                " wrote it, or start a new run from exported weights"
            )
        step_plan = values["step_plan"]
        step_plan = StepPlan(**{**step_plan, "schedule": ScheduleConfig(**step_plan["schedule"])})
        return cls(**{**values, "position": PackPosition(**values["position"]), "step_plan": step_plan})

    def check_resumable(self, now: TrainState, *, source: str) -> None:
        """Raises ValueError if resuming would change packs, steps or learning rates."""
        if self.plan_hash != now.plan_hash:
            raise ValueError(
                f"{source} was training phase {self.phase} on another pack plan ({self.plan_hash[:12]}, now"
                f" {now.plan_hash[:12]}): seed, samples, weights, packing, frames or the feature store have"
                " changed; restore them, or start a new run from exported weights"
            )
        if differences := self.step_plan.differences(now.step_plan):
            raise ValueError(
                f"{source} was training phase {self.phase} with other steps ({', '.join(differences)}): a phase"
                " may only become longer; restore them, or start a new run from exported weights"
            )
        if now.step_plan.num_steps > self.step_plan.num_steps:
            logger.info(
                "phase %s is lengthened from %d to %d steps; learning rates follow the longer schedule from here on",
                *(self.phase, self.step_plan.num_steps, now.step_plan.num_steps),
            )


def _is_longer(before: dict[str, Any], after: dict[str, Any], name: str) -> bool:
    lengths = before[name], after[name]
    return name in ("num_steps", "num_epochs") and None not in lengths and lengths[1] > lengths[0]


def _flat(plan: StepPlan) -> dict[str, Any]:
    values = asdict(plan)
    schedule = values.pop("schedule")
    return values | {f"schedule.{name}": value for name, value in schedule.items()}

"""Progress and fixed settings in a checkpoint's state.json."""

from __future__ import annotations

from dataclasses import asdict, dataclass, replace
from typing import Any

from timeviper_platform.common.devices import Dtype
from timeviper_platform.training.batches.packing import PackPosition
from timeviper_platform.training.optim.lr_schedule import ScheduleConfig

STATE_VERSION = 3


@dataclass(frozen=True, kw_only=True, slots=True)
class StepPlan:
    """Settings that must stay equal within a phase; otherwise resuming skips or repeats samples."""

    packs_per_step: int
    num_steps: int
    num_epochs: int | None
    schedule: ScheduleConfig

    def differences(self, now: StepPlan) -> list[str]:
        """Returns `name before -> now` for each changed setting."""
        before, after = _flat(self), _flat(now)
        return [f"{name} {before[name]} -> {after[name]}" for name in before if before[name] != after[name]]


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
                f"{source} was training phase {self.phase} with other steps ({', '.join(differences)}): a phase cannot"
                " change them half-way; restore them, or start a new run from exported weights"
            )


def _flat(plan: StepPlan) -> dict[str, Any]:
    values = asdict(plan)
    schedule = values.pop("schedule")
    return values | {f"schedule.{name}": value for name, value in schedule.items()}

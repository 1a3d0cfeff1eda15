"""Where a run stands after a step, and what decides its further steps: the state.json of a checkpoint.

Knows the figures and which of them a phase cannot change half-way. Does not know files or ranks (checkpoint.py).
"""

from __future__ import annotations

from dataclasses import asdict, dataclass
from typing import Any

from timeviper_platform.common.devices import Dtype
from timeviper_platform.training.batches.packing import PackPosition
from timeviper_platform.training.optim.lr_schedule import ScheduleConfig

STATE_VERSION = 3


@dataclass(frozen=True, kw_only=True, slots=True)
class StepPlan:
    """Which packs of the plan a phase's steps take, and how fast each learns; the same from its first step to its last.

    A run that goes on with other values would leave samples out, show them twice or jump in its learning rate.
    """

    packs_per_step: int
    num_steps: int
    num_epochs: int | None
    """None where the configuration counts steps"""
    schedule: ScheduleConfig

    def differences(self, now: StepPlan) -> list[str]:
        """What is another value `now`, as `name before -> now`."""
        before, after = _flat(self), _flat(now)
        return [f"{name} {before[name]} -> {after[name]}" for name in before if before[name] != after[name]]


@dataclass(frozen=True, kw_only=True, slots=True)
class TrainState:
    """Where a run stands after a step."""

    phase: str
    step: int
    """finished steps of the phase"""
    global_step: int
    """finished steps of all phases"""
    position: PackPosition
    plan_hash: str
    step_plan: StepPlan
    world_size: int
    zero_stage: int
    dtype: Dtype
    num_damaged: int = 0
    """samples that the phase has left out because their features could not be read"""

    def to_json(self) -> dict[str, Any]:
        """Plain values."""
        return {"version": STATE_VERSION, **asdict(self), "position": self.position._asdict()}

    @classmethod
    def from_json(cls, values: dict[str, Any], *, source: str) -> TrainState:
        """The inverse of `to_json`.

        Raises:
            ValueError: when it was written under another version.
        """
        values = dict(values)
        if (version := values.pop("version", None)) != STATE_VERSION:
            raise ValueError(
                f"{source}: state version {version}, this release reads {STATE_VERSION}; go on with the release that"
                " wrote it, or start a new run from exported weights"
            )
        step_plan = values["step_plan"]
        step_plan = StepPlan(**{**step_plan, "schedule": ScheduleConfig(**step_plan["schedule"])})
        return cls(**{**values, "position": PackPosition(**values["position"]), "step_plan": step_plan})

    def check_goes_on(self, now: TrainState, *, source: str) -> None:
        """Holds this saved state against the first state that the configuration gives `now`.

        Raises:
            ValueError: when the phase would go on with other packs, steps or learning rates.
        """
        if self.plan_hash != now.plan_hash:
            raise ValueError(
                f"{source} was training phase {self.phase} on another pack plan ({self.plan_hash[:12]}, now"
                f" {now.plan_hash[:12]}): seed, samples, weights, packing, frames or the feature store have"
                " changed; put them back, or start a new run from exported weights"
            )
        if differences := self.step_plan.differences(now.step_plan):
            raise ValueError(
                f"{source} was training phase {self.phase} with other steps ({', '.join(differences)}): a phase cannot"
                " change them half-way; put them back, or start a new run from exported weights"
            )


def _flat(plan: StepPlan) -> dict[str, Any]:
    values = asdict(plan)
    schedule = values.pop("schedule")
    return values | {f"schedule.{name}": value for name, value in schedule.items()}

"""Linear warm-up and cosine decay."""

from __future__ import annotations

import math
from dataclasses import dataclass


@dataclass(frozen=True, kw_only=True, slots=True)
class ScheduleConfig:
    """Learning rate relative to each group's peak."""

    warmup_ratio: float = 0.03
    """Share of the steps with linear warm-up. The paper uses 0.03."""
    final_ratio: float = 0.0
    """Final share of the peak."""

    def __post_init__(self) -> None:
        for name in ("warmup_ratio", "final_ratio"):
            if not 0.0 <= getattr(self, name) <= 1.0:
                raise ValueError(f"{name} = {getattr(self, name)} must be between 0 and 1")


def learning_rate_factor(step: int, num_steps: int, config: ScheduleConfig) -> float:
    """Returns the factor on the peak. 100 steps, 0.1 warm-up: 0.1, 0.2, ..., 1.0 at step 10, then cosine."""
    warmup = math.ceil(config.warmup_ratio * num_steps)
    if step <= warmup:
        return step / warmup
    progress = (step - warmup) / (num_steps - warmup + 1)  # + 1: not 0 at the last step
    return config.final_ratio + (1.0 - config.final_ratio) * 0.5 * (1.0 + math.cos(math.pi * progress))

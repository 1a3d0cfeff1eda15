"""Linear warm-up and cosine decay as a factor on each group's peak learning rate. A pure function of the step."""

from __future__ import annotations

import math
from dataclasses import dataclass


@dataclass(frozen=True, kw_only=True, slots=True)
class ScheduleConfig:
    """Shape of the learning rate over a phase."""

    warmup_ratio: float = 0.03
    """share of the steps that rise linearly from 0 (the paper's value)"""
    final_ratio: float = 0.0
    """the cosine ends at this share of the peak"""

    def __post_init__(self) -> None:
        for name in ("warmup_ratio", "final_ratio"):
            if not 0.0 <= getattr(self, name) <= 1.0:
                raise ValueError(f"{name} = {getattr(self, name)} must be between 0 and 1")


def learning_rate_factor(step: int, num_steps: int, config: ScheduleConfig) -> float:
    """The factor of step 1 .. num_steps. With 100 steps and 0.1 warm-up: 0.1, 0.2, ..., 1.0 at step 10, then cosine."""
    warmup = math.ceil(config.warmup_ratio * num_steps)
    if step <= warmup:
        return step / warmup
    progress = (step - warmup) / (num_steps - warmup + 1)  # + 1: the last step still learns
    return config.final_ratio + (1.0 - config.final_ratio) * 0.5 * (1.0 + math.cos(math.pi * progress))

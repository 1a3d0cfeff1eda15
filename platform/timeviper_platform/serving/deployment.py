"""How many replicas of a deployment, of what size: typed settings, and the options Ray Serve takes for them."""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Any


@dataclass(frozen=True, kw_only=True, slots=True)
class AutoscalingSettings:
    """Ray Serve's autoscaler, under its own names.

    On two cores a second replica is seen in seconds with metrics_interval_s 0.5, look_back_period_s 2,
    upscale_delay_s 1 and downscale_delay_s 3.
    """

    min_replicas: int = 1
    max_replicas: int = 1
    target_ongoing_requests: float | None = None
    """requests a replica should have; None = 0.65 of what it serves at once, so that a burst finds free slots"""
    metrics_interval_s: float = 2.0
    look_back_period_s: float = 10.0
    upscale_delay_s: float = 5.0
    downscale_delay_s: float = 120.0

    def __post_init__(self) -> None:
        if not 0 <= self.min_replicas <= self.max_replicas or self.max_replicas < 1:
            raise ValueError(f"{self.min_replicas = } must be between 0 and {self.max_replicas = }")
        if self.look_back_period_s <= self.metrics_interval_s:
            raise ValueError(f"{self.look_back_period_s = } must exceed {self.metrics_interval_s = }")


@dataclass(frozen=True, kw_only=True, slots=True)
class DeploymentSettings:
    """One deployment's place in the cluster."""

    num_cpus: float = 1.0
    """reserved for each replica; fractions let several share a core"""
    num_gpus: float = 0.0
    max_ongoing_requests: int | None = None
    """requests a replica takes at once; None = as many as its service can hold"""
    max_queued_requests: int = 256
    """requests that may wait at each caller for a replica; past it 429"""
    graceful_shutdown_timeout_s: float = 60.0
    """must exceed the longest answer"""
    autoscaling: AutoscalingSettings = field(default_factory=AutoscalingSettings)

    def options(self, *, capacity: int, served_at_once: int) -> dict[str, Any]:
        """Keyword arguments for `serve.deployment`.

        Args:
            capacity: requests the service can hold, waiting ones included; the default of max_ongoing_requests.
            served_at_once: requests it works on together, which sets the default target.
        """
        scaling = self.autoscaling
        target = scaling.target_ongoing_requests or max(1.0, 0.65 * served_at_once)
        return {
            "ray_actor_options": {"num_cpus": self.num_cpus, "num_gpus": self.num_gpus},
            "max_ongoing_requests": self.max_ongoing_requests or capacity,
            "max_queued_requests": self.max_queued_requests,
            "backpressure_config": {"status_code": 429, "retry_after_s": 1.0},
            "graceful_shutdown_timeout_s": self.graceful_shutdown_timeout_s,
            "max_constructor_retry_count": 2,  # wrong weights stay wrong; the default of 20 hides the cause for minutes
            "autoscaling_config": {
                "min_replicas": scaling.min_replicas,
                "max_replicas": scaling.max_replicas,
                "target_ongoing_requests": target,
                "metrics_interval_s": scaling.metrics_interval_s,
                "look_back_period_s": scaling.look_back_period_s,
                "upscale_delay_s": scaling.upscale_delay_s,
                "downscale_delay_s": scaling.downscale_delay_s,
            },
        }

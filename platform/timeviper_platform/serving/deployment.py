"""Settings of deployments, and the Ray Serve options that follow from them."""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Any

SESSION_ROUTER = "ray.serve.experimental.consistent_hash_router:ConsistentHashRouter"


@dataclass(frozen=True, kw_only=True, slots=True)
class AutoscalingSettings:
    """Options of Ray Serve's autoscaler."""

    min_replicas: int = 1
    """Minimum number of replicas."""
    max_replicas: int = 1
    """Maximum number of replicas."""
    target_ongoing_requests: float | None = None
    """Target requests per replica; None = 0.65 of its concurrent requests, which leaves room for bursts."""
    metrics_interval_s: float = 2.0
    """Seconds between a replica's load reports."""
    look_back_period_s: float = 10.0
    """Seconds of load to average. Must be > metrics_interval_s."""
    upscale_delay_s: float = 5.0
    """Seconds of high load before replicas are added."""
    downscale_delay_s: float = 120.0
    """Seconds of low load before replicas are removed."""

    def __post_init__(self) -> None:
        if not 0 <= self.min_replicas <= self.max_replicas or self.max_replicas < 1:
            raise ValueError(f"{self.min_replicas = } must be between 0 and {self.max_replicas = }")
        if self.look_back_period_s <= self.metrics_interval_s:
            raise ValueError(f"{self.look_back_period_s = } must exceed {self.metrics_interval_s = }")


@dataclass(frozen=True, kw_only=True, slots=True)
class DeploymentSettings:
    num_cpus: float = 1.0
    """CPU cores per replica; may be a fraction."""
    num_gpus: float = 0.0
    """GPUs per replica."""
    max_ongoing_requests: int | None = None
    """Maximum concurrent requests per replica; None = the service's capacity."""
    max_queued_requests: int = 256
    """Maximum waiting requests per caller; more are answered with 429."""
    graceful_shutdown_timeout_s: float | None = None
    """Seconds for running requests when a replica stops; None = 30 more than gateway.request_timeout_s, so that an
    update cuts no answer."""
    max_surge_percent: int | None = None
    """Extra replicas during an update, in percent, which start before old ones stop; None = 100 for gateways, else 0,
    as an update would wait for free GPUs."""
    autoscaling: AutoscalingSettings = field(default_factory=AutoscalingSettings)

    def __post_init__(self) -> None:
        if self.max_surge_percent is not None and not 0 <= self.max_surge_percent <= 100:
            raise ValueError(f"{self.max_surge_percent = } must be between 0 and 100")

    def options(
        self,
        *,
        capacity: int,
        served_at_once: int,
        shutdown_timeout_s: float,
        surge_percent: int = 0,
        has_sessions: bool = False,
    ) -> dict[str, Any]:
        """Returns keyword arguments for `serve.deployment`.

        Args:
            capacity: running and waiting requests per replica.
            served_at_once: running requests per replica.
            shutdown_timeout_s: seconds for running requests when a replica stops.
            surge_percent: where `max_surge_percent` is None.
            has_sessions: whether requests of a session go to one replica, or to its neighbours while it is full.
        """
        scaling = self.autoscaling
        target = scaling.target_ongoing_requests or max(1.0, 0.65 * served_at_once)
        sessions = {"request_router_config": {"request_router_class": SESSION_ROUTER}} if has_sessions else {}
        return {
            **sessions,
            "ray_actor_options": {"num_cpus": self.num_cpus, "num_gpus": self.num_gpus},
            "max_ongoing_requests": self.max_ongoing_requests or capacity,
            "max_queued_requests": self.max_queued_requests,
            "backpressure_config": {"status_code": 429, "retry_after_s": 1.0},
            "graceful_shutdown_timeout_s": shutdown_timeout_s,
            "max_surge_percent": surge_percent if self.max_surge_percent is None else self.max_surge_percent,
            "max_constructor_retry_count": 2,  # the default of 20 hides a wrong configuration for minutes
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

"""The endpoint as a Ray Serve application: a gateway in front of a feature service and an engine service."""

from __future__ import annotations

import asyncio
import contextlib
import dataclasses
import logging
from collections.abc import AsyncGenerator, Mapping
from contextlib import aclosing
from dataclasses import dataclass, field
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
import ray
from ray import serve
from ray.exceptions import RayError
from ray.serve import metrics as serve_metrics

from timeviper_platform.common.config import parse_config, with_absolute_paths
from timeviper_platform.common.logs import setup_logging
from timeviper_platform.common.metrics import RayMetrics
from timeviper_platform.serving.deployment import DeploymentSettings
from timeviper_platform.serving.engine.service import EngineService, EngineServiceConfig
from timeviper_platform.serving.features.blocks import BlockBoard, read_blocks
from timeviper_platform.serving.features.service import FeatureService, FeatureServiceConfig
from timeviper_platform.serving.gateway.config import GatewayConfig
from timeviper_platform.serving.gateway_replica import GatewayReplica, check_max_tokens
from timeviper_platform.serving.limits import IN_PLACE, DeploymentName, Limits, limits_text, with_limits
from timeviper_platform.serving.messages import FeatureReference, FeatureStream, Refusal

logger = logging.getLogger(__name__)

BUILDER = "timeviper_platform.serving.app:build"
MAX_GATEWAY_REQUESTS = 8192
"""Concurrent requests per replica. They cost little; with fewer, slow bodies would block health checks."""
GATEWAY_TARGET = 256
"""Concurrent requests per replica that the autoscaler aims at."""
STATS_TIMEOUT_S = 2.0
"""The engine reports statistics only between two steps."""
MAX_STREAM_READERS = 10_000
"""Requests that wait for blocks of features, per feature replica."""
SHUTDOWN_MARGIN_S = 30.0
"""Seconds a stopping replica has on top of the longest request."""
FEATURE_QUEUE = 64
"""Concurrent requests per replica; most are lookups in the store."""


@dataclass(frozen=True, kw_only=True, slots=True)
class Deployments:
    gateway: DeploymentSettings = field(default_factory=DeploymentSettings)
    """Gateway replicas; at least one."""
    features: DeploymentSettings = field(default_factory=DeploymentSettings)
    engine: DeploymentSettings = field(default_factory=DeploymentSettings)


@dataclass(frozen=True, kw_only=True, slots=True)
class ServeConfig:
    """The `args` of the application in a Serve configuration file."""

    weights: str
    """URI of the weights folder that the export job wrote; each node downloads a remote one once."""
    features: FeatureServiceConfig
    gateway: GatewayConfig = field(default_factory=GatewayConfig)
    engine: EngineServiceConfig = field(default_factory=EngineServiceConfig)
    deployments: Deployments = field(default_factory=Deployments)

    def __post_init__(self) -> None:
        if self.deployments.gateway.autoscaling.min_replicas < 1:
            raise ValueError("deployments.gateway.autoscaling.min_replicas must be at least 1 to accept requests")
        check_max_tokens(self.gateway, self.engine.engine.max_new_tokens)

    def shutdown_timeout_s(self, name: DeploymentName) -> float:
        """Seconds that running requests have when a replica of a deployment stops."""
        settings: DeploymentSettings = getattr(self.deployments, name)
        if settings.graceful_shutdown_timeout_s is not None:
            return settings.graceful_shutdown_timeout_s
        return self.gateway.request_timeout_s + SHUTDOWN_MARGIN_S


class FeatureReplica(FeatureService):
    """Ray Serve replica that puts arrays into Ray's object store."""

    async def __init__(self, weights: str, config: FeatureServiceConfig) -> None:  # type: ignore[misc]  # Serve awaits it
        setup_logging(as_json=True)
        self._limits = Limits("features", config)
        metrics = RayMetrics("timeviper_features_", module=serve_metrics)
        super().__init__(weights, config, ray.put, None if config.encoder is None else RayBlockWriter(), metrics)
        await self.start()

    async def check_health(self) -> None:
        """Sends metrics, because Ray Serve calls this every few seconds."""
        self._metrics.report(self.gauges())

    def reconfigure(self, user_config: dict[str, Any]) -> None:
        """See `Limits.reconfigure`."""
        if self._limits.reconfigure(user_config):
            self.set_limits(self._limits.config)

    async def __del__(self) -> None:
        if hasattr(self, "_sandbox"):  # construction may have failed
            await self.close()


class EngineReplica(EngineService):
    def __init__(self, weights: str, config: EngineServiceConfig) -> None:
        setup_logging(as_json=True)
        self._metrics = RayMetrics("timeviper_engine_", module=serve_metrics)
        self._limits = Limits("engine", config)
        super().__init__(weights, config, read_features, partial(self._metrics.observe, "first_token_seconds"))

    def reconfigure(self, user_config: dict[str, Any]) -> None:
        """See `Limits.reconfigure`."""
        if self._limits.reconfigure(user_config):
            self.set_limits(self._limits.config)

    async def check_health(self) -> None:  # type: ignore[override]  # Serve accepts both kinds
        """Also sends metrics, because Ray Serve calls this every few seconds."""
        super().check_health()
        with contextlib.suppress(TimeoutError):  # a long step is running
            self._metrics.report(dataclasses.asdict(await asyncio.wait_for(self.stats(), STATS_TIMEOUT_S)))

    def __del__(self) -> None:
        if hasattr(self, "_prompts"):  # construction may have failed
            self.stop()


def build(args: dict[str, Any]) -> Any:
    """Builds the application from the `args` of a Serve configuration file.

    Raises:
        ValueError: for an unknown or invalid key, with its dotted path.
    """
    return build_application(parse_config(ServeConfig, args, source="args"))


def build_application(
    config: ServeConfig, user_configs: Mapping[DeploymentName, Mapping[str, Any]] | None = None
) -> Any:
    """Builds the application. `user_configs` are those of the deployments in a Serve configuration file.

    Raises:
        ValueError: for an invalid one.
    """
    user_configs = user_configs or {}
    for name in IN_PLACE:
        limits = with_limits(getattr(config, name), user_configs.get(name, {}), name)
        logger.info("limits of %s: %s", name, limits_text(limits))
    deployments, engine = config.deployments, config.engine.engine
    feature_options = deployments.features.options(
        capacity=FEATURE_QUEUE,
        served_at_once=config.features.sandbox.num_workers,
        shutdown_timeout_s=config.shutdown_timeout_s("features"),
    )
    engine_options = deployments.engine.options(
        capacity=engine.num_slots + engine.max_queued_requests,
        served_at_once=engine.num_slots,
        shutdown_timeout_s=config.shutdown_timeout_s("engine"),
        has_sessions=True,
    )
    gateway_options = deployments.gateway.options(
        capacity=MAX_GATEWAY_REQUESTS,
        served_at_once=GATEWAY_TARGET,
        surge_percent=100,
        shutdown_timeout_s=config.shutdown_timeout_s("gateway"),
    )

    def deployment(name: DeploymentName, options: dict[str, Any], replica: type) -> Any:
        # never None: when a file no longer has a user_config, replicas return to their args
        return serve.deployment(name=name, user_config=dict(user_configs.get(name, {})), **options)(replica)

    features = deployment("features", feature_options, FeatureReplica)
    engines = deployment("engine", engine_options, EngineReplica)
    gateway = deployment("gateway", gateway_options, GatewayReplica)
    return gateway.bind(
        config.gateway,
        config.engine.engine.max_new_tokens,
        features.bind(config.weights, config.features),
        engines.bind(config.weights, config.engine),
    )


def limit_faults(application: Mapping[str, Any]) -> list[str]:
    """Returns why running replicas have not taken the limits of a deployed application.

    Args:
        application: an entry of a Serve file's `applications`; none are found in those not of `build`.
    """
    if application.get("import_path") != BUILDER:
        return []
    config = parse_config(ServeConfig, application["args"], source="args")
    faults = []
    for deployment in application.get("deployments", ()):
        name = deployment["name"]
        try:
            limits = with_limits(getattr(config, name), deployment.get("user_config") or {}, name)
            if isinstance(limits, GatewayConfig):
                check_max_tokens(limits, config.engine.engine.max_new_tokens)
        except ValueError as error:
            faults.append(f"{error}; running replicas keep their earlier limits")
    return faults


def resolve_paths(config: ServeConfig, root: Path) -> ServeConfig:
    """Makes paths absolute, below `root`. An encoder that is not a folder stays a hub name."""
    config = with_absolute_paths(
        config, ("gateway.media_root", "gateway.api_keys_file", "gateway.allowed_local_media.*"), root=root
    )
    keys = ("weights", "features.feature_store", "features.encoder.model", "features.encoder.second.model")
    return with_absolute_paths(config, keys, root=root, if_exists=True)


class RayBlockWriter:
    """A `BlockBoard` in an actor, which ends with this replica."""

    def __init__(self) -> None:
        self._actor: Any = ray.remote(num_cpus=0, max_concurrency=MAX_STREAM_READERS)(BlockBoard).remote()

    def append(self, stream_id: str, number: int, ref: Any) -> None:
        self._actor.append.remote(stream_id, number, [ref])

    def end(self, stream_id: str, end: FeatureReference | Refusal) -> None:
        self._actor.end.remote(stream_id, end)

    def forget(self, stream_id: str) -> None:
        self._actor.forget.remote(stream_id)

    def address(self) -> Any:
        return self._actor


async def read_features(reference: FeatureReference) -> AsyncGenerator[np.ndarray | Refusal]:
    """See `ReadFeatures`."""

    async def fetch(ref: Any) -> np.ndarray:
        array: np.ndarray = await ref
        return array

    async def next_blocks(stream: FeatureStream, number: int) -> Any:
        return await stream.board.read.remote(stream.stream_id, number)

    try:
        async with aclosing(read_blocks(reference, fetch=fetch, next_blocks=next_blocks)) as blocks:
            async for block in blocks:
                yield block
    except RayError as error:  # its owner, a feature replica, has died
        raise RuntimeError(f"the features {reference.key} are lost: {type(error).__name__}") from error

"""The endpoint as a Ray Serve application: a gateway in front of a feature service and an engine service."""

from __future__ import annotations

import asyncio
import contextlib
import dataclasses
import logging
from collections.abc import AsyncGenerator
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
from timeviper_platform.serving.gateway_replica import GatewayReplica
from timeviper_platform.serving.messages import FeatureReference, FeatureStream, Refusal

logger = logging.getLogger(__name__)

MAX_GATEWAY_REQUESTS = 8192
"""Concurrent requests per replica. They cost little; with fewer, slow bodies would block health checks."""
GATEWAY_TARGET = 256
"""Requests per replica that are served well."""
STATS_TIMEOUT_S = 2.0
"""The engine reports statistics only between two steps."""
MAX_STREAM_READERS = 10_000
"""Requests that wait for blocks of features, per feature replica."""
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
        if self.gateway.max_tokens > self.engine.engine.max_new_tokens:
            raise ValueError(
                f"{self.gateway.max_tokens = } exceeds {self.engine.engine.max_new_tokens = }; lower the first"
            )


class FeatureReplica(FeatureService):
    """Ray Serve replica that puts arrays into Ray's object store."""

    async def __init__(self, weights: str, config: FeatureServiceConfig) -> None:  # type: ignore[misc]  # Serve awaits it
        setup_logging()
        super().__init__(weights, config, ray.put, None if config.encoder is None else RayBlockWriter())
        await self.start()

    async def __del__(self) -> None:
        if hasattr(self, "_sandbox"):  # construction may have failed
            await self.close()


class EngineReplica(EngineService):
    """Ray Serve replica that reports statistics to Prometheus."""

    def __init__(self, weights: str, config: EngineServiceConfig) -> None:
        setup_logging()
        self._metrics = RayMetrics("timeviper_engine_", module=serve_metrics)
        super().__init__(weights, config, read_features, partial(self._metrics.observe, "first_token_seconds"))

    async def check_health(self) -> None:  # type: ignore[override]  # Serve takes both kinds
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


def build_application(config: ServeConfig) -> Any:
    for name in ("gateway", "features", "engine"):
        logger.info("limits of %s: %s", name, limits_text(getattr(config, name)))
    deployments, engine = config.deployments, config.engine.engine
    feature_options = deployments.features.options(
        capacity=FEATURE_QUEUE, served_at_once=config.features.sandbox.num_workers
    )
    engine_options = deployments.engine.options(
        capacity=engine.num_slots + engine.max_queued_requests, served_at_once=engine.num_slots, has_sessions=True
    )
    gateway_options = deployments.gateway.options(capacity=MAX_GATEWAY_REQUESTS, served_at_once=GATEWAY_TARGET)
    features = serve.deployment(name="features", **feature_options)(FeatureReplica)
    engines = serve.deployment(name="engine", **engine_options)(EngineReplica)
    gateway = serve.deployment(name="gateway", **gateway_options)(GatewayReplica)
    return gateway.bind(
        config.gateway,
        features.bind(config.weights, config.features),
        engines.bind(config.weights, config.engine),
    )


def limits_text(config: object) -> str:
    """Returns all numbers of a configuration as `key = value, section.key = value`."""
    texts = []
    for entry in dataclasses.fields(config):  # type: ignore[arg-type]  # a dataclass
        value = getattr(config, entry.name)
        if dataclasses.is_dataclass(value):
            texts += [f"{entry.name}.{text}" for text in limits_text(value).split(", ") if text]
        elif isinstance(value, int | float) and not isinstance(value, bool):
            texts.append(f"{entry.name} = {value}")
        elif value is None and entry.name.startswith("max_"):
            texts.append(f"{entry.name} = none")
    return ", ".join(texts)


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

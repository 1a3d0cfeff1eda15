"""The endpoint as a Ray Serve application: gateway -> feature service, gateway -> engine service.

`build` turns the `args` of a Serve configuration file into the bound graph; `serve run FILE`, `serve deploy FILE` and
jobs/serve.py all come here. Where the plain services meet Ray: deployments and object references.
"""

from __future__ import annotations

import asyncio
import contextlib
import dataclasses
from collections.abc import AsyncGenerator
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np
import ray
from ray import serve
from ray.exceptions import RayError
from ray.serve import metrics as serve_metrics

from timeviper_platform.common.config import parse_config
from timeviper_platform.common.logs import setup_logging
from timeviper_platform.common.metrics import RayMetrics
from timeviper_platform.serving.deployment import DeploymentSettings
from timeviper_platform.serving.engine.service import EngineService, EngineServiceConfig
from timeviper_platform.serving.features.service import FeatureService, FeatureServiceConfig
from timeviper_platform.serving.gateway.config import GatewayConfig
from timeviper_platform.serving.gateway_replica import GatewayReplica
from timeviper_platform.serving.messages import (
    AnswerDelta,
    FeatureReference,
    FeatureRequest,
    GenerateRequest,
    Refusal,
)

MAX_GATEWAY_REQUESTS = 512
"""requests one gateway replica holds at once; they wait for the services and cost it little"""
STATS_TIMEOUT_S = 2.0
"""the engine tells its counts between two steps"""
FEATURE_QUEUE = 64
"""requests one feature replica holds at once; lookups in the store are many and short"""


@dataclass(frozen=True, kw_only=True, slots=True)
class Deployments:
    """Place and number of the three deployments' replicas."""

    gateway: DeploymentSettings = field(default_factory=DeploymentSettings)
    features: DeploymentSettings = field(default_factory=DeploymentSettings)
    engine: DeploymentSettings = field(default_factory=DeploymentSettings)


@dataclass(frozen=True, kw_only=True, slots=True)
class ServeConfig:
    """`applications[0].args` of the Serve configuration file."""

    weights: str
    """folder of jobs/export.py"""
    features: FeatureServiceConfig
    gateway: GatewayConfig = field(default_factory=GatewayConfig)
    engine: EngineServiceConfig = field(default_factory=EngineServiceConfig)
    deployments: Deployments = field(default_factory=Deployments)

    def __post_init__(self) -> None:
        if self.deployments.gateway.autoscaling.min_replicas < 1:
            raise ValueError("deployments.gateway.autoscaling.min_replicas must be at least 1: requests arrive there")
        if self.gateway.max_tokens > self.engine.engine.max_new_tokens:
            raise ValueError(
                f"{self.gateway.max_tokens = } is past {self.engine.engine.max_new_tokens = }; lower the first"
            )


class FeatureReplica:
    """One replica of the feature service; arrays go into Ray's object store."""

    async def __init__(self, weights: str, config: FeatureServiceConfig) -> None:  # type: ignore[misc]  # Serve awaits it
        setup_logging()
        self._service = FeatureService(weights, config, ray.put)
        await self._service.start()

    async def features(self, request: FeatureRequest) -> FeatureReference | Refusal:
        """See FeatureService.features."""
        return await self._service.features(request)

    async def is_ready(self) -> bool:
        """See FeatureService.is_ready."""
        return await self._service.is_ready()

    async def __del__(self) -> None:
        if hasattr(self, "_service"):  # construction may have failed
            await self._service.close()


class EngineReplica:
    """One replica of the engine service; arrays come from Ray's object store."""

    def __init__(self, weights: str, config: EngineServiceConfig) -> None:
        setup_logging()
        self._service = EngineService(weights, config, _fetch)
        self._metrics = RayMetrics("timeviper_engine_", module=serve_metrics)

    async def generate(self, request: GenerateRequest) -> AsyncGenerator[AnswerDelta | Refusal]:
        """See EngineService.generate."""
        items = self._service.generate(request)
        try:
            async for item in items:
                yield item
        finally:
            await items.aclose()

    async def is_ready(self) -> bool:
        """See EngineService.is_ready."""
        return await self._service.is_ready()

    async def stats(self) -> dict[str, int]:
        """The engine's counts by name."""
        return dataclasses.asdict(await self._service.stats())

    async def check_health(self) -> None:
        """Ray Serve replaces the replica when this raises; it asks every few seconds, so counts go out here too."""
        self._service.check_health()
        with contextlib.suppress(TimeoutError):  # in the middle of a long step
            stats = await asyncio.wait_for(self._service.stats(), STATS_TIMEOUT_S)
            self._metrics.report(dataclasses.asdict(stats))

    def __del__(self) -> None:
        if hasattr(self, "_service"):
            self._service.stop()


def build(args: dict[str, Any]) -> Any:
    """The bound application for `args`, which are a ServeConfig.

    Raises:
        ValueError: for an unknown or wrong key, with its dotted path.
    """
    return build_application(parse_config(ServeConfig, args, source="args"))


def build_application(config: ServeConfig) -> Any:
    """The bound application."""
    places, engine = config.deployments, config.engine.engine
    feature_options = places.features.options(
        capacity=FEATURE_QUEUE, served_at_once=config.features.sandbox.num_workers
    )
    engine_options = places.engine.options(
        capacity=engine.num_slots + engine.max_queued_requests, served_at_once=engine.num_slots
    )
    gateway_options = places.gateway.options(capacity=MAX_GATEWAY_REQUESTS, served_at_once=MAX_GATEWAY_REQUESTS // 2)
    features = serve.deployment(name="features", **feature_options)(FeatureReplica)
    engines = serve.deployment(name="engine", **engine_options)(EngineReplica)
    gateway = serve.deployment(name="gateway", **gateway_options)(GatewayReplica)
    return gateway.bind(
        config.gateway,
        features.bind(config.weights, config.features),
        engines.bind(config.weights, config.engine),
    )


def with_absolute_paths(config: ServeConfig, root: Path) -> ServeConfig:
    """The same configuration with paths below `root` written out, for replicas start in another folder.

    URIs stay, and so do names that are no path there: an encoder may be a Hugging Face name.
    """
    features = config.features
    if features.encoder is not None:
        encoder = features.encoder.with_names(lambda name: _absolute(name, root))
        features = dataclasses.replace(features, encoder=encoder)
    if features.feature_store is not None:
        features = dataclasses.replace(features, feature_store=_absolute(features.feature_store, root))
    media_root = config.gateway.media_root
    if "://" not in media_root:
        media_root = str(root / media_root)  # it is made when the first upload comes
    return dataclasses.replace(
        config,
        weights=_absolute(config.weights, root),
        features=features,
        gateway=dataclasses.replace(config.gateway, media_root=media_root),
    )


def _absolute(path: str, root: Path) -> str:
    return str(root / path) if "://" not in path and (root / path).exists() else path


async def _fetch(reference: FeatureReference) -> np.ndarray:
    try:
        array: np.ndarray = await reference.ref
    except RayError as error:  # its owner, a feature replica, has gone
        raise RuntimeError(f"the features {reference.key} are lost: {type(error).__name__}") from error
    return array

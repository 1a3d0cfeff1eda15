"""app: the shipped configuration files, deployment options, and Ray's errors."""

from __future__ import annotations

import asyncio
import os
import subprocess
import sys
from collections.abc import AsyncGenerator
from contextlib import aclosing, suppress
from dataclasses import replace
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest
import ray
import yaml
from ray.exceptions import RayActorError
from ray.serve.exceptions import BackPressureError
from ray.serve.schema import ServeDeploySchema

from timeviper_model.config import PRESETS
from timeviper_model.inference.answer import SamplingParams
from timeviper_model.inference.memory import check_limits, request_memory
from timeviper_model.layers.cache import HybridCache
from timeviper_platform.common.config import parse_config
from timeviper_platform.common.devices import torch_dtype
from timeviper_platform.data.encode.frame_encoder import TowerConfig, VisionTowerConfig
from timeviper_platform.serving import gateway_replica
from timeviper_platform.serving.app import RayBlockWriter, ServeConfig, build, read_features, resolve_paths
from timeviper_platform.serving.deployment import AutoscalingSettings, DeploymentSettings
from timeviper_platform.serving.gateway_replica import ServiceHandle
from timeviper_platform.serving.messages import (
    AnswerDelta,
    ChatTurn,
    FeatureReference,
    FeatureStream,
    GenerateRequest,
    Refusal,
)

CONFIGS = Path(__file__).resolve().parents[3] / "ray_configs"
FILES = [CONFIGS / "serve.yaml", CONFIGS / "tiny" / "serve.yaml"]


def args_of(path: Path) -> dict[str, Any]:
    args: dict[str, Any] = yaml.safe_load(path.read_text())["applications"][0]["args"]
    return args


@pytest.mark.parametrize("path", FILES, ids=["full", "tiny"])
def test_a_shipped_file_is_valid_for_ray_serve_and_for_us(path: Path) -> None:
    schema = ServeDeploySchema.model_validate(yaml.safe_load(path.read_text()))
    assert schema.applications[0].import_path == "timeviper_platform.serving.app:build"
    assert build(args_of(path)) is not None


def test_the_twins_have_the_same_keys() -> None:
    full, tiny = (args_of(path) for path in FILES)
    assert set(full) == set(tiny)
    assert set(full["deployments"]) == set(tiny["deployments"]) == {"gateway", "features", "engine"}


def test_the_9b_is_served_with_10000_frames_within_80_gb() -> None:
    config = parse_config(ServeConfig, args_of(FILES[0]))
    model, limits, dtype = PRESETS["9b"], config.engine.engine, torch_dtype(config.engine.dtype)
    cache = HybridCache(model.text, limits.num_slots, device="meta", dtype=dtype)
    weights = 9_023_568_130 * dtype.itemsize
    total = weights + cache.num_bytes + limits.kv_cache_bytes + limits.prefix_cache_bytes
    assert total == pytest.approx(65.6e9, rel=0.001)  # docs/serve.md; of 80e9
    check_limits(model, limits, cache, dtype=dtype)
    assert limits.max_prompt_tokens >= 160_080
    assert config.features.max_frames >= 10_000
    film, short = (
        request_memory(model, 80, 16 * frames, limits.max_new_tokens, dtype=dtype) for frames in (10_000, 256)
    )
    rooms = cache.room_bytes(film.tokens)
    assert rooms == pytest.approx(1.12e9, rel=0.01)
    assert film.working_bytes == pytest.approx(1.54e9, rel=0.01)
    assert short.working_bytes == pytest.approx(0.04e9, rel=0.01)
    for gib, reading, answering in ((24, 9, 23), (72, 29, 69)):
        assert gib * 2**30 // (rooms + film.working_bytes) == reading
        assert gib * 2**30 // rooms == answering


@pytest.mark.parametrize("path", FILES, ids=["full", "tiny"])
def test_uploads_are_encoded_as_in_the_preprocessing_file(path: Path) -> None:
    preprocess = yaml.safe_load(path.with_name("preprocess.yaml").read_text())
    serving = args_of(path)["features"]
    assert VisionTowerConfig(**serving["encoder"]) == VisionTowerConfig(**preprocess["encoder"])
    assert serving["feature_store"] == preprocess["feature_store"]
    assert serving.get("fps", 1.0) == preprocess["sampling"]["fps"]


def test_three_tiny_deployments_and_a_training_job_fit_two_cores() -> None:
    config = parse_config(ServeConfig, args_of(FILES[1]))
    places = config.deployments
    assert sum(place.num_cpus for place in (places.gateway, places.features, places.engine)) <= 0.5


def test_an_unknown_key_is_named_by_its_path() -> None:
    args = args_of(FILES[1])
    args["engine"]["engine"]["num_slotz"] = 3
    with pytest.raises(ValueError, match=r"'engine\.engine\.num_slotz'"):
        build(args)


def test_a_gateway_needs_a_replica_and_at_most_the_engines_max_tokens() -> None:
    args = args_of(FILES[1])
    args["deployments"]["gateway"] = {"autoscaling": {"min_replicas": 0}}
    with pytest.raises(ValueError, match="min_replicas must be at least 1"):
        build(args)
    args = args_of(FILES[1])
    args["gateway"]["max_tokens"] = 5000
    with pytest.raises(ValueError, match="max_new_tokens"):
        build(args)


def test_the_default_target_is_two_thirds_of_the_concurrent_requests() -> None:
    options = DeploymentSettings(num_cpus=0.2).options(capacity=40, served_at_once=8, shutdown_timeout_s=5)
    assert options["autoscaling_config"]["target_ongoing_requests"] == pytest.approx(5.2)
    assert options["max_ongoing_requests"] == 40
    assert options["backpressure_config"] == {"status_code": 429, "retry_after_s": 1.0}
    chosen = DeploymentSettings(autoscaling=AutoscalingSettings(target_ongoing_requests=3.0), max_ongoing_requests=7)
    options = chosen.options(capacity=40, served_at_once=8, shutdown_timeout_s=5)
    assert options["autoscaling_config"]["target_ongoing_requests"] == 3.0
    assert options["max_ongoing_requests"] == 7


@pytest.mark.parametrize("path", FILES, ids=["full", "tiny"])
def test_every_stopping_replica_waits_for_the_longest_answer(path: Path) -> None:
    """Before, a gateway that an update replaced cut all streams of more than a minute."""
    args = args_of(path)
    gateway = build(args)._bound_deployment
    others = [argument._bound_deployment for argument in gateway.init_args[2:]]
    limits = {bound.name: bound._deployment_config.graceful_shutdown_timeout_s for bound in (gateway, *others)}
    longest = args["gateway"]["request_timeout_s"]
    assert limits == dict.fromkeys(("gateway", "features", "engine"), longest + 30)
    surges = [bound._deployment_config.max_surge_percent for bound in (gateway, *others)]
    assert surges == [100, 0, 0]  # a new gateway is there before the old one ends; others may lack a GPU
    args["deployments"]["engine"]["max_surge_percent"] = 100
    engine = build(args)._bound_deployment.init_args[3]._bound_deployment
    assert engine._deployment_config.max_surge_percent == 100
    args["deployments"]["engine"]["graceful_shutdown_timeout_s"] = 7.0
    config = parse_config(ServeConfig, args)
    assert [config.shutdown_timeout_s(name) for name in ("engine", "gateway")] == [7.0, longest + 30]


def test_a_surge_is_a_percentage() -> None:
    with pytest.raises(ValueError, match="between 0 and 100"):
        DeploymentSettings(max_surge_percent=200)


@pytest.mark.parametrize("values", [{"min_replicas": 3}, {"look_back_period_s": 1.0}, {"max_replicas": 0}])
def test_impossible_autoscaling_is_refused(values: dict[str, Any]) -> None:
    with pytest.raises(ValueError, match="must"):
        AutoscalingSettings(**values)


def test_paths_become_absolute_but_names_and_uris_stay(tmp_path: Path) -> None:
    (tmp_path / "weights").mkdir()
    (tmp_path / "second").mkdir()
    towers = {"model": "google/some-encoder", "second": {"model": "second", "layer": -1}}
    args = {
        "weights": "weights",
        "features": {"feature_store": "s3://bucket/store", "encoder": towers},
        "gateway": {"media_root": "uploads"},
    }
    config = resolve_paths(parse_config(ServeConfig, args), tmp_path)
    assert config.weights == str(tmp_path / "weights")
    assert config.gateway.media_root == str(tmp_path / "uploads")
    assert config.features.feature_store == "s3://bucket/store"
    assert config.features.encoder is not None
    assert config.features.encoder.model == "google/some-encoder"
    assert config.features.encoder.second == TowerConfig(model=str(tmp_path / "second"), layer=-1)


QUESTION = GenerateRequest(tenant="a", turns=(ChatTurn(role="user", text="?"),), sampling=SamplingParams())


def about(*media: str, tenant: str = "a") -> GenerateRequest:
    references = tuple(
        FeatureReference(
            key=key, ref=None, num_frames=1, num_tokens_per_frame=1, modality="video", duration_seconds=1.0
        )
        for key in media
    )
    return replace(QUESTION, tenant=tenant, turns=(ChatTurn(role="user", text="?", media=references),))


class Handle:
    """A deployment handle whose calls all raise `error` or return `answer`."""

    def __init__(self, error: Exception | None = None, answer: Any = True) -> None:
        self.error = error
        self.answer = answer
        self.features = self.generate = self.is_ready = self
        self.cancelled = 0
        self.app_name, self.deployment_name = "app", "engine"
        self.session_ids: list[str | None] = []

    def options(
        self, *, stream: bool = False, session_id: str | None = None, _by_reference: bool | None = None
    ) -> Handle:
        self.session_ids.append(session_id)
        return self

    def remote(self, *_: Any, **options: Any) -> Any:
        return self

    def __await__(self) -> Any:
        yield from asyncio.sleep(0).__await__()
        if self.error is not None:
            raise self.error
        return self.answer

    async def _items(self) -> AsyncGenerator[Any]:
        yield AnswerDelta(index=0, text="a")
        if self.error is not None:
            raise self.error
        yield AnswerDelta(index=0, text="b", finish_reason="stop")

    def __aiter__(self) -> Any:
        return self._items()

    def cancel(self) -> None:
        self.cancelled += 1


@pytest.mark.cluster
def test_blocks_of_features_cross_ray_before_the_last_and_are_lost_with_their_replica(ray_address: str) -> None:
    ray.init(address=ray_address, logging_level="WARNING")
    arrays = [np.full((2, 1, 3), number, np.int16) for number in range(3)]

    def of(writer: RayBlockWriter) -> FeatureReference:
        (media,) = about("x").media
        return replace(media, num_frames=6, stream=FeatureStream(board=writer.address(), stream_id="s"))

    async def read() -> list[Any]:
        writer = RayBlockWriter()
        writer.append("s", 0, ray.put(arrays[0]))
        found = []
        async with aclosing(read_features(of(writer))) as blocks:
            found.append(await anext(blocks))
            writer.append("s", 1, ray.put(arrays[1]))
            found.append(await anext(blocks))
            writer.end("s", replace(of(writer), stream=None, ref=ray.put(np.concatenate(arrays))))
            found += [block async for block in blocks]
        dead = of(writer)
        ray.kill(writer.address())
        with suppress(RayActorError):  # the kill takes a moment
            while True:
                await writer.address().__ray_ready__.remote()
        with pytest.raises(RuntimeError, match="features x are lost"):
            await anext(read_features(dead))
        return found

    np.testing.assert_array_equal(np.concatenate(asyncio.run(read())), np.concatenate(arrays))


def test_rays_errors_become_refusals() -> None:
    async def ask(error: Exception) -> tuple[Any, list[Any], bool]:
        handle = Handle(error)
        items = [item async for item in ServiceHandle("engine service", handle).generate(QUESTION)]
        assert handle.cancelled == 0
        features = await ServiceHandle("feature service", handle).features(None)  # type: ignore[arg-type]
        return features, items, await ServiceHandle("feature service", handle).is_ready(deep=True)

    features, items, is_ready = asyncio.run(ask(RayActorError()))
    assert isinstance(features, Refusal)
    assert (features.status, items[-1].status, is_ready) == (503, 503, False)
    features, items, _ = asyncio.run(ask(BackPressureError(1, 1)))
    assert (features.status, items[-1].status, items[-1].retry_after_s) == (429, 429, 1.0)


@pytest.mark.parametrize("num_deaths", [2, 3])
def test_a_replica_that_dies_before_the_first_token_is_replaced_by_another(
    num_deaths: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Before, every question that the replica had taken was a 503."""
    monkeypatch.setattr(gateway_replica, "RETRY_S", 0.0)

    class Dying(Handle):
        deaths = 0

        async def _items(self) -> AsyncGenerator[Any]:
            self.deaths += 1
            if self.deaths <= num_deaths:
                raise RayActorError
            async for item in super()._items():
                yield item

        def __await__(self) -> Any:
            self.deaths += 1
            self.error = RayActorError() if self.deaths <= num_deaths else None
            return super().__await__()

    async def ask() -> tuple[list[Any], Any]:
        items = [item async for item in ServiceHandle("engine service", Dying()).generate(QUESTION)]
        return items, await ServiceHandle("feature service", Dying()).features(None)  # type: ignore[arg-type]

    items, features = asyncio.run(ask())
    if num_deaths == 2:
        assert ([item.text for item in items], features) == (["a", "b"], True)
    else:
        assert ([item.status for item in items], features.status) == ([503], 503)


def test_a_stream_closed_early_is_cancelled_and_a_complete_one_is_not() -> None:
    async def run(whole: bool) -> int:
        handle = Handle()
        items = ServiceHandle("engine service", handle).generate(QUESTION)
        await anext(items)
        if whole:
            assert len([item async for item in items]) == 1
        await items.aclose()
        return handle.cancelled

    async def close_after_the_last_delta() -> int:
        handle = Handle()
        items = ServiceHandle("engine service", handle).generate(QUESTION)
        assert [(await anext(items)).text, (await anext(items)).text] == ["a", "b"]  # type: ignore[union-attr]
        await items.aclose()
        return handle.cancelled

    assert asyncio.run(close_after_the_last_delta()) == 0
    assert asyncio.run(run(whole=False)) == 1
    assert asyncio.run(run(whole=True)) == 0


def test_a_call_of_a_client_that_has_left_is_cancelled() -> None:
    class Endless(Handle):
        def __await__(self) -> Any:
            yield from asyncio.sleep(60).__await__()

    async def run() -> int:
        handle = Endless()
        call = asyncio.create_task(ServiceHandle("feature service", handle).features(None))  # type: ignore[arg-type]
        await asyncio.sleep(0.01)
        call.cancel()
        await asyncio.gather(call, return_exceptions=True)
        return handle.cancelled

    assert asyncio.run(run()) == 1


def test_media_never_go_by_value() -> None:
    """In Ray's throughput mode a call is by value unless its handle says so: 4 MiB at most, and references that it
    contains are never freed.
    """

    class Noted(Handle):
        def __init__(self) -> None:
            super().__init__()
            self.by_reference, self.watch = False, self
            self.calls: list[bool] = []

        def options(self, *, _by_reference: bool | None = None, **_: Any) -> Noted:
            other = Noted()
            other.calls = self.calls
            other.by_reference = self.by_reference if _by_reference is None else _by_reference
            return other

        def remote(self, *_: Any, **options: Any) -> Any:
            self.calls.append(self.by_reference)
            return self

    async def ask() -> list[bool]:
        handle = Noted()
        service = ServiceHandle("engine service", handle)
        await service.features(None)  # type: ignore[arg-type]
        for request in (about("x"), QUESTION):
            _ = [item async for item in service.generate(request)]
        _ = [item async for item in service.watch(None)]  # type: ignore[arg-type]
        return handle.calls

    assert asyncio.run(ask()) == [True, True, False, True]


def test_a_gateway_replica_imports_no_torch() -> None:
    code = "import sys, timeviper_platform.serving.gateway_replica; print('torch' in sys.modules, 'av' in sys.modules)"
    result = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True, env=os.environ)
    assert result.stdout.strip() == "False False"


def test_a_tenants_questions_about_one_video_are_one_session() -> None:
    handle = Handle()
    service = ServiceHandle("engine service", handle)

    async def session_of(request: GenerateRequest) -> str | None:
        handle.session_ids.clear()
        _ = [item async for item in service.generate(request)]
        return handle.session_ids[-1] if handle.session_ids else None

    async def sessions() -> list[str | None]:
        asked = [about("x"), about("x", "y"), about("y"), about("x", tenant="b"), QUESTION]
        return [await session_of(request) for request in asked]

    first, more, other, another_tenant, text = asyncio.run(sessions())
    assert first == more
    assert len({first, other, another_tenant}) == 3
    assert text is None
    options = build(args_of(FILES[1]))._bound_deployment.init_args[3]._bound_deployment._deployment_config
    assert "ConsistentHashRouter" in str(options.request_router_config.request_router_class)


def states(status: str, **replicas: int) -> Any:
    deployment = SimpleNamespace(status=status, replica_states=replicas)
    return SimpleNamespace(applications={"app": SimpleNamespace(deployments={"engine": deployment})})


@pytest.mark.parametrize(
    ("found", "expected"),
    [
        (states("HEALTHY", RUNNING=1), True),
        (states("HEALTHY"), True),  # scaled to zero
        (states("UPSCALING", RUNNING=1, STARTING=1), True),
        (states("UPSCALING", STARTING=1), True),  # held requests wait for it
        (states("UPDATING", STARTING=1), False),
        (states("UPDATING", RUNNING=1, STARTING=1), True),
        (states("DEPLOY_FAILED"), False),
        (states("UNHEALTHY"), False),
        (SimpleNamespace(applications={}), False),
    ],
)
def test_readiness_does_not_wake_a_service_that_can_start(
    found: Any, expected: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("timeviper_platform.serving.gateway_replica.serve.status", lambda: found)
    handle = Handle(RuntimeError("called"))
    assert asyncio.run(ServiceHandle("engine service", handle).is_ready(deep=False)) is expected

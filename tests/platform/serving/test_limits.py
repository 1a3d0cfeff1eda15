"""limits: what a user_config may change, and what replicas do with it."""

from __future__ import annotations

import logging
from dataclasses import replace
from functools import partial
from pathlib import Path
from typing import Any

import pytest

from reference.synthetic_gateway import Server, check_error, keys
from timeviper_platform.serving.app import BUILDER, ServeConfig, build, build_application, limit_faults
from timeviper_platform.serving.engine.service import EngineServiceConfig
from timeviper_platform.serving.features.service import FeatureServiceConfig
from timeviper_platform.serving.gateway.config import GatewayConfig
from timeviper_platform.serving.gateway_replica import GatewayReplica, check_max_tokens
from timeviper_platform.serving.limits import IN_PLACE, DeploymentName, Limits, with_limits
from timeviper_platform.serving.status import application_state

CONFIGS: dict[DeploymentName, Any] = {
    "gateway": GatewayConfig(api_keys=keys("a")),
    "features": FeatureServiceConfig(feature_store="store"),
    "engine": EngineServiceConfig(),
}


@pytest.mark.parametrize("name", IN_PLACE)
def test_every_key_is_one_of_its_configuration(name: DeploymentName) -> None:
    config = CONFIGS[name]
    for key in IN_PLACE[name]:
        section, _, last = key.rpartition(".")
        value = getattr(getattr(config, section) if section else config, last)
        if key == "api_keys":
            value = [{"tenant": found.tenant, "sha256": found.sha256} for found in value]
        assert with_limits(config, {section: {last: value}} if section else {key: value}, name) == config


def test_a_user_config_counts_over_the_args_and_not_over_the_one_before() -> None:
    limits = Limits("engine", EngineServiceConfig())
    assert limits.reconfigure({"engine": {"max_queued_requests": 3}})
    assert limits.config.engine == replace(EngineServiceConfig().engine, max_queued_requests=3)
    assert limits.reconfigure({"coalesce_ms": 5})
    assert limits.config == EngineServiceConfig(coalesce_ms=5.0)
    assert limits.reconfigure({})
    assert limits.config == EngineServiceConfig()


@pytest.mark.parametrize(
    ("name", "user_config", "message"),
    [
        (
            "engine",
            {"engine": {"num_slots": 2}},
            r"'engine\.num_slots' cannot change while replicas run; set it in args",
        ),
        ("gateway", {"max_tokns": 2}, "'max_tokns' cannot change.*max_tokens"),
        ("gateway", {"max_tokens": {}}, "max_tokens: Input should be a valid integer"),
        ("gateway", {"media_root": "x"}, "'media_root' cannot change"),
        ("gateway", {"max_tokens": 0}, "must be between 1 and"),
        ("gateway", {"api_keys": [{"tenant": "a"}]}, r"api_keys\.0\.sha256"),
        ("features", {"fps": 0}, "must be above 0"),
    ],
)
def test_a_wrong_user_config_stops_a_start_and_leaves_running_replicas_as_they_are(
    name: DeploymentName, user_config: dict[str, Any], message: str, caplog: pytest.LogCaptureFixture
) -> None:
    limits = Limits(name, CONFIGS[name])
    with pytest.raises(ValueError, match=message):
        limits.reconfigure(user_config)
    limits.reconfigure({})
    with caplog.at_level(logging.ERROR):
        assert not limits.reconfigure(user_config)
    assert f"the limits of {name} stay as they are: user_config of {name}: " in caplog.text
    assert limits.config == CONFIGS[name]


def test_a_gateways_limits_and_keys_count_for_its_next_request(tmp_path: Path) -> None:
    server = Server(tmp_path, api_keys=keys("a"))
    replica = GatewayReplica.__new__(GatewayReplica)
    replica._app = server.http.app
    replica._limits = Limits("gateway", server.http.app.state.current.config)

    def found(**user_config: Any) -> Any:
        replica.reconfigure(user_config)
        return server.chat("a longer text", key="key-a", max_tokens=500)

    assert found().status_code == 200
    check_error(found(max_text_characters=5), 413, "too_large")
    check_error(found(max_request_bytes=10), 413, "too_large")
    check_error(found(max_upload_bytes=10) and server.upload(key="key-a"), 413, "too_large")
    assert found(default_max_tokens=7, max_tokens=7).status_code == 200
    assert server.engine.requests[-1].sampling.max_new_tokens == 7
    rotated = [{"tenant": "b", "sha256": keys("b")[0].sha256, "quota": {"requests_per_minute": 1}}]
    check_error(found(api_keys=rotated), 401, "invalid_api_key")
    assert server.chat(key="key-b").status_code == 200
    check_error(server.chat(key="key-b"), 429, "rate_limit_exceeded")
    assert found().status_code == 200


def test_a_gateways_answers_are_never_longer_than_the_engines() -> None:
    limits = Limits("gateway", GatewayConfig(), check=partial(check_max_tokens, max_new_tokens=2000))
    assert limits.reconfigure({"max_tokens": 2000})
    assert not limits.reconfigure({"max_tokens": 2001})
    assert limits.config.max_tokens == 2000


def test_status_says_which_limits_running_replicas_have_not_taken() -> None:
    """A deploy with a wrong user_config leaves the application RUNNING."""
    limits = [
        {"name": "gateway", "user_config": {"max_tokens": 5000}},
        {"name": "features", "user_config": {"fps": 0.5}},
        {"name": "engine", "user_config": {"max_queued_requests": 3}},
    ]
    args = {"weights": "w", "features": {"feature_store": "s"}}
    application = {"import_path": BUILDER, "args": args, "deployments": limits}
    found = {"status": "RUNNING", "deployments": {}, "message": "", "deployed_app_config": application}
    state = application_state({"applications": {"timeviper": found}}, "timeviper", limit_faults)
    kept = "running replicas keep their earlier limits"
    assert state.state == "RUNNING"
    assert [cause.endswith(kept) for cause in state.causes] == [True, True]
    assert "gateway.max_tokens = 5000 exceeds" in state.causes[0]
    assert "'max_queued_requests' cannot change" in state.causes[1]
    assert limit_faults({"import_path": "other:app", "args": {}}) == limit_faults({}) == []


def test_an_application_is_built_with_the_user_configs_of_its_file() -> None:
    args: dict[str, Any] = {"weights": "w", "features": {"feature_store": "s"}}
    assert build(args)._bound_deployment.user_config == {}  # not None: it must count when it is taken back
    config = ServeConfig(weights="w", features=FeatureServiceConfig(feature_store="s"))
    gateway = build_application(config, {"gateway": {"max_tokens": 300}, "features": {"fps": 0.5}})._bound_deployment
    assert gateway.user_config == {"max_tokens": 300}
    assert gateway.init_args[2]._bound_deployment.user_config == {"fps": 0.5}
    with pytest.raises(ValueError, match="'weights' cannot change"):
        build_application(config, {"engine": {"weights": "x"}})

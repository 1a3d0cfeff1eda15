from __future__ import annotations

import sys
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest

from timeviper_platform.common.ray_cluster import STARTED, connect, local_cluster


def ray_stub(folder: Path, script: str) -> Path:
    program = folder / "ray"
    program.write_text(f"#!/bin/sh\n{script}\n")
    program.chmod(0o700)
    return program


def test_a_cluster_is_yielded_once_its_node_is_registered(tmp_path: Path) -> None:
    node = tmp_path / "node"
    program = ray_stub(tmp_path, f"sleep 0.5; touch {node}; echo '{STARTED}'; exec sleep 60")
    with local_cluster(num_cpus=1, with_dashboard=False, ray_program=program) as variables:
        assert node.exists()
        assert variables["RAY_AUTH_MODE"] == "token"


def test_the_log_of_a_ray_that_fails_to_start_is_in_the_error(tmp_path: Path) -> None:
    program = ray_stub(tmp_path, "echo 'no memory left'; exit 1")
    with (
        pytest.raises(RuntimeError, match=r"has not started its node; .*\nno memory left"),
        local_cluster(num_cpus=1, with_dashboard=False, ray_program=program),
    ):
        pass


def test_a_node_that_times_out_on_a_busy_machine_is_started_again(tmp_path: Path) -> None:
    tried = tmp_path / "tried"
    first = f"[ -e {tried} ] || {{ touch {tried}; echo 'The current node timed out during startup.'; exit 1; }}"
    program = ray_stub(tmp_path, f"{first}; echo '{STARTED}'; exec sleep 60")
    with local_cluster(num_cpus=1, with_dashboard=False, ray_program=program):
        assert tried.exists()


@pytest.mark.parametrize(("address", "expected"), [(None, {"address": "local"}), ("127.0.0.1:1", {})])
def test_ray_imported_without_a_token_still_gets_a_cluster_of_its_own(
    monkeypatch: pytest.MonkeyPatch, address: str | None, expected: dict[str, str]
) -> None:
    calls: list[Any] = []
    stub = SimpleNamespace(
        is_initialized=lambda: False, init=lambda **options: calls.append(options), shutdown=lambda: calls.append("end")
    )
    monkeypatch.setitem(sys.modules, "ray", stub)
    monkeypatch.delenv("RAY_AUTH_MODE", raising=False)
    if address is None:
        monkeypatch.delenv("RAY_ADDRESS", raising=False)
    else:
        monkeypatch.setenv("RAY_ADDRESS", address)
    with connect(namespace="serve"):
        assert calls == [{**expected, "log_to_driver": False, "namespace": "serve"}]
    assert calls[1:] == ["end"]

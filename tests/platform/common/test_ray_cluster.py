"""A private Ray is handed out when its node is there; one that does not come up says why. Without Ray."""

from __future__ import annotations

from pathlib import Path

import pytest

from timeviper_platform.common import ray_cluster as module
from timeviper_platform.common.ray_cluster import STARTED, local_cluster


def _instead_of_ray(folder: Path, script: str, monkeypatch: pytest.MonkeyPatch) -> None:
    program = folder / "ray"
    program.write_text(f"#!/bin/sh\n{script}\n")
    program.chmod(0o700)
    monkeypatch.setattr(module.sys, "executable", str(folder / "python"))


def test_nobody_connects_before_the_node_is_there(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    made = tmp_path / "node"
    _instead_of_ray(tmp_path, f"sleep 0.5; touch {made}; echo '{STARTED}'; exec sleep 60", monkeypatch)
    with local_cluster(num_cpus=1, with_dashboard=False) as variables:
        assert made.exists()
        assert variables["RAY_AUTH_MODE"] == "token"


def test_a_ray_that_ends_at_once_says_why(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    _instead_of_ray(tmp_path, "echo 'no memory left'; exit 1", monkeypatch)
    with (
        pytest.raises(RuntimeError, match=r"has not started its node; .*\nno memory left"),
        local_cluster(num_cpus=1, with_dashboard=False),
    ):
        pass

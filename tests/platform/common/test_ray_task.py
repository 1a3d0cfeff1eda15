"""A function as a task of the cluster, or in this process."""

from __future__ import annotations

import os
from functools import partial

import pytest

from timeviper_platform.common.job import user_error
from timeviper_platform.common.ray_task import run_as_task, task_options

run = partial(run_as_task, wanted_by="the export", way_out="lower them")


def fail(message: str) -> None:
    raise ValueError(message)


def test_without_a_cluster_this_process_runs_the_function(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delenv("RAY_ADDRESS", raising=False)
    assert run(os.getpid, resources={"CPU": 1}) == os.getpid()


def test_options_name_rays_own_resources() -> None:
    assert task_options({"CPU": 2, "memory": 5, "disk": 1}) == {
        "num_cpus": 2,
        "num_gpus": 0,
        "memory": 5,
        "resources": {"disk": 1},
    }


@pytest.mark.cluster
def test_on_a_cluster_a_task_runs_the_function_and_its_mistakes_stay_one_line(ray_address: str) -> None:
    assert run(os.getpid, resources={"CPU": 0.1}) != os.getpid()
    with pytest.raises(Exception, match="no such weights") as caught:
        run(fail, "no such weights", resources={"CPU": 0.1})
    assert user_error(caught.value) == "no such weights"
    with pytest.raises(ValueError, match=r"99 CPUs wanted by the export, .* has 4, .* no larger one; lower"):
        run(os.getpid, resources={"CPU": 99})

"""Why an application of Ray Serve does not run, from what Ray's dashboard answers."""

from __future__ import annotations

import time
from collections.abc import Iterator
from types import SimpleNamespace
from typing import Any

import pytest

from timeviper_platform.serving.status import application_state, failure_causes, wait_for_application

MESSAGE = """The deployment failed to start 2 times in a row. See controller logs for details. Error:
ray::ServeReplica:timeviper:features.initialize_and_get_metadata() (pid=1)
  File "replica.py", line 1928, in initialize
    raise RuntimeError(traceback.format_exc()) from None
RuntimeError: Traceback (most recent call last):
  File "compatibility.py", line 63, in _refuse
    raise ValueError(f"{one} and {other} do not fit")
          ^^^^^^^^^^^^^^^^^^^^^^^^^^^^^^^^^^^^^^^^^^^
ValueError: encoder and store do not fit:
  recipe_version: 2 and 1
preprocess into a new folder
"""


def test_a_failed_deployments_cause_has_no_traceback() -> None:
    def deployment(status: str, message: str) -> SimpleNamespace:
        return SimpleNamespace(status=status, message=message)

    deployments = {
        "engine": deployment("HEALTHY", ""),
        "features": deployment("DEPLOY_FAILED", MESSAGE),
        "gateway": deployment("UNHEALTHY", "no node has room"),
    }
    status = SimpleNamespace(applications={"timeviper": SimpleNamespace(deployments=deployments)})
    cause = "encoder and store do not fit:\n  recipe_version: 2 and 1\npreprocess into a new folder"
    assert failure_causes(status, "timeviper") == f"\nfeatures: ValueError: {cause}\ngateway: no node has room"
    assert failure_causes(status, "another") == ""


def details(status: str, message: str = "", **deployments: tuple[str, str]) -> dict[str, Any]:
    """An answer of /api/serve/applications/, as far as it is read."""
    values = {name: {"status": state, "message": text} for name, (state, text) in deployments.items()}
    return {"applications": {"timeviper": {"status": status, "message": message, "deployments": values}}}


@pytest.mark.parametrize(
    ("answer", "expected"),
    [
        (details("RUNNING", gateway=("HEALTHY", "")), "RUNNING"),
        (
            details("DEPLOYING", engine=("UPDATING", "1 replica cannot be scheduled"), gateway=("HEALTHY", "")),
            "DEPLOYING\nengine UPDATING: 1 replica cannot be scheduled",
        ),
        (details("DEPLOY_FAILED", MESSAGE.replace(":\n  recipe_version: 2 and 1\npreprocess into a new folder", "")),
         "DEPLOY_FAILED\nValueError: encoder and store do not fit"),
        ({"applications": {}}, "NOT_DEPLOYED\nno application 'timeviper'; deploy it with `serve deploy FILE`"),
    ],
)  # fmt: skip
def test_a_state_comes_with_its_causes(answer: dict[str, Any], expected: str) -> None:
    assert str(application_state(answer, "timeviper")) == expected


def test_waiting_ends_when_it_runs_has_failed_or_the_time_is_over() -> None:
    def answers(*states: str) -> Iterator[dict[str, Any]]:
        yield from map(details, states)

    running = answers("DEPLOYING", "UNHEALTHY", "RUNNING")
    assert wait_for_application(lambda: next(running), "timeviper", timeout_s=60, poll_s=0).state == "RUNNING"
    failed = answers("DEPLOYING", "DEPLOY_FAILED")
    assert wait_for_application(lambda: next(failed), "timeviper", timeout_s=60, poll_s=0).state == "DEPLOY_FAILED"
    started = time.monotonic()
    state = wait_for_application(lambda: details("DEPLOYING"), "timeviper", timeout_s=0.1, poll_s=0.01)
    assert (state.state, time.monotonic() - started < 5) == ("DEPLOYING", True)


def test_a_cluster_that_does_not_answer_is_a_state_of_its_own() -> None:
    def refuse() -> dict[str, Any]:
        raise ConnectionError("Failed to connect to Ray\nat address: http://127.0.0.1:1")

    state = wait_for_application(refuse, "timeviper", timeout_s=0)
    assert str(state) == "UNREACHABLE\nFailed to connect to Ray at address: http://127.0.0.1:1"

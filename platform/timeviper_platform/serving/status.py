"""The state of an application of Ray Serve, and why it is not running."""

from __future__ import annotations

import itertools
import time
from collections.abc import Callable, Mapping, Sequence
from typing import Any, NamedTuple

RUNNING = "RUNNING"
NOT_DEPLOYED = "NOT_DEPLOYED"
UNREACHABLE = "UNREACHABLE"
"""A state in addition to Ray's ApplicationStatus, like NOT_DEPLOYED."""
FINAL_STATES = (RUNNING, "DEPLOY_FAILED")
POLL_SECONDS = 1.0


class ApplicationState(NamedTuple):
    state: str
    """RUNNING, another of Ray's ApplicationStatus, NOT_DEPLOYED, or UNREACHABLE"""
    causes: tuple[str, ...] = ()
    """One per fault, named by its deployment"""

    def __str__(self) -> str:
        return "\n".join([self.state, *self.causes])


def application_state(
    details: Mapping[str, Any], name: str, faults: Callable[[Mapping[str, Any]], Sequence[str]] = lambda application: ()
) -> ApplicationState:
    """Returns the state of application `name`.

    Args:
        details: answer of the dashboard's GET /api/serve/applications/.
        faults: returns faults of a running application from its entry in the Serve file.
    """
    applications = details["applications"]
    if name not in applications:
        others = f"; there are {', '.join(sorted(applications))}" if applications else ""
        return ApplicationState(NOT_DEPLOYED, (f"no application {name!r}{others}; deploy it with `serve deploy FILE`",))
    found = applications[name]
    if found["status"] == RUNNING:
        return ApplicationState(RUNNING, tuple(faults(found.get("deployed_app_config") or {})))
    causes = [
        f"{deployment} {values['status']}: {without_traceback(values['message'])}".rstrip(": ")
        for deployment, values in found["deployments"].items()
        if values["status"] != "HEALTHY"
    ]
    own = without_traceback(found["message"])
    return ApplicationState(found["status"], tuple(causes) if causes or not own else (own,))


def wait_for_application(
    read: Callable[[], Mapping[str, Any]],
    name: str,
    *,
    timeout_s: float,
    poll_s: float = POLL_SECONDS,
    faults: Callable[[Mapping[str, Any]], Sequence[str]] = lambda application: (),
) -> ApplicationState:
    """Returns the state once it is RUNNING or DEPLOY_FAILED, else the last one after `timeout_s`; 0 = the state now.

    Args:
        read: returns the details of `application_state`; a ConnectionError counts as UNREACHABLE.
        faults: as `application_state`'s.
    """
    deadline = time.monotonic() + timeout_s
    while True:
        try:
            state = application_state(read(), name, faults)
        except ConnectionError as error:
            state = ApplicationState(UNREACHABLE, (" ".join(str(error).split()),))
        if state.state in FINAL_STATES or time.monotonic() >= deadline:
            return state
        time.sleep(poll_s)


def failure_causes(status: Any, application: str) -> str:
    """Returns the message of each failed deployment of `serve.status()`, without its traceback."""
    found = status.applications.get(application)
    deployments = {} if found is None else found.deployments
    return "".join(
        f"\n{name}: {without_traceback(deployment.message)}"
        for name, deployment in deployments.items()
        if deployment.message and deployment.status not in ("HEALTHY", "UPDATING")
    )


def without_traceback(message: str) -> str:
    lines = message.strip().splitlines()
    frames = [number for number, line in enumerate(lines) if line.startswith('  File "')]
    message_lines = lines[frames[-1] + 1 :] if frames else lines
    return "\n".join(itertools.dropwhile(lambda line: line.startswith("    "), message_lines))

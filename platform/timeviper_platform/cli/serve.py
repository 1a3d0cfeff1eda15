"""Serves weights over HTTP until SIGINT or SIGTERM.

    timeviper serve --config ray_configs/tiny/serve.yaml [--port 8000] [weights=outputs/demo/weights ...]
    timeviper serve status [--wait] [--timeout 600]

The Serve configuration file also works with `serve run` and `serve deploy`. Joins the cluster at RAY_ADDRESS, else
starts a local Ray. On exit it removes its application and stops everything it started. Use `status`
after `serve deploy`, which exits with 0 before the application runs, even if it then fails.
"""

from __future__ import annotations

import argparse
import logging
import os
import signal
import sys
import threading
import time
import urllib.error
import urllib.request
from collections.abc import Sequence
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any, Literal

import ray
from ray import serve

from timeviper_platform.common import ray_cluster
from timeviper_platform.common.config import load_config
from timeviper_platform.common.job import JobParser, JobResult, run_job
from timeviper_platform.serving.app import ServeConfig, build_application, limit_faults, resolve_paths
from timeviper_platform.serving.gateway.connections import CALLBACK_VARIABLE, environment
from timeviper_platform.serving.limits import DeploymentName
from timeviper_platform.serving.status import RUNNING, failure_causes, wait_for_application

logger = logging.getLogger("serve")

READY_TIMEOUT_S = 180.0
LOOPBACK = ("127.0.0.1", "localhost", "::1")
DASHBOARD = "http://127.0.0.1:8265"
STATUS_HELP = "Reports whether a deployed application is RUNNING (exit code 0), or its state and why (1)."
CONTROLLER = "SERVE_CONTROLLER_ACTOR"
"""Ray Serve's name for its controller."""


@dataclass(frozen=True, kw_only=True, slots=True)
class HttpOptions:
    host: str = "127.0.0.1"
    """Address to listen on."""
    port: int = 8000
    """Port to listen on."""
    request_timeout_s: float | None = None
    """Maximum seconds of a request; None = no limit besides the gateway's own."""
    keep_alive_timeout_s: int = 90
    """Seconds for which idle connections stay open."""


@dataclass(frozen=True, kw_only=True, slots=True)
class DeploymentEntry:
    name: DeploymentName
    """The deployment."""
    user_config: dict[str, Any] = field(default_factory=dict)
    """Limits that override those of `args`; `serve deploy` changes them without new replicas."""


@dataclass(frozen=True, kw_only=True, slots=True)
class ApplicationEntry:
    args: ServeConfig
    """Configuration of the application."""
    import_path: Literal["timeviper_platform.serving.app:build"]
    """The application's builder."""
    name: str = "timeviper"
    """Name of the application."""
    route_prefix: str = "/"
    """URL path of the application."""
    runtime_env: dict[str, Any] = field(default_factory=dict)
    """Ray's runtime environment of the replicas."""
    deployments: list[DeploymentEntry] = field(default_factory=list)
    """Limits by deployment."""


@dataclass(frozen=True, kw_only=True, slots=True)
class TracingOptions:
    """Ray Serve's tracing. A request whose `traceparent` is sampled is always traced."""

    enabled: bool = False
    """Whether requests have OpenTelemetry spans."""
    exporter_import_path: str = "timeviper_platform.serving.tracing:otlp"
    """Function that returns span processors."""
    sampling_ratio: float = 0.01
    """Share of the other requests to trace."""


@dataclass(frozen=True, kw_only=True, slots=True)
class ServeFile:
    """Supported options of Ray Serve's file format; others need `serve deploy`."""

    applications: list[ApplicationEntry]
    """Exactly one application."""
    proxy_location: Literal["HeadOnly", "EveryNode", "Disabled"] = "EveryNode"
    """Nodes with an HTTP proxy."""
    http_options: HttpOptions = field(default_factory=HttpOptions)
    """Options of the proxies."""
    tracing_config: TracingOptions | None = None
    """None = RAY_SERVE_TRACING_EXPORTER_IMPORT_PATH decides."""

    def __post_init__(self) -> None:
        if len(self.applications) != 1:
            raise ValueError(f"the file has {len(self.applications)} applications, this job runs one; use serve deploy")


def main(arguments: Sequence[str] | None = None) -> int:
    given = list(sys.argv[1:] if arguments is None else arguments)
    if given[:1] == ["status"]:
        return _status_main(given[1:])
    parser = JobParser(
        __doc__,
        config_class=ServeConfig,
        config_file="ray_configs/serve.yaml (a Ray Serve file; the keys are those of its application's args)",
        override="weights=FOLDER",
    )
    parser.add_argument("--port", type=int, help="instead of http_options.port")
    return run_job(parser, serve_until_stopped, given)


def _status_main(arguments: Sequence[str]) -> int:
    parser = JobParser(STATUS_HELP)
    parser.prog += " status"
    parser.add_argument("--wait", action="store_true", help="until it runs, has failed, or the timeout")
    parser.add_argument("--timeout", type=float, default=600.0, metavar="SECONDS", help="of --wait (600)")
    parser.add_argument("--name", default="timeviper", help="the application (timeviper)")
    parser.add_argument(
        "--address",
        default=os.environ.get("RAY_API_SERVER_ADDRESS") or os.environ.get("RAY_DASHBOARD_ADDRESS") or DASHBOARD,
        help=f"of Ray's dashboard (RAY_API_SERVER_ADDRESS, else {DASHBOARD})",
    )
    return run_job(parser, show_status, arguments)


def show_status(options: argparse.Namespace) -> JobResult:
    """Reports the application's state and faults; exit code 0 if it runs without faults."""
    from ray.dashboard.modules.serve.sdk import ServeSubmissionClient

    state = wait_for_application(
        lambda: ServeSubmissionClient(options.address).get_serve_details(),
        options.name,
        timeout_s=options.timeout if options.wait else 0.0,
        faults=limit_faults,
    )
    return JobResult([str(state)], exit_code=0 if state.state == RUNNING and not state.causes else 1)


def serve_until_stopped(options: argparse.Namespace) -> JobResult:
    stop = threading.Event()
    _watch_signals(stop)
    file = _load(options.config, options.overrides)
    (entry,) = file.applications
    if file.http_options.host not in LOOPBACK:
        entry.args.gateway.require_keys(f"but the server listens on {file.http_options.host}")
    if not ray_cluster.has_cluster():
        logger.info("RAY_ADDRESS is not set: starting a local Ray")
    ray_options: dict[str, Any] = {
        "runtime_env": entry.runtime_env or None,
        "namespace": "serve",
        "logging_level": logging.WARNING,
    }
    with ray_cluster.connect(**ray_options):
        _watch_signals(stop)  # ray.init has replaced them
        _serve(file, entry, options.port or file.http_options.port, stop)
    return JobResult()


def _load(path: str, overrides: Sequence[str]) -> ServeFile:
    return load_config(ServeFile, path, [f"applications.0.args.{override}" for override in overrides])


def _watch_signals(stop: threading.Event) -> None:
    for number in (signal.SIGINT, signal.SIGTERM):
        signal.signal(number, lambda *_: stop.set())


def _serve(file: ServeFile, entry: ApplicationEntry, port: int, stop: threading.Event) -> None:
    was_running = _is_serve_running()
    http = file.http_options
    if was_running:
        logger.warning(
            "Ray Serve was running already: slow clients are bounded only if %s was set where it was started; see"
            " docs/serve.md",
            CALLBACK_VARIABLE,
        )
    serve.start(
        proxy_location=file.proxy_location,
        http_options={
            "host": http.host,
            "port": port,
            "request_timeout_s": http.request_timeout_s,
            "keep_alive_timeout_s": http.keep_alive_timeout_s,
        },
        tracing_config=None if file.tracing_config is None else asdict(file.tracing_config),
        controller_options={
            "runtime_env": {"env_vars": environment(entry.args.gateway.connections)}
        },  # for its proxies
    )
    try:
        application = build_application(
            resolve_paths(entry.args, Path.cwd()), {limits.name: limits.user_config for limits in entry.deployments}
        )
        try:
            serve.run(application, name=entry.name, route_prefix=entry.route_prefix)
        except RuntimeError as error:  # Serve names the failed deployments; the causes are in their status
            raise RuntimeError(f"{error}{failure_causes(serve.status(), entry.name)}") from error
        url = f"http://{_url_host(http.host)}:{port}{entry.route_prefix.rstrip('/')}"
        _wait_until_ready(url, stop)
        if not stop.is_set():
            print(f"ready: {url}/v1  model {entry.args.gateway.model_name}  (Ctrl-C ends it)", flush=True)
        stop.wait()
    finally:
        serve.delete(entry.name)
        if not was_running:
            serve.shutdown()


def _is_serve_running() -> bool:
    try:
        ray.get_actor(CONTROLLER, namespace="serve")
    except ValueError:
        return False
    return True


def _url_host(host: str) -> str:
    host = {"0.0.0.0": "127.0.0.1", "::": "::1"}.get(host, host)
    return f"[{host}]" if ":" in host else host


def _wait_until_ready(url: str, stop: threading.Event) -> None:
    deadline = time.monotonic() + READY_TIMEOUT_S
    while time.monotonic() < deadline and not stop.is_set():
        try:
            with urllib.request.urlopen(f"{url}/health/ready", timeout=10):
                return
        except (urllib.error.URLError, OSError):
            stop.wait(0.3)
    if not stop.is_set():
        raise RuntimeError(f"{url}/health/ready does not answer; check that no other Ray Serve uses this port")

"""Ray Serve's own commands with our application: deploy, build and run, and what another deploy changes."""

from __future__ import annotations

import contextlib
import json
import os
import signal
import subprocess
import sys
import threading
import time
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import httpx2 as httpx
import pytest
import yaml

from reference.serve_apps import SPANS_VARIABLE
from reference.tiny_serving import make_serving_folders
from timeviper_platform.common.ray_cluster import free_port, local_cluster
from timeviper_platform.serving.gateway.config import ConnectionLimits
from timeviper_platform.serving.gateway.connections import environment

ROOT = Path(__file__).resolve().parents[2]
NAMES = ("gateway", "features", "engine")
TIMEOUT_S = 300
pytestmark = [pytest.mark.slow, pytest.mark.cluster, pytest.mark.timeout(900)]


@dataclass
class Site:
    """A Ray with our application, and its Serve file."""

    root: Path
    port: int
    environment: dict[str, str]
    file: dict[str, Any]
    num_files: int = field(default=0)

    @property
    def application(self) -> dict[str, Any]:
        application: dict[str, Any] = self.file["applications"][0]
        return application

    @property
    def path(self) -> Path:
        self.num_files += 1
        path = self.root / f"serve-{self.num_files}.yaml"
        path.write_text(yaml.safe_dump(self.file))
        return path

    def run(self, *command: str, expected: int = 0) -> str:
        program = [str(Path(sys.executable).parent / command[0]), *command[1:]]
        result = subprocess.run(
            program, cwd=self.root, env=self.environment, capture_output=True, text=True, timeout=TIMEOUT_S + 60
        )
        assert result.returncode == expected, result.stdout + result.stderr[-3000:]
        return result.stdout

    def deploy(self) -> None:
        self.run("serve", "deploy", str(self.path))

    def status(self, *options: str, expected: int = 0) -> str:
        job = str(ROOT / "jobs" / "serve.py")
        return self.run("python", job, "status", *options, "--timeout", str(TIMEOUT_S), expected=expected).strip()

    def details(self) -> dict[str, Any]:
        details: dict[str, Any] = self._client.get_serve_details()
        return details

    @property
    def _client(self) -> Any:
        from ray.dashboard.modules.serve.sdk import ServeSubmissionClient

        return ServeSubmissionClient(self.environment["RAY_API_SERVER_ADDRESS"])

    def redeploy(self) -> None:
        """As `serve deploy`, in this process."""
        self._client.deploy_applications(self.file)

    def pids(self) -> dict[str, list[int]]:
        """Processes of running replicas; none while the application is being built."""
        deployments = self.details()["applications"]["timeviper"]["deployments"]
        return {
            name: [replica["pid"] for replica in values["replicas"] if replica["state"] == "RUNNING"]
            for name, values in deployments.items()
        }

    def get(self, path: str, **options: Any) -> httpx.Response:
        return httpx.get(f"http://127.0.0.1:{self.port}{path}", timeout=60, **options)

    def ask(self, text: str = "What?", headers: dict[str, str] | None = None, **values: Any) -> httpx.Response:
        parts = [{"type": "video_url", "video_url": {"url": "feature://film"}}, {"type": "text", "text": text}]
        body = {"model": "timeviper", "messages": [{"role": "user", "content": parts}], "max_tokens": 4}
        body |= values
        url = f"http://127.0.0.1:{self.port}/tv/v1/chat/completions"
        return httpx.post(url, json=body, timeout=120, headers=headers)

    def wait(self, is_true: Callable[[], bool]) -> None:
        deadline = time.monotonic() + TIMEOUT_S
        while not is_true():
            assert time.monotonic() < deadline
            time.sleep(0.3)

    @contextlib.contextmanager
    def asked_all_the_time(self) -> Iterator[list[int]]:
        """Yields the statuses of questions that follow each other meanwhile."""
        statuses, stop = list[int](), threading.Event()

        def ask() -> None:
            while not stop.wait(0.2):
                statuses.append(self.ask().status_code)

        with ThreadPoolExecutor(1) as pool:
            task = pool.submit(ask)
            try:
                yield statuses
            finally:
                stop.set()
            task.result()


def serve_file(root: Path, port: int) -> dict[str, Any]:
    folders = make_serving_folders(root)
    args = {
        "weights": folders.weights,
        "features": {"feature_store": folders.store, "num_threads": 1},
        "gateway": {"media_root": str(root / "media"), "default_max_tokens": 4, "max_tokens": 64},
        "engine": {"num_threads": 1, "engine": {"max_new_tokens": 64}},
        "deployments": {name: {"num_cpus": 0.1} for name in NAMES},
    }
    builder = "timeviper_platform.serving.app:build"
    return {
        "proxy_location": "HeadOnly",
        "http_options": {"host": "127.0.0.1", "port": port, "request_timeout_s": 30},
        "tracing_config": {"enabled": True, "exporter_import_path": "reference.serve_apps:span_files"},
        "applications": [
            {"name": "timeviper", "route_prefix": "/tv", "import_path": builder, "args": args},
            {"name": "slow", "route_prefix": "/slow", "import_path": "reference.serve_apps:slow"},
            {"name": "broken", "route_prefix": "/broken", "import_path": builder, "args": {"weights": "w"}},
        ],
    }


@pytest.fixture(scope="module")
def site(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Site]:
    root, port = tmp_path_factory.mktemp("deploy"), free_port()
    (root / "spans").mkdir()
    variables = {
        **environment(ConnectionLimits()),
        SPANS_VARIABLE: str(root / "spans"),
        "PYTHONPATH": os.pathsep.join([str(ROOT / "tests"), str(root), os.environ.get("PYTHONPATH", "")]),
    }
    token_file = Path(os.environ["RAY_AUTH_TOKEN_PATH"])  # Ray reads it once in this process
    with local_cluster(num_cpus=4, token_file=token_file, environment=variables) as cluster:
        dashboard = {"RAY_DASHBOARD_ADDRESS": cluster["RAY_API_SERVER_ADDRESS"]}  # of the serve commands
        variables |= {**cluster, **dashboard}
        found = Site(root, port, {**os.environ, **variables}, serve_file(root, port))
        found.deploy()
        assert found.status("--wait") == "RUNNING"
        yield found


def test_status_says_running_or_why_not(site: Site) -> None:
    assert site.status() == "RUNNING"
    failed = site.status("--wait", "--name", "broken", expected=1)
    assert failed.startswith("DEPLOY_FAILED\n")
    assert "args: features: " in failed
    assert site.status("--name", "other", expected=1).startswith("NOT_DEPLOYED\nno application 'other'")
    assert site.ask().status_code == 200


def test_rays_own_errors_have_openais_shape(site: Site) -> None:
    def error(response: httpx.Response) -> tuple[int, str]:
        assert set(response.json()["error"]) == {"message", "type", "param", "code"}
        return response.status_code, response.json()["error"]["code"]

    site.wait(lambda: site.get("/slow?seconds=0").status_code == 200)
    assert error(site.get("/none")) == (404, "unknown_url")
    away = site.get("/none/v1/models")
    assert (error(away), away.headers["retry-after"]) == ((503, "unavailable"), "2")
    with ThreadPoolExecutor(4) as pool:  # one runs, one waits, the others are too many
        answers = list(
            pool.map(lambda _: site.get("/slow?seconds=40", headers={"x-request-timeout-seconds": "0"}), "1234")
        )
    assert sorted(error(answer) for answer in answers) == [(408, "timeout")] * 2 + [(429, "busy")] * 2


def test_one_trace_crosses_the_deployments(site: Site) -> None:
    trace = "4bf92f3577b34da6a3ce929d0e0e4736"
    headers = {"traceparent": f"00-{trace}-00f067aa0ba902b7-01"}
    assert site.ask("a secret?", headers, mm_processor_kwargs={"max_frames": 7}).status_code == 200

    def spans() -> dict[str, dict[str, Any]]:
        lines = [line for path in (site.root / "spans").iterdir() for line in path.read_text().splitlines()]
        assert "secret" not in "".join(lines)
        own = [span for span in map(json.loads, lines) if span["context"]["trace_id"] == f"0x{trace}"]
        return {span["context"]["span_id"]: span for span in own}

    def path_of(span: dict[str, Any]) -> list[str]:
        parent = found.get(span["parent_id"])
        return [*(path_of(parent) if parent else []), span["name"]]

    request = "POST /v1/chat/completions"
    site.wait(lambda: {request, "fetch", "answer"} <= {span["name"] for span in spans().values()})
    found = spans()
    paths = {span["name"]: path_of(span) for span in found.values()}
    assert paths[request] == [request]
    for name, deployment in (
        ("fetch", "features features"),
        ("prefill", "engine generate"),
        ("answer", "engine generate"),
    ):
        handled = [f"route_to_replica {deployment}", f"replica_handle_request {deployment}"]
        assert paths[name] == [request, *handled, name]


def test_limits_change_in_running_replicas_and_args_replace_them_without_a_failed_request(site: Site) -> None:
    long, before = "x" * 50, site.pids()
    site.file["applications"] = [site.application]
    assert site.ask(long).status_code == 200
    with site.asked_all_the_time() as statuses:
        site.application["deployments"] = [
            {"name": "gateway", "user_config": {"max_text_characters": 40}},
            {"name": "features", "user_config": {"max_frames": 10}},
        ]
        site.redeploy()
        site.wait(lambda: site.ask(long).status_code == 413 and vision_tokens(site) == 40)
        site.application["deployments"][0]["user_config"] = {"max_tokens": 10**6}
        site.redeploy()
        faults = site.status("--wait", expected=1)
        assert faults.startswith("RUNNING\ngateway.max_tokens = 1000000 exceeds"), faults
        assert site.ask(long).status_code == 413
        del site.application["deployments"]
        site.redeploy()
        site.wait(lambda: site.ask(long).status_code == 200 and vision_tokens(site) == 160)
        assert site.pids() == before
        site.application["args"]["gateway"]["max_text_characters"] = 40
        site.redeploy()

        def are_replaced() -> bool:
            now = site.pids()
            return all(now.get(name) and set(now[name]).isdisjoint(before[name]) for name in NAMES)

        site.wait(are_replaced)
        site.wait(lambda: site.details()["applications"]["timeviper"]["status"] == "RUNNING")
        assert site.ask(long).status_code == 413
    assert set(statuses) == {200}


def vision_tokens(site: Site) -> int:
    return int(site.ask().json()["usage"]["prompt_tokens_details"]["vision_tokens"])


def test_a_built_file_is_deployed_and_run(site: Site) -> None:
    (site.root / "built.py").write_text(
        f"from timeviper_platform.serving.app import build\napp = build({site.application['args']!r})\n"
    )
    site.run("serve", "build", "built:app", "--output-path", "built.yaml")
    built = yaml.safe_load((site.root / "built.yaml").read_text())
    (application,) = built["applications"]
    assert {deployment["name"] for deployment in application["deployments"]} == set(NAMES)
    application |= {"name": "timeviper", "route_prefix": "/tv"}
    built["http_options"] = site.file["http_options"]
    site.file = built
    site.deploy()
    assert site.status("--wait") == "RUNNING"
    assert site.ask().status_code == 200
    command = [str(Path(sys.executable).parent / "serve"), "run", str(site.path)]
    log = site.root / "run.log"
    with log.open("w") as output:
        process = subprocess.Popen(command, cwd=site.root, env=site.environment, stdout=output, stderr=output)
    try:
        site.wait(lambda: "Submitted deploy config" in log.read_text() or process.poll() is not None)
        assert site.status("--wait") == "RUNNING", log.read_text()
        assert site.ask().status_code == 200
    finally:
        process.send_signal(signal.SIGINT)
        process.wait(120)
    assert site.status(expected=1).startswith("NOT_DEPLOYED")

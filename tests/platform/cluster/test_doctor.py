from __future__ import annotations

import http.server
import json
import threading
from collections.abc import Iterator
from importlib import metadata
from pathlib import Path
from types import SimpleNamespace

import pytest

from timeviper_platform.cli.doctor import main
from timeviper_platform.cluster import doctor
from timeviper_platform.cluster.doctor import Finding, describe, examine

TOKEN = "a" * 64


@pytest.fixture(autouse=True)
def own_home(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("HOME", str(tmp_path))
    for name in ("RAY_ADDRESS", "RAY_API_SERVER_ADDRESS", "RAY_AUTH_MODE", "RAY_AUTH_TOKEN", "RAY_AUTH_TOKEN_PATH"):
        monkeypatch.delenv(name, raising=False)


@pytest.fixture
def dashboard() -> Iterator[SimpleNamespace]:
    """A server that answers as Ray's dashboard does, and wants a token."""
    state = SimpleNamespace(version=metadata.version("ray"))

    class Handler(http.server.BaseHTTPRequestHandler):
        def do_GET(self) -> None:
            allowed = self.headers["Authorization"] == f"Bearer {TOKEN}"
            self.send_response(200 if allowed and self.path == "/api/version" else 401)
            self.end_headers()
            if allowed:
                self.wfile.write(json.dumps({"ray_version": state.version}).encode())

        def log_message(self, *_: object) -> None:
            pass

    server = http.server.ThreadingHTTPServer(("127.0.0.1", 0), Handler)
    threading.Thread(target=server.serve_forever, daemon=True).start()
    state.url = f"http://127.0.0.1:{server.server_port}"
    yield state
    server.shutdown()
    server.server_close()


def found(check: str, *uris: str, need_gpu: bool = False) -> list[Finding]:
    return [finding for finding in examine(uris, need_gpu=need_gpu) if finding.check == check]


def test_every_fault_has_a_way_out_and_the_exit_code_follows(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    assert main([str(tmp_path / "store")]) == 0
    (tmp_path / "file").touch()
    assert main([str(tmp_path / "file" / "store")]) == 1
    lines = capsys.readouterr().out.splitlines()
    assert any(line.startswith("error    storage") and str(tmp_path / "file") in line for line in lines)
    assert all(finding.way_out for finding in examine() if finding.status != "ok")
    assert list((tmp_path / "store").iterdir()) == []


def test_a_version_out_of_range_is_an_error(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(doctor, "requires", lambda _: ["torch>=99", "pyarrow", "no-such-package>=1", "x; extra == 'a'"])
    (problem,) = [finding for finding in found("versions") if finding.status == "error"]
    assert "torch" in problem.text
    assert "needs >=99" in problem.text
    assert "no-such-package is missing" in problem.text
    assert "pyarrow" not in problem.text


def test_a_missing_gpu_is_an_error_where_one_is_needed(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("torch.cuda.is_available", lambda: False)
    assert [finding.status for finding in found("devices")] == ["ok", "warning"]
    assert [finding.status for finding in found("devices", need_gpu=True)] == ["ok", "error"]


def test_the_token_is_needed_for_a_cluster_and_private(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    assert [finding.status for finding in found("token")] == ["ok"]  # jobs make their own
    monkeypatch.setenv("RAY_ADDRESS", "10.0.0.1:6379")
    assert [finding.status for finding in found("token")] == ["error"]
    token = tmp_path / ".ray" / "auth_token"
    token.parent.mkdir()
    token.write_text(TOKEN)
    token.chmod(0o644)
    assert [(finding.status, finding.way_out) for finding in found("token")] == [("warning", f"chmod 600 {token}")]
    token.chmod(0o600)
    assert [finding.status for finding in found("token")] == ["ok"]


def test_the_cluster_must_run_the_same_ray(dashboard: SimpleNamespace, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("RAY_API_SERVER_ADDRESS", dashboard.url)
    assert [finding.text for finding in found("cluster")] == [f"{dashboard.url} answers 401"]
    monkeypatch.setenv("RAY_AUTH_TOKEN", TOKEN)
    assert [finding.status for finding in found("cluster")] == ["ok"]
    dashboard.version = "2.40.0"
    (problem,) = found("cluster")
    assert problem.status == "error"
    assert "runs Ray 2.40.0" in problem.text
    monkeypatch.setenv("RAY_API_SERVER_ADDRESS", "http://127.0.0.1:1")
    assert "does not answer" in found("cluster")[0].text


def test_a_small_shared_memory_names_its_option(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(doctor.shutil, "disk_usage", lambda _: SimpleNamespace(total=64 << 20, used=0, free=64 << 20))
    (problem,) = found("/dev/shm")
    assert problem.status == "warning"
    assert "--shm-size=" in problem.way_out


def test_a_check_that_fails_does_not_stop_the_others(monkeypatch: pytest.MonkeyPatch) -> None:
    def fail() -> Iterator[Finding]:
        raise KeyError("x")
        yield

    monkeypatch.setattr(doctor, "_ports", fail)
    findings = examine()
    assert findings[-1].check == "storage"
    assert describe(findings)[-1].startswith("1 error, ")

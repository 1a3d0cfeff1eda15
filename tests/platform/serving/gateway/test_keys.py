"""keys: rotation by file, and quotas."""

from __future__ import annotations

import hashlib
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import yaml

from reference.synthetic_gateway import MP4, PNG, Server, check_error, video
from timeviper_platform.serving.gateway import keys
from timeviper_platform.serving.gateway.config import ApiKey, CurrentConfig, GatewayConfig, Quota
from timeviper_platform.serving.gateway.keys import KeyRing


def entry(name: str, **quota: int) -> dict[str, Any]:
    return {"tenant": name, "sha256": hashlib.sha256(f"key-{name}".encode()).hexdigest(), "quota": quota}


def write(path: Path, *entries: dict[str, Any]) -> str:
    path.write_text(yaml.safe_dump({"keys": list(entries)}))
    return str(path)


@pytest.fixture
def clock(monkeypatch: pytest.MonkeyPatch) -> Callable[[float], None]:
    now = [1000.0]

    def forward(seconds: float) -> None:
        now[0] += seconds

    monkeypatch.setattr(keys.time, "monotonic", lambda: now[0])
    return forward


def with_quota(folder: Path, **quota: int) -> Server:
    return Server(folder, api_keys=(ApiKey(**{**entry("a"), "quota": Quota(**quota)}),))


def test_keys_in_a_file_change_while_the_server_runs(tmp_path: Path, clock: Callable[[float], None]) -> None:
    path = tmp_path / "keys.yaml"
    server = Server(tmp_path, api_keys_file=write(path, entry("old")))

    def status(name: str) -> int:
        headers = {"Authorization": f"Bearer key-{name}"}
        return int(server.http.get("/v1/models", headers=headers).status_code)

    assert (status("old"), status("new"), status("")) == (200, 401, 401)
    write(path, entry("new"))
    clock(keys.REFRESH_S)
    assert (status("old"), status("new")) == (401, 200)
    for broken in ("keys: [{tenant: x}]", "- no", "{", "\xff"):
        path.write_text(broken, encoding="latin-1")
        clock(keys.REFRESH_S)
        assert status("new") == 200
    path.unlink()
    clock(keys.REFRESH_S)
    assert status("new") == 200


def test_a_file_that_is_no_list_of_keys_stops_the_start(tmp_path: Path) -> None:
    path = tmp_path / "keys.yaml"
    path.write_text("keys: [{tenant: x, sha: 3}]")
    with pytest.raises(ValueError, match="sha256"):
        KeyRing(CurrentConfig(GatewayConfig(api_keys_file=str(path))))
    with pytest.raises(OSError, match="none"):
        KeyRing(CurrentConfig(GatewayConfig(api_keys_file=str(tmp_path / "none"))))


def test_requests_per_minute_come_back(tmp_path: Path, clock: Callable[[float], None]) -> None:
    server = with_quota(tmp_path, requests_per_minute=2)
    assert [server.chat(key="key-a").status_code for _ in range(2)] == [200, 200]
    refused = server.chat(key="key-a")
    check_error(refused, 429, "rate_limit_exceeded")
    assert refused.headers["retry-after"] == "30"
    assert server.http.get("/health/live").status_code == 200
    clock(30)
    assert server.chat(key="key-a").status_code == 200
    assert server.chat(key="key-a").status_code == 429


def test_frames_are_charged_when_they_are_known(tmp_path: Path, clock: Callable[[float], None]) -> None:
    server = with_quota(tmp_path, frames_per_minute=3)
    for _ in range(2):  # 2 frames each; the last may exceed what is left
        assert server.chat(video("feature://known"), key="key-a").status_code == 200
    refused = server.chat(video("feature://known"), key="key-a")
    check_error(refused, 429, "rate_limit_exceeded")
    assert refused.headers["retry-after"] == "40"
    # before, nothing else could be asked or cancelled either
    assert server.chat(key="key-a").status_code == 200
    for path in ("/v1/models", "/v1/jobs", "/v1/files"):
        assert server.http.get(path, headers={"Authorization": "Bearer key-a"}).status_code == 200
    clock(40)
    assert server.chat(video("feature://known"), key="key-a").status_code == 200


def test_requests_at_once_are_counted_until_their_answers_end(tmp_path: Path) -> None:
    server = with_quota(tmp_path, max_concurrent_requests=1)
    server.engine.during = lambda: check_error(server.chat(key="key-a"), 429, "rate_limit_exceeded")
    assert server.chat(key="key-a", stream=True).status_code == 200
    server.engine.during = None
    assert server.chat(key="key-a").status_code == 200


def test_stored_bytes_have_a_quota_until_files_are_deleted(tmp_path: Path) -> None:
    server = with_quota(tmp_path, max_stored_bytes=len(MP4) + 10)
    first = server.upload(MP4, key="key-a").json()["id"]
    assert server.upload(MP4, key="key-a").json()["id"] == first  # nothing new
    check_error(server.upload(PNG, key="key-a"), 429, "insufficient_quota")
    server.http.delete(f"/v1/files/{first}", headers={"Authorization": "Bearer key-a"})
    assert server.upload(PNG, key="key-a").status_code == 200

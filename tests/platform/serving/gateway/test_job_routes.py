"""job_routes: jobs over HTTP with synthetic services."""

from __future__ import annotations

import time
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest

from reference.synthetic_gateway import PNG, Server, check_error, keys
from timeviper_platform.serving.gateway.config import Quota
from timeviper_platform.serving.messages import Refusal


def post(server: Server, **values: Any) -> Any:
    body = {"model": "timeviper", "video": "feature://known", "questions": ["what?", "when?"], **values}
    return server.http.post("/v1/jobs", json=body)


def wait(server: Server, job_id: str, done: Callable[[Any], bool]) -> Any:
    deadline = time.monotonic() + 20
    while not done(job := server.http.get(f"/v1/jobs/{job_id}").json()):
        assert time.monotonic() < deadline, job
        time.sleep(0.02)
    return job


def has_ended(job: Any) -> bool:
    return job["status"] not in ("queued", "running")


def test_a_job_answers_each_question_as_chat_does(server: Server) -> None:
    with server.http:
        created = post(server, max_tokens=7, fps=0.5)
        assert (created.status_code, created.json()["status"]) == (202, "queued")
        job = wait(server, created.json()["id"], has_ended)
        assert (job["status"], job["error"]) == ("completed", None)
        assert [answer["choices"][0]["message"]["content"] for answer in job["answers"]] == ["hello world"] * 2
        assert job["progress"] == {
            "stage": "ended",
            "frames_done": 2,
            "frames_total": 2,
            "questions_done": 2,
            "questions_total": 2,
        }
        assert [request.turns[0].text for request in server.engine.requests] == ["what?", "when?"]
        assert {request.sampling.max_new_tokens for request in server.engine.requests} == {7}
        assert server.features.limits == [(0.5, None)] * 2
        page = server.http.get("/v1/jobs?limit=1").json()
        (listed,) = page["data"]
        assert (listed["id"], listed["answers"], page["has_more"]) == (job["id"], None, False)
        assert server.http.get(f"/v1/jobs?after={job['id']}").json()["data"] == []
        check_error(server.http.get("/v1/jobs?limit=0"), 400, "invalid_value")


def test_a_job_takes_what_a_question_takes_and_refuses_the_rest_by_name(server: Server) -> None:
    """Before, what it did not know was ignored: a job for time spans was answered in prose."""
    segments = {"type": "json_schema", "json_schema": {"name": "segments"}}
    options = {"response_format": segments, "temperature": 0, "stop": "x", "nframes": 5, "stream": False, "user": "me"}
    with server.http:
        job = wait(server, post(server, **options).json()["id"], has_ended)
        assert job["status"] == "completed"
        assert job["answers"][0]["media"] == [{"duration_seconds": 2.0, "frame_times_seconds": [0.0, 1.04]}]
        asked = server.engine.requests[0]
        assert (asked.is_temporal, asked.sampling.temperature, asked.sampling.stop) == (True, 0, ("x",))
        assert server.features.limits == [(None, 5)] * 2
        twice = wait(server, post(server, n=2).json()["id"], has_ended)
        assert [len(answer["choices"]) for answer in twice["answers"]] == [2, 2]
        check_error(post(server, stream=True), 400, "unsupported_parameter")
        check_error(post(server, messages=[]), 400, "unsupported_parameter")
        assert check_error(post(server, max_token=3), 400, "unknown_parameter")["param"] == "max_token"
        check_error(post(server, response_format={"type": "json_schema"}), 400, "missing_required_parameter")


def test_a_cancelled_job_ends_within_a_second_and_frees_its_slot(server: Server) -> None:
    server.engine.delay_s = 60.0
    with server.http:
        job = post(server).json()
        wait(server, job["id"], lambda job: bool(job["progress"]["stage"] == "answering"))
        began = time.monotonic()
        assert server.http.post(f"/v1/jobs/{job['id']}/cancel").json()["status"] == "cancelled"
        while server.engine.closed == 0:
            assert time.monotonic() < began + 1
            time.sleep(0.01)
        ended = wait(server, job["id"], lambda job: bool(job["progress"]["stage"] == "ended"))
        assert (ended["status"], ended["answers"]) == ("cancelled", [])
        server.engine.delay_s = 0.0
        done = wait(server, post(server).json()["id"], has_ended)
        assert server.http.post(f"/v1/jobs/{done['id']}/cancel").json() == done


def test_a_busy_or_absent_service_is_tried_again_and_other_errors_end_the_job(server: Server) -> None:
    server.engine.refusal = Refusal(status=503, message="the engine service is not available", code="unavailable")
    with server.http:
        job = post(server).json()
        deadline = time.monotonic() + 20
        while server.engine.closed == 0:
            assert time.monotonic() < deadline
            time.sleep(0.02)
        assert server.http.get(f"/v1/jobs/{job['id']}").json()["status"] == "running"
        server.engine.refusal = None
        assert wait(server, job["id"], has_ended)["status"] == "completed"
        lost = wait(server, post(server, video="feature://none").json()["id"], has_ended)
        assert (lost["status"], lost["error"]["code"], lost["answers"]) == ("failed", "media_not_found", [])


def test_a_jobs_questions_wait_for_the_keys_frames(tmp_path: Path) -> None:
    """Before, one job could ask about any number of frames, and left nothing for hours to come."""
    (key,) = keys("a")
    quota = Quota(frames_per_minute=120)  # two are back in a second
    server = Server(tmp_path, api_keys=(replace(key, quota=quota),))
    server.features.num_frames = 121
    server.http.headers["Authorization"] = "Bearer key-a"
    with server.http:
        job = post(server).json()
        running = wait(server, job["id"], lambda job: job["progress"]["questions_done"] == 1)
        assert running["status"] == "running"
        assert len(server.engine.requests) == 1
        assert wait(server, job["id"], has_ended)["status"] == "completed"
        assert len(server.engine.requests) == 2


def test_a_job_that_no_question_could_be_asked_with_is_refused_at_once(tmp_path: Path) -> None:
    server = Server(tmp_path, max_unfinished_jobs=1)
    server.engine.delay_s = 60.0
    with server.http:
        check_error(post(server, model="gpt-4"), 404, "model_not_found")
        check_error(post(server, video="data:video/mp4;base64,AAAA"), 400, "invalid_url")
        check_error(post(server, questions=[]), 400, "invalid_value")
        check_error(post(server, max_frames=0), 400, "invalid_value")
        check_error(server.http.get("/v1/jobs/job-none"), 404, "job_not_found")
        assert post(server).status_code == 202
        check_error(post(server), 429, "too_many_jobs")


def test_jobs_and_their_files_belong_to_the_key_that_sent_them(tmp_path: Path) -> None:
    server = Server(tmp_path, api_keys=keys("a", "b"))
    with server.http:
        server.http.headers["Authorization"] = "Bearer key-a"
        server.upload(PNG, key="a")
        job = wait(server, post(server).json()["id"], has_ended)
        server.http.headers["Authorization"] = "Bearer key-b"
        assert server.http.get("/v1/jobs").json()["data"] == []
        for method, path in (("GET", ""), ("POST", "/cancel")):
            check_error(server.http.request(method, f"/v1/jobs/{job['id']}{path}"), 404, "job_not_found")


@pytest.mark.parametrize("job_id", ["..", "job-../../x", "job-" + "a" * 31])
def test_an_id_is_never_a_path(server: Server, job_id: str) -> None:
    assert server.http.get(f"/v1/jobs/{job_id}").status_code == 404

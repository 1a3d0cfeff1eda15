"""chat: the requests that reach the services, and errors for the client."""

from __future__ import annotations

import base64
import hashlib
from pathlib import Path

import pytest

from reference.synthetic_gateway import MP4, PNG, Server, check_error, video
from timeviper_model.inference.answer import SamplingParams
from timeviper_platform.serving.messages import MediaBytes, MediaFile, MediaFrames, StoredFeatures


def test_parameters_reach_the_engine_and_defaults_come_from_the_configuration(tmp_path: Path) -> None:
    server = Server(tmp_path, default_temperature=0.5, default_max_tokens=7)
    server.chat()
    server.chat(temperature=0, top_p=0.5, max_tokens=9, n=2, seed=-1, stop="x", logprobs=True, top_logprobs=2)
    default, explicit = server.engine.requests
    assert default.sampling == SamplingParams(temperature=0.5, max_new_tokens=7, seed=default.sampling.seed)
    assert explicit.sampling == SamplingParams(
        temperature=0, top_p=0.5, max_new_tokens=9, seed=2**63 - 1, stop=("x",), num_logprobs=2
    )
    assert (default.n, explicit.n) == (1, 2)


def test_media_come_from_the_store_a_file_or_the_request(server: Server) -> None:
    file_id = server.upload().json()["id"]
    inline = "data:video/mp4;base64," + base64.b64encode(MP4).decode()
    for url in ("feature://known", file_id, inline):
        assert server.chat(video(url), mm_processor_kwargs={"max_frames": 5, "fps": 0.5}).status_code == 200
    stored, file, data = server.features.sources
    assert stored == StoredFeatures(media_id="known")
    assert isinstance(file, MediaFile)
    assert Path(file.uri).read_bytes() == MP4
    assert isinstance(data, MediaBytes)
    assert data.sha256 == file.sha256 == hashlib.sha256(MP4).hexdigest()
    assert set(server.features.limits) == {(0.5, 5)}
    assert server.engine.requests[0].turns[0].media[0].num_frames == 2


def test_input_video_and_a_bare_text_url_are_aliases(server: Server) -> None:
    assert server.chat([{"type": "input_video", "input_video": "feature://known"}]).status_code == 200
    assert server.features.sources[0] == StoredFeatures(media_id="known")


@pytest.mark.parametrize(
    ("url", "status", "code"),
    [
        ("feature://unknown", 404, "media_not_found"),
        ("file-00000000000000000000000000000000", 404, "file_not_found"),
        ("file-../../etc/passwd", 404, "file_not_found"),
        ("https://example.com/a.mp4", 400, "remote_media_disabled"),
        ("http://169.254.169.254/latest", 400, "invalid_url"),
        ("file:///etc/passwd", 400, "local_media_disabled"),
        ("s3://bucket/a.mp4", 400, "invalid_url"),
        ("/etc/passwd", 400, "invalid_url"),
        ("data:video/mp4;base64,!!!!", 400, "invalid_data_uri"),
        ("data:video/mp4;base64," + base64.b64encode(b"a text").decode(), 415, "unsupported_media_type"),
        ("data:video/mp4;base64," + base64.b64encode(PNG).decode(), 415, "unsupported_media_type"),
    ],
)
def test_unavailable_media_are_a_4xx_with_the_content_part(server: Server, url: str, status: int, code: str) -> None:
    error = check_error(server.chat(video(url)), status, code)
    assert error["param"] == "messages.0.content.1"
    assert server.engine.requests == []


def test_a_picture_file_is_not_a_video(server: Server) -> None:
    file_id = server.upload(PNG).json()["id"]
    check_error(server.chat(video(file_id)), 415, "unsupported_media_type")
    assert server.chat([{"type": "image_url", "image_url": {"url": file_id}}]).status_code == 200


@pytest.mark.parametrize("part", ["image_url", "video_url"])
@pytest.mark.parametrize("as_file", [False, True])
def test_an_animation_may_be_called_a_picture_or_a_video(server: Server, part: str, as_file: bool) -> None:
    gif = b"GIF89a" + bytes(50)
    url = server.upload(gif).json()["id"] if as_file else "data:image/gif;base64," + base64.b64encode(gif).decode()
    assert server.chat([{"type": part, part: {"url": url}}]).status_code == 200


def data_uri(data: bytes) -> str:
    return "data:image/png;base64," + base64.b64encode(data).decode()


def picture(number: int) -> dict[str, object]:
    return {"type": "image_url", "image_url": {"url": data_uri(PNG + bytes([number])), "detail": "low"}}


def text(words: str) -> dict[str, object]:
    return {"type": "text", "text": words}


def test_text_and_media_keep_their_order(server: Server) -> None:
    """Before, all media moved before the text."""
    assert server.chat([text("a"), picture(1), text("b"), text("c"), picture(2)]).status_code == 200
    (turn,) = server.engine.requests[0].turns
    assert turn.marked_text("*") == "a*b\nc*"
    assert len(server.features.sources) == 2


def test_messages_of_one_role_in_a_row_are_one(server: Server) -> None:
    messages = [
        {"role": "system", "content": "s"}, {"role": "developer", "content": "d"},
        {"role": "user", "content": [text("a"), picture(1)]}, {"role": "user", "content": [picture(2), text("b")]},
        {"role": "assistant", "content": None}, {"role": "user", "content": "c"},
    ]  # fmt: skip
    assert server.chat(messages=messages).status_code == 200
    turns = server.engine.requests[0].turns
    assert [turn.role for turn in turns] == ["system", "user", "assistant", "user"]
    assert [turn.marked_text("*") for turn in turns] == ["s\n\nd", "a*\n\n*b", "", "c"]


def test_roles_come_in_any_order(server: Server) -> None:
    """Before, each of these was a 400, after its media were decoded."""

    def turns_of(*roles: str) -> list[tuple[str, str]]:
        messages = [{"role": role, "content": f"{role}{number}"} for number, role in enumerate(roles)]
        assert server.chat(messages=messages).status_code == 200
        return [(turn.role, turn.text) for turn in server.engine.requests[-1].turns]

    assert turns_of("user", "assistant", "system", "user") == [
        ("user", "user0"),
        ("assistant", "assistant1"),
        ("user", "system2\n\nuser3"),
    ]
    assert turns_of("user", "developer") == [("user", "user0\n\ndeveloper1")]
    assert turns_of("system", "assistant", "user") == [
        ("system", "system0"),
        ("user", ""),
        ("assistant", "assistant1"),
        ("user", "user2"),
    ]
    assert turns_of("assistant", "user")[0] == ("user", "")
    messages = [{"role": "user", "content": video("feature://known")}, {"role": "assistant", "content": "It is"}]
    error = check_error(server.chat(messages=messages), 400, "invalid_value")
    assert (error["param"], server.features.sources) == ("messages.1.role", [])


def test_pictures_in_a_row_are_the_frames_of_one_video(server: Server) -> None:
    """Before, more than 8 frames were refused, and each was decoded and encoded alone."""
    frames = [picture(number) for number in range(64)]
    file_id = server.upload(PNG).json()["id"]
    uploaded = {"type": "image_url", "image_url": file_id}
    assert server.chat([*frames, uploaded, text("What?"), picture(99)], nframes=32).status_code == 200
    joined, alone = server.features.sources
    assert isinstance(joined, MediaFrames)
    assert len(joined.frames) == 65
    assert isinstance(joined.frames[-1], MediaFile)
    assert isinstance(alone, MediaBytes)
    assert server.features.limits == [(None, 32)] * 2
    (turn,) = server.engine.requests[0].turns
    assert turn.marked_text("*") == "*What?*"
    check_error(server.chat([text(str(n)) if n % 2 else picture(n) for n in range(20)]), 400, "too_many_media")


def test_a_file_part_is_whatever_the_file_is(server: Server) -> None:
    for data in (MP4, PNG):
        file_id = server.upload(data).json()["id"]
        assert server.chat([{"type": "file", "file": {"file_id": file_id}}]).status_code == 200
    check_error(server.chat([{"type": "file", "file": {}}]), 400, "missing_required_parameter")


def test_more_tokens_than_the_limit_are_clamped(tmp_path: Path) -> None:
    server = Server(tmp_path, max_tokens=9, default_max_tokens=5)
    for wanted in ({"max_tokens": 10_000}, {"max_completion_tokens": 10}, {"max_tokens": 4}, {"top_p": 0}):
        assert server.chat(**wanted).status_code == 200
    assert [request.sampling.max_new_tokens for request in server.engine.requests] == [9, 9, 4, 5]


def test_frames_may_come_later_unless_the_answer_has_their_times(server: Server) -> None:
    segments = {"type": "json_schema", "json_schema": {"name": "segments"}}
    for values in ({}, {"response_format": segments}):
        assert server.chat(video("feature://known"), **values).status_code == 200
    assert server.features.whole == [False, True]


def test_texts_above_the_limit_are_refused(tmp_path: Path) -> None:
    check_error(Server(tmp_path, max_text_characters=10).chat("x" * 11), 413, "too_large")

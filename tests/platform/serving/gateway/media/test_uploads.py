"""uploads: media types, storage and tenants."""

from __future__ import annotations

import base64
import io
from pathlib import Path
from urllib.parse import quote

import pytest

from timeviper_platform.data.media.signatures import sniff_modality
from timeviper_platform.serving.gateway.media import uploads
from timeviper_platform.serving.gateway.media.uploads import MediaStore, parse_data_uri
from timeviper_platform.serving.gateway.openai_protocol import ApiError
from timeviper_platform.serving.messages import MediaBytes, MediaFrames

MP4 = b"\x00\x00\x00\x20ftypisom" + bytes(100)
PNG = b"\x89PNG\r\n\x1a\n" + bytes(50)


@pytest.mark.parametrize(
    ("header", "modality"),
    [
        (MP4, "video"),
        (b"\x1aE\xdf\xa3" + bytes(20), "video"),
        (b"RIFF\x00\x00\x00\x00AVI LIST", "video"),
        (b"G" + bytes(187) + b"G" + bytes(10), "video"),
        (PNG, "image"),
        (b"\xff\xd8\xff\xe0" + bytes(10), "image"),
        (b"RIFF\x00\x00\x00\x00WEBPVP8 ", "image"),
        (b"GIF89a" + bytes(20), "image"),
        (b"RIFF\x00\x00\x00\x00WAVEfmt ", None),
        (b"#EXTM3U\nhttp://127.0.0.1/secret", None),
        (b"ffconcat version 1.0\nfile /etc/passwd", None),
        (b"Good day, this is a text that begins with a G", None),
        (b"", None),
    ],
)
def test_first_bytes_distinguish_media_from_other_files(header: bytes, modality: str | None) -> None:
    assert sniff_modality(header) == modality


def uri_of(data: bytes, mime: str = "video/mp4") -> str:
    return f"data:{mime};base64,{base64.b64encode(data).decode()}"


def test_a_data_uri_is_its_bytes() -> None:
    media = parse_data_uri(uri_of(MP4), expected="video", param="p")
    assert isinstance(media, MediaBytes)
    assert (media.data, media.modality) == (MP4, "video")
    assert "ftyp" not in repr(media)


@pytest.mark.parametrize(
    ("uri", "status"),
    [
        ("data:video/mp4;base64", 400),
        ("data:" + "x" * 300 + ";base64,", 400),
        ("data:video/mp4,plain", 415),
        ("data:video/mp4;base64,@@@", 400),
        ("data:video/mp4;base64,AAAAA", 400),
        ("data:video/mp4;base64,é", 400),
        (uri_of(b"a text file"), 415),
        (uri_of(PNG), 415),  # a picture instead of a video
    ],
)
def test_a_bad_data_uri_is_an_error_with_its_field(uri: str, status: int) -> None:
    with pytest.raises(ApiError) as caught:
        parse_data_uri(uri, expected="video", param="messages.0.content.1")
    assert (caught.value.status, caught.value.param) == (status, "messages.0.content.1")


@pytest.mark.parametrize("data", [MP4, MP4 + b"\xfb\xff\xfe", MP4 + b"\xff"])
def test_a_data_uri_may_be_written_in_every_way(data: bytes) -> None:
    plain = base64.b64encode(data).decode()
    forms = [
        uri_of(data).replace("data:", "DATA:").replace("base64", "BASE64"),
        "data:;base64," + plain,
        "data:video/mp4;charset=utf-8;codecs=avc1;base64," + plain,
        uri_of(data)[:60] + "\r\n " + uri_of(data)[60:],
        "data:video/mp4;base64," + base64.urlsafe_b64encode(data).decode().rstrip("="),
        "data:video/mp4;base64," + quote(plain, safe=""),
        "data:video/mp4," + quote(data),
    ]
    for form in forms:
        media = parse_data_uri(form, expected="video", param="p")
        assert isinstance(media, MediaBytes)
        assert media.data == data, form


def test_joined_jpeg_frames_are_a_video() -> None:
    jpegs = [b"\xff\xd8\xff\xe0" + bytes([number]) * 20 for number in range(3)]
    uri = "data:video/jpeg;base64," + ",".join(base64.b64encode(jpeg).decode() for jpeg in jpegs)
    media = parse_data_uri(uri, expected="video", param="p")
    assert isinstance(media, MediaFrames)
    assert [frame.data for frame in media.frames if isinstance(frame, MediaBytes)] == jpegs
    with pytest.raises(ApiError, match="3 frames"):
        parse_data_uri(uri, expected="video", param="p", max_frames=2)


def test_a_file_is_stored_under_its_hash_and_visible_only_to_its_tenant(tmp_path: Path) -> None:
    store = MediaStore(str(tmp_path))
    record = store.put("alice", io.BytesIO(MP4), filename="../../etc/cat video.mp4", purpose="vision")
    assert record.filename == "cat video.mp4"
    assert Path(store.uri("alice", record)).read_bytes() == MP4
    assert Path(store.uri("alice", record)).name == f"{record.sha256}.media"
    assert store.get("alice", record.id) == record
    assert store.get("bob", record.id) is None
    assert store.list("bob") == []
    assert not store.delete("bob", record.id)


def test_the_same_content_again_is_the_same_file(tmp_path: Path) -> None:
    store = MediaStore(str(tmp_path))
    first = store.put("alice", io.BytesIO(MP4), filename="a", purpose="vision")
    again = store.put("alice", io.BytesIO(MP4), filename="b", purpose="user_data")
    assert (again.id, again.filename, again.purpose) == (first.id, "b", "user_data")
    assert store.get("alice", first.id) == again
    other = store.put("alice", io.BytesIO(PNG), filename="c", purpose="vision")
    assert {record.id for record in store.list("alice")} == {first.id, other.id}


def test_a_record_is_read_once_while_it_stays_as_it_is(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Before, a list and a quota read every record of their tenant, and the janitor those of all."""
    store, other = MediaStore(str(tmp_path)), MediaStore(str(tmp_path))
    first, second = (
        store.put("alice", io.BytesIO(data), filename="a", purpose="vision", max_total_bytes=1000)
        for data in (MP4, PNG)
    )
    reads = []
    read = uploads.read_json
    monkeypatch.setattr(uploads, "read_json", lambda uri: reads.append(uri) or read(uri))
    assert {record.id for record in store.list("alice")} == {first.id, second.id}
    assert len(reads) == 2
    assert len(store.list("alice")) == len(store.list("alice")) == 2
    with pytest.raises(ApiError, match="delete some files"):
        store.put("alice", io.BytesIO(PNG + bytes(900)), filename="a", purpose="vision", max_total_bytes=1000)
    assert len(reads) == 2
    other.put("alice", io.BytesIO(MP4), filename="new name", purpose="vision")
    other.delete("alice", second.id)
    assert [record.filename for record in store.list("alice")] == ["new name"]
    assert len(reads) == 3


def test_a_deleted_file_is_gone_from_the_disk(tmp_path: Path) -> None:
    store = MediaStore(str(tmp_path))
    record = store.put("alice", io.BytesIO(MP4), filename="a", purpose="vision")
    assert store.delete("alice", record.id)
    assert store.get("alice", record.id) is None
    assert list((tmp_path / "alice").iterdir()) == []


def test_other_files_are_not_stored(tmp_path: Path) -> None:
    with pytest.raises(ApiError, match="neither a video nor a picture"):
        MediaStore(str(tmp_path)).put("alice", io.BytesIO(b"text"), filename="movie.mp4", purpose="vision")
    assert list(tmp_path.iterdir()) == []


@pytest.mark.parametrize("file_id", ["file-", "file-../../secret", "file-" + "A" * 32, "x" * 40])
def test_a_malformed_id_names_no_file(tmp_path: Path, file_id: str) -> None:
    assert MediaStore(str(tmp_path)).get("alice", file_id) is None

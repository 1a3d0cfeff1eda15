"""The video stream is the one that players take."""

from __future__ import annotations

import av
import pytest
from av.stream import Disposition

from reference.numbered_videos import Shown, check_every_path, numbered_video, on_screen
from timeviper_platform.data.media.container import DecodeError, decode_errors
from timeviper_platform.data.media.probe import probe_media

FILM = range(75)


def numbered_from(first: int) -> Shown:
    return [(t, pts, first + number) for t, pts, number in on_screen(FILM)]


@pytest.mark.parametrize("format", ["mp4", "matroska"])
def test_the_default_stream_is_taken(format: str) -> None:
    others = [("mjpeg!", 0, Disposition(0)), ("libx264", 500, Disposition(0))]
    film = numbered_video(FILM, format=format, first_number=1000, more_streams=others, disposition=Disposition.default)
    check_every_path(film, numbered_from(1000))


def test_of_equal_streams_the_first_is_taken() -> None:
    others = [("libx264", 500, Disposition.default)]
    film = numbered_video(
        FILM, format="matroska", first_number=1000, more_streams=others, disposition=Disposition.default
    )
    check_every_path(film, numbered_from(500))


def test_a_cover_is_not_taken() -> None:
    cover = [("mjpeg!", 0, Disposition.attached_pic)]
    film = numbered_video(FILM, format="mp4", first_number=1000, more_streams=cover, disposition=Disposition(0))
    check_every_path(film, numbered_from(1000))


def test_a_cover_alone_is_not_a_video() -> None:
    music = numbered_video([0], format="mp4", codec="mjpeg", disposition=Disposition.attached_pic, sound=(0, 2))
    with pytest.raises(DecodeError, match=r"no_video_stream: .* only audio, video"):
        probe_media(music)


def test_contents_that_ffmpeg_does_not_permit_are_corrupt() -> None:
    with pytest.raises(DecodeError, match=r"corrupt_file: .* its packets contradict its headers, or are encrypted"):
        with decode_errors("probe", b"damaged WMV"):
            raise av.error.PermissionError(1, "Operation not permitted", "file:film.wmv")
    with pytest.raises(DecodeError, match="permission_denied"):
        with decode_errors("probe", "film.mp4"):
            raise PermissionError(13, "Permission denied", "film.mp4")

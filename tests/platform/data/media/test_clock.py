"""Clocks that start late, jump or wrap, and streams that begin anywhere: frames by the medium's clock."""

from __future__ import annotations

import struct

import pytest

from reference.numbered_videos import check_every_path, numbered_video, on_screen, remux

FRAGMENTED = {"movflags": "frag_keyframe+empty_moov+default_base_moof"}

WRAP_TICKS = (1 << 33) * 25 // 90_000
"""Ticks of 1/25 s until a 33-bit clock of 90 kHz is full."""


def with_decode_time(data: bytes, ticks: int) -> bytes:
    """Adds ticks to the decode time of every fragment (tfdt, ISO/IEC 14496-12)."""
    shifted, at = bytearray(data), data.find(b"tfdt")
    while at >= 0:
        layout = ">Q" if shifted[at + 4] else ">I"
        (value,) = struct.unpack_from(layout, shifted, at + 8)
        struct.pack_into(layout, shifted, at + 8, value + ticks)
        at = data.find(b"tfdt", at + 4)
    return bytes(shifted)


@pytest.mark.parametrize(
    ("format", "codec"),
    [("flv", "libx264"), ("matroska", "libx264"), ("webm", "libvpx"), ("mp4", "libx264"), ("mpegts", "libx264"),
     ("mpeg", "mpeg2video")],
)  # fmt: skip
def test_a_clock_that_starts_late_begins_at_0(format: str, codec: str) -> None:
    film = numbered_video(range(90_000, 90_100), format=format, codec=codec)
    check_every_path(film, on_screen(range(100)))


@pytest.mark.parametrize("start_seconds", [100, 1_700_000_000 // 100])
def test_fragments_cut_from_a_live_stream_begin_at_0(start_seconds: int) -> None:
    film = numbered_video(range(100), format="mp4", container_options=FRAGMENTED)
    check_every_path(with_decode_time(film, 12_800 * start_seconds), on_screen(range(100)))


def test_0_is_where_the_sound_starts_if_that_is_earlier() -> None:
    film = numbered_video(range(2550, 2650), format="matroska", sound=(100, 106))
    check_every_path(film, on_screen(range(50, 150)))


@pytest.mark.parametrize(("format", "codec"), [("mpegts", "libx264"), ("mpegts", "mpeg2video"), ("mpeg", "mpeg2video")])
@pytest.mark.parametrize("starts", [(0, 0, 0), (50, 25 * 72_000, 50), (5_000, 60, 5_000)])
def test_joined_recordings_follow_each_other(format: str, codec: str, starts: tuple[int, ...]) -> None:
    parts = [
        numbered_video(range(start, start + 80), format=format, codec=codec, first_number=80 * number)
        for number, start in enumerate(starts)
    ]
    check_every_path(b"".join(parts), on_screen(range(240)), parts=3)


def test_a_later_part_may_use_other_pids() -> None:
    """FFmpeg loses the first part's last frame, number 79."""
    pids = ({}, {"mpegts_start_pid": "600"})
    parts = [
        numbered_video(range(80), format="mpegts", first_number=80 * number, container_options=options)
        for number, options in enumerate(pids)
    ]
    expected = [(t, pts, number + (number >= 79)) for t, pts, number in on_screen(range(159))]
    check_every_path(b"".join(parts), expected, parts=2)


def test_streams_that_appear_later_do_not_end_the_film_early() -> None:
    """PyAV's demux() raises an IndexError at the end of such files."""
    service = {"mpegts_service_id": "5", "mpegts_pmt_start_pid": "700", "mpegts_start_pid": "600"}
    film = numbered_video(range(80), format="mpegts")
    other = numbered_video(range(80), format="mpegts", container_options=service)
    check_every_path(film + other, on_screen(range(80)))


def test_a_gap_below_the_limit_stays_a_gap() -> None:
    parts = [numbered_video(range(50 + n, 100 + n), format="mpegts", first_number=n // 5) for n in (0, 250)]
    check_every_path(b"".join(parts), on_screen([*range(50), *range(250, 300)]))


@pytest.mark.parametrize(("codec", "first"), [("libx264", 12), ("mpeg2video", 10)])
def test_a_part_that_begins_inside_a_group_of_pictures_starts_with_its_keyframe(codec: str, first: int) -> None:
    """Frame `first` of the second part is its first packet, at 3 s; its keyframe is frame 25."""
    parts = [numbered_video(range(75 + 25 * n), format="mpegts", codec=codec, first_number=75 * n) for n in (0, 1)]
    joined = parts[0] + remux(parts[1], format="mpegts", first_packet=10)
    rest = [(float(t), float(t), 75 + first + 25 * (t - 3)) for t in (4, 5, 6)]
    check_every_path(joined, [*on_screen(range(75)), (3.0, 2.96, 74), *rest], parts=2)


@pytest.mark.parametrize("format", ["mpegts", "mpeg"])
def test_the_33_bit_clock_may_wrap(format: str) -> None:
    codec = "libx264" if format == "mpegts" else "mpeg2video"
    film = numbered_video(range(WRAP_TICKS - 60, WRAP_TICKS + 60), format=format, codec=codec)
    check_every_path(film, on_screen(range(120)))


@pytest.mark.parametrize(
    ("format", "codec"),
    [("mpeg1video", "mpeg1video"), ("mpeg2video", "mpeg2video"), ("h264", "libx264"), ("hevc", "libx265"),
     ("asf", "wmv2"), ("avi", "mpeg4"), ("ivf", "libvpx")],
)  # fmt: skip
def test_formats_without_presentation_times_show_their_frames_in_order(format: str, codec: str) -> None:
    options = {"libx265": {"x265-params": "log-level=none"}}.get(codec)
    check_every_path(numbered_video(range(100), format=format, codec=codec, options=options), on_screen(range(100)))

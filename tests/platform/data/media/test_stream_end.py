"""The end of a video is when its last frame leaves the screen, whatever its headers state."""

from __future__ import annotations

import io
import random
import struct

import av
import pytest

from reference.numbered_videos import SIZE, check_every_path, numbered_video, on_screen
from timeviper_platform.data.media.clock import StreamClock
from timeviper_platform.data.media.probe import probe_media
from timeviper_platform.data.media.signatures import HEAD_BYTES
from timeviper_platform.data.media.stream_end import read_to_end, stated_size
from timeviper_platform.data.video.reader import read_frames

FILM = range(100)

SHARES = pytest.mark.parametrize("share", [0.3, 5])
"""Stated durations: a part, and a multiple of the right one."""


@pytest.mark.parametrize("format", ["mp4", "mov", "matroska", "flv"])
@pytest.mark.parametrize("seed", [0, 1])
def test_variable_frame_rates_with_b_frames_end_with_the_last_frame(format: str, seed: int) -> None:
    drawn = random.Random(seed)
    ticks = [0]
    while len(ticks) < 80:
        ticks.append(ticks[-1] + (1 if drawn.random() < 0.85 else drawn.randrange(2, 40)))
    check_every_path(numbered_video(ticks, format=format, gop=250), on_screen(ticks))


@pytest.mark.parametrize("format", ["mp4", "matroska"])
def test_a_gap_before_the_last_frame_is_not_its_duration(format: str) -> None:
    ticks = [*range(50), 200]
    check_every_path(numbered_video(ticks, format=format), on_screen(ticks))


@SHARES
def test_durations_of_matroska_may_be_wrong(share: float) -> None:
    film = numbered_video(FILM, format="matroska")
    at = film.index(b"\x44\x89\x88") + 3
    check_every_path(film[:at] + struct.pack(">d", 4000 * share) + film[at + 8 :], on_screen(FILM))


@SHARES
def test_durations_of_flv_may_be_wrong(share: float) -> None:
    film = numbered_video(FILM, format="flv")
    at = film.index(b"duration\0") + 9
    check_every_path(film[:at] + struct.pack(">d", 4 * share) + film[at + 8 :], on_screen(FILM))


@SHARES
@pytest.mark.parametrize("options", [{}, {"movflags": "frag_keyframe+empty_moov"}])
def test_durations_of_mp4_may_be_wrong(share: float, options: dict[str, str]) -> None:
    film = bytearray(numbered_video(FILM, format="mp4", container_options=options))
    for box, offset in ((b"mvhd", 20), (b"mdhd", 20), (b"tkhd", 24)):
        at = film.index(box) + offset
        (duration,) = struct.unpack_from(">I", film, at)
        struct.pack_into(">I", film, at, int(duration * share))
    check_every_path(bytes(film), on_screen(FILM))


@pytest.mark.parametrize(
    ("format", "options"),
    [("matroska", {"live": "1"}), ("flv", {"flvflags": "no_duration_filesize"}),
     ("mp4", {"movflags": "empty_moov+frag_every_frame"})],
)  # fmt: skip
def test_pipes_and_crashed_recorders_state_no_duration(format: str, options: dict[str, str]) -> None:
    check_every_path(numbered_video(FILM, format=format, container_options=options), on_screen(FILM))


@pytest.mark.parametrize("format", ["mp4", "matroska"])
@pytest.mark.parametrize("start", [0, 2])
def test_sound_may_be_longer(format: str, start: int) -> None:
    film = numbered_video(FILM, format=format, sound=(start, 12))
    batch = read_frames(film, SIZE)
    assert (len(batch.frames), batch.num_missing) == (4, 0)
    check_every_path(film, on_screen(FILM))


def with_edits(film: bytes, edits: list[tuple[int, int, int]]) -> bytes:
    """Replaces the edit list of an MP4: (duration in ms, media time, rate), see ISO/IEC 14496-12, 8.6.6."""
    changed = bytearray(film)
    at = film.index(b"elst") - 4
    (size,) = struct.unpack_from(">I", film, at)
    rows = b"".join(struct.pack(">IiHH", duration, start, rate, 0) for duration, start, rate in edits)
    box = struct.pack(">I4sII", 16 + len(rows), b"elst", 0, len(edits)) + rows
    changed[at : at + size] = box
    for name in (b"edts", b"trak", b"moov"):
        start = film.rindex(name, 0, at) - 4
        (old,) = struct.unpack_from(">I", film, start)
        struct.pack_into(">I", changed, start, old + len(box) - size)
    return bytes(changed)


@pytest.mark.parametrize(
    ("edits", "ticks", "first"),
    [
        ([(2000, -1, 1), (4000, 1024, 1)], range(100), 0),  # an empty edit: the clock starts with the picture
        ([(2000, 1024 + 512 * 63, 1)], range(37), 63),  # begins inside a group of pictures
        ([(2200, 1024, 1)], range(55), 0),  # ends early
    ],
)
def test_edit_lists_are_played_as_ffmpeg_plays_them(
    edits: list[tuple[int, int, int]], ticks: range, first: int
) -> None:
    film = with_edits(numbered_video(FILM, format="mp4"), edits)
    check_every_path(film, [(t, pts, first + number) for t, pts, number in on_screen(ticks)])


@pytest.mark.parametrize("edits", [[(1000, 1024, 1), (3000, 1024 + 12800, 0), (3000, 1024 + 12800, 1)],
                                   [(2000, 1024 + 12800, 1), (2000, 1024 + 12800, 1)]])  # fmt: skip
def test_edit_lists_that_dwell_or_repeat_miss_nothing(edits: list[tuple[int, int, int]]) -> None:
    film = with_edits(numbered_video(FILM, format="mp4"), edits)
    with av.open(io.BytesIO(film)) as container:
        stream = container.streams.video[0]
        played = [frame.pts * stream.time_base for frame in container.decode(stream)]
    batch = read_frames(film, SIZE)
    assert batch.num_missing == 0
    expected = [float(max(pts for pts in played if pts <= t)) for t in range(int(max(played)) + 1)]
    assert batch.pts_seconds.tolist() == expected


@pytest.mark.parametrize(("format", "codec"), [("matroska", "libx264"), ("flv", "libx264"), ("mp4", "libx264")])
@pytest.mark.parametrize("share", [0.5, 0.8])
def test_the_frames_that_a_cut_took_are_missing(format: str, codec: str, share: float) -> None:
    film = numbered_video(range(250), format=format, codec=codec)
    if format == "mp4":
        film = moved_to_front(film, film.index(b"moov") - 4)
    batch = read_frames(film[: int(len(film) * share)], SIZE)
    assert 0 < len(batch.frames) < 10
    assert len(batch.frames) + batch.num_missing in (9, 10)  # a frame within a second of the cut may not count


def moved_to_front(film: bytes, moov: int) -> bytes:
    """Moves an MP4's index before its samples, as for web servers."""
    (size,) = struct.unpack_from(">I", film, moov)
    index = bytearray(film[moov : moov + size])
    at = index.index(b"stco")
    (count,) = struct.unpack_from(">I", index, at + 8)
    for entry in range(count):
        (offset,) = struct.unpack_from(">I", index, at + 12 + 4 * entry)
        struct.pack_into(">I", index, at + 12 + 4 * entry, offset + size)
    (brand,) = struct.unpack_from(">I", film, 0)
    return film[:brand] + bytes(index) + film[brand:moov]


@pytest.mark.parametrize(("format", "codec"), [("matroska", "libx264"), ("avi", "mpeg4"), ("flv", "libx264")])
def test_headers_state_the_size_of_a_whole_file(format: str, codec: str) -> None:
    film = numbered_video(FILM, format=format, codec=codec)
    assert stated_size(film[:HEAD_BYTES]) == len(film)
    assert stated_size(film[:20]) is None or format == "avi"


def test_live_files_state_no_size() -> None:
    film = numbered_video(FILM, format="matroska", container_options={"live": "1"})
    assert stated_size(film[:HEAD_BYTES]) is None
    assert stated_size(b"") is None


def test_probing_reads_only_the_last_packets_of_an_indexed_film() -> None:
    film = numbered_video(range(1000), format="mp4", gop=1000)
    with av.open(io.BytesIO(film)) as container:
        stream = container.streams.video[0]
        packets = read_to_end(container, stream, StreamClock(container, stream), name="film")
    assert 32 < packets.num_shown < 100
    assert probe_media(film).duration_seconds == 40

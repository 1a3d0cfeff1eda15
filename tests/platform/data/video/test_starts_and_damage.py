"""Streams that begin inside a group of pictures, lack clean keyframes, repeat pictures or are damaged."""

from __future__ import annotations

import io
import random
from fractions import Fraction
from pathlib import Path

import av
import numpy as np
import pytest

from reference.numbered_videos import SIZE, check_every_path, numbered_video, on_screen, remux, shown
from reference.painted_numbers import read_number
from reference.plain_decode import IMAGE_SIZE, not_in, plain_decode
from reference.synthetic_media import make_video
from timeviper_platform.data.video.decord_reader import DecordReader
from timeviper_platform.data.video.keyframe_reader import KeyframeReader
from timeviper_platform.data.video.reader import open_video, read_frames
from timeviper_platform.data.video.sampling import sample_times

OPEN_GOPS = {
    "libx264": {"x264-params": "open-gop=1:bframes=3:keyint=25:min-keyint=25", "bf": "3"},
    "libx265": {"x265-params": "open-gop=1:keyint=25:min-keyint=25:log-level=none"},
    "mpeg2video": {"bf": "2"},
}


@pytest.mark.parametrize("format", ["mp4", "mpegts", "matroska"])
def test_intra_refresh_shows_what_plain_decoding_shows(format: str) -> None:
    film = numbered_video(range(150), format=format, gop=40, options={"intra-refresh": "1", "bf": "0"})
    check_every_path(film, on_screen(range(150)))


def test_decord_is_not_used_for_intra_refresh(tmp_path: Path) -> None:
    path = tmp_path / "film.mp4"
    path.write_bytes(numbered_video(range(150), format="mp4", gop=40, options={"intra-refresh": "1", "bf": "0"}))
    assert not isinstance(open_video(str(path), SIZE, backend="decord"), DecordReader)


def test_keyframes_that_need_others_are_no_keyframes() -> None:
    film = numbered_video(range(150), format="mp4", gop=40, options={"intra-refresh": "1", "bf": "0"})
    batch = KeyframeReader(film, SIZE, step=Fraction(1)).sample(sample_times(Fraction(0), Fraction(1), 0, 6))
    assert (shown(batch), batch.num_missing) == ([(0.0, 0.0, 0)], 0)


@pytest.mark.parametrize("codec", OPEN_GOPS)
@pytest.mark.parametrize("format", ["mp4", "mpegts"])
@pytest.mark.parametrize("cut", [{"first_keyframe": 1}, {"first_packet": 10}])
def test_a_start_inside_a_group_of_pictures_shows_the_first_frame_that_decodes(
    codec: str, format: str, cut: dict[str, int]
) -> None:
    film = remux(numbered_video(range(150), format=format, codec=codec, options=OPEN_GOPS[codec]), format=format, **cut)
    expected = plainly_sampled(film)
    assert expected[0][1] >= 0
    check_every_path(film, expected)


def plainly_sampled(film: bytes) -> list[tuple[float, float, int]]:
    """Decodes every frame, and samples them on the container's clock."""
    with av.open(io.BytesIO(film)) as container:
        stream = container.streams.video[0]
        stream.codec_context.thread_type = "NONE"
        start = Fraction(max(0, container.start_time or 0), av.time_base)
        frames = list(container.decode(stream))
        pts = [frame.pts * Fraction(stream.time_base) - start for frame in frames]
        end = pts[-1] + Fraction(1, 25)
        first = [(pts[0], frames[0])]
        rows = []
        for t in range(-int(-end // 1)):
            stamp, frame = [*first, *(pair for pair in zip(pts, frames, strict=True) if pair[0] <= t + 1e-6)][-1]
            rows.append((t, stamp, frame))
        pixels = np.stack([frame.to_ndarray(format="rgb24") for _, _, frame in rows])
    return [(float(t), round(float(stamp), 3), read_number(p)) for (t, stamp, _), p in zip(rows, pixels, strict=True)]


@pytest.mark.parametrize("format", ["webm", "matroska"])
def test_empty_blocks_repeat_the_last_picture(format: str) -> None:
    first, stop = 60, 99
    film = numbered_video(
        range(150), format=format, codec="libvpx", gop=50, options={"auto-alt-ref": "0", "lag-in-frames": "0"}
    )
    film = with_empty_packets(film, range(first, stop))
    ticks = [tick for tick in range(150) if tick not in range(first, stop)]
    expected = [(t, pts, round(pts * 25)) for t, pts, _ in on_screen(ticks, end=150)]
    check_every_path(film, expected)


def with_empty_packets(film: bytes, numbers: range) -> bytes:
    """Empties SimpleBlocks of a Matroska file; a Void element fills their place (RFC 9559)."""
    changed = bytearray(film)
    with av.open(io.BytesIO(film)) as container:
        packets = [packet for packet in container.demux(video=0) if packet.size]
        for number in numbers:
            data = bytes(packets[number])
            at = film.index(data, packets[number].pos)
            size = 1 if len(data) + 4 < 127 else 2
            assert film[at - 5 - size] == 0xA3
            changed[at - 4 - size : at - 4] = (4 | 1 << 7 * size).to_bytes(size, "big")
            changed[at : at + 9] = b"\xec" + (len(data) - 9 | 1 << 56).to_bytes(8, "big")
    return bytes(changed)


def test_frames_after_reported_damage_are_kept_and_counted() -> None:
    """Damage in one group of pictures of four."""
    film = bytearray(numbered_video(range(200), format="mp4", gop=50, options={"bf": "0", "slices": "1"}))
    whole = read_frames(bytes(film), SIZE)
    with av.open(io.BytesIO(bytes(film))) as container:
        packets = [packet for packet in container.demux(video=0) if packet.size]
    start = packets[60].pos + 8  # the first frame of the second group that a sampled one needs
    film[start : start + 24] = bytes(24)
    hurt = read_frames(bytes(film), SIZE)
    assert hurt.num_damaged == 1
    assert len(hurt.frames) + hurt.num_missing == 8
    for t, pixels in zip(hurt.times_seconds, hurt.frames, strict=True):
        assert t == 3 or np.array_equal(pixels, whole.frames[int(t)])
    times = sample_times(Fraction(0), Fraction(1), 0, 8)
    alone = [open_video(bytes(film), SIZE).sample([t]) for t in times]
    assert sum(batch.num_damaged for batch in alone) == 1


def test_a_damaged_beginning_is_missing() -> None:
    film = bytearray(numbered_video(range(100), format="webm", codec="libvpx", gop=50, options={"lag-in-frames": "0"}))
    with av.open(io.BytesIO(bytes(film))) as container:
        first = next(packet for packet in container.demux(video=0))
        assert first.is_keyframe
        start = film.index(bytes(first), first.pos)
    film[start + 3 : start + 6] = bytes(3)  # VP8's start code (RFC 6386, section 9.1)
    batch = read_frames(bytes(film), SIZE)
    assert batch.times_seconds.tolist() == [2, 3]
    assert batch.num_missing == 2


@pytest.mark.parametrize("codec", OPEN_GOPS)
@pytest.mark.parametrize("format", ["mp4", "mpegts", "matroska"])
def test_decoding_starts_at_ordinary_keyframes(codec: str, format: str, caplog: pytest.LogCaptureFixture) -> None:
    film = numbered_video(range(300), format=format, codec=codec, options=OPEN_GOPS[codec])
    reader = open_video(film, SIZE, joined_parts=1)
    with caplog.at_level("INFO"):
        for t in (2, 5, 11, 8, 3, 10):
            assert shown(reader.sample([Fraction(t)])) == on_screen(range(300))[t : t + 1]
    assert "without seeks" not in caplog.text


def test_the_picture_of_a_cut_packet_is_damaged() -> None:
    film = io.BytesIO()
    make_video(film, range(16), codec="ffvhuff", format="avi", container_options={"fflags": "+bitexact"})
    content = film.getvalue()
    with av.open(io.BytesIO(content)) as container:
        last = [packet for packet in container.demux(video=0) if packet.size][9]
        cut = content[: last.pos + 8 + last.size // 2]
    batch = open_video(cut, SIZE).sample([Fraction(k, 8) for k in range(10)])
    assert (len(batch.frames), batch.num_missing, batch.num_damaged) == (10, 0, 1)
    keyframes = open_video(cut, SIZE, keyframe_step=Fraction(1, 8)).sample([Fraction(k, 8) for k in range(10)])
    assert (len(keyframes.frames), keyframes.num_missing) == (9, 1)


def test_damage_is_filled_as_by_plain_decoding_though_frames_are_skipped(tmp_path: Path) -> None:
    film, path, drawn = io.BytesIO(), tmp_path / "film.mp4", random.Random(1)
    make_video(film, range(24), format="mp4", gop=10)
    with av.open(io.BytesIO(film.getvalue())) as container:
        packets = [(packet.pos, packet.size) for packet in container.demux(video=0) if packet.size][10:20]
    for _ in range(30):
        content = bytearray(film.getvalue())
        for position, size in drawn.choices(packets, k=3):
            content[position + drawn.randrange(8, size)] ^= 1 << drawn.randrange(8)
        path.write_bytes(content)
        batch = open_video(str(path), IMAGE_SIZE).sample([Fraction(k, 2) for k in range(6)])
        assert not_in(batch, plain_decode(str(path))) == []


def test_a_frame_whose_time_lies_before_the_last_ones_does_not_replace_it() -> None:
    target = io.BytesIO()
    make_video(target, range(24), time_base=Fraction(1, 8), format="webm", codec="libvpx-vp9")
    sound = target.getvalue()
    block = b"\x81" + (1125).to_bytes(2, "big")
    late = sound.replace(block, b"\x81" + (101).to_bytes(2, "big"))
    assert (sound.count(block), len(late)) == (1, len(sound))
    expected, found = (read_frames(film, image_size=32, fps=Fraction(2)) for film in (sound, late))
    assert np.array_equal(found.frames, expected.frames)

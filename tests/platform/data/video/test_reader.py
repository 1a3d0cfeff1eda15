"""Sampling by PTS equals decoding every frame, for awkward streams and any order of requests."""

from __future__ import annotations

import io
from fractions import Fraction
from pathlib import Path

import numpy as np
import pytest
from PIL import Image

from reference.awkward_videos import KINDS, SIZE, seconds
from reference.plain_sampling import sample_every_frame
from reference.synthetic_media import make_sound, make_video, picture
from timeviper_platform.data.media.container import DecodeError, ErrorType, MediaLimits
from timeviper_platform.data.media.probe import probe_media
from timeviper_platform.data.video.frames import FrameBatch
from timeviper_platform.data.video.reader import DecoderPool, open_medium, open_video, read_frames
from timeviper_platform.data.video.sampling import count_frames


@pytest.mark.parametrize("name", [name for name in KINDS if not name.endswith(".ts")])
@pytest.mark.parametrize("fps", [1, 3])
def test_sampled_frames_equal_those_of_full_decoding(videos: dict[str, Path], name: str, fps: int) -> None:
    path = videos[name]
    probe = probe_media(str(path))
    times = seconds(count_frames(Fraction(0), probe.duration_seconds, Fraction(fps)), fps)
    expected_pts, expected = sample_every_frame(path, times, SIZE)
    reader = open_video(str(path), SIZE)
    batches = [reader.sample(times[start : start + 5]) for start in range(0, len(times), 5)]
    reader.close()
    assert sum(batch.num_missing for batch in batches) == 0
    assert np.array_equal(np.concatenate([batch.frames for batch in batches]), expected)
    assert [pts for batch in batches for pts in batch.pts_seconds] == expected_pts


@pytest.mark.parametrize("name", list(KINDS))
def test_no_frame_is_from_the_future_or_a_frame_late(videos: dict[str, Path], name: str) -> None:
    frames = read_frames(str(videos[name]), SIZE)
    lag = frames.times_seconds - frames.pts_seconds
    first = frames.pts_seconds[0]
    assert all(late >= 0 or pts == first for late, pts in zip(lag, frames.pts_seconds, strict=True))
    if name != "variable.mp4":
        assert lag.max() < 1 / probe_media(str(videos[name])).source_fps + 1e-9


@pytest.mark.parametrize("name", list(KINDS))
def test_any_order_of_requests_gives_the_same_frames(videos: dict[str, Path], name: str) -> None:
    whole = read_frames(str(videos[name]), SIZE)
    times = [Fraction(t) for t in whole.times_seconds]
    reader = open_video(str(videos[name]), SIZE)
    for start, stop in ((3, 5), (0, 2), (len(times) - 1, len(times)), (1, 4), (0, len(times))):
        assert np.array_equal(reader.sample(times[start:stop]).frames, whole.frames[start:stop])
    reader.close()


@pytest.mark.parametrize("suffix", ["mp4", "mkv", "ts", "avi"])
def test_far_jumps_seek_and_find_the_same_frames(tmp_path: Path, suffix: str) -> None:
    path = tmp_path / f"long.{suffix}"
    make_video(path, range(1600), gop=30, b_frames=3)
    whole = read_frames(str(path), SIZE)
    times = [Fraction(t) for t in (0, 1, 60, 61, 130, 190)]
    reader = open_video(str(path), SIZE)
    for chosen in (times, [Fraction(150)], [Fraction(7)], times[3:]):
        got = reader.sample(chosen)
        assert np.array_equal(got.frames, whole.frames[[int(t) for t in chosen]])


@pytest.mark.parametrize("suffix", ["mp4", "mkv", "ts"])
@pytest.mark.parametrize("gop", [1, 9, 250])
def test_sparse_times_give_the_frames_of_full_decoding(tmp_path: Path, suffix: str, gop: int) -> None:
    path = tmp_path / f"film.{suffix}"
    make_video(path, range(700), gop=gop, b_frames=0 if gop == 1 else 3)
    eighths = open_video(str(path), SIZE).sample(seconds(700, fps=8))
    for step in (3, 10, 47, 101):
        numbers = list(range(step // 2, 690, step))
        got = open_video(str(path), SIZE).sample([Fraction(number, 8) for number in numbers])
        assert got.num_missing == 0
        assert np.array_equal(got.frames, eighths.frames[numbers])


@pytest.mark.parametrize("suffix", ["mp4", "mkv", "ts"])
def test_a_seek_to_just_before_a_keyframe_does_not_land_on_it(tmp_path: Path, suffix: str) -> None:
    path = tmp_path / f"long.{suffix}"
    make_video(path, range(600), gop=30, b_frames=3)
    eighths = open_video(str(path), SIZE).sample(seconds(600, fps=8))
    for number in (599, 299, 298, 269, 59, 30, 29):  # backwards: each is a seek; DTS are two frames before PTS
        got = open_video(str(path), SIZE).sample([Fraction(number, 8)])
        assert np.array_equal(got.frames[0], eighths.frames[number])


def test_h264_in_avi_is_sampled_in_display_order(tmp_path: Path, videos: dict[str, Path]) -> None:
    make_video(tmp_path / "clip.avi", range(80), gop=40, b_frames=3)
    mp4, avi = (read_frames(str(p), SIZE) for p in (videos["b_frames.mp4"], tmp_path / "clip.avi"))
    # timestamps start a frame late: every frame is the one of 1/8 s earlier
    late = [int(t * 8) - number for t, number in zip(avi.times_seconds[1:], frame_numbers(avi)[1:], strict=True)]
    assert set(late) == {1}
    assert len(avi.frames) == len(mp4.frames) + 1  # the last frame starts at 10 s
    reader = open_video(str(tmp_path / "clip.avi"), SIZE)
    assert np.array_equal(reader.sample(seconds(9)[5:]).frames, avi.frames[5:9])
    assert np.array_equal(reader.sample(seconds(3)).frames, avi.frames[:3])


def frame_numbers(batch: FrameBatch) -> list[int]:
    """The nearest `picture` of each frame."""
    pictures = np.stack([np.asarray(Image.fromarray(picture(n)).resize((SIZE, SIZE))) for n in range(80)]).astype(int)
    return [int(np.abs(pictures - frame.astype(int)).sum(axis=(1, 2, 3)).argmin()) for frame in batch.frames]


def test_a_slide_is_sampled_as_often_as_it_is_shown(tmp_path: Path) -> None:
    KINDS["variable.mp4"](tmp_path / "slides.mp4")
    frames = read_frames(str(tmp_path / "slides.mp4"), SIZE)
    assert frames.pts_seconds.tolist() == [0, 1, 1, 1, 3.875, 5.0, 5.125, 5.125, 7.5, 7.5]  # t = 0 ... 9
    assert frames.times_seconds.tolist() == list(range(10))


def test_a_transport_stream_starts_at_zero(videos: dict[str, Path]) -> None:
    frames = read_frames(str(videos["h264.ts"]), SIZE)
    plain = read_frames(str(videos["h264.ts"]).replace("h264.ts", "b_frames.mp4"), SIZE)
    assert frames.pts_seconds[0] == 0
    assert np.allclose(frames.pts_seconds, plain.pts_seconds[: len(frames.pts_seconds)], atol=1e-4)


def test_large_and_small_frames_are_scaled_to_the_encoders_size(videos: dict[str, Path]) -> None:
    assert read_frames(str(videos["b_frames.mp4"]), 20).frames.shape == (10, 20, 20, 3)
    assert read_frames(str(videos["b_frames.mp4"]), 100).frames.shape == (10, 100, 100, 3)


def test_bytes_and_files_decode_alike(videos: dict[str, Path]) -> None:
    path = videos["b_frames.mp4"]
    assert np.array_equal(read_frames(path.read_bytes(), SIZE).frames, read_frames(str(path), SIZE).frames)


def test_thinning_selects_the_same_frames_as_the_store(videos: dict[str, Path]) -> None:
    whole = read_frames(str(videos["b_frames.mp4"]), SIZE)
    uniform = read_frames(str(videos["b_frames.mp4"]), SIZE, max_frames=4)
    first = read_frames(str(videos["b_frames.mp4"]), SIZE, max_frames=4, frame_selection="first")
    assert np.array_equal(uniform.frames, whole.frames[[0, 3, 6, 9]])
    assert np.array_equal(first.frames, whole.frames[:4])


def test_a_long_video_comes_in_batches(videos: dict[str, Path]) -> None:
    batches = list(open_medium(str(videos["one_keyframe.mp4"]), SIZE, frames_per_batch=8).batches)
    assert [len(batch.frames) for batch in batches] == [8, 8, 8, 8]


def test_a_truncated_stream_gives_its_frames_and_counts_the_rest(tmp_path: Path) -> None:
    path = tmp_path / "cut.mp4"
    make_video(path, range(160), options={"movflags": "faststart"})
    whole = read_frames(str(path), SIZE)
    buffer = io.BytesIO()
    make_video(buffer, range(160), format="matroska")
    data = buffer.getvalue()
    cut = read_frames(data[: len(data) // 2], SIZE)
    assert 0 < len(cut.frames) < len(whole.frames) == 20
    assert cut.num_missing > 0
    assert len(cut.frames) + cut.num_missing in (19, 20)  # a frame within a second of the cut may not count
    plain = read_frames(data, SIZE)
    assert np.array_equal(cut.frames, plain.frames[: len(cut.frames)])


def test_damage_costs_only_the_frames_it_hits(tmp_path: Path) -> None:
    buffer = io.BytesIO()
    make_video(buffer, range(240), gop=8, b_frames=0, format="matroska", size=(160, 120))
    data = bytearray(buffer.getvalue())
    start = len(data) // 2
    data[start : start + 3000] = b"\x00" * 3000
    whole, hurt = read_frames(bytes(buffer.getvalue()), SIZE), read_frames(bytes(data), SIZE)
    assert len(hurt.frames) + hurt.num_missing == len(whole.frames)
    assert len(hurt.frames) > 20
    for t, pixels in zip(hurt.times_seconds[-5:], hurt.frames[-5:], strict=True):
        assert np.array_equal(pixels, whole.frames[int(t)])  # frames far after the damage are intact


def bad_files(folder: Path) -> dict[str, tuple[Path, ErrorType]]:
    (folder / "empty.mp4").write_bytes(b"")
    (folder / "text.mp4").write_text("this is a text file, whatever its name says\n" * 20)
    (folder / "list.mp4").write_text("#EXTM3U\n#EXT-X-TARGETDURATION:5\n#EXTINF:5,\n/etc/hostname\n#EXT-X-ENDLIST\n")
    make_sound(folder / "sound.mp4")
    make_video(folder / "whole.mp4", range(40))
    (folder / "cut.mp4").write_bytes((folder / "whole.mp4").read_bytes()[:2000])
    (folder / "cut.png").write_bytes(b"\x89PNG\r\n\x1a\n" + b"\0" * 30)
    return {
        "vanished": (folder / "nowhere.mp4", ErrorType.NOT_FOUND),
        "empty": (folder / "empty.mp4", ErrorType.EMPTY_FILE),
        "text": (folder / "text.mp4", ErrorType.UNKNOWN_FORMAT),
        "playlist": (folder / "list.mp4", ErrorType.UNKNOWN_FORMAT),
        "sound": (folder / "sound.mp4", ErrorType.NO_VIDEO_STREAM),
        "cut": (folder / "cut.mp4", ErrorType.CORRUPT_FILE),
        "cut image": (folder / "cut.png", ErrorType.CORRUPT_FILE),
    }


def test_every_bad_file_has_its_error_type(tmp_path: Path) -> None:
    for name, (path, expected) in bad_files(tmp_path).items():
        with pytest.raises(DecodeError) as caught:
            read_frames(str(path), SIZE)
        assert (caught.value.stage, caught.value.error_type) == ("probe", expected), name


def test_limits_are_checked_before_decoding(tmp_path: Path) -> None:
    make_video(tmp_path / "clip.mp4", range(80))
    Image.new("RGB", (100, 100)).save(tmp_path / "big.png")
    for path, limits, expected in (
        ("clip.mp4", MediaLimits(max_pixels=64 * 48 - 1), ErrorType.TOO_MANY_PIXELS),
        ("clip.mp4", MediaLimits(max_frames=9), ErrorType.TOO_MANY_FRAMES),
        ("big.png", MediaLimits(max_pixels=9999), ErrorType.TOO_MANY_PIXELS),
    ):
        with pytest.raises(DecodeError) as caught:
            read_frames(str(tmp_path / path), SIZE, limits=limits)
        assert caught.value.error_type == expected
    with pytest.raises(ValueError, match="max_pixels"):
        MediaLimits(max_pixels=0)


def test_the_pool_keeps_few_videos_open_and_drops_broken_ones(tmp_path: Path) -> None:
    pool = DecoderPool(SIZE, max_open=2)
    for number in range(3):
        make_video(tmp_path / f"{number}.mp4", range(24))
    paths = [str(tmp_path / f"{number}.mp4") for number in range(3)]
    for path in paths * 2:
        assert len(pool.sample(path, seconds(3)).frames) == 3
    with pytest.raises(DecodeError, match="not_found"):
        pool.sample(str(tmp_path / "none.mp4"), seconds(1))
    pool.close()
    assert len(pool.sample(paths[0], seconds(3)).frames) == 3
    with pytest.raises(ValueError, match="max_open"):
        DecoderPool(SIZE, max_open=0)


def test_descending_times_are_an_error(videos: dict[str, Path]) -> None:
    reader = open_video(str(videos["b_frames.mp4"]), SIZE)
    with pytest.raises(ValueError, match="ascend"):
        reader.sample([Fraction(2), Fraction(1)])
    assert reader.sample([]).frames.shape == (0, SIZE, SIZE, 3)


def test_an_invalid_frame_batch_is_an_error() -> None:
    good = np.zeros((2, 4, 4, 3), np.uint8)
    for frames, pts, times in (
        (good.astype(np.float32), np.zeros(2), np.zeros(2)),
        (good, np.zeros(3), np.zeros(2)),
        (good, np.zeros(2), np.array([1.0, 0.0])),
    ):
        with pytest.raises(ValueError, match=r"frames"):
            FrameBatch(frames, pts, times)


def test_an_error_survives_pickling() -> None:
    import pickle

    error = pickle.loads(pickle.dumps(DecodeError("probe", ErrorType.EMPTY_FILE, "x: 0 bytes")))
    assert str(error) == "probe: empty_file: x: 0 bytes"


@pytest.mark.parametrize("is_local", [True, False])
def test_tags_in_another_encoding_than_utf8_are_no_error(tmp_path: Path, is_local: bool) -> None:
    path = tmp_path / "film.mkv"
    make_video(path, range(24))
    expected = read_frames(str(path), SIZE)
    content = path.read_bytes()
    assert b"Lavf" in content  # the writer's name
    path.write_bytes(content.replace(b"Lavf", "Lavé".encode("latin-1")))
    found = read_frames(str(path) if is_local else path.read_bytes(), SIZE)
    assert np.array_equal(found.frames, expected.frames)

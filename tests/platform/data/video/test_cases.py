"""The cases of people's videos: right frames by every reader and every way to the bytes."""

from __future__ import annotations

from fractions import Fraction

import fsspec
import pytest

from reference.numbered_videos import CASES, SIZE, check_every_path, expected_cases, shown
from timeviper_platform.data.media.probe import probe_media
from timeviper_platform.data.video.decord_reader import DecordReader
from timeviper_platform.data.video.keyframe_reader import KeyframeReader
from timeviper_platform.data.video.reader import open_video, read_frames
from timeviper_platform.data.video.sampling import sample_times

EXPECTED = {name: rows for name, rows in expected_cases().items() if not name.startswith("anim")}

PARTS = {"ts_concat2.ts": 2, "ts_jump_5000s.ts": 2}

DECORDS = {"flv_start500.flv", "fmp4_live_100s.mp4", "mkv_start_3600s.mkv", "vfr_gap6s.mp4", "audio_longer.mkv"}
"""Cases that decord may read. It falls back for the others, and for those that it misreads."""


@pytest.fixture(params=EXPECTED)
def case(request: pytest.FixtureRequest) -> str:
    return str(request.param)


def test_every_frame_is_the_one_on_screen(case: str) -> None:
    check_every_path(str(CASES / case), EXPECTED[case], parts=PARTS.get(case, 1))


def test_bytes_and_remote_files_give_the_same(case: str) -> None:
    data = (CASES / case).read_bytes()
    with fsspec.open(f"memory://{case}", "wb") as file:
        file.write(data)
    assert shown(read_frames(data, SIZE)) == shown(read_frames(f"memory://{case}", SIZE)) == EXPECTED[case]


def test_decord_gives_the_same_or_is_not_used(case: str) -> None:
    path = str(CASES / case)
    batch = read_frames(path, SIZE, backend="decord")
    assert (shown(batch), batch.num_missing) == (EXPECTED[case], 0)
    reader = open_video(path, SIZE, backend="decord")
    assert case in DECORDS or not isinstance(reader, DecordReader)


def test_keyframes_are_on_the_same_clock(case: str) -> None:
    path = str(CASES / case)
    rows = EXPECTED[case]
    offset = rows[-1][2] / 25 - rows[-1][1]  # number / 25 - PTS is constant, except in a capture's first frame
    times = sample_times(Fraction(0), Fraction(1), 0, len(rows))
    whole = KeyframeReader(path, SIZE, step=Fraction(1)).sample(times)
    assert whole.num_missing == 0
    assert len(whole.frames) >= 1
    for t, pts, number in shown(whole):
        assert t - 1 < pts <= t
        assert abs(number / 25 - pts - offset) < 1e-3
    reader = KeyframeReader(path, SIZE, step=Fraction(1), joined_parts=probe_media(path).joined_parts)
    order = [*range(3, len(rows)), *range(3)]
    assert sorted(row for k in order for row in shown(reader.sample(times[k : k + 1]))) == shown(whole)

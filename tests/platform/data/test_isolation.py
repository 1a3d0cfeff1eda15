"""Decoding in a child: the same frames; a hang, a crash or too much memory is one error, and the rest decodes."""

from __future__ import annotations

import contextlib
import os
import signal
import threading
import time
from collections.abc import Iterator
from dataclasses import replace
from fractions import Fraction
from pathlib import Path

import numpy as np
import psutil
import pytest
from PIL import Image

from reference.made_media import make_video
from timeviper_platform import storage
from timeviper_platform.data.decode import sample_times
from timeviper_platform.data.isolation import IsolatedFrames
from timeviper_platform.data.media import DecodeError, ErrorType, MediaLimits
from timeviper_platform.data.segment_frames import DecodeConfig, LocalFrames

SIZE = 32
TIMES = sample_times(Fraction(0), Fraction(3), 0, 20)
CONFIG = DecodeConfig(deadline_seconds=60)


@pytest.fixture
def film(tmp_path: Path) -> str:
    make_video(tmp_path / "film.mp4", range(80))
    return str(tmp_path / "film.mp4")


@pytest.fixture
def hang(tmp_path: Path) -> str:
    """A file that cannot be opened before somebody writes to it."""
    os.mkfifo(tmp_path / "hang.mp4")
    return str(tmp_path / "hang.mp4")


@pytest.fixture(scope="module")
def source() -> IsolatedFrames:
    return IsolatedFrames(SIZE, MediaLimits(), CONFIG)


def failure(source: IsolatedFrames, uri: str) -> tuple[str, ErrorType, str]:
    with pytest.raises(DecodeError) as caught:
        source.frames(uri, "video", TIMES)
    return caught.value.stage, caught.value.error_type, caught.value.message


def test_a_child_gives_the_frames_of_this_process(source: IsolatedFrames, film: str, tmp_path: Path) -> None:
    Image.new("RGB", (40, 30), (10, 200, 30)).save(tmp_path / "a.png")
    local = LocalFrames(SIZE, MediaLimits(), CONFIG)
    kept = []
    late = [Fraction(100)]  # has no frame
    asked = ((film, "video", TIMES), (film, "video", late), (str(tmp_path / "a.png"), "image", TIMES[:1]))
    for uri, modality, times in asked * 2:
        here, there = (s.frames(uri, modality, times) for s in (local, source))  # type: ignore[arg-type]
        kept.append((here, there))
    for here, there in kept:  # later answers do not write over earlier ones
        assert np.array_equal(here.frames, there.frames)
        assert here.pts_seconds.tolist() == there.pts_seconds.tolist()
        assert here.times_seconds.tolist() == there.times_seconds.tolist()
        assert here.num_missing == there.num_missing


def test_errors_of_files_arrive_with_stage_type_and_message(source: IsolatedFrames, film: str, tmp_path: Path) -> None:
    (tmp_path / "text.mp4").write_text("no video")
    local = LocalFrames(SIZE, MediaLimits(), CONFIG)
    for name in ("nowhere.mp4", "text.mp4"):
        uri = str(tmp_path / name)
        with pytest.raises(DecodeError) as here:
            local.frames(uri, "video", TIMES)
        assert failure(source, uri) == here.value.args
    assert len(source.frames(film, "video", TIMES).frames) == len(TIMES)


def test_a_hang_is_one_error_and_the_rest_of_that_medium_is_given_up(film: str, hang: str) -> None:
    source = IsolatedFrames(SIZE, MediaLimits(), replace(CONFIG, deadline_seconds=1.0))
    assert failure(source, hang)[:2] == ("decode_video", ErrorType.DECODER_TIMEOUT)
    started = time.monotonic()
    assert failure(source, hang)[1] == ErrorType.DECODER_TIMEOUT
    assert time.monotonic() - started < 1
    source.config = CONFIG
    assert len(source.frames(film, "video", TIMES).frames) == len(TIMES)


@contextlib.contextmanager
def killing(source: IsolatedFrames, times: int) -> Iterator[None]:
    """Ends the child that works, `times` times, as a broken decoder would."""

    def kill() -> None:
        for _ in range(times):
            while not source._child._is_ready:
                time.sleep(0.01)
            child = source._child
            time.sleep(0.1)
            os.kill(child.pid, signal.SIGSEGV)
            while source._child is child:
                time.sleep(0.01)

    thread = threading.Thread(target=kill, daemon=True)
    thread.start()
    yield
    thread.join()


def test_a_crash_is_one_error_and_the_next_medium_decodes(film: str, hang: str) -> None:
    source = IsolatedFrames(SIZE, MediaLimits(), CONFIG)
    source.frames(film, "video", TIMES)
    with killing(source, times=2):
        stage, kind, message = failure(source, hang)
    assert (stage, kind) == ("decode_video", ErrorType.DECODER_CRASHED)
    assert "code -11" in message
    assert len(source.frames(film, "video", TIMES).frames) == len(TIMES)


def test_a_child_that_something_else_killed_costs_nothing(source: IsolatedFrames, film: str) -> None:
    expected = source.frames(film, "video", TIMES)
    os.kill(source._child.pid, signal.SIGKILL)
    assert np.array_equal(source.frames(film, "video", TIMES).frames, expected.frames)


def test_too_much_memory_is_an_error_of_its_own(tmp_path: Path) -> None:
    Image.new("L", (13000, 13000)).save(tmp_path / "large.png")
    limits = MediaLimits(max_pixels=1 << 30)
    source = IsolatedFrames(SIZE, limits, replace(CONFIG, max_memory_bytes=1 << 28))
    with pytest.raises(DecodeError) as caught:
        source.frames(str(tmp_path / "large.png"), "image", TIMES[:1])
    assert (caught.value.stage, caught.value.error_type) == ("decode_image", ErrorType.OUT_OF_MEMORY)


def test_no_child_outlives_its_source(film: str) -> None:
    source = IsolatedFrames(SIZE, MediaLimits(), CONFIG)
    source.frames(film, "video", TIMES)
    pid = source._child.pid
    del source
    assert not psutil.pid_exists(pid)


def test_retries_of_a_child_are_counted_here() -> None:
    before = storage.num_retries()
    storage.add_retries(3)
    assert storage.num_retries() == before + 3


def test_settings_without_sense_are_refused() -> None:
    for wrong in ({"deadline_seconds": 0.0}, {"max_memory_bytes": 1000}, {"max_open_videos": 0}):
        with pytest.raises(ValueError, match=next(iter(wrong))):
            DecodeConfig(**wrong)  # type: ignore[arg-type]

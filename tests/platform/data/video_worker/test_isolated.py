"""Decoding and probing in a child: the same results; a hang, a crash or too much memory is one error and no more."""

from __future__ import annotations

import contextlib
import errno
import os
import resource
import signal
import struct
import threading
import time
from collections.abc import Iterator, Sequence
from dataclasses import replace
from fractions import Fraction
from pathlib import Path

import av
import numpy as np
import psutil
import pyarrow as pa
import pytest
from PIL import Image

from reference.synthetic_media import make_video
from timeviper_platform.common import storage
from timeviper_platform.common.listing import FileVersion
from timeviper_platform.data.media.container import DecodeError, ErrorType, MediaLimits, Modality, reading
from timeviper_platform.data.media.medium import Medium
from timeviper_platform.data.media.probe import LocalProbes, probe_media
from timeviper_platform.data.plan.segments import PlanSpec, plan_page
from timeviper_platform.data.plan.stored_plan import plan_here
from timeviper_platform.data.video.frames import FrameBatch
from timeviper_platform.data.video.sampling import sample_times
from timeviper_platform.data.video_worker import child_process as isolation
from timeviper_platform.data.video_worker import isolated as isolated_sources
from timeviper_platform.data.video_worker.frame_source import DecodeConfig, DecodeRequest, FrameSource, LocalFrames
from timeviper_platform.data.video_worker.isolated import IsolatedFrames, IsolatedProbes

SIZE = 32
TIMES = sample_times(Fraction(0), Fraction(3), 0, 20)
CONFIG = DecodeConfig(deadline_seconds=60, probe_deadline_seconds=60)


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


def frames(
    source: FrameSource, uri: str, modality: Modality = "video", times: Sequence[Fraction] = TIMES
) -> FrameBatch:
    """Those of one request."""
    (decoded,) = source.decode([DecodeRequest(uri, modality, times)])
    if isinstance(decoded.frames, DecodeError):
        raise decoded.frames
    return decoded.frames


def failure(source: FrameSource, uri: str) -> tuple[str, ErrorType, str]:
    with pytest.raises(DecodeError) as caught:
        frames(source, uri)
    return caught.value.stage, caught.value.error_type, caught.value.message


def test_nobody_looks_for_an_answer_again_at_once_where_there_is_none_yet(
    source: IsolatedFrames, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    requests = []
    for number in range(300):
        path = tmp_path / f"{number}.png"
        Image.new("RGB", (64, 48), (number % 256, 7, 9)).save(path)
        requests.append(DecodeRequest(str(path), "image", [Fraction(0)]))
    naps: list[float] = []
    sleep = time.sleep
    monkeypatch.setattr(isolation.time, "sleep", lambda seconds: (naps.append(seconds), sleep(0.05)))
    found = [decoded.frames for decoded in source.decode(requests)]
    reds = [int(batch.frames[0, 0, 0, 0]) for batch in found if isinstance(batch, FrameBatch)]
    assert reds == [number % 256 for number in range(300)]
    assert set(naps) == {isolated_sources.NAP_SECONDS}
    assert len(naps) < 100  # many answers a nap


def test_a_child_gives_the_frames_of_this_process(source: IsolatedFrames, film: str, tmp_path: Path) -> None:
    Image.new("RGB", (40, 30), (10, 200, 30)).save(tmp_path / "a.png")
    local = LocalFrames(SIZE, MediaLimits(), CONFIG)
    kept = []
    late = [Fraction(100)]  # has no frame
    asked = ((film, "video", TIMES), (film, "video", late), (str(tmp_path / "a.png"), "image", TIMES[:1]))
    for uri, modality, times in asked * 2:
        here, there = (frames(s, uri, modality, times) for s in (local, source))  # type: ignore[arg-type]
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
            frames(local, uri)
        assert failure(source, uri) == here.value.args
    assert len(frames(source, film).frames) == len(TIMES)


def test_a_hang_is_one_error_and_the_rest_of_that_medium_is_given_up(film: str, hang: str) -> None:
    source = IsolatedFrames(SIZE, MediaLimits(), replace(CONFIG, deadline_seconds=1.0))
    assert failure(source, hang)[:2] == ("decode_video", ErrorType.DECODER_TIMEOUT)
    started = time.monotonic()
    assert failure(source, hang)[1] == ErrorType.DECODER_TIMEOUT
    assert time.monotonic() - started < 1
    source.config = CONFIG
    assert len(frames(source, film).frames) == len(TIMES)


@contextlib.contextmanager
def killing(source: IsolatedFrames, times: int) -> Iterator[None]:
    """Ends the child that works, `times` times, as a broken decoder would."""

    def kill() -> None:
        for _ in range(times):
            while (child := source._child) is None or not child._is_ready:
                time.sleep(0.01)
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
    frames(source, film)
    with killing(source, times=2):
        stage, kind, message = failure(source, hang)
    assert (stage, kind) == ("decode_video", ErrorType.DECODER_CRASHED)
    assert "code -11" in message
    assert len(frames(source, film).frames) == len(TIMES)


def test_a_child_that_something_else_killed_costs_nothing(source: IsolatedFrames, film: str) -> None:
    expected = frames(source, film)
    os.kill(source._child.pid, signal.SIGKILL)
    assert np.array_equal(frames(source, film).frames, expected.frames)


def described(source: FrameSource, requests: Sequence[DecodeRequest]) -> list[object]:
    """What became of each request, so that it can be compared."""
    found = [decoded.frames for decoded in source.decode(requests)]
    return [
        (one.stage, one.error_type)
        if isinstance(one, DecodeError)
        else (one.frames.tobytes(), one.times_seconds.tolist(), one.num_missing)
        for one in found
    ]


@pytest.fixture
def requests(film: str, tmp_path: Path) -> list[DecodeRequest]:
    """Pictures, of which each is another, stretches of a film, and two files that are neither: several jobs."""
    made = [DecodeRequest(film, "video", TIMES[start : start + 8]) for start in range(0, 16, 4)] * 10
    for number in range(100):
        Image.new("RGB", (40, 30), (number, 200, 30)).save(tmp_path / f"{number}.png")
        made.insert(number, DecodeRequest(str(tmp_path / f"{number}.png"), "image", TIMES[:1]))
    (tmp_path / "text.mp4").write_text("no video")
    for place, name in ((3, "text.mp4"), (90, "nowhere.mp4")):
        made.insert(place, DecodeRequest(str(tmp_path / name), "video", TIMES))
    return made


def test_results_of_many_requests_come_in_order_and_next_to_each_other(
    source: IsolatedFrames, requests: list[DecodeRequest]
) -> None:
    assert described(source, requests) == described(LocalFrames(SIZE, MediaLimits(), CONFIG), requests)
    assert described(source, []) == []


def test_the_child_decodes_ahead_of_what_is_taken(
    source: IsolatedFrames, requests: list[DecodeRequest], film: str
) -> None:
    taken = 0

    def counted() -> Iterator[DecodeRequest]:
        nonlocal taken
        for request in requests:
            taken += 1
            yield request

    results = source.decode(counted())
    assert isinstance(next(results).frames, FrameBatch)
    assert isolated_sources.MAX_FRAMES_A_JOB < taken < len(requests)
    child = source._child
    assert child is not None
    results.close()
    assert not psutil.pid_exists(child.pid)  # whose answers nobody waits for any more
    assert len(frames(source, film).frames) == len(TIMES)
    assert source._child is not None
    pid = source._child.pid
    results = source.decode(requests[:1])
    next(results)
    results.close()
    assert source._child.pid == pid  # all of its answers were taken


def test_a_child_killed_among_many_requests_costs_nothing(
    source: IsolatedFrames, requests: list[DecodeRequest]
) -> None:
    expected = described(source, requests)

    def killing_some() -> Iterator[DecodeRequest]:
        for number, request in enumerate(requests):
            if number in (0, 5, 130) and source._child is not None:
                os.kill(source._child.pid, signal.SIGKILL)
            yield request

    assert described(source, killing_some()) == expected  # type: ignore[arg-type]


@pytest.mark.usefixtures("broken_readers")
def test_what_crashes_or_hangs_the_child_among_many_is_one_error_each(
    requests: list[DecodeRequest], film: str, hang: str, tmp_path: Path
) -> None:
    crash = tmp_path / "crash.mp4"
    crash.hardlink_to(film)
    expected = described(LocalFrames(SIZE, MediaLimits(), CONFIG), requests)
    for place, uri, kind in (
        (150, str(crash), ErrorType.DECODER_CRASHED),
        (60, hang, ErrorType.DECODER_TIMEOUT),
        (60, hang, ErrorType.DECODER_TIMEOUT),  # given up
        (0, str(crash), ErrorType.DECODER_CRASHED),
    ):
        requests.insert(place, DecodeRequest(uri, "video", TIMES))
        expected.insert(place, ("decode_video", kind))
    source = IsolatedFrames(SIZE, MediaLimits(), replace(CONFIG, deadline_seconds=3.0))
    assert described(source, requests) == expected


def test_too_much_memory_is_an_error_of_its_own(tmp_path: Path) -> None:
    Image.new("L", (13000, 13000)).save(tmp_path / "large.png")
    limits = MediaLimits(max_pixels=1 << 30)
    source = IsolatedFrames(SIZE, limits, replace(CONFIG, max_memory_bytes=1 << 28))
    with pytest.raises(DecodeError) as caught:
        frames(source, str(tmp_path / "large.png"), "image", TIMES[:1])
    assert (caught.value.stage, caught.value.error_type) == ("decode_image", ErrorType.OUT_OF_MEMORY)


def test_no_limit_of_memory_holds_beside_nvidias_driver() -> None:
    for backend, limit in (("pyav", CONFIG.max_memory_bytes), ("nvdec", resource.RLIM_INFINITY)):
        source = IsolatedFrames(SIZE, MediaLimits(), replace(CONFIG, backend=backend))  # type: ignore[arg-type]
        source._child.wait_until_ready()
        assert resource.prlimit(source._child.pid, resource.RLIMIT_DATA)[0] == limit


def test_no_child_outlives_its_source(film: str) -> None:
    source = IsolatedFrames(SIZE, MediaLimits(), CONFIG)
    frames(source, film)
    pid = source._child.pid
    del source
    assert not psutil.pid_exists(pid)


def test_retries_of_a_child_are_counted_here() -> None:
    before = storage.num_retries()
    storage.add_retries(3)
    assert storage.num_retries() == before + 3


BROKEN_READERS = """
import os, signal, time
from timeviper_platform.common import storage
from timeviper_platform.data.video import reader as decode
from timeviper_platform.data.media import probe

def probe_media(source, limits=None, real=probe.probe_media):
    if "crash" in os.path.basename(source):
        os.kill(os.getpid(), signal.SIGSEGV)
    if "retried" in source:
        storage.add_retries(2)
    if "strange" in source:
        raise KeyError("codec")
    if "large" in source:
        memory = bytearray(80 << 20)
        time.sleep(0.5)
    return real(source, limits)

def open_video(source, *rest, real=decode.open_video, **options):
    if "crash" in os.path.basename(source):
        os.kill(os.getpid(), signal.SIGSEGV)
    return real(source, *rest, **options)

probe.probe_media, decode.open_video = probe_media, open_video
"""


@pytest.fixture
def broken_readers(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Children started from now on do what a file is called: crash, take memory, see storage fail twice."""
    (tmp_path / "site").mkdir()
    (tmp_path / "site" / "sitecustomize.py").write_text(BROKEN_READERS)
    monkeypatch.syspath_prepend(str(tmp_path / "site"))


def make_greedy_picture(path: Path) -> None:
    """A PNG of 1 x 1 whose header has 600 MB of text, none of which is on the disk."""
    Image.new("L", (1, 1)).save(path, "PNG")
    header_end = 8 + 25
    with path.open("r+b") as file:
        file.seek(header_end)
        file.write(struct.pack(">I", 600 << 20) + b"tEXt")
        file.truncate(700 << 20)


def spec(**changes: object) -> PlanSpec:
    return PlanSpec(fps=Fraction(1), recipe_hash="r", decode=replace(CONFIG, **changes))  # type: ignore[arg-type]


def plan(paths: list[Path], **changes: object) -> dict[str, tuple[str | None, str | None]]:
    """Stage and type of the error of every medium, by its file's name; one row each."""
    table = pa.concat_tables(plan_page([Medium(str(path), path.name) for path in paths], spec(**changes)))
    assert table["media_id"].to_pylist() == [path.name for path in paths]
    columns = (table[name].to_pylist() for name in ("media_id", "error_stage", "error_type"))
    return {name: (stage, kind) for name, stage, kind in zip(*columns, strict=True)}


def test_headers_read_in_a_child_say_what_they_say_here(tmp_path: Path) -> None:
    make_video(tmp_path / "ntsc.mp4", [1001 * n for n in range(40)], time_base=Fraction(1, 30000))
    Image.new("RGB", (40, 30)).save(tmp_path / "a.png")
    (tmp_path / "text.mp4").write_text("no video")
    uris = [str(tmp_path / name) for name in ("ntsc.mp4", "nowhere.mp4", "a.png", "text.mp4")]
    media = [Medium(uri) for uri in uris]
    here, there = (s.probe(media) for s in (LocalProbes(MediaLimits()), IsolatedProbes(MediaLimits(), CONFIG)))
    assert there[0] == here[0] == probe_media(uris[0])
    assert there[2] == here[2]
    errors = [[medium.error.args for medium in media if medium.error] for media in (here, there)]
    assert errors[0] == errors[1]
    assert len(errors[0]) == 2


@pytest.mark.usefixtures("broken_readers")
def test_what_breaks_the_prober_is_one_error_row_each_and_the_rest_is_planned(tmp_path: Path, hang: str) -> None:
    make_video(tmp_path / "good.mp4", range(8))
    paths = [tmp_path / f"{number:02d}.mp4" for number in range(40)]
    for path in paths:
        path.hardlink_to(tmp_path / "good.mp4")
    bad = [tmp_path / name for name in ("crash0.mp4", "greedy.png", "crash1.mp4", "strange.mp4")]
    make_greedy_picture(bad[1])
    for path in (bad[0], bad[2], bad[3]):
        path.hardlink_to(tmp_path / "good.mp4")
    paths[3:3], paths[20:20], paths[39:39] = bad[:2], [Path(hang)], bad[2:]
    found = plan(paths, probe_deadline_seconds=3.0, max_memory_bytes=1 << 28)
    assert {name: error for name, error in found.items() if error != (None, None)} == {
        "crash0.mp4": ("probe", ErrorType.DECODER_CRASHED),
        "crash1.mp4": ("probe", ErrorType.DECODER_CRASHED),
        "strange.mp4": ("probe", ErrorType.DECODER_CRASHED),
        "hang.mp4": ("probe", ErrorType.DECODER_TIMEOUT),
        "greedy.png": ("probe", ErrorType.OUT_OF_MEMORY),
    }


@pytest.mark.usefixtures("broken_readers")
def test_media_whose_headers_fit_alone_but_not_together_are_planned(tmp_path: Path, film: str) -> None:
    paths = [tmp_path / f"large{number}.mp4" for number in range(6)]
    for path in paths:
        path.hardlink_to(film)
    assert set(plan(paths, max_memory_bytes=320 << 20).values()) == {(None, None)}


def test_ffmpegs_lack_of_memory_is_not_the_files_fault(film: str) -> None:
    with pytest.raises(DecodeError, match="out_of_memory"), reading("probe", film):
        av.error.err_check(-errno.ENOMEM)


@pytest.mark.usefixtures("broken_readers")
def test_one_medium_that_breaks_the_prober_says_how(tmp_path: Path, film: str) -> None:
    Path(tmp_path / "crash.mp4").hardlink_to(film)
    source = IsolatedProbes(MediaLimits(), CONFIG)
    (medium,) = source.probe([Medium(str(tmp_path / "crash.mp4"))])
    assert medium.error is not None
    assert "code -11, twice" in medium.error.message
    assert source.probe([Medium(film)]) == [probe_media(film)]


@pytest.mark.usefixtures("broken_readers")
def test_retries_of_probing_in_a_child_are_counted_here(tmp_path: Path, film: str) -> None:
    paths = [tmp_path / f"{kind}{number}.mp4" for kind in ("retried", "plain") for number in range(20)]
    for path in paths:
        path.hardlink_to(film)
    before = storage.num_retries()
    assert set(plan(paths).values()) == {(None, None)}
    assert storage.num_retries() == before + 40
    IsolatedProbes(MediaLimits(), CONFIG).probe([Medium(str(paths[0]))] * 9)  # stretches of one film
    assert storage.num_retries() == before + 42


def test_a_prober_that_something_else_killed_costs_nothing(tmp_path: Path, film: str) -> None:
    media = [Medium(str(tmp_path / f"{number}.mp4"), str(number)) for number in range(40)]
    for medium in media:
        Path(medium.uri).hardlink_to(film)
    source = IsolatedProbes(MediaLimits(), CONFIG)
    expected = [medium.with_headers(probe_media(film)) for medium in media]
    assert source.probe(media) == expected
    assert source._child is not None
    os.kill(source._child.pid, signal.SIGKILL)
    assert source.probe(media) == expected
    child = source._child
    assert source.probe(media[:1]) == expected[:1]
    assert source._child is child  # pages share it


def test_no_child_is_started_for_media_of_which_all_is_told(film: str, monkeypatch: pytest.MonkeyPatch) -> None:
    def refuse(*_: object) -> None:
        raise AssertionError("a child was started")

    monkeypatch.setattr(isolated_sources, "DecodeChild", refuse)
    told = Medium(film, "told", version=FileVersion(1, None, "v")).with_headers(probe_media(film))
    rejected = Medium(film, "rejected", error=DecodeError("list", ErrorType.BAD_ROW, "as the manifest says"))
    pages = [[told, rejected], [replace(told, sha256="0")]]
    assert pa.concat_tables(plan_here(pages, spec())).num_rows == 3
    assert pa.concat_tables(plan_here([[replace(told, version=None)]], spec())).num_rows == 1
    with pytest.raises(AssertionError):
        list(plan_here([[replace(told, modality=None)]], spec()))
    plain = plan_here([[replace(told, modality=None)]], spec(isolation="none"))
    assert pa.concat_tables(plain).num_rows == 1


def test_settings_without_sense_are_refused() -> None:
    for wrong in (
        {"deadline_seconds": 0.0},
        {"probe_deadline_seconds": 0.0},
        {"max_memory_bytes": 1000},
        {"max_open_videos": 0},
    ):
        with pytest.raises(ValueError, match=next(iter(wrong))):
            DecodeConfig(**wrong)  # type: ignore[arg-type]

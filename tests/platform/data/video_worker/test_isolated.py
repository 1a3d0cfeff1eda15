"""A child decodes and probes as this process does; a hang, a crash or too much memory is a single error."""

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
from timeviper_platform.data.media.container import DecodeError, ErrorType, MediaLimits, Modality, decode_errors
from timeviper_platform.data.media.medium import Medium
from timeviper_platform.data.media.probe import LocalProbes, probe_media
from timeviper_platform.data.plan.segments import PlanSpec, plan_page
from timeviper_platform.data.plan.stored_plan import plan_here
from timeviper_platform.data.video.frames import FrameBatch
from timeviper_platform.data.video.sampling import sample_times
from timeviper_platform.data.video_worker.frame_source import DecodeConfig, DecodeRequest, FrameSource, LocalFrames
from timeviper_platform.data.video_worker.isolated import MAX_FRAMES_PER_JOB, IsolatedFrames, IsolatedProbes

SIZE = 32
TIMES = sample_times(Fraction(0), Fraction(3), 0, 20)
CONFIG = DecodeConfig(deadline_seconds=60, probe_deadline_seconds=60)


@pytest.fixture
def film(tmp_path: Path) -> str:
    make_video(tmp_path / "film.mp4", range(80))
    return str(tmp_path / "film.mp4")


@pytest.fixture
def hang(tmp_path: Path) -> str:
    """A pipe, which blocks when it is opened."""
    os.mkfifo(tmp_path / "hang.mp4")
    return str(tmp_path / "hang.mp4")


@pytest.fixture(scope="module")
def source() -> IsolatedFrames:
    return IsolatedFrames(SIZE, MediaLimits(), CONFIG)


def frames(
    source: FrameSource, uri: str, modality: Modality = "video", times: Sequence[Fraction] = TIMES
) -> FrameBatch:
    """Frames of one request."""
    (decoded,) = source.decode([DecodeRequest(uri, modality, times)])
    if isinstance(decoded.frames, DecodeError):
        raise decoded.frames
    return decoded.frames


def failure(source: FrameSource, uri: str) -> tuple[str, ErrorType, str]:
    with pytest.raises(DecodeError) as caught:
        frames(source, uri)
    return caught.value.stage, caught.value.error_type, caught.value.message


def test_short_replies_accumulate_while_the_parent_is_idle(tmp_path: Path) -> None:
    requests = []
    for index in range(300):
        path = tmp_path / f"{index}.png"
        Image.new("RGB", (64, 48), (index % 256, 7, 9)).save(path)
        requests.append(DecodeRequest(str(path), "image", [Fraction(0)]))
    naps: list[None] = []
    source = IsolatedFrames(SIZE, MediaLimits(), CONFIG, idle=lambda: naps.append(time.sleep(0.05)))
    batches = [result.frames for result in source.decode(requests)]
    reds = [int(batch.frames[0, 0, 0, 0]) for batch in batches if isinstance(batch, FrameBatch)]
    assert reds == [index % 256 for index in range(300)]
    assert 0 < len(naps) < 100


def test_a_child_returns_the_frames_of_this_process(source: IsolatedFrames, film: str, tmp_path: Path) -> None:
    Image.new("RGB", (40, 30), (10, 200, 30)).save(tmp_path / "a.png")
    local = LocalFrames(SIZE, MediaLimits(), CONFIG)
    kept = []
    late = [Fraction(100)]  # has no frame
    requests = ((film, "video", TIMES), (film, "video", late), (str(tmp_path / "a.png"), "image", TIMES[:1]))
    for uri, modality, times in requests * 2:
        here, there = (frames(s, uri, modality, times) for s in (local, source))  # type: ignore[arg-type]
        kept.append((here, there))
    for here, there in kept:  # later replies do not overwrite earlier frames
        assert np.array_equal(here.frames, there.frames)
        assert here.pts_seconds.tolist() == there.pts_seconds.tolist()
        assert here.times_seconds.tolist() == there.times_seconds.tolist()
        assert here.num_missing == there.num_missing


def test_errors_keep_their_stage_type_and_message(source: IsolatedFrames, film: str, tmp_path: Path) -> None:
    (tmp_path / "text.mp4").write_text("no video")
    local = LocalFrames(SIZE, MediaLimits(), CONFIG)
    for name in ("nowhere.mp4", "text.mp4"):
        uri = str(tmp_path / name)
        with pytest.raises(DecodeError) as here:
            frames(local, uri)
        assert failure(source, uri) == here.value.args
    assert len(frames(source, film).frames) == len(TIMES)


def test_a_medium_that_hangs_is_not_tried_again(film: str, hang: str) -> None:
    source = IsolatedFrames(SIZE, MediaLimits(), replace(CONFIG, deadline_seconds=1.0))
    assert failure(source, hang)[:2] == ("decode_video", ErrorType.DECODER_TIMEOUT)
    started = time.monotonic()
    assert failure(source, hang)[1] == ErrorType.DECODER_TIMEOUT
    assert time.monotonic() - started < 1
    source.config = CONFIG
    assert len(frames(source, film).frames) == len(TIMES)


@contextlib.contextmanager
def killing(source: IsolatedFrames, times: int) -> Iterator[None]:
    """Crashes the working child `times` times, as a broken decoder would."""

    def kill() -> None:
        for _ in range(times):
            while (child := source.child) is None or not child.is_ready:
                time.sleep(0.01)
            time.sleep(0.1)
            os.kill(child.pid, signal.SIGSEGV)
            while source.child is child:
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


def test_a_child_killed_from_outside_loses_nothing(source: IsolatedFrames, film: str) -> None:
    expected = frames(source, film)
    os.kill(source.child.pid, signal.SIGKILL)
    assert np.array_equal(frames(source, film).frames, expected.frames)


def described(source: FrameSource, requests: Sequence[DecodeRequest]) -> list[object]:
    """Comparable results of the requests."""
    found = [decoded.frames for decoded in source.decode(requests)]
    return [
        (one.stage, one.error_type)
        if isinstance(one, DecodeError)
        else (one.frames.tobytes(), one.times_seconds.tolist(), one.num_missing)
        for one in found
    ]


@pytest.fixture
def requests(film: str, tmp_path: Path) -> list[DecodeRequest]:
    """Distinct images, clips of a film and two bad files: several jobs."""
    requests = [DecodeRequest(film, "video", TIMES[start : start + 8]) for start in range(0, 16, 4)] * 10
    for number in range(100):
        Image.new("RGB", (40, 30), (number, 200, 30)).save(tmp_path / f"{number}.png")
        requests.insert(number, DecodeRequest(str(tmp_path / f"{number}.png"), "image", TIMES[:1]))
    (tmp_path / "text.mp4").write_text("no video")
    for index, name in ((3, "text.mp4"), (90, "nowhere.mp4")):
        requests.insert(index, DecodeRequest(str(tmp_path / name), "video", TIMES))
    return requests


def test_results_of_many_requests_come_in_order(source: IsolatedFrames, requests: list[DecodeRequest]) -> None:
    assert described(source, requests) == described(LocalFrames(SIZE, MediaLimits(), CONFIG), requests)
    assert described(source, []) == []


def test_the_child_decodes_ahead(source: IsolatedFrames, requests: list[DecodeRequest], film: str) -> None:
    taken = 0

    def counted() -> Iterator[DecodeRequest]:
        nonlocal taken
        for request in requests:
            taken += 1
            yield request

    results = source.decode(counted())
    assert isinstance(next(results).frames, FrameBatch)
    assert MAX_FRAMES_PER_JOB < taken < len(requests)
    child = source.child
    assert child is not None
    results.close()
    assert not psutil.pid_exists(child.pid)  # its remaining replies are dropped
    assert len(frames(source, film).frames) == len(TIMES)
    assert source.child is not None
    pid = source.child.pid
    results = source.decode(requests[:1])
    next(results)
    results.close()
    assert source.child.pid == pid  # it had no replies left


def test_a_child_killed_during_many_requests_loses_nothing(
    source: IsolatedFrames, requests: list[DecodeRequest]
) -> None:
    expected = described(source, requests)

    def killing_some() -> Iterator[DecodeRequest]:
        for number, request in enumerate(requests):
            if number in (0, 5, 130) and source.child is not None:
                os.kill(source.child.pid, signal.SIGKILL)
            yield request

    assert described(source, killing_some()) == expected  # type: ignore[arg-type]


@pytest.mark.usefixtures("broken_readers")
def test_each_crash_or_hang_among_many_requests_is_one_error(
    requests: list[DecodeRequest], film: str, hang: str, tmp_path: Path
) -> None:
    crash = tmp_path / "crash.mp4"
    crash.hardlink_to(film)
    expected = described(LocalFrames(SIZE, MediaLimits(), CONFIG), requests)
    for index, uri, kind in (
        (150, str(crash), ErrorType.DECODER_CRASHED),
        (60, hang, ErrorType.DECODER_TIMEOUT),
        (60, hang, ErrorType.DECODER_TIMEOUT),  # not tried again
        (0, str(crash), ErrorType.DECODER_CRASHED),
    ):
        requests.insert(index, DecodeRequest(uri, "video", TIMES))
        expected.insert(index, ("decode_video", kind))
    source = IsolatedFrames(SIZE, MediaLimits(), replace(CONFIG, deadline_seconds=3.0))
    assert described(source, requests) == expected


def test_too_much_memory_is_out_of_memory(tmp_path: Path) -> None:
    Image.new("L", (13000, 13000)).save(tmp_path / "large.png")
    limits = MediaLimits(max_pixels=1 << 30)
    source = IsolatedFrames(SIZE, limits, replace(CONFIG, max_memory_bytes=1 << 28))
    with pytest.raises(DecodeError) as caught:
        frames(source, str(tmp_path / "large.png"), "image", TIMES[:1])
    assert (caught.value.stage, caught.value.error_type) == ("decode_image", ErrorType.OUT_OF_MEMORY)


def test_nvdec_has_no_memory_limit() -> None:
    for backend, limit in (("pyav", CONFIG.max_memory_bytes), ("nvdec", resource.RLIM_INFINITY)):
        source = IsolatedFrames(SIZE, MediaLimits(), replace(CONFIG, backend=backend))  # type: ignore[arg-type]
        source.child.wait_until_ready()
        assert resource.prlimit(source.child.pid, resource.RLIMIT_DATA)[0] == limit


def test_no_child_outlives_its_source(film: str) -> None:
    source = IsolatedFrames(SIZE, MediaLimits(), CONFIG)
    frames(source, film)
    pid = source.child.pid
    del source
    assert not psutil.pid_exists(pid)


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
    """New children act by the name of a file: crash, take memory, count two retries."""
    (tmp_path / "site").mkdir()
    (tmp_path / "site" / "sitecustomize.py").write_text(BROKEN_READERS)
    monkeypatch.syspath_prepend(str(tmp_path / "site"))


def make_greedy_picture(path: Path) -> None:
    """A sparse 1 x 1 PNG whose header has 600 MB of text."""
    Image.new("L", (1, 1)).save(path, "PNG")
    header_end = 8 + 25
    with path.open("r+b") as file:
        file.seek(header_end)
        file.write(struct.pack(">I", 600 << 20) + b"tEXt")
        file.truncate(700 << 20)


def spec(**changes: object) -> PlanSpec:
    return PlanSpec(fps=Fraction(1), recipe_hash="r", decode=replace(CONFIG, **changes))  # type: ignore[arg-type]


def plan(paths: list[Path], **changes: object) -> dict[str, tuple[str | None, str | None]]:
    """Error stage and type of every medium, by file name."""
    table = pa.concat_tables(plan_page([Medium(str(path), path.name) for path in paths], spec(**changes)))
    assert table["media_id"].to_pylist() == [path.name for path in paths]
    columns = (table[name].to_pylist() for name in ("media_id", "error_stage", "error_type"))
    return {name: (stage, kind) for name, stage, kind in zip(*columns, strict=True)}


def test_a_child_reads_the_same_headers_as_this_process(tmp_path: Path) -> None:
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
def test_each_medium_that_breaks_the_prober_is_one_error_row(tmp_path: Path, hang: str) -> None:
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


@pytest.mark.slow
@pytest.mark.usefixtures("broken_readers")
def test_media_whose_headers_fit_alone_but_not_together_are_planned(tmp_path: Path, film: str) -> None:
    paths = [tmp_path / f"large{number}.mp4" for number in range(6)]
    for path in paths:
        path.hardlink_to(film)
    assert set(plan(paths, max_memory_bytes=320 << 20).values()) == {(None, None)}


def test_ffmpegs_enomem_is_out_of_memory(film: str) -> None:
    with pytest.raises(DecodeError, match="out_of_memory"), decode_errors("probe", film):
        av.error.err_check(-errno.ENOMEM)


@pytest.mark.usefixtures("broken_readers")
def test_a_medium_that_crashes_the_prober_has_its_exit_code(tmp_path: Path, film: str) -> None:
    Path(tmp_path / "crash.mp4").hardlink_to(film)
    source = IsolatedProbes(MediaLimits(), CONFIG)
    (medium,) = source.probe([Medium(str(tmp_path / "crash.mp4"))])
    assert medium.error is not None
    assert "code -11, twice" in medium.error.message
    assert source.probe([Medium(film)]) == [probe_media(film)]


@pytest.mark.usefixtures("broken_readers")
def test_retries_in_a_child_are_counted_in_the_parent(tmp_path: Path, film: str) -> None:
    paths = [tmp_path / f"{kind}{number}.mp4" for kind in ("retried", "plain") for number in range(20)]
    for path in paths:
        path.hardlink_to(film)
    before = storage.num_retries()
    assert set(plan(paths).values()) == {(None, None)}
    assert storage.num_retries() == before + 40
    IsolatedProbes(MediaLimits(), CONFIG).probe([Medium(str(paths[0]))] * 9)  # clips of one film
    assert storage.num_retries() == before + 42


def test_a_prober_killed_from_outside_loses_nothing(tmp_path: Path, film: str) -> None:
    media = [Medium(str(tmp_path / f"{number}.mp4"), str(number)) for number in range(40)]
    for medium in media:
        Path(medium.uri).hardlink_to(film)
    source = IsolatedProbes(MediaLimits(), CONFIG)
    expected = [medium.with_headers(probe_media(film)) for medium in media]
    assert source.probe(media) == expected
    assert source.child is not None
    os.kill(source.child.pid, signal.SIGKILL)
    assert source.probe(media) == expected
    child = source.child
    assert source.probe(media[:1]) == expected[:1]
    assert source.child is child  # pages share it


def test_no_child_is_started_for_media_that_need_no_probing(film: str) -> None:
    probed = Medium(film, "probed", version=FileVersion(1, None, "v")).with_headers(probe_media(film))
    failed = Medium(film, "failed", error=DecodeError("list", ErrorType.BAD_ROW, "as in the manifest"))
    probes = IsolatedProbes(MediaLimits(), CONFIG)
    for page in ([probed, failed], [replace(probed, sha256="0")], [replace(probed, version=None)]):
        assert pa.concat_tables(plan_page(page, spec(), probes)).num_rows == len(page)
    assert probes.child is None
    plain = plan_here([[replace(probed, modality=None)]], spec(isolation="none"))
    assert pa.concat_tables(plain).num_rows == 1
    assert pa.concat_tables(plan_page([replace(probed, modality=None)], spec(), probes)).num_rows == 1
    assert probes.child is not None


def test_invalid_settings_are_errors() -> None:
    for wrong in (
        {"deadline_seconds": 0.0},
        {"probe_deadline_seconds": 0.0},
        {"max_memory_bytes": 1000},
        {"max_open_videos": 0},
    ):
        with pytest.raises(ValueError, match=next(iter(wrong))):
            DecodeConfig(**wrong)  # type: ignore[arg-type]

"""decord, torchcodec and NVDEC return PyAV's frames, fall back to PyAV, or say how to install them."""

from __future__ import annotations

import sys
from fractions import Fraction
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import pytest
import torch
from PIL import Image

from reference.awkward_videos import KINDS, SIZE
from reference.synthetic_media import make_video
from timeviper_platform.data.media.container import DecodeError
from timeviper_platform.data.video.decord_reader import DecordReader, load_decord
from timeviper_platform.data.video.frames import FrameBatch, Resample
from timeviper_platform.data.video.reader import Backend, check_backend, open_video, read_frames
from timeviper_platform.data.video.torchcodec_reader import TorchcodecReader, load_torchcodec

DECORDS = {name for name in KINDS if name.endswith(".mp4")} | {"mpeg4.avi", "mpeg2.mkv"}
"""Videos of which decord reads the timestamps correctly."""


def assert_alike(ours: FrameBatch, theirs: FrameBatch) -> None:
    assert theirs.num_missing == ours.num_missing
    assert np.array_equal(theirs.times_seconds, ours.times_seconds)
    assert np.allclose(theirs.pts_seconds, ours.pts_seconds, rtol=0, atol=1e-9)
    assert (
        np.abs(theirs.frames.astype(int) - ours.frames).mean(axis=(1, 2, 3)).max(initial=0) < 6
    )  # of hard edges in 64 x 48


@pytest.mark.parametrize("name", list(KINDS))
def test_decord_returns_the_same_frames_within_rounding(videos: dict[str, Path], name: str) -> None:
    path = str(videos[name])
    ours = read_frames(path, SIZE)
    assert_alike(ours, read_frames(path, SIZE, backend="decord"))
    reader = open_video(path, SIZE, backend="decord")
    assert isinstance(reader, DecordReader) == (name in DECORDS)
    times = [Fraction(t) for t in ours.times_seconds]
    for start, stop in ((3, 5), (0, 2), (len(times) - 1, len(times)), (1, 4), (0, 0), (0, len(times))):
        assert_alike(reader_frames(ours, start, stop), reader.sample(times[start:stop]))
    reader.close()


def reader_frames(batch: FrameBatch, start: int, stop: int) -> FrameBatch:
    return FrameBatch(*(values[start:stop] for values in (batch.frames, batch.pts_seconds, batch.times_seconds)))


@pytest.mark.parametrize("format", ["mpegts", "mpeg", "matroska", "mp4"])
@pytest.mark.parametrize("start", [0, 11])
def test_decord_returns_the_same_frames_wherever_a_clock_starts(tmp_path: Path, format: str, start: int) -> None:
    codec = "mpeg2video" if format == "mpeg" else "libx264"
    make_video(tmp_path / "film", range(start, 160), format=format, codec=codec, time_base=Fraction(1, 25))
    assert_alike(*(read_frames(str(tmp_path / "film"), SIZE, backend=backend) for backend in ("pyav", "decord")))


@pytest.mark.parametrize("turned", [(90, False, False), (0, True, False)])
@pytest.mark.parametrize("format", ["mp4", "matroska"])
def test_decord_returns_rotated_videos_upright(tmp_path: Path, format: str, turned: tuple[int, bool, bool]) -> None:
    make_video(tmp_path / "film", range(40), format=format, turned=turned)
    assert_alike(*(read_frames(str(tmp_path / "film"), SIZE, backend=backend) for backend in ("pyav", "decord")))


def test_decord_scales_as_the_processor_says(videos: dict[str, Path]) -> None:
    """Bicubic: full-size frames through Pillow, as the public code does."""
    path, times = str(videos["b_frames.mp4"]), [Fraction(n, 2) for n in (0, 1, 1, 4, 5)]

    def frames(resample: Resample) -> np.ndarray:
        reader = open_video(path, SIZE, backend="decord", resample=resample)
        batch = reader.sample(times)
        reader.close()
        return batch.frames

    plain = load_decord().VideoReader(path)
    indices = [round(seconds * plain.get_avg_fps()) for seconds in (0, 0.5, 0.5, 2, 2.5)]
    for pixels, index in zip(frames("bicubic"), indices, strict=True):
        picture = Image.fromarray(plain[index].asnumpy())
        assert np.array_equal(pixels, picture.resize((SIZE, SIZE), Image.Resampling.BICUBIC))
    assert not np.array_equal(frames("bicubic"), frames("bilinear"))


def test_decord_handles_a_wrong_header(tmp_path: Path) -> None:
    make_video(tmp_path / "film", range(160), format="matroska")
    data = (tmp_path / "film").read_bytes()
    (tmp_path / "film").write_bytes(data[: len(data) // 2])
    ours, theirs = (read_frames(str(tmp_path / "film"), SIZE, backend=backend) for backend in ("pyav", "decord"))
    assert 0 < len(ours.frames) < 20
    assert_alike(ours, theirs)


def test_unfit_sources_fall_back_to_pyav(
    videos: dict[str, Path], tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    film = videos["b_frames.mp4"].read_bytes()
    (tmp_path / "shard.tar").write_bytes(b"\0" * 512 + film)
    location = f"{tmp_path}/shard.tar#offset=512&size={len(film)}"
    expected = read_frames(film, SIZE)
    with caplog.at_level("INFO"):
        for source in (film, location):
            assert_alike(expected, read_frames(source, SIZE, backend="decord"))
    assert "falling back from decord to PyAV: decord copies all but whole local files" in caplog.text


def test_missing_decord_is_an_error_with_the_fix(monkeypatch: pytest.MonkeyPatch) -> None:
    check_backend("decord")
    monkeypatch.setitem(sys.modules, "decord", None)
    with pytest.raises(RuntimeError, match=r"backend decord does not load .*pip install decord .*or use pyav"):
        check_backend("decord")


def test_torchcodec_returns_the_same_frames_within_rounding(videos: dict[str, Path]) -> None:
    try:
        load_torchcodec()
    except RuntimeError as error:
        pytest.skip(str(error))
    for path in videos.values():
        assert_alike(*(read_frames(str(path), 64, backend=backend) for backend in ("pyav", "torchcodec")))


@pytest.mark.gpu
def test_nvdec_returns_the_same_frames_within_rounding(videos: dict[str, Path]) -> None:
    try:
        load_torchcodec("nvdec")
    except RuntimeError as error:
        pytest.skip(str(error))
    for path in videos.values():
        assert_alike(*(read_frames(str(path), 64, backend=backend) for backend in ("pyav", "nvdec")))


@pytest.mark.parametrize("backend", ["torchcodec", "nvdec"])
def test_a_missing_backend_is_an_error_with_the_package_to_install(
    monkeypatch: pytest.MonkeyPatch, videos: dict[str, Path], backend: Backend
) -> None:
    monkeypatch.setitem(sys.modules, "torchcodec.decoders", None)
    for use in (lambda: open_video(str(videos["b_frames.mp4"]), SIZE, backend=backend), lambda: check_backend(backend)):
        with pytest.raises(
            RuntimeError, match=rf"{backend} .* pip install 'timeviper-platform\[{backend}\]', or use pyav"
        ):
            use()


class FakeDecoder:
    """torchcodec's decoder in a build without CUDA; fails on files named `damaged`."""

    metadata = SimpleNamespace(rotation=None)

    def __init__(self, content: str, *, device: str, **_: object) -> None:
        if device != "cpu":
            raise RuntimeError(f"Unsupported device: {device}")
        if "damaged" in content:
            raise RuntimeError("Could not open input file")


@pytest.fixture
def torchcodec_without_cuda(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "torchcodec.decoders", SimpleNamespace(VideoDecoder=FakeDecoder))


@pytest.mark.usefixtures("torchcodec_without_cuda")
def test_nvdec_without_a_cuda_device_is_an_error(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    with pytest.raises(RuntimeError, match=r"backend nvdec needs a CUDA device.* extra nvdec .*or use pyav"):
        check_backend("nvdec")
    check_backend("torchcodec")


@pytest.mark.usefixtures("torchcodec_without_cuda")
def test_nvdec_distinguishes_a_build_without_cuda_from_a_damaged_file(
    monkeypatch: pytest.MonkeyPatch, videos: dict[str, Path], tmp_path: Path
) -> None:
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    with pytest.raises(RuntimeError, match=r"only on the CPU .*pip install 'timeviper-platform\[nvdec\]'"):
        open_video(str(videos["b_frames.mp4"]), SIZE, backend="nvdec")
    (tmp_path / "damaged.mp4").hardlink_to(videos["b_frames.mp4"])
    with pytest.raises(DecodeError, match="corrupt_file"):
        open_video(str(tmp_path / "damaged.mp4"), SIZE, backend="nvdec")


@pytest.mark.usefixtures("torchcodec_without_cuda")
@pytest.mark.parametrize("turned", [None, (90, False, False), (180, False, False), (0, True, False), (90, True, False)])
def test_torchcodec_is_used_for_files_that_it_rotates_correctly(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path, turned: tuple[int, bool, bool] | None
) -> None:
    """torchcodec rotates from -180 to 180 degrees and ignores mirrors."""
    make_video(tmp_path / "film.mp4", range(8), turned=turned)
    rotation = None if turned is None else {0: -180.0, 90: 90.0, 180: -180.0}[turned[0]]
    monkeypatch.setattr(FakeDecoder, "metadata", SimpleNamespace(rotation=rotation))
    reader = open_video(str(tmp_path / "film.mp4"), SIZE, backend="torchcodec")
    assert isinstance(reader, TorchcodecReader) == (turned is None or not turned[1])


@pytest.mark.usefixtures("torchcodec_without_cuda")
def test_torchcodec_is_not_used_for_files_without_pts(videos: dict[str, Path]) -> None:
    for name in KINDS:
        reader = open_video(str(videos[name]), SIZE, backend="torchcodec")
        assert isinstance(reader, TorchcodecReader) == (name != "mpeg4_b_frames.avi")

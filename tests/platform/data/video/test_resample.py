"""Frames are scaled as the encoder's processor asks, by every reader and across processes."""

from __future__ import annotations

import io
from fractions import Fraction
from pathlib import Path
from typing import get_args

import av
import numpy as np
import pytest
from PIL import Image

from reference.synthetic_media import picture
from timeviper_platform.data.media.container import MediaLimits
from timeviper_platform.data.video.frames import FrameBatch, Resample
from timeviper_platform.data.video.reader import open_video, read_frames
from timeviper_platform.data.video_worker.frame_source import DecodeConfig, DecodeRequest, LocalFrames
from timeviper_platform.data.video_worker.isolated import IsolatedFrames

PILLOW = {"bilinear": Image.Resampling.BILINEAR, "bicubic": Image.Resampling.BICUBIC}
SIZE = 32
TIMES = [Fraction(0), Fraction(1), Fraction(2)]


@pytest.fixture(scope="module")
def film(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Grey noise, in which the methods differ most; 8 frames per second, each eighth a keyframe."""
    path = tmp_path_factory.mktemp("film") / "film.mp4"
    noise = np.random.default_rng(0).integers(0, 256, (24, 64, 96, 1), np.uint8)
    with av.open(str(path), "w") as container:
        stream = container.add_stream("libx264", rate=8)
        stream.width, stream.height, stream.pix_fmt = 96, 64, "yuv420p"
        stream.options = {"crf": "8", "bf": "0", "g": "8", "sc_threshold": "0"}
        for pixels in noise.repeat(3, axis=-1):
            container.mux(stream.encode(av.VideoFrame.from_ndarray(pixels, format="rgb24")))
        container.mux(stream.encode(None))
    return path


def scaled_by_pillow(film: Path, resample: Resample) -> np.ndarray:
    with av.open(str(film)) as container:
        frames = [frame.to_ndarray(format="rgb24") for frame in container.decode(video=0)][::8]
    return np.stack([np.asarray(Image.fromarray(frame).resize((SIZE, SIZE), PILLOW[resample])) for frame in frames])


def difference(one: np.ndarray, other: np.ndarray) -> float:
    return float(np.abs(one.astype(int) - other.astype(int)).mean())


@pytest.mark.parametrize("resample", get_args(Resample))
@pytest.mark.parametrize("options", [{}, {"keyframe_step": Fraction(1)}], ids=str)
def test_a_video_is_scaled_as_by_pillow(film: Path, resample: Resample, options: dict[str, object]) -> None:
    frames = open_video(str(film), SIZE, resample=resample, **options).sample(TIMES).frames  # type: ignore[arg-type]
    (other,) = set(PILLOW) - {resample}
    found = {name: difference(frames, scaled_by_pillow(film, name)) for name in get_args(Resample)}
    assert found[resample] < 2.5  # swscale scales in YUV, with other rounding
    assert found[resample] < found[other]


@pytest.mark.parametrize("resample", get_args(Resample))
def test_a_picture_is_scaled_as_by_pillow(resample: Resample) -> None:
    image, content = Image.fromarray(picture(3, 90, 57)), io.BytesIO()
    image.save(content, "png")
    frames = read_frames(content.getvalue(), SIZE, resample=resample).frames
    assert np.array_equal(frames[0], np.asarray(image.resize((SIZE, SIZE), PILLOW[resample])))


def test_a_child_process_scales_alike(film: Path) -> None:
    requests = [DecodeRequest(str(film), "video", TIMES)]
    config = DecodeConfig()
    for resample in get_args(Resample):
        pair = []
        for kind in (LocalFrames, IsolatedFrames):
            (result,) = kind(SIZE, MediaLimits(), config, resample=resample).decode(requests)
            assert isinstance(result.frames, FrameBatch)
            pair.append(result.frames.frames)
        assert np.array_equal(*pair)

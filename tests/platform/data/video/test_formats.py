"""Every container and elementary stream that folder scans select is read frame by frame."""

from __future__ import annotations

import io
from fractions import Fraction

import av
import numpy as np
import pytest

from reference.painted_numbers import painted, read_number
from timeviper_platform.data.media.probe import probe_media
from timeviper_platform.data.video.reader import open_video, read_frames

SIZE = 64


def film(codec: str, format: str) -> bytes:
    """60 frames at 25 fps; frame k shows k."""
    content = io.BytesIO()
    with av.open(content, "w", format=format) as container:
        stream = container.add_stream(codec, rate=25, options={"crf": "10"} if codec.startswith("libx") else {})
        stream.width, stream.height, stream.pix_fmt, stream.bit_rate = SIZE, SIZE, "yuv420p", 2_000_000
        stream.gop_size = 12
        for number in range(60):
            frame = av.VideoFrame.from_ndarray(np.ascontiguousarray(painted(number, SIZE, SIZE)), format="rgb24")
            container.mux(stream.encode(frame))
        container.mux(stream.encode(None))
    return content.getvalue()


@pytest.mark.parametrize(
    ("codec", "format"),
    [
        *[("wmv2", "asf"), ("mpeg2video", "mxf"), ("libvpx", "ivf"), ("mpeg2video", "vob"), ("flv", "flv")],
        *[("mpeg1video", "mpeg1video"), ("mpeg2video", "mpeg2video"), ("libx264", "h264"), ("libx265", "hevc")],
    ],
)
def test_the_frame_on_screen_is_read(codec: str, format: str) -> None:
    content = film(codec, format)
    assert probe_media(content).duration_seconds == Fraction(60, 25)
    assert [read_number(frame) for frame in read_frames(content, SIZE).frames] == [0, 25, 50]
    reader = open_video(content, SIZE)
    for number in (59, 3, 30, 31, 0):  # back and forth
        batch = reader.sample([Fraction(number, 25)])
        assert (read_number(batch.frames[0]), batch.pts_seconds[0]) == (number, pytest.approx(number / 25))

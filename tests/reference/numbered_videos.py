"""Videos whose frames carry their number, as the cases of `cases/media` do, and what is right for them."""

from __future__ import annotations

import io
import json
import random
from collections.abc import Iterable, Sequence
from fractions import Fraction
from pathlib import Path

import av
import numpy as np

from reference.painted_numbers import painted, read_number
from timeviper_platform.data.media.probe import probe_media
from timeviper_platform.data.video.frames import FrameBatch
from timeviper_platform.data.video.reader import open_video
from timeviper_platform.data.video.sampling import count_frames, sample_times

CASES = Path(__file__).parent / "cases/media"

SIZE = 64

Shown = list[tuple[float, float, int]]
"""Sampling time, PTS on the medium's clock, number."""


def expected_cases() -> dict[str, Shown]:
    """What is right for each video of `cases/media`."""
    cases = json.loads((CASES / "expected.json").read_text())
    return {name: [(t, pts, number) for t, pts, number in rows] for name, rows in cases.items()}


def shown(batch: FrameBatch) -> Shown:
    return [
        (float(t), round(float(pts), 3), read_number(pixels))
        for t, pts, pixels in zip(batch.times_seconds, batch.pts_seconds, batch.frames, strict=True)
    ]


def on_screen(ticks: Sequence[int], *, end: int | None = None, first: int = 0, start: int = 0) -> Shown:
    """What is right at 1 frame per second.

    Args:
        ticks: of 1/25 s; frame i is shown from ticks[i].
        end: of the last frame; None = one tick after it starts.
        first: number of the first frame that decodes.
        start: tick at 0 s.
    """
    rows = []
    for t in range(-(-((ticks[-1] + 1 if end is None else end) - start) // 25)):
        index = max(first, sum(tick - start <= 25 * t for tick in ticks) - 1)
        rows.append((float(t), round((ticks[index] - start) / 25, 3), index))
    return rows


def numbered_video(
    ticks: Iterable[int],
    *,
    format: str,
    time_base: Fraction = Fraction(1, 25),
    codec: str = "libx264",
    gop: int = 25,
    options: dict[str, str] | None = None,
    container_options: dict[str, str] | None = None,
    sound: tuple[float, float] | None = None,
    first_number: int = 0,
    more_streams: Sequence[tuple[str, int, av.stream.Disposition]] = (),
    disposition: av.stream.Disposition | None = None,
) -> bytes:
    """Returns a file whose frame i shows first_number + i at ticks[i].

    Args:
        sound: start and end in seconds.
        more_streams: codec, first number and disposition of streams before this one, with the same ticks; a codec
            with `!` has one frame alone.
    """
    stamps = list(ticks)
    target = io.BytesIO()
    with av.open(target, "w", format=format, options=container_options or {}) as container:
        streams = []
        for name, number, kind in (*more_streams, (codec, first_number, disposition)):
            stream = container.add_stream(name.strip("!"), rate=25)
            stream.width = stream.height = SIZE
            stream.pix_fmt = "yuvj420p" if name.startswith("mjpeg") else "yuv420p"
            stream.time_base = stream.codec_context.time_base = time_base
            stream.gop_size = gop
            if name == "libx264":
                stream.options = {"sc_threshold": "0", "preset": "ultrafast", "crf": "12", "bf": "2", **(options or {})}
            elif options and name == codec:
                stream.options = options
            if kind is not None:
                stream.disposition = kind
            streams.append((stream, number, stamps[:1] if name.endswith("!") else stamps))
        audio = _add_sound(container) if sound else None
        for index in range(len(stamps)):
            for stream, number, own in streams:
                if index < len(own):
                    frame = av.VideoFrame.from_ndarray(painted(number + index, SIZE, SIZE), format="rgb24")
                    frame.pts, frame.time_base = own[index], time_base
                    container.mux(stream.encode(frame))
        for stream, _, _ in streams:
            container.mux(stream.encode(None))
        if audio is not None and sound is not None:
            _write_sound(container, audio, *sound)
    return target.getvalue()


def remux(data: bytes, *, format: str, first_keyframe: int = 0, first_packet: int = 0) -> bytes:
    """Copies the video packets of a file from a keyframe, and from a packet, on."""
    target = io.BytesIO()
    num_keyframes = 0
    with av.open(io.BytesIO(data)) as source, av.open(target, "w", format=format) as copy:
        stream = source.streams.video[0]
        copied = copy.add_stream_from_template(stream)
        for index, packet in enumerate(source.demux(stream)):
            num_keyframes += packet.is_keyframe
            if packet.dts is not None and num_keyframes > first_keyframe and index >= first_packet:
                packet.stream = copied
                copy.mux(packet)
    return target.getvalue()


def check_every_path(source: str | bytes, expected: Shown, *, parts: int = 1) -> None:
    """Checks the planned times and the frames, whole, in segments of drawn order, and each alone."""
    medium = probe_media(source)
    times = sample_times(Fraction(0), Fraction(1), 0, count_frames(Fraction(0), medium.duration_seconds, Fraction(1)))
    assert [float(t) for t in times] == [t for t, _, _ in expected]
    assert medium.joined_parts == parts
    whole = open_video(source, SIZE).sample(times)  # without knowing whether parts were joined
    assert shown(whole) == expected
    segments = [times[start : start + 2] for start in range(0, len(times), 2)]
    random.Random(0).shuffle(segments)
    reader = open_video(source, SIZE, joined_parts=medium.joined_parts)
    pieces = [reader.sample(segment) for segment in segments]
    reader.close()
    assert sorted(row for piece in pieces for row in shown(piece)) == expected
    alone = [open_video(source, SIZE, joined_parts=medium.joined_parts).sample([t]) for t in times[::-3]]
    assert sorted(row for piece in alone for row in shown(piece)) == sorted(expected[::-3])
    assert sum(batch.num_missing + batch.num_damaged for batch in (whole, *pieces, *alone)) == 0


def _add_sound(container: av.container.OutputContainer) -> av.AudioStream:
    codecs = {"webm": "libopus", "matroska": "pcm_s16le"}  # PCM starts at its PTS, AAC earlier
    stream = container.add_stream(codecs.get(container.format.name, "aac"), rate=48000)
    stream.layout = "mono"
    return stream


def _write_sound(container: av.container.OutputContainer, stream: av.AudioStream, start: float, end: float) -> None:
    for second in range(round(end - start)):
        silence = np.zeros((1, 48000), np.int16 if stream.name == "pcm_s16le" else np.float32)
        frame = av.AudioFrame.from_ndarray(
            silence, format="s16" if silence.dtype == np.int16 else "fltp", layout="mono"
        )
        frame.sample_rate, frame.time_base, frame.pts = 48000, Fraction(1, 48000), round((start + second) * 48000)
        container.mux(stream.encode(frame))
    container.mux(stream.encode(None))

"""Small synthetic media and encoders; every frame of a video shows its own number."""

from __future__ import annotations

import io
import json
from collections.abc import Sequence
from fractions import Fraction
from pathlib import Path

import av
import numpy as np
import torch
from transformers import SiglipVisionConfig, SiglipVisionModel


def picture(number: int, width: int = 64, height: int = 48) -> np.ndarray:
    """(H, W, 3) uint8, clearly different for neighbouring numbers."""
    rows, columns = np.mgrid[0:height, 0:width]
    red = (number * 37 + columns * 2) % 256
    green = (number * 83 + rows * 3) % 256
    blue = np.full_like(red, (number * 29) % 256)
    return np.stack([red, green, blue], axis=-1).astype(np.uint8)


def make_video(
    target: Path | io.BytesIO,
    pts: Sequence[int],
    *,
    time_base: Fraction = Fraction(1, 8),
    codec: str = "libx264",
    gop: int = 12,
    b_frames: int = 2,
    size: tuple[int, int] = (64, 48),
    audio_seconds: float = 0.0,
    format: str | None = None,
    options: dict[str, str] | None = None,
    turned: tuple[int, bool, bool] | None = None,
    container_options: dict[str, str] | None = None,
) -> None:
    """Writes a video whose frame i is picture(i) at pts[i] (ticks of `time_base`).

    `turned` sets the display matrix: degrees counterclockwise, horizontal flip, vertical flip.
    """
    name = str(target) if isinstance(target, Path) else target
    with av.open(name, "w", format=format, options=container_options or {}) as container:
        stream = container.add_stream(codec, rate=round(1 / time_base))
        stream.width, stream.height = size
        stream.pix_fmt = "yuv420p"
        stream.time_base = time_base
        stream.codec_context.time_base = time_base
        stream.gop_size = gop
        if turned is not None:
            stream.set_display_rotation(turned[0], hflip=turned[1], vflip=turned[2])
        if codec == "libx264":
            stream.options = {"bf": str(b_frames), "sc_threshold": "0", "crf": "12", **(options or {})}
        elif options:
            stream.options = options
        sound = _add_sound(container, audio_seconds) if audio_seconds else None
        for number, tick in enumerate(pts):
            frame = av.VideoFrame.from_ndarray(picture(number, *size), format="rgb24")
            frame.pts, frame.time_base = tick, time_base
            container.mux(stream.encode(frame))
        container.mux(stream.encode(None))
        if sound is not None:
            _write_sound(container, sound, audio_seconds)


def make_sound(path: Path, seconds: float = 1.0) -> None:
    """Writes a file with only sound."""
    with av.open(str(path), "w") as container:
        stream = _add_sound(container, seconds)
        _write_sound(container, stream, seconds)


def make_encoder(folder: Path, *, image_size: int = 32, hidden_size: int = 16, seed: int = 0) -> Path:
    """A random SigLIP-shaped encoder with 16 patches per frame."""
    torch.manual_seed(seed)
    config = SiglipVisionConfig(
        hidden_size=hidden_size,
        intermediate_size=2 * hidden_size,
        num_hidden_layers=2,
        num_attention_heads=2,
        image_size=image_size,
        patch_size=image_size // 4,
    )
    SiglipVisionModel(config).save_pretrained(folder)
    processor = {"image_mean": [0.5] * 3, "image_std": [0.5] * 3, "size": {"height": image_size, "width": image_size}}
    (folder / "preprocessor_config.json").write_text(json.dumps(processor))
    return folder


def _add_sound(container: av.container.OutputContainer, seconds: float) -> av.AudioStream:
    stream = container.add_stream("aac", rate=16000)
    stream.layout = "mono"
    return stream


def _write_sound(container: av.container.OutputContainer, stream: av.AudioStream, seconds: float) -> None:
    samples = np.zeros((1, round(16000 * seconds)), np.float32)
    frame = av.AudioFrame.from_ndarray(samples, format="fltp", layout="mono")
    frame.sample_rate, frame.pts = 16000, 0
    container.mux(stream.encode(frame))
    container.mux(stream.encode(None))

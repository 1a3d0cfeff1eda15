"""Small files of every container and picture format that a test can make, and random damage to them."""

from __future__ import annotations

import functools
import io
import random
from fractions import Fraction
from pathlib import Path
from typing import Any

import av
import numpy as np
from PIL import Image

from reference.synthetic_media import make_video, picture

CASES = Path(__file__).parent / "cases"


@functools.cache
def make_originals() -> dict[str, bytes]:
    """Name -> bytes of a sound file of each format.

    Not of FFV1: it fills damage from whatever frame it decoded last, unnoticed, so that a seek shows another picture.
    """
    slow, fast = Fraction(1, 8), Fraction(1, 25)  # MPEG-1 and 2 have no 8 frames per second
    h264: dict[str, Any] = {"gop": 10}
    files = {
        "h264.mp4": _video("mp4", slow, audio_seconds=3.0, **h264),
        "hevc.mp4": _video("mp4", slow, codec="libx265", options={"x265-params": "log-level=none"}),
        "mpeg4.mov": _video("mov", slow, codec="mpeg4"),
        "mpeg4.3gp": _video("3gp", slow, codec="mpeg4"),
        "h264.mkv": _video("matroska", slow, **h264),
        "vp8.webm": _video("webm", slow, codec="libvpx"),
        "vp9.webm": _video("webm", slow, codec="libvpx-vp9"),
        "mpeg4.avi": _video("avi", slow, codec="mpeg4"),
        "huffyuv.avi": _video("avi", slow, codec="ffvhuff"),
        "h263.flv": _video("flv", slow, codec="flv"),
        "h264.flv": _video("flv", slow, **h264),
        "h264.ts": _video("mpegts", slow, **h264),
        "mpeg2.ts": _video("mpegts", fast, codec="mpeg2video"),
        "mpeg1.mpg": _video("mpeg", fast, codec="mpeg1video"),
        "mpeg2.mpg": _video("mpeg", fast, codec="mpeg2video"),
        "mpeg2.m2v": _video("mpeg2video", fast, codec="mpeg2video"),
        "raw.h264": _video("h264", slow, **h264),
        "wmv2.wmv": _video("asf", slow, codec="wmv2"),
        "vp8.ogv": _video("ogg", slow, codec="libvpx"),
        "theora.ogv": (CASES / "media" / "theora_dup.ogv").read_bytes(),
        **_pictures(),
    }
    return {"fragmented.mp4": _fragmented(files["h264.mp4"]), **files}


def _video(format: str, time_base: Fraction, **changes: Any) -> bytes:
    target = io.BytesIO()
    count = round(3 / time_base)
    same = {"fflags": "+bitexact"}  # no random ids
    make_video(target, range(count), time_base=time_base, format=format, container_options=same, **changes)
    return target.getvalue()


def _fragmented(whole: bytes) -> bytes:
    target = io.BytesIO()
    options = {"movflags": "frag_keyframe+empty_moov+default_base_moof"}
    with av.open(io.BytesIO(whole)) as source, av.open(target, "w", format="mp4", options=options) as container:
        stream = container.add_stream_from_template(source.streams.video[0])
        for packet in source.demux(video=0):
            if packet.dts is not None:
                packet.stream = stream
                container.mux(packet)
    return target.getvalue()


def _pictures() -> dict[str, bytes]:
    stills = [Image.fromarray(picture(number)) for number in range(6)]
    first = stills[0]
    exif = Image.Exif()
    exif[0x0112] = 6
    alpha = first.copy()
    alpha.putalpha(Image.linear_gradient("L").resize(first.size))
    deep = Image.fromarray(np.arange(64 * 48, dtype=np.uint16).reshape(48, 64) * 21)
    film: dict[str, Any] = {"save_all": True, "append_images": stills[1:], "duration": 400, "loop": 0}
    saved: dict[str, tuple[Image.Image, str, dict[str, Any]]] = {
        "turned.jpg": (first, "JPEG", {"exif": exif}),
        "progressive.jpg": (first, "JPEG", {"progressive": True}),
        "grey.jpg": (first.convert("L"), "JPEG", {}),
        "cmyk.jpg": (first.convert("CMYK"), "JPEG", {}),
        "rgb.png": (first, "PNG", {}),
        "palette.png": (first.convert("P"), "PNG", {}),
        "alpha.png": (alpha, "PNG", {}),
        "deep.png": (deep, "PNG", {}),
        "film.png": (first, "PNG", film),
        "rgb.webp": (first, "WEBP", {}),
        "alpha.webp": (alpha, "WEBP", {"lossless": True}),
        "film.webp": (first, "WEBP", film),
        "still.gif": (first, "GIF", {}),
        "film.gif": (first, "GIF", film),
        "rgb.bmp": (first, "BMP", {}),
        "rgb.tiff": (first, "TIFF", {}),
        "lzw.tiff": (first, "TIFF", {"compression": "tiff_lzw"}),
        "rgb.avif": (first, "AVIF", {}),
    }
    return {name: _saved(image, format, options) for name, (image, format, options) in saved.items()}


def _saved(image: Image.Image, format: str, options: dict[str, Any]) -> bytes:
    target = io.BytesIO()
    image.save(target, format, **options)
    return target.getvalue()


def damage(data: bytes, other: bytes, drawn: random.Random) -> bytes:
    """Applies one to three changes; `other` is a file to splice from."""
    changed = bytearray(data)
    for _ in range(drawn.choice((1, 1, 2, 3))):
        start = _position(len(changed), drawn)
        length = min(drawn.choice((1, 4, 16, 64, 256, 1024)), len(changed) - start)
        match drawn.choice(("flip", "flip", "flip", "write", "zero", "cut", "remove", "repeat", "splice")):
            case "flip":
                for _ in range(drawn.choice((1, 1, 2, 4, 16))):
                    changed[_position(len(changed), drawn)] ^= 1 << drawn.randrange(8)
            case "write":
                changed[start : start + length] = drawn.randbytes(length)
            case "zero":
                changed[start : start + length] = bytes(length)
            case "cut":
                del changed[max(1, start) :]
            case "remove":
                del changed[start : start + length]
            case "repeat":
                changed[start:start] = changed[start : start + length]
            case "splice":
                begin = drawn.randrange(len(other))
                changed[start:start] = other[begin : begin + max(64, length)]
        if len(changed) < 2:
            changed += data[:16]
    return bytes(changed)


def _position(length: int, drawn: random.Random) -> int:
    """Prefers headers, which are at the start or the end."""
    region = drawn.choice(("anywhere", "anywhere", "start", "end"))
    if region == "anywhere" or length <= 512:
        return drawn.randrange(length)
    return drawn.randrange(512) if region == "start" else length - 1 - drawn.randrange(512)


def damaged_file(seed: int, index: int) -> tuple[str, bytes]:
    """Name and bytes of file `index` of a seed; every format has its turn."""
    originals = make_originals()
    names = sorted(originals)
    drawn = random.Random(f"{seed}/{index}")
    name = names[index % len(names)]
    return f"{index:06d}-{name}", damage(originals[name], originals[drawn.choice(names)], drawn)

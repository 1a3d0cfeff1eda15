"""Decodes pictures of any mode to upright RGB frames on white."""

from __future__ import annotations

from functools import partial
from typing import Any

import numpy as np
from PIL import ExifTags, Image, ImageCms

from timeviper_platform.data.media.container import (
    DecodeError,
    ErrorType,
    MediaLimits,
    check_size,
    decode_errors,
    open_binary,
    source_name,
)
from timeviper_platform.data.media.pictures import PictureError, load_picture, picture_errors
from timeviper_platform.data.video.frames import FrameBatch, Resample

_UPRIGHT = {
    2: Image.Transpose.FLIP_LEFT_RIGHT,
    3: Image.Transpose.ROTATE_180,
    4: Image.Transpose.FLIP_TOP_BOTTOM,
    5: Image.Transpose.TRANSPOSE,
    6: Image.Transpose.ROTATE_270,
    7: Image.Transpose.TRANSVERSE,
    8: Image.Transpose.ROTATE_90,
}
"""Transposition by EXIF orientation (EXIF 2.3, tag 0x0112)."""

_RESAMPLES = {"bilinear": Image.Resampling.BILINEAR, "bicubic": Image.Resampling.BICUBIC}

_LAB_TO_RGB = (ImageCms.createProfile("LAB"), ImageCms.createProfile("sRGB"))

_STRAIGHT = {"RGBa": "RGBA", "La": "LA"}
"""Modes with premultiplied alpha, and without."""


def read_image(
    source: str | bytes, image_size: int, *, limits: MediaLimits | None = None, resample: Resample = "bicubic"
) -> FrameBatch:
    """Returns one frame at time 0, upright by EXIF, with white for transparency. A cut picture is a damaged frame."""
    limits = limits or MediaLimits()
    name = source_name(source)
    check = partial(check_size, limits=limits, stage="decode_image", name=name)
    with decode_errors("decode_image", source, limits), open_binary(source, limits) as file:
        try:
            image, is_damaged = load_picture(file, check)
            with picture_errors():
                frame = scaled(on_white(_upright(image)), image_size, resample)
        except PictureError as error:
            raise DecodeError("decode_image", ErrorType.CORRUPT_FILE, f"{name}: {error}") from error
    return FrameBatch(frame[None], np.zeros(1), np.zeros(1), num_damaged=int(is_damaged))


def on_white(image: Image.Image) -> Image.Image:
    """Returns an image of any mode as RGB, with white for transparency."""
    image = with_8_bits(image)
    if image.mode == "LAB":
        image = ImageCms.profileToProfile(image, *_LAB_TO_RGB, outputMode="RGB") or image
    if image.has_transparency_data:
        image = image.convert(_STRAIGHT.get(image.mode, image.mode)).convert("RGBA")
        image = Image.alpha_composite(Image.new("RGBA", image.size, "white"), image)
    return image if image.mode == "RGB" else image.convert("RGB")  # convert() always copies


def with_8_bits(image: Image.Image) -> Image.Image:
    """Returns greys of 16 or 32 bits, or floating point, as L or LA, and others unchanged. Pillow would clip them.

    Integers keep the high byte of 16 bits; floating-point values from 0 to 1 become 0 to 255.
    """
    if not image.mode.startswith(("I", "F")):
        return image
    values = np.asarray(image)
    if image.mode == "F":
        scale = 255 if np.nanmax(values, initial=0) <= 1 else 1
        return Image.fromarray(np.clip(np.nan_to_num(values) * scale, 0, 255).astype(np.uint8))
    grey = Image.fromarray((np.clip(values, 0, 0xFFFF) >> 8).astype(np.uint8))
    if "transparency" in image.info:
        grey.putalpha(Image.fromarray(np.where(values == image.info["transparency"], 0, 255).astype(np.uint8)))
    return grey


def scaled(image: Image.Image, image_size: int, resample: Resample = "bicubic") -> np.ndarray:
    """Returns (image_size, image_size, 3) uint8."""
    return np.array(image.resize((image_size, image_size), _RESAMPLES[resample]))


def _upright(image: Image.Image) -> Image.Image:
    try:
        orientation: Any = image.getexif().get(ExifTags.Base.Orientation)
    except Exception:  # noqa: BLE001 - a broken EXIF block must not lose the picture
        orientation = None
    method = _UPRIGHT.get(orientation) if isinstance(orientation, int) else None
    return image if method is None else image.transpose(method)

"""The value shared by inputs, probing and planning."""

from __future__ import annotations

import functools
import hashlib
from dataclasses import dataclass, field, replace
from fractions import Fraction

from timeviper_platform.common.listing import FileVersion
from timeviper_platform.data.media.container import DecodeError, Modality

HEADER_FIELDS = ("modality", "duration_seconds", "source_fps", "width", "height", "codec", "joined_parts")
"""Fields that probing sets."""


@dataclass(frozen=True, slots=True)
class Medium:
    """A video, clip or image, with its headers or error."""

    uri: str
    """Absolute URI, possibly of a location inside a file."""
    media_id: str = ""
    start_seconds: float | None = None
    """Start of the clip; None = 0."""
    end_seconds: float | None = None
    """Exclusive end of the clip; None = the end."""
    version: FileVersion | None = None
    """Version in the listing or manifest; None = unknown."""
    sha256: str | None = None
    modality: Modality | None = None
    """None until probed."""
    duration_seconds: Fraction = Fraction(0)
    """End of the whole medium; 0 for an image."""
    source_fps: float = 0.0
    width: int = 0
    height: int = 0
    codec: str = ""
    joined_parts: int | None = None
    """Recordings that were joined in a video, each with its own clock; None = unknown, or an image."""
    error: DecodeError | None = None
    origin: str = field(default="", compare=False)
    """Manifest and row, for messages."""

    @property
    def is_probed(self) -> bool:
        return self.modality is not None

    def with_headers(self, probed: Medium) -> Medium:
        return replace(self, error=probed.error, **{name: getattr(probed, name) for name in HEADER_FIELDS})


@functools.lru_cache(maxsize=1024)  # most are 0
def exact(seconds: float) -> Fraction:
    """Returns the decimal that the float prints as: 0.1 becomes 1/10."""
    text = repr(float(seconds))
    whole, _, decimals = text.partition(".")
    if decimals.isdecimal():  # a third of the time that Fraction takes to parse text
        return Fraction(int(whole + decimals), 10 ** len(decimals))
    return Fraction(text)


def media_id_of(uri: str, root: str, start_seconds: float | None = None, end_seconds: float | None = None) -> str:
    """Returns 32 hex digits of sha256(URI relative to `root`, plus a clip's bounds)."""
    text = uri[len(root) :].lstrip("/") if uri.startswith(root.rstrip("/") + "/") else uri
    if start_seconds is not None or end_seconds is not None:
        text += f"#t={start_seconds or 0},{'' if end_seconds is None else end_seconds}"
    return hashlib.sha256(text.encode("utf-8", "surrogatepass")).hexdigest()[:32]

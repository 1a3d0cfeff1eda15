"""First bytes of files to modalities. Does not import Pillow or FFmpeg."""

from __future__ import annotations

import re
from typing import Literal

HEAD_BYTES = 512
"""Enough for every signature: MPEG-TS repeats its first byte after 188, 192 or 204."""

_PICTURE = re.compile(
    rb"\xff\xd8\xff|\x89PNG\r\n\x1a\n|GIF8[79]a|RIFF....WEBP|BM....\0\0\0\0|II[*+]\0|MM\0[*+]"
    rb"|\0\0\0\x0cjP  \r\n\x87\n|\xff\x4f\xff\x51|....ftypavi[fs]|....ftypm[is]f1.{0,64}avi[fs]"
    rb"|....ftyp(hei[cxms]|m[is]f1.{0,64}hei[cxms])"
    rb"|P[4-6][ \t\r\n]+(#[^\n]*\n[ \t\r\n]*)*\d+[ \t\r\n]",
    re.DOTALL,
)
_VIDEO = re.compile(
    rb"....(ftyp|moov|mdat|free|wide|skip)|\x1aE\xdf\xa3|FLV\x01|OggS|RIFF....AVI|DKIF"
    rb"|\x30\x26\xb2\x75\x8e\x66\xcf\x11|\x06\x0e\x2b\x34\x02\x05\x01\x01"  # ASF, MXF
    rb"|\0\0\x01[\xb3\xba]"  # MPEG video and program streams
    rb"|\0?\0\0\x01([\x07\x09\x27\x29\x47\x49\x67\x69]|[\x40\x46]\x01)"  # parameters or delimiter: H.264, HEVC
    rb"|G.{187}G|.{4}G.{191}G|G.{203}G",  # MPEG-TS
    re.DOTALL,
)
_HEIC = re.compile(rb"....ftyp(hei[cxms]|m[is]f1.{0,64}hei[cxms])", re.DOTALL)
_GIF = (b"GIF87a", b"GIF89a")
_PNG = b"\x89PNG\r\n\x1a\n"


def sniff_modality(head: bytes) -> Literal["video", "image"] | None:
    """Returns the modality by the first HEAD_BYTES, or None if no signature matches.

    An image may still be an animation, and so a video: see `scan_animation`. Playlists are text and match none.
    """
    if _PICTURE.match(head):
        return "image"
    return "video" if _VIDEO.match(head) else None


def may_be_animation(head: bytes) -> bool:
    """Returns False for the first bytes of still pictures and other media."""
    return is_gif(head) or (is_png(head) and b"acTL" in head) or is_animated_webp(head) or is_avif_sequence(head)


def is_gif(head: bytes) -> bool:
    return head.startswith(_GIF)


def is_png(head: bytes) -> bool:
    return head.startswith(_PNG)


def is_animated_webp(head: bytes) -> bool:
    return head[:4] == b"RIFF" and head[8:16] == b"WEBPVP8X" and len(head) >= 30 and bool(head[20] & 2)


def is_heic(head: bytes) -> bool:
    return _HEIC.match(head) is not None


def is_avif_sequence(head: bytes) -> bool:
    return head[4:8] == b"ftyp" and b"avis" in head[8 : int.from_bytes(head[:4], "big")]

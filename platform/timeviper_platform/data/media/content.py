"""Describes files that no decoder reads, and what to do about them."""

from __future__ import annotations

import io
import re
from typing import IO

HEAD_BYTES = 4096
MAX_BOXES = 1000
"""Maximum top-level boxes read from an MP4."""

_PREFIXES = (
    (
        b"version https://git-lfs.github.com/spec/",
        "a Git LFS pointer, not the file; run git lfs pull in its repository",
    ),
    (b"#EXTM3U", "an HLS playlist (m3u8), which only lists segments; join them: ffmpeg -i URL -c copy film.mp4"),
    (b"[playlist]", "a playlist (pls), which only lists media; name those instead"),
    (b"PK\x03\x04", "a zip archive; unpack it"),
    (b"PK\x05\x06", "an empty zip archive"),
    (b"\x1f\x8b", "a gzip archive; unpack it"),
    (b"BZh", "a bzip2 archive; unpack it"),
    (b"\xfd7zXZ\x00", "an xz archive; unpack it"),
    (b"\x28\xb5\x2f\xfd", "a zstd archive; unpack it"),
    (b"7z\xbc\xaf\x27\x1c", "a 7z archive; unpack it"),
    (b"Rar!\x1a\x07", "a rar archive; unpack it"),
    (b"%PDF", "a PDF document; export its pages as images"),
    (b"%!PS", "a PostScript document; export its pages as images"),
    (b"\xd0\xcf\x11\xe0\xa1\xb1\x1a\xe1", "an Office document; export its media"),
    (b"PAR1", "a Parquet file; give it as `input`, or a glob of such files, not as a medium"),
    (b"ID3", "a sound file without pictures"),
    (b"fLaC", "a sound file without pictures"),
    (b"d8:announce", "a torrent file, which only names its media; download those"),
    (b"\x93NUMPY", "a NumPy array; save it as images or video"),
    (b"\x89HDF\r\n\x1a\n", "an HDF5 file; save its arrays as images or video"),
    (b"SQLite format 3\x00", "an SQLite database"),
    (b"\x7fELF", "a program"),
    (b"MZ", "a program"),
)
_MARKUP = (
    (rb"<!doctype html|<html|<head|<body", "an HTML page (a login, consent or error page?); fetch the file itself"),
    (rb"<mpd\b", "a DASH playlist (mpd), which only lists segments; join them: ffmpeg -i URL -c copy film.mp4"),
    (rb"<smoothstreamingmedia\b", "a Smooth Streaming playlist, which only lists segments; download the film"),
    (rb"<svg\b", "an SVG drawing; render it as PNG"),
    (rb"<error>|accessdenied|nosuchkey", "an error message of a storage server; fetch the file again"),
)
_TAR_MAGIC = slice(257, 262)
_SEGMENT_BOXES = frozenset({b"moof", b"sidx", b"styp"})
_BOXES = _SEGMENT_BOXES | {b"ftyp", b"moov", b"mdat", b"free", b"wide", b"skip", b"uuid", b"pnot"}


def describe_content(file: IO[bytes]) -> str | None:
    """Returns what the file holds and what to do; None if it is not recognised.

    Never repeats the content, which may be secret.
    """
    head = file.read(HEAD_BYTES)
    if head and not head.strip(b"\0"):
        return "zero bytes, as of a download that never finished; download it again"
    for prefix, description in _PREFIXES:
        if head.startswith(prefix):
            return description
    if head[_TAR_MAGIC] == b"ustar":
        return "a tar archive; name it *.tar and give it as `input`, not as a medium"
    if head[4:8] in _BOXES:
        return _describe_boxes(file)
    text = _text(head)
    return None if text is None else _describe_text(text)


def describe_manifest(file: IO[bytes], suffix: str) -> str | None:
    """Returns what a file *.`suffix` holds instead of a table, and what to do; None if it is not recognised."""
    head = file.read(HEAD_BYTES)
    file.seek(0)
    if head.startswith(b"PAR1"):
        cut = "a Parquet file without its end: it was cut; write or fetch it again"
        return cut if suffix == "parquet" else "a Parquet file; name it *.parquet"
    if head.startswith(b"\x1f\x8b"):
        return f"a gzip archive; name it *.{suffix}.gz" if suffix != "parquet" else "a gzip archive; unpack it"
    text = _text(head)
    if text is None:
        known = describe_content(file)
        is_binary = suffix != "parquet" and any(byte < 32 and byte not in b"\t\n\f\r" for byte in head)
        return "binary data; fetch it again, or name it after its format" if is_binary and known is None else known
    if any(text.encode().startswith(prefix) for prefix, _ in _PREFIXES) or text.startswith("<"):
        return _describe_text(text).removesuffix(", not a medium")
    return "text; name it *.csv, *.tsv, *.json or *.jsonl" if suffix == "parquet" else None


def _describe_text(text: str) -> str:
    for prefix, description in _PREFIXES:
        if text.encode().startswith(prefix):
            return description
    if text.startswith("<"):
        for pattern, markup in _MARKUP:
            if re.search(pattern, text.encode(), re.IGNORECASE):
                return markup
        return "an XML document, not a medium"
    if text.startswith(("{", "[")):
        return "JSON text (an error message of a server?), not a medium"
    return "text, not a medium"


def _text(head: bytes) -> str | None:
    """Returns the head as text, or None for binary data."""
    encoding = "utf-16" if head.startswith((b"\xff\xfe", b"\xfe\xff")) else "utf-8"
    try:
        text = head.decode(encoding)
    except UnicodeDecodeError as error:
        if error.start < len(head) - 4:  # a cut character is at the very end
            return None
        text = head[: error.start].decode(encoding)
    text = text.lstrip("\ufeff \t\r\n")
    return text if text and all(char.isprintable() or char.isspace() for char in text) else None


def _describe_boxes(file: IO[bytes]) -> str | None:
    """Describes an MP4 or MOV whose index (ISO/IEC 14496-12, box `moov`) is missing or cut."""
    size, offset = file.seek(0, io.SEEK_END), 0
    for _ in range(MAX_BOXES):
        if offset + 8 > size:
            break
        file.seek(offset)
        header = file.read(16)
        length, name = int.from_bytes(header[:4], "big"), header[4:8]
        if length == 1:
            length = int.from_bytes(header[8:16], "big")
        if length == 0:  # up to the end of the file
            length = size - offset
        if length < 8:
            return None
        if name in _SEGMENT_BOXES:
            return "a media segment without its initialisation segment; join them: cat init.mp4 *.m4s > film.mp4"
        offset += length
        if name == b"moov":
            return (
                f"it ends at byte {size}, inside its index (moov): it was cut; fetch it again"
                if offset > size
                else None
            )
    cut = f" (it ends at byte {size}, its data at byte {offset})" if offset > size else ""
    return (
        f"its index (moov) is missing{cut}: the recording or download was cut before its index was written; fetch it"
        " again, or repair it with a tool such as untrunc"
    )

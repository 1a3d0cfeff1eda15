"""Reads a medium's headers, and the version and hash of its file."""

from __future__ import annotations

import hashlib
from collections.abc import Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Protocol

from timeviper_platform.common import storage
from timeviper_platform.common.listing import FileVersion
from timeviper_platform.data.media.animations import scan_animation
from timeviper_platform.data.media.clock import StreamClock
from timeviper_platform.data.media.container import (
    DecodeError,
    ErrorType,
    MediaFile,
    MediaLimits,
    check_size,
    decode_errors,
    open_binary,
    source_name,
    unreadable,
    video_stream,
)
from timeviper_platform.data.media.http_file import is_web
from timeviper_platform.data.media.locations import RangeLocation, parse_location
from timeviper_platform.data.media.medium import Medium
from timeviper_platform.data.media.pictures import PictureError, read_header
from timeviper_platform.data.media.signatures import sniff_modality
from timeviper_platform.data.media.stream_end import header_end_tick, is_cut_short, read_to_end

PROBE_THREADS = 16
"""Probing mostly waits for disks and object stores."""


class ProbeSource(Protocol):
    def probe(self, media: Sequence[Medium]) -> list[Medium]:
        """Returns the media in order, each with its header fields or error."""


@dataclass(frozen=True, slots=True)
class LocalProbes:
    """ProbeSource in this process."""

    limits: MediaLimits

    def probe(self, media: Sequence[Medium]) -> list[Medium]:
        with ThreadPoolExecutor(PROBE_THREADS) as pool:
            return list(pool.map(self._probe, media))

    def _probe(self, medium: Medium) -> Medium:
        try:
            return medium.with_headers(probe_media(medium.uri, self.limits))
        except DecodeError as error:
            return replace(medium, error=error)


def probe_media(source: str | bytes, limits: MediaLimits | None = None) -> Medium:
    """Returns the medium at `source` (URI or bytes) with its header fields. Raises DecodeError."""
    limits = limits or MediaLimits()
    with decode_errors("probe", source, limits):
        file = MediaFile(source, limits)
        if not file.head:
            raise DecodeError("probe", ErrorType.EMPTY_FILE, f"{source_name(source)}: the file has 0 bytes")
        is_picture = sniff_modality(file.head) == "image"
        probe = _probe_picture(source, file) if is_picture else _probe_video(source, file, limits)
    check_size(probe.width, probe.height, limits, "probe", source_name(source))
    return probe


def file_version(uri: str, limits: MediaLimits | None = None) -> FileVersion:
    """Returns the version of a file, location or URL. Raises DecodeError when it is missing."""
    location = parse_location(uri)
    if location is not None:
        whole = file_version(location.uri)
        size = location.size if isinstance(location, RangeLocation) else whole.size
        return FileVersion(size, whole.etag, f"{whole.text}/{location.version_text()}")
    with decode_errors("probe", uri, limits), storage.plain_errors(of_any_library=not is_web(uri)):
        if is_web(uri):
            with open_binary(uri, limits) as file:
                web = file.raw
                return FileVersion(web.size, web.etag, web.etag or f"{web.size}-{web.modified or 'web'}")
        filesystem, path = storage.split_uri(uri)
        if storage.is_local(uri):
            stat = Path(path).stat()
            return FileVersion(stat.st_size, None, f"{stat.st_size}-{stat.st_mtime_ns}")
        info = filesystem.info(path)
        size = int(info.get("size") or 0)
        etag = str(info.get("ETag") or info.get("etag") or "").strip('"') or None
        return FileVersion(size, etag, etag or f"{size}-{info.get('LastModified') or info.get('created')}")


def sha256_of(uri: str, limits: MediaLimits | None = None) -> str:
    with decode_errors("probe", uri, limits), open_binary(uri, limits) as file:
        digest = hashlib.sha256()
        while chunk := file.read(1 << 20):
            digest.update(chunk)
        return digest.hexdigest()


def _probe_picture(source: str | bytes, opened: MediaFile) -> Medium:
    """An animation is a video."""
    uri = source if isinstance(source, str) else source_name(source)
    with opened.open() as file:
        animation = scan_animation(file, opened.head)
        if animation is not None:
            return Medium(
                uri,
                modality="video",
                duration_seconds=animation.duration_seconds,
                source_fps=float(len(animation.frames) / animation.duration_seconds),
                width=animation.width,
                height=animation.height,
                codec=animation.format,
            )
        try:
            header = read_header(file)
        except PictureError as error:
            raise DecodeError("probe", ErrorType.CORRUPT_FILE, f"{source_name(source)}: {error}") from error
        return Medium(uri, modality="image", width=header.width, height=header.height, codec=header.codec)


def _probe_video(source: str | bytes, opened: MediaFile, limits: MediaLimits) -> Medium:
    name = source_name(source)
    with opened.open_container() as container:
        if not len(container.streams):
            kind, fact = unreadable(source, limits)
            raise DecodeError("probe", kind, f"{name}: {fact or 'it has no streams'}")
        stream = video_stream(container, "probe", name)
        context = stream.codec_context
        if not context.width or not context.height:
            raise DecodeError("probe", ErrorType.CORRUPT_FILE, f"{name}: the video stream has no frame size")
        clock = StreamClock(container, stream)
        is_cut = is_cut_short(opened.head, container, stream)
        packets = None if is_cut and stream.duration else read_to_end(container, stream, clock, name=name)
        ends = [] if packets is None or not packets.num_shown else [packets.end_tick]
        if is_cut:  # the frames that were cut off count as missing
            ends.append(header_end_tick(container, stream, clock))
        if not ends:
            message = f"{name}: its video stream has no packet with a timestamp; remux the file"
            raise DecodeError("probe", ErrorType.NO_DURATION, message)
        return Medium(
            source if isinstance(source, str) else name,
            modality="video",
            duration_seconds=clock.seconds(max(ends)),
            source_fps=float(stream.average_rate or 0),
            width=context.width,
            height=context.height,
            codec=context.name,
            joined_parts=1 if packets is None else packets.num_parts,
        )

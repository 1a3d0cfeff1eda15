"""Finds the members of a tar, also after damage and in archives joined end to end (GNU tar's --ignore-zeros)."""

from __future__ import annotations

import io
import tarfile
from collections.abc import Generator, Iterator
from typing import Any, NamedTuple, Self

from timeviper_platform.common.storage import READ_AHEAD_BYTES

BLOCK = tarfile.BLOCKSIZE
END_MARK = 2 * BLOCK
"""Zero bytes that end an archive. Most writers pad them to a record."""

RECORD_SIZES = (tarfile.RECORDSIZE, *(BLOCK << power for power in range(1, 12)))
"""The default, and blocking factors up to 2048."""

MAX_EXTENDED_HEADER = 1 << 20
"""Above it a size is damage, which would make the whole file a name."""

TAR_MAGIC = b"ustar"
_MAGIC_OFFSET = 257
_EXTENDED = (
    tarfile.XHDTYPE,
    tarfile.XGLTYPE,
    tarfile.SOLARIS_XHDTYPE,
    tarfile.GNUTYPE_LONGNAME,
    tarfile.GNUTYPE_LONGLINK,
)


class TarBreak(NamedTuple):
    """Bytes [start, end) that are not members."""

    start: int
    end: int
    reason: str
    is_last: bool
    """Nothing follows."""

    def __str__(self) -> str:
        rest = f"members continue at byte {self.end}"
        if self.is_last:
            rest = (
                f"nothing up to byte {self.end} is a member" if self.end > self.start else "it is the end of the file"
            )
        return f"broken at byte {self.start}: {self.reason}; {rest}; write or copy the tar again"


class _Header(tarfile.TarInfo):
    @classmethod
    def frombuf(cls, buf: bytes | bytearray, encoding: str, errors: str) -> Self:
        header = super().frombuf(buf, encoding, errors)
        if header.size < 0 or (header.type in _EXTENDED and header.size > MAX_EXTENDED_HEADER):
            raise tarfile.InvalidHeaderError(f"a size of {header.size} bytes")  # type: ignore[attr-defined]  # not in typeshed
        return header


def scan_tar(file: Any) -> Iterator[tarfile.TarInfo | TarBreak]:
    """Yields the complete members in order, and breaks between them."""
    size = file.seek(0, io.SEEK_END)
    archive = offset = 0
    while True:
        stop, fault = yield from _members(file, offset, size)
        after_zeros = _end_of_zeros(file, stop, size)
        follows = after_zeros < size and _is_header(file, after_zeros)
        if not fault or after_zeros > stop:
            if after_zeros == size and _is_end(after_zeros - stop, size - archive):
                return
            if follows and _is_joint(after_zeros - stop, after_zeros - archive):
                archive = offset = after_zeros
                continue
        offset = after_zeros if follows and after_zeros > stop else _next_header(file, stop + BLOCK, size)
        yield TarBreak(stop, offset, _reason(stop, after_zeros, size, fault), offset == size)
        if offset == size:
            return
        archive += (offset - archive + BLOCK // 2) % BLOCK - BLOCK // 2  # lost bytes moved the blocks


def _members(file: Any, offset: int, size: int) -> Generator[tarfile.TarInfo, None, tuple[int, str]]:
    """Yields members from `offset` on. Returns where they end, and the fault if known."""
    file.seek(offset)
    try:
        with tarfile.TarFile(fileobj=file, tarinfo=_Header, errors="surrogateescape") as tar:
            while (member := tar.next()) is not None:
                tar.members = []  # type: ignore[attr-defined]  # not in typeshed; it would keep every header
                num_bytes = 0 if member.issparse() or not member.isreg() else member.size
                if member.size < 0 or tar.offset <= offset:
                    return offset, f"the size of {member.name!r} is wrong"
                if max(member.offset_data + num_bytes, tar.offset - BLOCK + 1) > size:
                    return offset, f"{member.name!r} would end at byte {tar.offset} of a file of {size} bytes"
                yield member
                offset = min(tar.offset, size)
    except (tarfile.TarError, ValueError, OverflowError, RecursionError) as error:
        return offset, str(error)
    return offset, ""


def _reason(stop: int, after_zeros: int, size: int, fault: str) -> str:
    if not size:
        return "the file is empty"
    if stop == size:
        return "the end mark of a tar is missing, as in a file that was cut between two members"
    if after_zeros > stop:
        return f"{after_zeros - stop} zero bytes in place of members"
    return fault or "it is not a tar header"


def _is_end(num_zeros: int, archive_bytes: int) -> bool:
    """Accepts a lone zero block and padding that was cut."""
    if num_zeros < BLOCK:
        return False
    is_padding = any(not archive_bytes % record and num_zeros < record + END_MARK for record in RECORD_SIZES)
    return num_zeros < tarfile.RECORDSIZE + END_MARK or is_padding


def _is_joint(num_zeros: int, archive_bytes: int) -> bool:
    """Distinguishes an archive's end from a zeroed member, by the exact padding of common writers."""
    is_padded = not archive_bytes % tarfile.RECORDSIZE and END_MARK <= num_zeros < tarfile.RECORDSIZE + END_MARK
    return num_zeros == END_MARK or is_padded


def _is_header(file: Any, offset: int) -> bool:
    file.seek(offset)
    return _parses(file.read(BLOCK))


def _parses(block: bytes) -> bool:
    try:
        _Header.frombuf(block, "utf-8", "surrogateescape")
    except (tarfile.TarError, ValueError):
        return False
    return True


def _end_of_zeros(file: Any, offset: int, size: int) -> int:
    """Returns the first block from `offset` on that is not zero, or `size`."""
    file.seek(offset)
    start = offset
    while chunk := file.read(READ_AHEAD_BYTES):
        rest = len(chunk.lstrip(b"\0"))
        offset += len(chunk) - rest
        if rest:
            return start + (offset - start) // BLOCK * BLOCK
    return int(size)


def _next_header(file: Any, offset: int, size: int) -> int:
    """Returns the offset of the next POSIX or GNU header, or `size`. Lost bytes may have moved it off a block."""
    file.seek(min(offset, size))
    chunk = b""
    while more := file.read(READ_AHEAD_BYTES):
        chunk += more
        found = chunk.find(TAR_MAGIC, _MAGIC_OFFSET)
        while 0 <= found <= len(chunk) - (BLOCK - _MAGIC_OFFSET):
            start = found - _MAGIC_OFFSET
            if _parses(chunk[start : start + BLOCK]):
                return int(offset + start)
            found = chunk.find(TAR_MAGIC, found + 1)
        rest = max(0, len(chunk) - BLOCK + 1)
        chunk, offset = chunk[rest:], offset + rest
    return int(size)

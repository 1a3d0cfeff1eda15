"""COMMIT, the last file of a checkpoint: sizes and checksums of all others.

{"files": {"state.json": {"num_bytes": 512, "sha256": "9f86..."}, ...}, "sha256": "60a3..."}
"""

from __future__ import annotations

import hashlib
import json
import logging
from collections.abc import Callable, Collection, Mapping
from pathlib import Path, PurePosixPath
from typing import IO, Any, NamedTuple

from timeviper_platform.common import storage

logger = logging.getLogger(__name__)

COMMIT_FILE = "COMMIT"
CHUNK_BYTES = 16 << 20


class DamagedCheckpointError(RuntimeError):
    """Names the missing or changed files of a committed checkpoint."""


class FileFacts(NamedTuple):
    num_bytes: int
    sha256: str


def write_hashed(uri: str, write: Callable[[Any], object]) -> FileFacts:
    """Writes a file atomically by `write(file)`; returns its size and checksum."""
    facts: list[FileFacts] = []

    def write_and_hash(file: IO[bytes]) -> None:
        hashing = _HashingFile(file)
        write(hashing)
        facts.append(hashing.facts())

    storage.write_atomic(uri, write_and_hash)
    return facts[-1]


class _HashingFile:
    """Hashes what is written; torch.save does not seek."""

    def __init__(self, file: IO[bytes]) -> None:
        self._file = file
        self._digest = hashlib.sha256()
        self._num_bytes = 0

    def write(self, data: bytes) -> int:
        self._digest.update(data)
        self._num_bytes += len(data)
        return self._file.write(data)

    def flush(self) -> None:
        self._file.flush()

    def facts(self) -> FileFacts:
        return FileFacts(self._num_bytes, self._digest.hexdigest())


def write_commit(uri: str, files: Mapping[str, FileFacts]) -> None:
    """Raises RuntimeError if this process does not see all files."""
    found = _sizes(uri)
    absent = sorted(name for name, facts in files.items() if found.get(name) != facts.num_bytes)
    if absent:
        raise RuntimeError(
            f"{len(absent)} of {len(files)} files were written but are not in {uri} as rank 0 sees it, such as"
            f" {absent[0]}; `runs` must be a folder that all nodes share"
        )
    storage.write_bytes(storage.join_uri(uri, COMMIT_FILE), _render(files))


def read_commit(uri: str) -> dict[str, FileFacts]:
    """Returns size and checksum of every file.

    Raises:
        ValueError: without COMMIT.
        DamagedCheckpointError: if COMMIT itself is damaged.
    """
    try:
        text = storage.read_bytes(storage.join_uri(uri, COMMIT_FILE))
    except FileNotFoundError as error:
        raise ValueError(
            f"there is no committed checkpoint at {uri!r}; name a folder step-* that holds a {COMMIT_FILE}"
        ) from error
    try:
        files = {name: FileFacts(**facts) for name, facts in json.loads(text)["files"].items()}
    except (ValueError, KeyError, TypeError, AttributeError):
        files = {}
    if not files or _render(files) != text:
        raise DamagedCheckpointError(f"{uri}: {COMMIT_FILE} is damaged or of another version")
    return files


def _render(files: Mapping[str, FileFacts]) -> bytes:
    listed = {name: facts._asdict() for name, facts in sorted(files.items())}
    digest = hashlib.sha256(json.dumps(listed).encode()).hexdigest()
    return (json.dumps({"files": listed, "sha256": digest}, indent=2) + "\n").encode()


def check_sizes(uri: str) -> dict[str, FileFacts]:
    """Like `read_commit`; also checks that all files exist with their sizes."""
    files = read_commit(uri)
    found = _sizes(uri)
    wrong = [f"{name} ({_size_fault(found.get(name))})" for name in files if found.get(name) != files[name].num_bytes]
    if wrong:
        raise DamagedCheckpointError(f"{uri}: {', '.join(sorted(wrong)[:5])}")
    return files


def check_file(uri: str, name: str, facts: FileFacts, local: Path) -> None:
    """Raises DamagedCheckpointError if the file at `local` differs from its checksum."""
    try:
        with local.open("rb") as file:
            digest = hashlib.file_digest(file, "sha256").hexdigest()
    except FileNotFoundError as error:
        raise DamagedCheckpointError(f"{uri}: {name} (missing)") from error
    if digest != facts.sha256:
        raise DamagedCheckpointError(f"{uri}: {name} (its checksum differs)")


def read_document(uri: str, name: str, facts: FileFacts) -> Any:
    try:
        data = storage.read_bytes(storage.join_uri(uri, name))
    except FileNotFoundError as error:
        raise DamagedCheckpointError(f"{uri}: {name} (missing)") from error
    if hashlib.sha256(data).hexdigest() != facts.sha256:
        raise DamagedCheckpointError(f"{uri}: {name} (its checksum differs)")
    return json.loads(data)


def is_marked(uri: str) -> bool:
    return storage.exists(storage.join_uri(uri, COMMIT_FILE))


def set_aside(uris: Collection[str], reason: str) -> None:
    """Renames COMMIT to COMMIT.<reason>, so that no run uses the checkpoint."""
    for uri in uris:
        mark = storage.join_uri(uri, COMMIT_FILE)
        renamed = f"{mark}.{reason}"
        storage.write_bytes(renamed, storage.read_bytes(mark))
        storage.remove(mark)
        logger.warning("%s is set aside; to use it again, rename %s to %s", uri, renamed, COMMIT_FILE)


def _size_fault(num_bytes: int | None) -> str:
    return "missing" if num_bytes is None else f"{num_bytes:,} bytes, not as committed"


def _sizes(uri: str) -> dict[str, int]:
    found = storage.entries_in(uri)
    return {PurePosixPath(item["name"]).name: int(item["size"]) for item in found if item["type"] == "file"}

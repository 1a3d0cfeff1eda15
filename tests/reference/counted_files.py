"""counted:///path: local files as remote ones, whose reads are written down for tests of all processes."""

from __future__ import annotations

import json
import os
from pathlib import Path
from typing import Any

import fsspec
from fsspec.implementations.local import LocalFileSystem

LOG_VARIABLE = "COUNTED_FILES_LOG"


class CountedFileSystem(LocalFileSystem):
    """Appends name and bytes of each file that is read to the file in LOG_VARIABLE."""

    protocol = "counted"

    def __init__(self, **options: Any) -> None:
        super().__init__(**{"auto_mkdir": True, **options})  # an object store has no folders

    @classmethod
    def _strip_protocol(cls, path: Any) -> Any:
        return super()._strip_protocol(path.removeprefix("counted://") if isinstance(path, str) else path)

    def get_file(self, path1: Any, path2: Any, callback: Any = None, **options: Any) -> None:
        super().get_file(path1, path2, **options)
        _note(path1)

    def cat_file(self, path: str, *arguments: Any, **options: Any) -> Any:
        content = super().cat_file(path, *arguments, **options)
        _note(path)
        return content


def _note(path: Any) -> None:
    path = CountedFileSystem._strip_protocol(path)
    with Path(os.environ[LOG_VARIABLE]).open("a") as log:  # one short write: appended whole
        log.write(json.dumps([path, Path(path).stat().st_size]) + "\n")


def reads(log: Path) -> list[tuple[str, int]]:
    """Path and bytes of every read, in order."""
    return [tuple(json.loads(line)) for line in log.read_text().splitlines()] if log.exists() else []


fsspec.register_implementation("counted", CountedFileSystem, clobber=True)

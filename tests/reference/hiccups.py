"""hiccup:///path: local files on storage that fails, by a file system with fsspec's default `exists` and `isdir`."""

from __future__ import annotations

import errno
from typing import Any, ClassVar

import fsspec
from fsspec import AbstractFileSystem
from fsspec.implementations.local import LocalFileSystem


class HiccupFileSystem(AbstractFileSystem):
    """As those of SFTP, SMB and HDFS; paths with a text in `broken` raise EIO."""

    protocol = "hiccup"
    cachable = False
    broken: ClassVar[set[str]] = set()

    def __init__(self, **options: Any) -> None:
        super().__init__(**options)
        self._local = LocalFileSystem(auto_mkdir=True)

    def _checked(self, path: str) -> str:
        if any(text in path for text in self.broken):
            raise OSError(errno.EIO, "the storage hiccups", path)
        return path

    def info(self, path: str, **_: Any) -> dict[str, Any]:
        return dict(self._local.info(self._checked(path)))

    def ls(self, path: str, detail: bool = True, **_: Any) -> Any:
        return self._local.ls(self._checked(path), detail=detail)

    def _rm(self, path: str) -> None:
        self._local.rm_file(self._checked(path))

    def rmdir(self, path: str) -> None:
        self._local.rmdir(self._checked(path))

    def makedirs(self, path: str, exist_ok: bool = False) -> None:
        self._local.makedirs(path, exist_ok=exist_ok)

    def _open(self, path: str, mode: str = "rb", **_: Any) -> Any:
        return self._local.open(self._checked(path), mode)

    @classmethod
    def _strip_protocol(cls, path: Any) -> Any:
        return LocalFileSystem._strip_protocol(path.removeprefix("hiccup://"))


fsspec.register_implementation("hiccup", HiccupFileSystem, clobber=True)

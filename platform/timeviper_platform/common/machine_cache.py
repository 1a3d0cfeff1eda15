"""Files that the processes of a machine compute once and map together."""

from __future__ import annotations

import fcntl
import os
import tempfile
import time
from collections.abc import Callable
from pathlib import Path

MAX_UNUSED_SECONDS = 7 * 24 * 3600.0
"""Seconds after which an unused file is deleted."""


def machine_file(kind: str, name: str, write: Callable[[Path], object]) -> Path:
    """Returns a file in TMPDIR, written by the first process that needs it; `name` determines its content.

    Raises RuntimeError if the folder of this `kind` belongs to another user.
    """
    folder = Path(tempfile.gettempdir(), f"timeviper-{kind}-{os.getuid()}")
    folder.mkdir(mode=0o700, exist_ok=True)
    if folder.stat().st_uid != os.getuid():
        raise RuntimeError(f"{folder} belongs to another user; set TMPDIR to a folder of your own")
    target = folder / name
    with (folder / "lock").open("w") as lock:
        fcntl.flock(lock, fcntl.LOCK_EX)
        if not target.exists():
            _remove_old(folder, target.suffix)
            partial = target.with_suffix(".partial")
            write(partial)
            partial.replace(target)
        os.utime(target)
    return target


def _remove_old(folder: Path, suffix: str) -> None:
    for path in folder.glob(f"*{suffix}"):
        if time.time() - path.stat().st_mtime > MAX_UNUSED_SECONDS:
            path.unlink()

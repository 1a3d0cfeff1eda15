"""A lease on a folder, so that one job at a time writes there.

The file LEASE names the owner, who rewrites it every few seconds. A lease is free once its owner's process is gone
(same machine) or has not rewritten it for STALE_S (another machine).
"""

from __future__ import annotations

import contextlib
import getpass
import json
import logging
import os
import signal
import socket
import threading
import time
import uuid
from collections.abc import Callable, Iterator
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

from timeviper_platform.common import storage

logger = logging.getLogger(__name__)

LEASE_FILE = "LEASE"
HEARTBEAT_S = 5.0
STALE_S = 30.0
POLL_S = 1.0
SETTLE_S = 1.0
"""Seconds between writing and reading back: on storage without locks, the later of two writers wins."""
LOCAL_SETTLE_S = 0.02


_held_here: set[Any] = set()
"""Ids of the leases this process holds. A file of this process with another id is left from a failed release."""


class LeaseHeldError(RuntimeError):
    """Another job holds the lease."""


@contextlib.contextmanager
def hold_lease(folder: str, job: str, *, on_lost: Callable[[], None] | None = None) -> Iterator[None]:
    """Holds the lease on `folder` (any URI) inside the block.

    Args:
        job: name of the job in messages, such as `jobs/train.py`.
        on_lost: called if another job took the lease over, as after a suspension; by default sends SIGTERM to this
            process.

    Raises:
        LeaseHeldError: if another job holds it.
    """
    lease = _Lease(folder, job, on_lost or _end_process)
    lease.acquire()
    try:
        yield
    finally:
        lease.release()


class _Lease:
    def __init__(self, folder: str, job: str, on_lost: Callable[[], None]) -> None:
        self._folder = folder
        self._uri = storage.join_uri(folder, LEASE_FILE)
        self._on_lost = on_lost
        self._owner = {
            "id": uuid.uuid4().hex,
            "job": job,
            "user": _user(),
            "host": socket.gethostname(),
            "machine": _machine(),
            "pid": os.getpid(),
            "process_started": _process_start(os.getpid()),
            "acquired": _now(),
        }
        self._released = threading.Event()
        self._num_beats = 0
        self._thread = threading.Thread(target=self._beat, name="lease", daemon=True)

    def acquire(self) -> None:
        found = self._read()
        if found is not None and not self._is_free(found):
            raise LeaseHeldError(self._held(found))
        self._write()
        time.sleep(LOCAL_SETTLE_S if storage.is_local(self._uri) else SETTLE_S)
        winner = self._read()
        if winner is not None and winner["id"] != self._owner["id"]:
            raise LeaseHeldError(self._held(winner))
        _held_here.add(self._owner["id"])
        self._thread.start()

    def release(self) -> None:
        _held_here.discard(self._owner["id"])
        self._released.set()
        self._thread.join()
        with contextlib.suppress(OSError, RuntimeError):  # it becomes stale
            if (found := self._read()) is not None and found["id"] == self._owner["id"]:
                storage.remove(self._uri)

    def _is_free(self, found: dict[str, Any]) -> bool:
        if found.get("machine") == self._owner["machine"]:
            has_ended = _process_start(int(found["pid"])) != found["process_started"]
            return has_ended or (found["pid"] == os.getpid() and found["id"] not in _held_here)
        logger.info("%s: waiting up to %.0f s to see whether its owner is alive: %s", self._uri, STALE_S, _shown(found))
        deadline = time.monotonic() + STALE_S
        while time.monotonic() < deadline:
            time.sleep(POLL_S)
            now = self._read()
            if now is None:
                return True
            if (now["id"], now.get("beat")) != (found["id"], found.get("beat")):
                return False
        return True

    def _beat(self) -> None:
        while not self._released.wait(HEARTBEAT_S):
            try:
                found = self._read()
                if found is not None and found["id"] != self._owner["id"]:
                    logger.error("%s was taken over by %s; this run ends", self._uri, _shown(found))
                    self._on_lost()
                    return
                self._write()
            except (OSError, RuntimeError) as error:
                logger.warning("cannot renew the lease, trying again in %.0f s: %s", HEARTBEAT_S, error)

    def _read(self) -> dict[str, Any] | None:
        try:
            text = storage.read_bytes(self._uri)
        except FileNotFoundError:
            return None
        try:
            found: dict[str, Any] = json.loads(text)
            return found | {"id": found["id"]}
        except (ValueError, KeyError, TypeError):
            return {"id": text.hex(), "job": "an unknown job"}

    def _write(self) -> None:
        self._num_beats += 1
        storage.write_json(self._uri, {**self._owner, "beat": self._num_beats, "renewed": _now()})

    def _held(self, found: dict[str, Any]) -> str:
        return (
            f"{self._folder} is in use by {_shown(found)}; wait for that job, end it, or write to another folder"
            f" (if it has certainly ended, remove {self._uri})"
        )


def _shown(owner: dict[str, Any]) -> str:
    if "pid" not in owner:
        return str(owner["job"])
    return (
        f"{owner['job']} of {owner['user']} on {owner['host']} (process {owner['pid']}, since {owner['acquired']},"
        f" last sign of life {owner['renewed']})"
    )


def _end_process() -> None:
    os.kill(os.getpid(), signal.SIGTERM)


def _now() -> str:
    return datetime.now(UTC).strftime("%Y-%m-%d %H:%M:%S UTC")


def _user() -> str:
    try:
        return getpass.getuser()
    except (KeyError, OSError):  # a container's user id without a name
        return str(os.getuid())


def _machine() -> str:
    """Identifies the machine's boot and the process-id namespace, in which ids can be compared."""
    parts = [socket.gethostname()]
    with contextlib.suppress(OSError):
        parts.append(Path("/proc/sys/kernel/random/boot_id").read_text().strip())
        parts.append(str(Path("/proc/self/ns/pid").readlink()))
    return " ".join(parts)


def _process_start(pid: int) -> int | None:
    """Returns the process's start in clock ticks since boot, 0 where /proc is missing; None if it has ended."""
    try:
        os.kill(pid, 0)
    except ProcessLookupError:
        return None
    except PermissionError:
        pass
    try:
        # after the name, which may hold spaces: state, parent, ...; the start is field 22 of proc(5)
        state, *values = Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()
    except OSError:
        return 0
    return None if state == "Z" else int(values[18])

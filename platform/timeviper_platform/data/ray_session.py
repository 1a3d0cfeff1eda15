"""Which Ray the steps run on: the one that this process is told of, or a private one that is started and ended here.

Knows connections, tokens and the variables that say where a Ray is. Not what runs on it.
"""

from __future__ import annotations

import atexit
import functools
import os
import shutil
import sys
import tempfile
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

from timeviper_platform.local_cluster import local_cluster, make_token


@contextmanager
def ray_session() -> Iterator[None]:
    """A connection to the Ray of RAY_ADDRESS (`ray job submit` sets it), else to one started here and ended here."""
    if has_cluster():
        with _connection():
            yield
        return
    with local_cluster(num_cpus=os.cpu_count() or 2, with_dashboard=False, token_file=_token_file()) as variables:
        before = {name: os.environ.get(name) for name in variables}
        os.environ.update(variables)  # before `import ray`, which reads the authentication mode once
        try:
            with _connection():
                yield
        finally:
            for name, value in before.items():
                os.environ.pop(name) if value is None else os.environ.update({name: value})


@functools.cache
def _token_file() -> Path:
    """One token for every Ray that this process starts: Ray reads its own once a process."""
    folder = Path(tempfile.mkdtemp(prefix="tv-token-"))
    atexit.register(shutil.rmtree, folder, ignore_errors=True)
    return make_token(folder)


@contextmanager
def _connection() -> Iterator[None]:
    import ray

    if ray.is_initialized():
        yield
        return
    ray.init(log_to_driver=False)
    try:
        yield
    finally:
        ray.shutdown()


def has_cluster() -> bool:
    """True when this process is connected to a Ray, or told where one is."""
    return bool(os.environ.get("RAY_ADDRESS")) or ("ray" in sys.modules and sys.modules["ray"].is_initialized())

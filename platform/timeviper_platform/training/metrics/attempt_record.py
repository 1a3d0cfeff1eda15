"""Records what an attempt ran with: resolved configuration, versions and commit.

runs/tiny/attempts/attempt-0001/config.yaml           pass it to --config to run the same again
runs/tiny/attempts/attempt-0001/environment.json
"""

from __future__ import annotations

import getpass
import platform
import shlex
import socket
import subprocess
import sys
from contextlib import suppress
from datetime import UTC, datetime
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path
from typing import Any

import yaml
from pydantic import TypeAdapter

from timeviper_platform.common import storage

ATTEMPTS_FOLDER = "attempts"
PACKAGES = (
    "timeviper-platform",
    "torch",
    "deepspeed",
    "ray",
    "transformers",
    "numpy",
    "pyarrow",
    "mamba-ssm",
    "causal-conv1d",
)


def describe_environment() -> dict[str, Any]:
    """Describes this process; call it where the source tree is, which workers may lack."""
    return {
        "command": shlex.join(sys.argv),
        "user": _user(),
        "host": socket.gethostname(),
        "started": datetime.now(UTC).isoformat(timespec="seconds"),
        "python": platform.python_version(),
        "packages": {name: found for name in PACKAGES if (found := _version(name)) is not None},
        "commit": _commit(Path(__file__).parent),
    }


def write_attempt(run_uri: str, attempt: int, config: Any, environment: dict[str, Any]) -> None:
    """Writes the record of an attempt, without passwords; `config` is a configuration dataclass."""
    folder = storage.join_uri(run_uri, ATTEMPTS_FOLDER, f"attempt-{attempt:04d}")
    values = TypeAdapter(type(config)).dump_python(config, mode="json")
    text = storage.without_passwords(yaml.safe_dump(values, sort_keys=False))
    storage.write_text(storage.join_uri(folder, "config.yaml"), text)
    storage.write_report(storage.join_uri(folder, "environment.json"), environment)


def _version(package: str) -> str | None:
    try:
        return version(package)
    except PackageNotFoundError:
        return None


def _commit(folder: Path) -> str | None:
    """Returns the git commit, with `+changes` if files differ from it; None outside a repository."""
    with suppress(OSError, subprocess.CalledProcessError):
        commit = _git(folder, "rev-parse", "HEAD")
        return f"{commit}+changes" if _git(folder, "status", "--porcelain", "--untracked-files=no") else commit
    return None


def _git(folder: Path, *arguments: str) -> str:
    ran = subprocess.run(["git", "-C", str(folder), *arguments], capture_output=True, text=True, check=True)
    return ran.stdout.strip()


def _user() -> str | None:
    with suppress(KeyError, OSError):  # a container's user id without a name
        return getpass.getuser()
    return None

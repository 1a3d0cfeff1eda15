"""Runs a job from the command line and turns user errors into one line."""

from __future__ import annotations

import argparse
import contextlib
import logging
import os
import signal
import subprocess
import sys
import threading
from collections.abc import Callable, Iterable, Iterator, Sequence
from pathlib import Path
from types import FrameType
from typing import NamedTuple, NoReturn

from timeviper_platform.common.config_docs import help_lines
from timeviper_platform.common.logs import setup_logging
from timeviper_platform.common.storage import is_storage_error, plain_error, without_passwords

USAGE_EXIT_CODE = 2
CONSOLE_PACKAGE = "timeviper_platform.cli"
PACKAGE = Path(__file__).resolve().parents[1]


class JobResult(NamedTuple):
    lines: Iterable[str] = ()
    exit_code: int = 0


class JobError(RuntimeError):
    def __init__(self, message: str, exit_code: int = 1) -> None:
        super().__init__(message)
        self.exit_code = exit_code


class Terminated(KeyboardInterrupt):
    """SIGTERM arrived. Ray's waits let interrupts through, but raise them as plain KeyboardInterrupt."""


SIGTERM_EXIT_CODE = 128 + signal.SIGTERM
"""The shell's convention."""


class JobParser(argparse.ArgumentParser):
    """Command line of a job; `--help` lists its configuration keys.

    Args:
        config_class: adds `--config FILE` and `key=value ...`.
        config_file: example for the help.
        override: example for the help.
    """

    def __init__(
        self,
        description: str | None,
        *,
        config_class: type | None = None,
        config_file: str = "",
        override: str = "",
        config_required: bool = True,
        prog: str | None = None,
    ) -> None:
        super().__init__(
            prog=prog or _program(), description=description, formatter_class=argparse.RawDescriptionHelpFormatter
        )
        self._config_class = config_class
        if prog is None:
            self.add_argument("--debug", action="store_true", help="log at level DEBUG; show tracebacks")
        if config_class is not None:
            text = f"YAML, see {config_file}"
            self.add_argument("--config", required=config_required, type=find_config, metavar="FILE", help=text)
            self.add_argument("overrides", nargs="*", metavar="key=value", help=f"for example {override}")

    def error(self, message: str) -> NoReturn:
        self.print_usage(sys.stderr)
        self.exit(USAGE_EXIT_CODE, f"error: {message}\n")

    def format_help(self) -> str:
        text = super().format_help()
        if self._config_class is None:
            return text
        return "\n".join([text, "configuration keys (default): meaning", *help_lines(self._config_class), ""])


def config_folder() -> Path:
    """Returns the folder ray_configs: the source tree's, or its copy in the installed wheel."""
    packaged = PACKAGE / "ray_configs"
    return packaged if packaged.is_dir() else PACKAGE.parents[1] / "ray_configs"


def find_config(path: str) -> str:
    """Returns `path`; for `ray_configs/...` that does not exist here, the packaged file of that name."""
    top, *rest = Path(path).parts or ("",)
    packaged = config_folder().joinpath(*rest)
    return str(packaged) if top == "ray_configs" and not Path(path).exists() and packaged.is_file() else path


def job_command(name: str, *arguments: str) -> list[str]:
    """Returns the command that runs a job in another process of this Python."""
    return [sys.executable, "-m", CONSOLE_PACKAGE, name, *arguments]


def _program() -> str:
    """The program's name in the usage line: `timeviper train`, or `train.py`."""
    script = Path(sys.argv[0])
    is_console = script.name == "timeviper" or script.match("timeviper_platform/cli/__main__.py")
    return " ".join(["timeviper", *sys.argv[1:2]]) if is_console else script.name


def run_job(
    parser: argparse.ArgumentParser,
    work: Callable[[argparse.Namespace], JobResult],
    arguments: Sequence[str] | None = None,
) -> int:
    """Runs `work`, prints its lines and returns the exit code.

    A user error becomes one line on standard error; other exceptions keep their traceback. SIGTERM raises `Terminated`
    in the main thread, so that `work` ends what it started; the exit code is 143.
    """
    options = parser.parse_args(arguments)
    setup_logging(logging.DEBUG if options.debug else logging.INFO)
    terminated = threading.Event()
    try:
        with _sigterm_raises(terminated):
            result = work(options)
            for line in result.lines:
                sys.stdout.write(f"{without_passwords(line)}\n")
    except Exception as error:  # user errors become one line, others are raised again
        message = user_error(error)
        if message is None or options.debug:
            raise
        sys.stderr.write(f"error: {message}\n")
        return getattr(error, "exit_code", 1)
    except KeyboardInterrupt:
        sys.stderr.write(f"error: {'stopped by SIGTERM' if terminated.is_set() else 'interrupted'}\n")
        return SIGTERM_EXIT_CODE if terminated.is_set() else 130
    return result.exit_code


@contextlib.contextmanager
def _sigterm_raises(received: threading.Event) -> Iterator[None]:
    if threading.current_thread() is not threading.main_thread():
        yield
        return
    process = os.getpid()

    def end(number: int, frame: FrameType | None) -> None:
        signal.signal(number, signal.SIG_DFL)  # a second SIGTERM ends the process at once
        if os.getpid() != process:  # a forked child
            os.kill(os.getpid(), number)
        received.set()
        raise Terminated

    before = signal.signal(signal.SIGTERM, end)
    try:
        yield
    finally:
        signal.signal(signal.SIGTERM, before)


def user_error(error: BaseException) -> str | None:
    """Returns the message of an error that the user can fix; None for a bug.

    By convention, ValueError is the caller's mistake and RuntimeError the environment's.
    """
    message = _message(error)
    return None if message is None else without_passwords(message)


def _message(error: BaseException) -> str | None:
    if _package(error) == "ray":
        cause = getattr(error, "cause", None) or error.__cause__
        return str(error) if cause is None else _message(cause)  # a wrapper's message is the worker's traceback
    if isinstance(error, ImportError):
        is_ours = (error.name or "").startswith("timeviper")
        return None if is_ours else f"{error}; install the missing package into this environment"
    if isinstance(error, NotImplementedError | RecursionError):
        return None
    if isinstance(error, ValueError | RuntimeError | OSError | subprocess.CalledProcessError):
        return str(error) or type(error).__name__
    if isinstance(error, AssertionError) and "CUDA" in str(error):  # raised by a build of torch without CUDA
        return f"{error}; set the device to cpu"
    if isinstance(error, Exception) and is_storage_error(error):  # neither OSError nor RuntimeError
        return str(plain_error(error))
    return None


def _package(error: BaseException) -> str:
    return type(error).__module__.partition(".")[0]

from __future__ import annotations

import argparse
import errno
import signal
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

import botocore.exceptions
import pytest
from ray.exceptions import RayTaskError, WorkerCrashedError

from timeviper_platform.common.config import load_config
from timeviper_platform.common.job import JobError, JobParser, JobResult, run_job
from timeviper_platform.common.storage import StorageUnavailableError


@dataclass(frozen=True, kw_only=True, slots=True)
class Config:
    number: int
    """How many. The rest is not shown."""
    name: str = "a"


def print_number(options: argparse.Namespace) -> JobResult:
    config = load_config(Config, options.config, options.overrides)
    return JobResult([f"number {config.number}", "done"], exit_code=config.number)


def run(folder: Path, work: Callable[[argparse.Namespace], JobResult], *arguments: str) -> int:
    file = folder / "config.yaml"
    file.write_text("number: 3\n")
    parser = JobParser("Prints a number.", config_class=Config, config_file="number.yaml", override="number=4")
    return run_job(parser, work, ["--config", str(file), *arguments])


def test_a_job_prints_its_lines_and_returns_its_exit_code(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert run(tmp_path, print_number, "number=5") == 5
    assert capsys.readouterr().out == "number 5\ndone\n"


@pytest.mark.parametrize(
    ("error", "message"),
    [
        (ValueError("fps = 0 must be above 0"), "fps = 0 must be above 0"),
        (RuntimeError("No CUDA GPUs are available"), "No CUDA GPUs are available"),
        (
            AssertionError("Torch not compiled with CUDA enabled"),
            "Torch not compiled with CUDA enabled; set the device",
        ),
        (PermissionError(errno.EACCES, "Permission denied", "/scores"), "[Errno 13] Permission denied: '/scores'"),
        (StorageUnavailableError(errno.EBUSY, "s3://b/x: 503"), "[Errno 16] s3://b/x: 503"),
        (ModuleNotFoundError("No module named 'wandb'", name="wandb"), "No module named 'wandb'; install the missing"),
        (botocore.exceptions.NoCredentialsError(), "Unable to locate credentials; give the job and its workers cred"),
        (RayTaskError("f", "a traceback", ValueError("no weights at 'x'")), "no weights at 'x'"),
        (ValueError("no weights at sftp://ann:s3:cr&t@nas/w"), "no weights at sftp://nas/w"),
        (WorkerCrashedError(), "The worker died unexpectedly while executing this task."),
    ],
    ids=lambda value: type(value).__name__ if isinstance(value, Exception) else "",
)
def test_a_user_error_is_one_line_and_exit_code_1(
    tmp_path: Path, capsys: pytest.CaptureFixture[str], error: Exception, message: str
) -> None:
    def fail(options: argparse.Namespace) -> JobResult:
        raise error

    assert run(tmp_path, fail) == 1
    shown = capsys.readouterr().err
    assert shown.startswith(f"error: {message}")
    assert shown.count("\n") == 1


@pytest.mark.parametrize(
    "error",
    [
        KeyError("frames"),
        AssertionError(),
        NotImplementedError(),
        ModuleNotFoundError("No module named 'timeviper_platform.x'", name="timeviper_platform.x"),
        RayTaskError("f", "a traceback", KeyError("frames")),
    ],
    ids=lambda error: type(error).__name__,
)
def test_a_bug_keeps_its_traceback(tmp_path: Path, error: Exception) -> None:
    def fail(options: argparse.Namespace) -> JobResult:
        raise error

    with pytest.raises(type(error)):
        run(tmp_path, fail)


def test_debug_keeps_the_traceback_of_a_user_error(tmp_path: Path) -> None:
    with pytest.raises(ValueError, match="unknown key 'nummer'"):
        run(tmp_path, print_number, "--debug", "nummer=1")


def test_a_result_shows_no_password(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert run(tmp_path, lambda options: JobResult(["report: webhdfs://ann:secret@name-node:9870/r.json"])) == 0
    assert capsys.readouterr().out == "report: webhdfs://name-node:9870/r.json\n"


def test_an_error_can_choose_the_exit_code(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    def stop(options: argparse.Namespace) -> JobResult:
        raise JobError("stopped by SIGTERM", exit_code=143)

    assert run(tmp_path, stop) == 143
    assert capsys.readouterr().err == "error: stopped by SIGTERM\n"


def test_an_interrupted_job_shows_no_traceback(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    def interrupt(options: argparse.Namespace) -> JobResult:
        raise KeyboardInterrupt

    assert run(tmp_path, interrupt) == 130
    assert capsys.readouterr().err == "error: interrupted\n"


def test_sigterm_ends_a_job_with_one_line_and_lets_it_clean_up(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    before, cleaned = signal.getsignal(signal.SIGTERM), []

    def wait(options: argparse.Namespace) -> JobResult:
        try:
            signal.raise_signal(signal.SIGTERM)
            return JobResult()
        finally:
            cleaned.append(True)

    assert run(tmp_path, wait) == 143
    assert capsys.readouterr().err == "error: stopped by SIGTERM\n"
    assert cleaned
    assert signal.getsignal(signal.SIGTERM) == before


def test_a_usage_error_exits_2_with_the_same_prefix(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit) as ended:
        run(tmp_path, print_number, "--nowhere")
    assert ended.value.code == 2
    assert capsys.readouterr().err.splitlines()[-1] == "error: unrecognized arguments: --nowhere"


def test_help_lists_every_key_with_its_default_and_doc(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit) as ended:
        run(tmp_path, print_number, "--help")
    assert ended.value.code == 0
    assert capsys.readouterr().out.splitlines()[-2:] == ["  number (required): How many", "  name (a)"]

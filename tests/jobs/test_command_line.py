"""The command line of all jobs: `--help`, and errors as a user sees them."""

from __future__ import annotations

import os
import runpy
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parents[2]
JOBS = sorted(path.stem for path in (ROOT / "jobs").glob("*.py"))
KEYS = {
    "analyze": "answering.max_frames",
    "convert": "input",
    "evaluate": "workers.batch_size",
    "export": "phases.*.packing.max_tokens",
    "preprocess": "sampling.fps",
    "serve": "engine.engine.num_slots",
    "train": "phases.*.packing.max_tokens",
}


def start(job: str, *arguments: str) -> subprocess.CompletedProcess[str]:
    environment = {**os.environ, "CUDA_VISIBLE_DEVICES": ""}
    command = [sys.executable, str(ROOT / "jobs" / f"{job}.py"), *arguments]
    return subprocess.run(command, env=environment, capture_output=True, text=True, cwd=ROOT, check=False)


@pytest.mark.parametrize("job", JOBS)
def test_help_describes_the_job_and_every_key(job: str, capsys: pytest.CaptureFixture[str]) -> None:
    main = runpy.run_path(str(ROOT / "jobs" / f"{job}.py"))["main"]
    with pytest.raises(SystemExit) as ended:
        main(["--help"])
    assert ended.value.code == 0
    shown = capsys.readouterr().out
    assert "--debug" in shown
    if job in KEYS:
        assert f"\n  {KEYS[job]} (" in shown


@pytest.mark.parametrize("job", sorted(KEYS))
def test_a_missing_file_is_one_line_and_exit_code_1(job: str, capsys: pytest.CaptureFixture[str]) -> None:
    main = runpy.run_path(str(ROOT / "jobs" / f"{job}.py"))["main"]
    output = ["--output", "outputs/weights"] if job == "export" else []
    assert main(["--config", "/nowhere.yaml", *output]) == 1
    assert (
        capsys.readouterr().err == "error: no configuration file at '/nowhere.yaml'; pass --config with a YAML file\n"
    )


@pytest.mark.parametrize(
    ("job", "arguments", "code", "message"),
    [
        ("store", ["inspect", "/nowhere/store"], 1, "error: no feature store at '/nowhere/store'"),
        pytest.param(
            *("convert", ["--config", "ray_configs/convert.yaml", "inptu=x"], 1, "did you mean 'input'"),
            marks=pytest.mark.slow,
        ),
        pytest.param("benchmark", ["gpu"], 1, "needs a CUDA device", marks=pytest.mark.slow),
        pytest.param(
            *("benchmark", ["demo", "--only", "x"], 2, "error: the demo suite has no rows x"), marks=pytest.mark.slow
        ),
        ("export", ["--nowhere"], 2, "error: the following arguments are required: --output"),
    ],
    ids=["storage", "key", "device", "group", "usage"],
)
def test_a_failing_process_prints_one_line_without_a_traceback(
    job: str, arguments: list[str], code: int, message: str
) -> None:
    ended = start(job, *arguments)
    assert ended.returncode == code, ended.stderr
    assert message in ended.stderr.splitlines()[-1]
    assert ended.stderr.splitlines()[-1].startswith("error: ")
    assert "Traceback" not in ended.stderr
    assert ended.stdout == ""

"""Row group `recovery`: from the SIGKILL of a training job to its next finished step, and to its next new step.

Trains without Ray. The time includes the start of Python, imports, the plan, the newest checkpoint and a step.
"""

from __future__ import annotations

import logging
import statistics
import subprocess
import tempfile
import time
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import NamedTuple

import yaml

from timeviper_platform.benchmarks.measure import Row
from timeviper_platform.benchmarks.training.synthetic_corpus import DEMO, make_mixture, run_values, training_command
from timeviper_platform.common.config import parse_config
from timeviper_platform.data.synthetic.corpus import CorpusConfig
from timeviper_platform.training.config import TrainConfig
from timeviper_platform.training.metrics.writer import read_metrics
from timeviper_platform.training.run import RunFolder

logger = logging.getLogger(__name__)

COMMAND = "python jobs/benchmark.py training --only recovery"
SAVE_EVERY = 10
STEPS_BEFORE_KILL = (13, 17, 15, 19, 16)
"""Steps finished before each kill; the steps since the last checkpoint are lost each time."""
TIMEOUT_S = 300.0
POLL_S = 0.02


def recovery_rows(config: CorpusConfig = DEMO, steps_before_kill: Sequence[int] = STEPS_BEFORE_KILL) -> list[Row]:
    with tempfile.TemporaryDirectory(prefix="timeviper-benchmark-") as folder:
        corpus = make_mixture(Path(folder), config)
        values = run_values(corpus, {"steps": 100_000}, checkpoint={"every_steps": SAVE_EVERY, "keep": 2})
        file = corpus.folder / "config.yaml"
        file.write_text(yaml.safe_dump(values))
        uri = RunFolder.of(parse_config(TrainConfig, values)).uri
        found = kill_and_measure(training_command(file), uri, steps_before_kill)
    finished, new = ([getattr(item, name) for item in found] for name in ("finished_s", "new_s"))
    first = f"from SIGKILL of the job to the next finished step ({min(finished):.1f} to {max(finished):.1f} s)"
    second = f"to the next new step, saving every {SAVE_EVERY} ({min(new):.1f} to {max(new):.1f} s)"
    return [
        Row(name=first, value=statistics.median(finished), unit="s", bar="<= 20", command=COMMAND),
        Row(name=second, value=statistics.median(new), unit="s", command=COMMAND),
    ]


class Recovery(NamedTuple):
    finished_s: float
    """Until the first row of the next attempt."""
    new_s: float
    """Until the first row of a step not finished before."""


def kill_and_measure(command: Sequence[str], run_uri: str, steps_before_kill: Sequence[int]) -> list[Recovery]:
    """Kills and restarts a run that resumes from its newest checkpoint.

    Raises:
        RuntimeError: if the run ends or makes no progress.
    """
    found = []
    process = _start(command)
    try:
        last_step = 0
        for num_steps in steps_before_kill:
            _wait(lambda last=last_step + num_steps: newest_step(run_uri) >= last, process, run_uri)  # type: ignore[misc]
            process.kill()
            killed = time.monotonic()
            process.wait()
            last_step, attempt = newest_step(run_uri), newest_attempt(run_uri)
            process = _start(command)
            _wait(lambda last=attempt: newest_attempt(run_uri) > last, process, run_uri)  # type: ignore[misc]
            finished_s = time.monotonic() - killed
            _wait(lambda last=last_step: newest_step(run_uri) > last, process, run_uri)  # type: ignore[misc]
            found.append(Recovery(finished_s, time.monotonic() - killed))
            logger.info("killed after step %d; %s", last_step, found[-1])
    finally:
        process.kill()
        process.wait()
    return found


def newest_step(run_uri: str) -> int:
    """0 before the first step."""
    rows = read_metrics(run_uri)
    return int(rows[-1]["global_step"]) if rows else 0


def newest_attempt(run_uri: str) -> int:
    """0 before the first step."""
    return max((int(row["attempt"]) for row in read_metrics(run_uri)), default=0)


def _start(command: Sequence[str]) -> subprocess.Popen[bytes]:
    return subprocess.Popen(command, stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL)


def _wait(is_reached: Callable[[], bool], process: subprocess.Popen[bytes], run_uri: str) -> None:
    deadline = time.monotonic() + TIMEOUT_S
    while not is_reached():
        if process.poll() is not None:
            raise RuntimeError(f"the run {run_uri} ended with {process.returncode} before its next step")
        if time.monotonic() > deadline:
            raise RuntimeError(f"the run {run_uri} did not reach its next step within {TIMEOUT_S:.0f} s")
        time.sleep(POLL_S)

"""Writes step metrics as JSON lines and TensorBoard events.

    runs/tiny/metrics/attempt-0001.jsonl      rows of one attempt
    runs/tiny/tensorboard/attempt-0001/       the same values

An attempt repeats the steps after its checkpoint; `read_metrics` keeps the last attempt's rows.
"""

from __future__ import annotations

import json
import logging
import re
import tempfile
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass
from functools import partial
from pathlib import Path, PurePosixPath
from types import TracebackType
from typing import Any

from timeviper_platform.common import storage
from timeviper_platform.training.metrics.trackers import MlflowConfig, TolerantTracker, Tracker, WandbConfig

logger = logging.getLogger(__name__)

METRICS_FOLDER = "metrics"
TENSORBOARD_FOLDER = "tensorboard"
REPORT_WINDOW = 5
"""Maximum steps averaged for the first and last loss."""


@dataclass(frozen=True, kw_only=True, slots=True)
class MetricsConfig:
    log_every_steps: int = 20
    """Steps between progress lines in the log."""
    tensorboard: bool = True
    """Write TensorBoard event files."""
    curves: bool = True
    """Draw curves.svg at the end of each phase."""
    mlflow: MlflowConfig | None = None
    wandb: WandbConfig | None = None

    def __post_init__(self) -> None:
        if self.log_every_steps < 1:
            raise ValueError(f"{self.log_every_steps = } must be at least 1")


class MetricsWriter:
    """Writes one attempt's rows, on rank 0. A remote run folder is updated at every `flush`."""

    def __init__(self, run_uri: str, attempt: int, *, tensorboard: bool, trackers: Sequence[Tracker] = ()) -> None:
        self._trackers = [TolerantTracker(tracker) for tracker in trackers]
        self._run_uri = run_uri
        self._attempt = attempt
        self._scratch: tempfile.TemporaryDirectory[str] | None = None
        if storage.is_local(run_uri):
            self._root = Path(storage.split_uri(run_uri)[1])
        else:
            self._scratch = tempfile.TemporaryDirectory(prefix="timeviper-metrics-")
            self._root = Path(self._scratch.name)
        path = self._root / METRICS_FOLDER / _attempt_name(attempt, ".jsonl")
        path.parent.mkdir(parents=True, exist_ok=True)
        self._file = path.open("a", encoding="utf-8")
        self._tensorboard: Any = None
        if tensorboard:
            from torch.utils.tensorboard import SummaryWriter  # takes a second to import

            self._tensorboard = SummaryWriter(str(self._root / TENSORBOARD_FOLDER / _attempt_name(attempt)))

    def write(self, row: dict[str, Any]) -> None:
        """Writes a row with at least `phase`, `step` and `global_step`; without `loss` it extends the step's row."""
        self._file.write(json.dumps({"attempt": self._attempt, **row}) + "\n")
        self._file.flush()
        scalars = {f"{row['phase']}/{name}": value for name, value in _scalars(row)}
        if self._tensorboard is not None:
            for name, value in scalars.items():
                self._tensorboard.add_scalar(name, value, row["step"])
        scalars[f"{row['phase']}/attempt"] = float(self._attempt)
        for tracker in self._trackers:
            tracker.log(scalars, row["global_step"])

    def lacks(self, name: str, global_step: int) -> bool:
        """Returns whether a row of the step lacks this metric."""
        return any(row["global_step"] == global_step and name not in row for row in read_metrics(self._run_uri))

    def flush(self) -> None:
        """Makes all rows visible in the run's folder."""
        if self._tensorboard is not None:
            self._tensorboard.flush()
        if self._scratch is None:
            return
        filesystem, target = storage.split_uri(self._run_uri)
        for file in self._root.rglob("*"):
            if file.is_file():
                path = f"{target}/{file.relative_to(self._root).as_posix()}"
                storage.retrying(partial(filesystem.put_file, str(file), path), path)

    def close(self) -> None:
        self.flush()
        for tracker in self._trackers:
            tracker.close()
        self._file.close()
        if self._tensorboard is not None:
            self._tensorboard.close()
        if self._scratch is not None:
            self._scratch.cleanup()

    def __enter__(self) -> MetricsWriter:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self.close()


def next_attempt(run_uri: str) -> int:
    names = [PurePosixPath(uri).name for uri in _attempt_files(run_uri)]
    return max((int(re.sub(r"\D", "", name)) for name in names), default=0) + 1


def read_metrics(run_uri: str) -> list[dict[str, Any]]:
    """Returns the last attempt's row of each step, in order."""
    rows: dict[int, dict[str, Any]] = {}
    for uri in _attempt_files(run_uri):
        for row in _parsed(uri):
            step = row["global_step"]
            if "loss" in row:
                rows[step] = row
            elif step in rows:  # validation after the step
                rows[step] |= row | {"attempt": rows[step]["attempt"]}
    return [rows[step] for step in sorted(rows)]


def _parsed(uri: str) -> Iterator[dict[str, Any]]:
    """Yields the whole rows of a file; a kill or a full disk may cut off any line."""
    *lines, _ = storage.read_bytes(uri).decode(errors="replace").split("\n")
    num_cut = 0
    for line in lines:
        try:
            row = json.loads(line)
            yield row | {"global_step": int(row["global_step"])}
        except (ValueError, KeyError, TypeError):
            num_cut += 1
    if num_cut:
        logger.warning("%s: skipping %d damaged lines", uri, num_cut)


def phase_report(rows: Iterable[dict[str, Any]]) -> dict[str, Any]:
    """Summarizes one phase; first and last loss are means."""
    rows = list(rows)
    losses = [row["loss"] for row in rows]
    window = max(1, min(REPORT_WINDOW, len(losses) // 4))
    return {
        "steps": len(rows),
        "loss_first": _mean(losses[:window]),
        "loss_last": _mean(losses[-window:]),
        "seconds": sum(row["seconds"] for row in rows),
        "samples": sum(row["num_samples"] for row in rows),
        "tokens": sum(row["num_tokens"] for row in rows),
        "fill": _mean([row["fill"] for row in rows]),
        "data_wait_share": _mean([row["data_wait_share"] for row in rows]),
        "checkpoint_stall_share": _stall_share(rows),
        "validation_loss": _last(rows, "validation_loss"),
        "validation_exact_match": _last(rows, "validation_exact_match"),
    }


def _last(rows: list[dict[str, Any]], name: str) -> float | None:
    return next((row[name] for row in reversed(rows) if name in row), None)


def _stall_share(rows: list[dict[str, Any]]) -> float | None:
    stall_s = sum(row["checkpoint_stall_s"] for row in rows)
    seconds = sum(row["seconds"] for row in rows) + stall_s
    return stall_s / seconds if seconds else None


def _mean(values: list[float]) -> float | None:
    return sum(values) / len(values) if values else None


def _scalars(row: dict[str, Any]) -> list[tuple[str, float]]:
    pairs: list[tuple[str, float]] = []
    for name, value in row.items():
        if isinstance(value, dict):
            pairs += [(f"{name}/{key}", float(item)) for key, item in value.items()]
        elif isinstance(value, list):
            pairs += [(f"{name}/{index}", float(item)) for index, item in enumerate(value)]
        elif isinstance(value, int | float) and name not in ("step", "global_step"):
            pairs.append((name, float(value)))
    return pairs


def _attempt_name(attempt: int, suffix: str = "") -> str:
    return f"attempt-{attempt:04d}{suffix}"


def _attempt_files(run_uri: str) -> list[str]:
    return storage.files_in(storage.join_uri(run_uri, METRICS_FOLDER), ".jsonl")

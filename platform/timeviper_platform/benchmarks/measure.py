"""Rows of a benchmark, and comparisons of alternating runs."""

from __future__ import annotations

import ctypes
import multiprocessing
import statistics
import time
from collections.abc import Callable, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any, NamedTuple


@dataclass(frozen=True, kw_only=True, slots=True)
class Row:
    name: str
    value: float
    unit: str
    bar: str | None = None
    """Bound that the value must meet, such as ">= 1.6"; None = no bound."""
    command: str
    """Command that measures the row."""

    @property
    def holds(self) -> bool | None:
        """Whether the value meets its bar; None without one."""
        if self.bar is None:
            return None
        relation, _, number = self.bar.partition(" ")
        comparisons = {">=": self.value >= float(number), "<=": self.value <= float(number)}
        if relation not in comparisons:
            raise ValueError(f"{self.bar = } must read '>= NUMBER' or '<= NUMBER'")
        return comparisons[relation]

    def as_dict(self) -> dict[str, Any]:
        values = asdict(self)
        return {key: values[key] for key in ("name", "value", "unit", "bar")} | {
            "holds": self.holds,
            "command": self.command,
        }


@dataclass(frozen=True, kw_only=True, slots=True)
class Comparison:
    ours_seconds: tuple[float, ...]
    control_seconds: tuple[float, ...]

    @property
    def speedup(self) -> float:
        """Median over turns of control / ours; above 1 if ours is faster."""
        pairs = zip(self.control_seconds, self.ours_seconds, strict=True)
        return statistics.median(control / ours for control, ours in pairs)

    @property
    def noise(self) -> float:
        """Largest relative spread of either side, (max - min) / median."""
        return max((max(s) - min(s)) / statistics.median(s) for s in (self.ours_seconds, self.control_seconds))


def compare(ours: Callable[[], object], control: Callable[[], object], *, repeats: int = 5) -> Comparison:
    """Runs `ours` and `control` in turn, `repeats` times each, after an unmeasured run of both.

    Raises:
        ValueError: for fewer than three repeats.
    """
    if repeats < 3:
        raise ValueError(f"{repeats = } must be at least 3")
    ours()
    control()
    pairs = [(_seconds(ours), _seconds(control)) for _ in range(repeats)]
    return Comparison(ours_seconds=tuple(a for a, _ in pairs), control_seconds=tuple(b for _, b in pairs))


class StolenTime:
    """Share of this machine's cores that its host gave to other machines since construction.

    Args:
        stat: file of CPU ticks; the share is 0 where it does not exist.
    """

    def __init__(self, stat: Path = Path("/proc/stat")) -> None:
        self._stat = stat
        self._before = _cpu_ticks(stat)

    def share(self) -> float:
        total, stolen = (now - before for now, before in zip(_cpu_ticks(self._stat), self._before, strict=True))
        return stolen / total if total else 0.0


def _cpu_ticks(path: Path) -> tuple[int, int]:
    """Ticks of all cores since boot: total, stolen (proc(5), /proc/stat)."""
    if not path.exists():
        return 0, 0
    ticks = [int(value) for value in path.read_text().split("\n", 1)[0].split()[1:9]]
    return sum(ticks), ticks[7]


class Cost(NamedTuple):
    seconds: float
    cpu_seconds: float
    peak_bytes: int
    """Growth of the process's peak memory."""


Measure = Callable[..., Cost]
"""(action, *arguments) -> Cost."""


def cost_elsewhere(action: Callable[..., object], *arguments: object) -> Cost:
    """Cost of a module-level function in a new process, without its imports. Linux only."""
    with multiprocessing.get_context("spawn").Pool(1) as pool:
        return pool.apply(cost_here, (action, *arguments))


def cost_here(action: Callable[..., object], *arguments: object) -> Cost:
    reset_peak()
    before = resident_bytes()
    started, cpu_started = time.perf_counter(), time.process_time()
    action(*arguments)
    seconds, cpu_seconds = time.perf_counter() - started, time.process_time() - cpu_started
    return Cost(seconds, cpu_seconds, peak_resident_bytes() - before)


def reset_peak() -> None:
    """Returns freed memory to the system and resets this process's peak. Linux only."""
    ctypes.CDLL(None).malloc_trim(0)
    Path("/proc/self/clear_refs").write_text("5")  # resets VmHWM (man 5 proc)


def resident_bytes() -> int:
    return _status_bytes("VmRSS")


def peak_resident_bytes() -> int:
    """Peak since `reset_peak`."""
    return _status_bytes("VmHWM")


def _status_bytes(name: str) -> int:
    lines = Path("/proc/self/status").read_text().splitlines()
    return int(next(line for line in lines if line.startswith(name)).split()[1]) * 1024


def format_rows(rows: Sequence[Row]) -> str:
    lines = ["| figure | value | bar | holds | command |", "| --- | --- | --- | --- | --- |"]
    for row in rows:
        verdict = {None: "", True: "yes", False: "NO"}[row.holds]
        value = f"{row.value:.4g} {row.unit}".strip()
        lines.append(f"| {row.name} | {value} | {row.bar or ''} | {verdict} | `{row.command}` |")
    return "\n".join(lines)


def _seconds(run: Callable[[], object]) -> float:
    start = time.perf_counter()
    run()
    return time.perf_counter() - start

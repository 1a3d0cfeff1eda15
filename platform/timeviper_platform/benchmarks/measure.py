"""What every benchmark row is, and how two things are compared: in turn, in one process, by their medians.

Knows rows, bars and medians; not what is measured (each part's suite lies beside the part).
"""

from __future__ import annotations

import multiprocessing
import statistics
import time
from collections.abc import Callable, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any, NamedTuple


@dataclass(frozen=True, kw_only=True, slots=True)
class Row:
    """One measured figure."""

    name: str
    value: float
    unit: str
    bar: str | None = None
    """what the figure must reach, such as ">= 1.6"; None = printed beside the others, no promise"""
    command: str
    """the command that measures it again"""

    @property
    def holds(self) -> bool | None:
        """Whether the value reaches its bar; None without one."""
        if self.bar is None:
            return None
        relation, _, number = self.bar.partition(" ")
        comparisons = {">=": self.value >= float(number), "<=": self.value <= float(number)}
        if relation not in comparisons:
            raise ValueError(f"{self.bar = } must read '>= NUMBER' or '<= NUMBER'")
        return comparisons[relation]

    def as_dict(self) -> dict[str, Any]:
        """The row with its verdict, as `--json` writes it."""
        values = asdict(self)
        return {key: values[key] for key in ("name", "value", "unit", "bar")} | {
            "holds": self.holds,
            "command": self.command,
        }


@dataclass(frozen=True, kw_only=True, slots=True)
class Comparison:
    """Seconds of two things run in turn."""

    ours_seconds: tuple[float, ...]
    control_seconds: tuple[float, ...]

    @property
    def speedup(self) -> float:
        """Median over the turns of control over ours: above 1 when ours is faster. Neighbours in time meet the same
        machine, whatever else it does."""
        pairs = zip(self.control_seconds, self.ours_seconds, strict=True)
        return statistics.median(control / ours for control, ours in pairs)

    @property
    def noise(self) -> float:
        """Largest relative spread, (max - min) / median, of the two sides."""
        return max((max(s) - min(s)) / statistics.median(s) for s in (self.ours_seconds, self.control_seconds))


def compare(ours: Callable[[], object], control: Callable[[], object], *, repeats: int = 5) -> Comparison:
    """Runs `ours` and `control` in turn, `repeats` times each, after one unmeasured run of both.

    Raises:
        ValueError: for fewer than three repeats: a median of two is no median.
    """
    if repeats < 3:
        raise ValueError(f"{repeats = } must be at least 3")
    ours()
    control()
    pairs = [(_seconds(ours), _seconds(control)) for _ in range(repeats)]
    return Comparison(ours_seconds=tuple(a for a, _ in pairs), control_seconds=tuple(b for _, b in pairs))


class StolenTime:
    """How much of this machine's cores its host has given to other machines, from now on. Linux alone; elsewhere 0."""

    def __init__(self) -> None:
        self._before = _cpu_ticks()

    def share(self) -> float:
        """Of all time of all cores, 0 to 1."""
        total, stolen = (now - before for now, before in zip(_cpu_ticks(), self._before, strict=True))
        return stolen / total if total else 0.0


def _cpu_ticks() -> tuple[int, int]:
    """Of all cores since the start: in all, and stolen (proc(5), `cpu` of /proc/stat)."""
    path = Path("/proc/stat")
    if not path.exists():
        return 0, 0
    ticks = [int(value) for value in path.read_text().split("\n", 1)[0].split()[1:9]]
    return sum(ticks), ticks[7]


class Cost(NamedTuple):
    """What an action took."""

    seconds: float
    cpu_seconds: float
    peak_bytes: int
    """by which its process's memory grew, at most"""


def cost_elsewhere(action: Callable[..., object], *arguments: object) -> Cost:
    """The cost of a module's function in a new process, its imports left out. Linux alone."""
    with multiprocessing.get_context("spawn").Pool(1) as pool:
        return pool.apply(cost_here, (action, *arguments))


def cost_here(action: Callable[..., object], *arguments: object) -> Cost:
    """The cost of a call in this process."""
    Path("/proc/self/clear_refs").write_text("5")  # the peak starts here
    before = _status_bytes("VmRSS")
    started, cpu_started = time.perf_counter(), time.process_time()
    action(*arguments)
    seconds, cpu_seconds = time.perf_counter() - started, time.process_time() - cpu_started
    return Cost(seconds, cpu_seconds, _status_bytes("VmHWM") - before)


def _status_bytes(name: str) -> int:
    lines = Path("/proc/self/status").read_text().splitlines()
    return int(next(line for line in lines if line.startswith(name)).split()[1]) * 1024


def format_rows(rows: Sequence[Row]) -> str:
    """The rows as a Markdown table: the one that the README quotes."""
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

"""Keeps measured rows as JSON next to a document, and shows them there in tables between markers."""

from __future__ import annotations

import contextlib
import json
import os
import platform
import re
import subprocess
import time
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from timeviper_platform.benchmarks.measure import Row

START, END = "<!-- measured: {} -->", "<!-- end -->"
"""Lines around the table of a suite. The text outside them is never changed."""

Records = dict[str, dict[str, Any]]
"""suite -> group -> {date, commit, machine, stolen, rows}"""


def record(document: Path, suite: str, group: str, rows: Sequence[Row], *, stolen: float) -> None:
    """Replaces the group's rows in the document and in the JSON file of its name.

    Args:
        stolen: share of the machine's cores that its host gave to others meanwhile.

    Raises:
        ValueError: if the document has no markers of the suite.
    """
    records = read_records(document)
    records.setdefault(suite, {})[group] = {
        "date": time.strftime("%Y-%m-%d", time.gmtime()),
        "commit": _commit(document),
        "machine": machine(),
        "stolen": round(stolen, 3),
        "rows": [row.as_dict() for row in rows],
    }
    text = with_tables(document.read_text(encoding="utf-8"), {suite: records[suite]})
    json_file(document).write_text(json.dumps(records, indent=1, sort_keys=True) + "\n", encoding="utf-8")
    document.write_text(text, encoding="utf-8")


def json_file(document: Path) -> Path:
    return document.with_suffix(".json")


def read_records(document: Path) -> Records:
    file = json_file(document)
    records: Records = json.loads(file.read_text(encoding="utf-8")) if file.is_file() else {}
    return records


def with_tables(text: str, records: Mapping[str, Mapping[str, Any]]) -> str:
    """Returns the document's text with these suites' tables.

    Raises:
        ValueError: if it has no markers of a suite.
    """
    for suite, groups in records.items():
        start = START.format(suite)
        block = re.compile(rf"^{re.escape(start)}\n.*?^{re.escape(END)}$", re.MULTILINE | re.DOTALL)
        new = f"{start}\n\n{_table(groups)}\n\n{END}"
        text, num_found = block.subn(lambda _, new=new: new, text)  # type: ignore[misc]
        if num_found != 1:
            raise ValueError(f"the document has {num_found} tables of {suite!r}; put {start!r} and {END!r} there once")
    return text


def _table(groups: Mapping[str, Any]) -> str:
    lines = ["| figure | value | bar | command |", "| --- | --- | --- | --- |"]
    notes = []
    for name, group in sorted(groups.items()):
        for row in group["rows"]:
            value = f"{row['value']:.4g} {row['unit']}".strip()
            shown = f"**{value}**" if row["holds"] is False else value
            lines.append(f"| {row['name']} | {shown} | {row['bar'] or ''} | `{row['command']}` |")
        where = f"{group['date']}, commit {group['commit'] or 'unknown'}, {group['machine']}"
        notes.append(f"`{name}`: {where}, {group['stolen']:.0%} stolen")
    return "\n".join([*lines, "", *(f"- {note}" for note in notes)])


def machine() -> str:
    """This machine in words: cores, CPU, memory, GPU."""
    memory = os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES") / 2**30
    words = [f"{os.cpu_count()} cores of {_cpu_name()}", f"{memory:.0f} GiB"]
    import torch

    if torch.cuda.is_available():
        words.append(torch.cuda.get_device_name())
    return ", ".join(words)


def _commit(document: Path) -> str | None:
    """Returns the short git commit, with `+changes` if files but the document differ; None outside a repository."""

    def git(*arguments: str) -> str:
        command = ["git", "-C", str(Path(__file__).parent), *arguments]
        return subprocess.run(command, capture_output=True, text=True, check=True).stdout.strip()

    with contextlib.suppress(OSError, subprocess.CalledProcessError):
        commit = git("rev-parse", "--short=7", "HEAD")
        own = (f":(exclude,top)**/{file.name}" for file in (document, json_file(document)))
        changed = git("status", "--porcelain", "--untracked-files=no", "--", ":/", *own)
        return f"{commit}+changes" if changed else commit
    return None


def _cpu_name() -> str:
    info = Path("/proc/cpuinfo")
    found = re.search(r"^model name\s*:\s*(.+)$", info.read_text(), re.MULTILINE) if info.exists() else None
    return found[1].strip() if found else platform.processor() or platform.machine()

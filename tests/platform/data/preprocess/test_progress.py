"""Progress of a run: a bar on a terminal, log lines elsewhere, with the same figures."""

from __future__ import annotations

import io
import logging

import pytest

from reference.synthetic_result import synthetic_result
from timeviper_platform.common.logs import setup_logging
from timeviper_platform.data.preprocess.progress import Progress
from timeviper_platform.data.store.audit import Outcomes

HALF = synthetic_result(
    num_frames=128,
    segments=Outcomes.of(["ok", "error"]),
    error_types=["corrupt_file"],
    started=0.0,
    ended=10.0,
)
REST = synthetic_result(num_frames=128, started=10.0, ended=20.0)
FIGURES = "1 ok + 0 partial + 1 rejected (1 corrupt_file); 12.8 frames/s, 10 s left"


class Terminal(io.StringIO):
    def isatty(self) -> bool:
        return True


def test_a_log_has_progress_lines(caplog: pytest.LogCaptureFixture, capsys: pytest.CaptureFixture[str]) -> None:
    caplog.set_level(logging.INFO)
    with Progress(num_segments=4, num_frames=256, every_seconds=0.0) as progress:
        progress.add(HALF)
    assert f"2/4 segments (50%): {FIGURES}" in caplog.text
    assert "\r" not in capsys.readouterr().err


def test_log_lines_are_some_seconds_apart_except_for_the_last(caplog: pytest.LogCaptureFixture) -> None:
    caplog.set_level(logging.INFO)
    with Progress(num_segments=6, num_frames=384, every_seconds=1e6) as progress:
        for result in (HALF, REST, REST):
            progress.add(result)
    assert [record.message.split(" ")[0] for record in caplog.records] == ["6/6"]


def test_a_terminal_has_a_bar_that_log_lines_do_not_break(monkeypatch: pytest.MonkeyPatch) -> None:
    terminal, root = Terminal(), logging.getLogger()
    monkeypatch.setattr("sys.stderr", terminal)
    handlers = root.handlers
    try:
        setup_logging()
        with Progress(num_segments=4, num_frames=256, every_seconds=0.0) as progress:
            progress.add(HALF)
            logging.getLogger("elsewhere").warning("a file is damaged")
            progress.add(REST)
    finally:
        root.handlers = handlers
    drawn = terminal.getvalue()
    assert "segments (" not in drawn  # no line per task
    bars = [part.strip() for part in drawn.replace("\n", "\r").split("\r") if "|" in part]
    assert bars[-1].startswith("100%|")
    assert "4/4 segments, 3 ok + 0 partial + 1 rejected (1 corrupt_file); 12.8 frames/s, 0 s left" in bars[-1]
    (line,) = [line for line in drawn.split("\n") if "a file is damaged" in line]
    assert "|" not in line.rpartition("\r")[2]

"""logs: lines of text or of JSON."""

from __future__ import annotations

import json
import logging
import math
from collections.abc import Iterator
from datetime import UTC, datetime

import pytest

from timeviper_platform.common.logs import log_event, setup_logging, shown_time


@pytest.fixture(autouse=True)
def handlers() -> Iterator[None]:
    root = logging.getLogger()
    before, level = list(root.handlers), root.level
    yield
    root.handlers[:] = before
    root.setLevel(level)


def test_every_line_of_a_replica_is_an_object(capsys: pytest.CaptureFixture[str]) -> None:
    """Before, the JSON of a request stood behind a time and names, which log collectors do not read."""
    setup_logging(as_json=True)
    logger = logging.getLogger("timeviper_platform.test")
    log_event(logger, logging.INFO, "request", request_id="é", status=200)
    try:
        raise ValueError("two\nlines")
    except ValueError:
        logger.exception("failed: %s", "x")
    first, second = map(json.loads, capsys.readouterr().err.splitlines())
    assert first.pop("time").endswith("+00:00")
    logger_fields = {"level": "INFO", "logger": logger.name}
    assert first == {**logger_fields, "event": "request", "request_id": "é", "status": 200}
    assert (second["level"], second["message"]) == ("ERROR", "failed: x")
    assert second["trace"].endswith("ValueError: two\nlines")


def test_a_job_logs_text(capsys: pytest.CaptureFixture[str]) -> None:
    setup_logging()
    log_event(logging.getLogger("timeviper"), logging.WARNING, "request", status=200)
    assert capsys.readouterr().err.endswith(' WARNING timeviper: {"event": "request", "status": 200}\n')


def test_a_line_of_a_job_has_date_and_time_zone(capsys: pytest.CaptureFixture[str]) -> None:
    """Runs take days, and nodes may be in other zones."""
    setup_logging()
    logging.getLogger("timeviper").warning("here")
    line = capsys.readouterr().err
    time = datetime.strptime(line[: line.index(" WARNING")], "%Y-%m-%d %H:%M:%S%z")
    assert abs((datetime.now(UTC) - time).total_seconds()) < 60


@pytest.mark.parametrize("as_json", [False, True])
def test_no_line_shows_a_password(as_json: bool, capsys: pytest.CaptureFixture[str]) -> None:
    setup_logging(as_json=as_json)
    logger = logging.getLogger("timeviper")
    try:
        raise OSError("cannot read sftp://wilma:se%40cret@nas/b")
    except OSError:
        logger.exception("writing %s and ftp://:secret@[::1]:21/c at 10:20:30", "webhdfs://wilma:secret@node:9870/a")
    text = capsys.readouterr().err
    assert "cret" not in text
    assert "wilma" not in text
    for uri in ("sftp://nas/b", "webhdfs://node:9870/a", "ftp://[::1]:21/c at 10:20:30"):
        assert uri in text


@pytest.mark.parametrize(
    ("seconds", "shown"),
    [
        (0.4, "0 s"),
        (59.0, "59 s"),
        (60.0, "1 min"),
        (3599.0, "1 h 00 min"),
        (11_100.0, "3 h 05 min"),
        (86399.0, "1 d 0 h"),
        (270_000.0, "3 d 3 h"),
        (math.inf, "unknown time"),
    ],
)
def test_a_time_is_shown_in_its_two_largest_units(seconds: float, shown: str) -> None:
    assert shown_time(seconds) == shown

"""Logging of a job or worker process."""

from __future__ import annotations

import json
import logging
import math
import sys
from collections.abc import Mapping
from datetime import UTC, datetime
from typing import Any

from timeviper_platform.common.storage import without_passwords


def setup_logging(level: int | str = logging.INFO, *, as_json: bool = False) -> None:
    """Logs to standard error; replaces existing handlers. `as_json` writes an object per line."""
    handler = logging.StreamHandler(sys.stderr)
    handler.setFormatter(JsonLines() if as_json else _TextLines())
    logging.basicConfig(level=level, handlers=[handler], force=True)


def log_event(logger: logging.Logger, level: int, event: str, **fields: Any) -> None:
    """Logs names and values, as keys of the JSON line or as JSON in a text line."""
    values = {"event": event, **fields}
    logger.log(level, "%s", json.dumps(values), extra={"values": values})


def shown_time(seconds: float) -> str:
    """Returns the two largest units: `59 s`, `7 min`, `3 h 05 min` or `2 d 3 h`; `unknown time` for infinity."""
    if not math.isfinite(seconds):
        return "unknown time"
    if seconds < 60:
        return f"{seconds:.0f} s"
    hours, minutes = divmod(round(seconds / 60), 60)
    if hours < 24:
        return f"{hours} h {minutes:02d} min" if hours else f"{minutes} min"
    return f"{hours // 24} d {hours % 24} h"


class _TextLines(logging.Formatter):
    def __init__(self) -> None:
        super().__init__("%(asctime)s %(levelname)s %(name)s: %(message)s", datefmt="%Y-%m-%d %H:%M:%S%z")

    def format(self, record: logging.LogRecord) -> str:
        return without_passwords(super().format(record))


class JsonLines(logging.Formatter):
    """A JSON object per record, on one line."""

    def format(self, record: logging.LogRecord) -> str:
        values: Mapping[str, Any] | None = getattr(record, "values", None)
        line = {
            "time": datetime.fromtimestamp(record.created, UTC).isoformat(timespec="milliseconds"),
            "level": record.levelname,
            "logger": record.name,
            **({"message": record.getMessage()} if values is None else values),
        }
        if record.exc_info:
            line["trace"] = self.formatException(record.exc_info)
        return without_passwords(json.dumps(line, ensure_ascii=False))

"""Draws a finished run: loss, validation loss and throughput by step."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

from timeviper_platform.common.charts import FileFormat, Panel, Point, line_chart

MAX_POINTS = 2000
"""Maximum points per line."""


def draw_curves(rows: Sequence[dict[str, Any]], title: str, *, file_format: FileFormat = "svg") -> bytes:
    """Draws loss with validation dots, and tokens per second below; one colour per phase."""
    panels = [
        Panel(_thinned(_points(rows, "loss")), "loss (dots: validation)", dots=_points(rows, "validation_loss")),
        Panel(_thinned(_points(rows, "tokens_per_second")), "tokens/s"),
    ]
    return line_chart(panels, title=title, x_label="step", file_format=file_format)


def _points(rows: Sequence[dict[str, Any]], name: str) -> dict[str, list[Point]]:
    points: dict[str, list[Point]] = {}
    for row in rows:
        if name in row:
            points.setdefault(row["phase"], []).append((row["global_step"], row[name]))
    return points


def _thinned(lines: dict[str, list[Point]]) -> dict[str, list[Point]]:
    return {phase: points[:: max(1, len(points) // MAX_POINTS)] for phase, points in lines.items()}

"""Draws a finished run by step: loss, learning rates, gradient norm and throughput."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

from timeviper_platform.common.charts import FileFormat, Panel, Point, line_chart

MAX_POINTS = 2000
"""Maximum points per line."""


def draw_curves(rows: Sequence[dict[str, Any]], title: str, *, file_format: FileFormat = "svg") -> bytes:
    """Draws one colour per phase, with validation loss as dots; groups with equal learning rates share a line."""
    panels = [
        Panel(
            _thinned(_points(rows, "loss")),
            "loss (nats per token)",
            dots=_points(rows, "validation_loss"),
            dots_label="validation",
            is_log=True,
        ),
        Panel(_thinned(_learning_rates(rows)), "learning rate"),
        Panel(_thinned(_points(rows, "grad_norm")), "gradient norm", is_log=True),
        Panel(_thinned(_points(rows, "tokens_per_second")), "tokens/s"),
    ]
    return line_chart(panels, title=title, x_label="step", file_format=file_format)


def _points(rows: Sequence[dict[str, Any]], name: str) -> dict[str, list[Point]]:
    points: dict[str, list[Point]] = {}
    for row in rows:
        if name in row:
            points.setdefault(row["phase"], []).append((row["global_step"], row[name]))
    return points


def _learning_rates(rows: Sequence[dict[str, Any]]) -> dict[str, list[Point]]:
    """Returns rates by the names of their groups."""
    by_group: dict[str, list[Point]] = {}
    for row in rows:
        for group, rate in row.get("lr", {}).items():
            by_group.setdefault(group, []).append((row["global_step"], rate))
    groups: dict[tuple[Point, ...], list[str]] = {}
    for group, points in by_group.items():
        names = groups.setdefault(tuple(points), [])
        pattern = group.removesuffix(" no decay").removesuffix(" decay")  # a pattern's weights with and without decay
        names += [] if pattern in names else [pattern]
    return {f"rate of {', '.join(names)}": list(points) for points, names in groups.items()}


def _thinned(lines: dict[str, list[Point]]) -> dict[str, list[Point]]:
    return {name: points[:: max(1, len(points) // MAX_POINTS)] for name, points in lines.items()}

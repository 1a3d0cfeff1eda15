"""Numbers as SVG that any browser shows: lines over layers, and a matrix as shades. Needs no plotting library."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from html import escape

WIDTH, HEIGHT, MARGIN = 900, 360, 60
COLOURS = ("#1f77b4", "#d62728", "#2ca02c", "#9467bd", "#ff7f0e", "#8c564b", "#e377c2", "#7f7f7f")
CELL = 10

Point = tuple[float, float]


def line_chart(series: Mapping[str, Sequence[Point]], *, title: str, x_label: str) -> str:
    """Each series as a line with a dot a point, and its name in its colour."""
    points = [point for line in series.values() for point in line]
    (x_low, x_high), (y_low, y_high) = (_range([point[axis] for point in points]) for axis in (0, 1))

    def place(point: Point) -> tuple[float, float]:
        x = MARGIN + (WIDTH - 2 * MARGIN) * (point[0] - x_low) / (x_high - x_low)
        return round(x, 1), round(40 + (HEIGHT - 100) * (1 - (point[1] - y_low) / (y_high - y_low)), 1)

    parts = [
        _text(MARGIN, 24, title, size=16),
        _text(4, 44, f"{y_high:.3g}"),
        _text(4, HEIGHT - 60, f"{y_low:.3g}"),
        _text(MARGIN, HEIGHT - 40, f"{x_low:g}"),
        _text(WIDTH - MARGIN, HEIGHT - 40, f"{x_high:g}"),
        _text(WIDTH // 2, HEIGHT - 40, x_label),
    ]
    for number, (name, line) in enumerate(series.items()):
        colour = COLOURS[number % len(COLOURS)]
        placed = [place(point) for point in line]
        drawn = " ".join(f"{x},{y}" for x, y in placed)
        parts.append(f'<polyline fill="none" stroke="{colour}" points="{drawn}"/>')
        parts += [f'<circle cx="{x}" cy="{y}" r="2.5" fill="{colour}"/>' for x, y in placed]
        parts.append(_text(MARGIN + 200 * (number % 4), HEIGHT - 20 + 14 * (number // 4), name, colour=colour))
    return _svg(WIDTH, HEIGHT + 14 * (len(series) // 4), parts)


def heat_map(matrix: Sequence[Sequence[float]], *, title: str) -> str:
    """Darker = more, on a logarithmic scale of four decades; cells without a number stay white."""
    largest = max((value for row in matrix for value in row if value > 0), default=1.0)
    parts = [_text(4, 16, title)]
    for y, row in enumerate(matrix):
        for x, value in enumerate(row):
            if value > 0:
                shade = max(0.0, 1 + math.log10(value / largest) / 4)
                where = f'x="{x * CELL}" y="{24 + y * CELL}" width="{CELL}" height="{CELL}"'
                parts.append(f'<rect {where} fill="#08306b" fill-opacity="{shade:.2f}"/>')
    return _svg(max(200, CELL * len(matrix)), 28 + CELL * len(matrix), parts)


def _range(values: Sequence[float]) -> tuple[float, float]:
    low, high = min(values, default=0.0), max(values, default=1.0)
    return (low, high) if low < high else (low - 0.5, high + 0.5)


def _svg(width: int, height: int, parts: Sequence[str]) -> str:
    head = f'<svg xmlns="http://www.w3.org/2000/svg" width="{width}" height="{height}" font-family="sans-serif">'
    return f"{head}{''.join(parts)}</svg>\n"


def _text(x: float, y: float, text: str, *, colour: str = "black", size: int = 12) -> str:
    return f'<text x="{x}" y="{y}" font-size="{size}" fill="{colour}">{escape(text)}</text>'

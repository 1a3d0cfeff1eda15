"""Pictures of a finished run: loss and throughput by step, as one SVG that any browser shows.

Knows rows of metrics and how to draw a line; needs no plotting library.
"""

from __future__ import annotations

from collections.abc import Sequence
from html import escape
from typing import Any

WIDTH, HEIGHT, MARGIN = 900, 260, 60
COLOURS = ("#1f77b4", "#d62728", "#2ca02c", "#9467bd")
MAX_POINTS = 2000
"""of a line; a longer curve is drawn by every n-th row"""


def draw_curves(rows: Sequence[dict[str, Any]], title: str) -> str:
    """An SVG with the loss (held-out loss as dots) above and tokens a second below, a colour a phase."""
    charts = [
        _chart(rows, ("loss", "validation_loss"), "loss", top=40),
        _chart(rows, ("tokens_per_second",), "tokens / s", top=40 + HEIGHT),
    ]
    size = f'width="{WIDTH}" height="{2 * HEIGHT + 60}"'
    head = f'<text x="{MARGIN}" y="24" font-size="16">{escape(title)}</text>'
    return f'<svg xmlns="http://www.w3.org/2000/svg" {size} font-family="sans-serif">{head}{"".join(charts)}</svg>\n'


def _chart(rows: Sequence[dict[str, Any]], names: tuple[str, ...], label: str, *, top: int) -> str:
    values = [row[name] for row in rows for name in names if name in row]
    if not values:
        return ""
    low, high = min(0.0, *values), max(values) or 1.0
    last = max(row["global_step"] for row in rows)

    def place(step: int, value: float) -> str:
        x = MARGIN + (WIDTH - 2 * MARGIN) * step / last
        return f"{x:.1f},{top + (HEIGHT - 50) * (1 - (value - low) / (high - low)):.1f}"

    parts = [_text(4, top + 10, f"{high:.4g}"), _text(4, top + HEIGHT - 50, f"{low:.4g}"), _text(4, top + 100, label)]
    parts.append(_text(WIDTH - MARGIN, top + HEIGHT - 32, f"step {last}"))
    phases = list(dict.fromkeys(row["phase"] for row in rows))
    for number, phase in enumerate(phases):
        colour = COLOURS[number % len(COLOURS)]
        own = [row for row in rows if row["phase"] == phase]
        drawn = own[:: max(1, len(own) // MAX_POINTS)]
        points = " ".join(place(row["global_step"], row[names[0]]) for row in drawn)
        parts.append(f'<polyline fill="none" stroke="{colour}" points="{points}"/>')
        for row in (row for row in own if names[-1] in row and len(names) > 1):
            x, y = place(row["global_step"], row[names[-1]]).split(",")
            parts.append(f'<circle cx="{x}" cy="{y}" r="3" fill="{colour}"/>')
        parts.append(_text(MARGIN + 140 * number, top + HEIGHT - 32, phase, colour))
    return "".join(parts)


def _text(x: float, y: float, text: str, colour: str = "black") -> str:
    return f'<text x="{x}" y="{y}" font-size="12" fill="{colour}">{escape(text)}</text>'

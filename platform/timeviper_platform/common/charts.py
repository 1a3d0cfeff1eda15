"""Draws SVG or PNG with matplotlib. Equal inputs give equal bytes."""

from __future__ import annotations

import io
from collections.abc import Mapping, Sequence
from typing import TYPE_CHECKING, Literal, NamedTuple

import numpy as np

if TYPE_CHECKING:
    from matplotlib.figure import Figure

FileFormat = Literal["svg", "png"]
Point = tuple[float, float]

HEAT_MAP_DECADES = 4
"""Orders of magnitude in a heat map's colours."""


class Panel(NamedTuple):
    lines: Mapping[str, Sequence[Point]]
    """Points by line name."""
    y_label: str = ""
    dots: Mapping[str, Sequence[Point]] = {}
    """Single points by line name, in the line's colour."""


def line_chart(
    panels: Sequence[Panel], *, title: str, x_label: str, markers: bool = False, file_format: FileFormat = "svg"
) -> bytes:
    """Draws panels below each other. `markers` draws a dot at every point."""
    figure = _figure(9, 1 + 3 * len(panels))
    figure.suptitle(title)
    for panel, axes in zip(panels, figure.subplots(len(panels), sharex=True, squeeze=False)[:, 0], strict=True):
        for index, (name, points) in enumerate(panel.lines.items()):
            colour = f"C{index}"
            axes.plot(*_columns(points), marker="." if markers else "", color=colour, label=name, gid=name)
            axes.plot(*_columns(panel.dots.get(name, ())), "o", mec="black", ms=5, color=colour, gid=f"{name} dots")
        axes.set_ylabel(panel.y_label)
        axes.grid(alpha=0.3)
        if panel.lines:
            axes.legend(fontsize="small")
    figure.axes[-1].set_xlabel(x_label)
    return _saved(figure, file_format)


def heat_map(matrix: Sequence[Sequence[float]], *, title: str, file_format: FileFormat = "svg") -> bytes:
    """Draws larger values darker, on a logarithmic scale; non-positive cells stay white."""
    from matplotlib.colors import LogNorm

    values = np.ma.masked_less_equal(np.asarray(matrix, dtype=float), 0.0)
    largest = float(values.max()) if values.count() else 1.0
    figure = _figure(6, 5)
    axes = figure.subplots()
    image = axes.imshow(values, cmap="Blues", norm=LogNorm(largest / 10**HEAT_MAP_DECADES, largest, clip=True))
    figure.colorbar(image)
    axes.set_title(title)
    return _saved(figure, file_format)


def _figure(width: float, height: float) -> Figure:
    from matplotlib.figure import Figure  # takes half a second to import

    return Figure(figsize=(width, height), layout="constrained")


def _columns(points: Sequence[Point]) -> tuple[list[float], list[float]]:
    return [x for x, _ in points], [y for _, y in points]


def _saved(figure: Figure, file_format: FileFormat) -> bytes:
    import matplotlib

    metadata = {"Date": None} if file_format == "svg" else None
    buffer = io.BytesIO()
    with matplotlib.rc_context({"svg.hashsalt": "timeviper", "svg.fonttype": "none"}):  # text stays text
        figure.savefig(buffer, format=file_format, metadata=metadata)
    return buffer.getvalue()

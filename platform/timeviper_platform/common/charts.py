"""Draws SVG or PNG with matplotlib. Equal inputs give equal bytes."""

from __future__ import annotations

import io
import textwrap
from collections.abc import Mapping, Sequence
from typing import TYPE_CHECKING, Any, Literal, NamedTuple

import numpy as np

if TYPE_CHECKING:
    from matplotlib.axes import Axes
    from matplotlib.figure import Figure

FileFormat = Literal["svg", "png"]
Point = tuple[float, float]

HEAT_MAP_DECADES = 4
"""Orders of magnitude in a heat map's colours."""

LEGEND_CHARACTERS = 28
"""Longer names continue on the next line."""

MIN_LABELLED_SHARE = 0.03
"""Narrower parts of a heat map get no name."""


class Panel(NamedTuple):
    lines: Mapping[str, Sequence[Point]]
    """Points by line name. A name has one colour and one legend entry in all panels."""
    y_label: str = ""
    dots: Mapping[str, Sequence[Point]] = {}
    """Single points by line name, in the line's colour."""
    dots_label: str = ""
    """Meaning of the dots, for the legend."""
    levels: Mapping[str, float] = {}
    """Dashed horizontal lines by name."""
    is_log: bool = False
    """Whether y is logarithmic; points that are not positive are left out."""
    y_range: tuple[float, float] | None = None
    bands: Mapping[str, Sequence[tuple[float, float, float]]] = {}
    """Intervals (x, low, high) by line name, shaded in the line's colour."""
    title: str = ""


class Part(NamedTuple):
    """Part of a heat map's rows and columns."""

    name: str
    end: float
    """End as a share of the map, from 0 to 1; the part begins where the previous one ends."""


class Example(NamedTuple):
    """Frames of a video in a row, and the text below them."""

    title: str
    frames: Sequence[np.ndarray]
    """(H, W, 3) uint8 each."""
    seconds: Sequence[float]
    """Time of each frame."""
    lines: Sequence[str]


def line_chart(
    panels: Sequence[Panel],
    *,
    title: str,
    x_label: str,
    markers: bool = False,
    integer_x: bool = True,
    log_x: bool = False,
    num_columns: int = 1,
    file_format: FileFormat = "svg",
) -> bytes:
    """Draws panels below each other, or row by row in `num_columns`.

    `markers` draws a dot at every point, `integer_x` labels only integers.
    """
    from matplotlib.ticker import MaxNLocator

    num_rows = -(-len(panels) // num_columns)
    figure = _figure(3 + 6 * num_columns, 1 + 2.4 * num_rows)
    figure.suptitle(title)
    colours: dict[str, str] = {}
    explained: set[str] = set()
    grid = figure.subplots(num_rows, num_columns, sharex="col", squeeze=False)
    for panel, axes in zip(panels, grid.flat, strict=True):
        _draw(panel, axes, colours, markers=markers)
        axes.set_title(panel.title, fontsize="medium")
        new = {label: handle for handle, label in zip(*axes.get_legend_handles_labels(), strict=True)}
        new = {label: handle for label, handle in new.items() if label not in explained}
        explained |= set(new)
        if new:
            names = [textwrap.fill(label, LEGEND_CHARACTERS) for label in new]
            axes.legend(new.values(), names, fontsize="small", loc="upper left", bbox_to_anchor=(1.0, 1.02))
    for axes in grid[-1]:
        axes.set_xlabel(x_label)
        if log_x:
            axes.set_xscale("log", base=2)
            axes.xaxis.set_major_formatter("{x:g}")
        elif integer_x:
            axes.xaxis.set_major_locator(MaxNLocator(integer=True))
    return _saved(figure, file_format)


def heat_map(
    matrix: Sequence[Sequence[float]],
    *,
    title: str,
    x_label: str = "",
    y_label: str = "",
    colour_label: str = "",
    parts: Sequence[Part] = (),
    file_format: FileFormat = "svg",
) -> bytes:
    """Draws larger values darker, on a logarithmic scale; cells that are not positive stay white.

    Axes run from 0 to 100 % of the rows and columns; `parts` are separated by lines.
    """
    from matplotlib.colors import LogNorm

    values = np.ma.masked_less_equal(np.asarray(matrix, dtype=float), 0.0)
    largest = float(values.max()) if values.count() else 1.0
    figure = _figure(6.4, 5.6)
    axes = figure.subplots()
    image = axes.imshow(
        values,
        cmap="Blues",
        norm=LogNorm(largest / 10**HEAT_MAP_DECADES, largest, clip=True),
        extent=(0, 100, 100, 0),
        interpolation="nearest",
    )
    figure.colorbar(image, label=colour_label, shrink=0.8)
    axes.set(xlabel=x_label, ylabel=y_label)
    figure.suptitle(title)
    _draw_parts(axes, parts)
    return _saved(figure, file_format)


def value_grid(
    matrix: Sequence[Sequence[float | None]],
    *,
    x_names: Sequence[str],
    y_names: Sequence[str],
    title: str,
    x_label: str = "",
    y_label: str = "",
    colour_label: str = "",
    file_format: FileFormat = "svg",
) -> bytes:
    """Draws named cells with their values, from 0 (white) to 1 (dark); None stays empty."""
    values = np.array([[np.nan if value is None else value for value in row] for row in matrix], dtype=float)
    figure = _figure(2.4 + 0.62 * len(x_names), 2.0 + 0.42 * len(y_names))
    axes = figure.subplots()
    image = axes.imshow(np.ma.masked_invalid(values), cmap="Blues", vmin=0.0, vmax=1.0, aspect="auto")
    figure.colorbar(image, label=colour_label)
    axes.set_xticks(range(len(x_names)), x_names)
    axes.set_yticks(range(len(y_names)), y_names)
    axes.set(xlabel=x_label, ylabel=y_label)
    figure.suptitle(title)
    for (row, column), value in np.ndenumerate(values):
        if not np.isnan(value):
            colour = "white" if value > 0.6 else "black"
            axes.text(column, row, f"{value:.2f}", ha="center", va="center", fontsize="x-small", color=colour)
    return _saved(figure, file_format)


def examples_picture(examples: Sequence[Example], *, title: str, file_format: FileFormat = "svg") -> bytes:
    """Draws a panel per example: a row of frames with their times, then its lines of text."""
    figure = _figure(11, 0.6 + 2.6 * len(examples))
    figure.suptitle(title)
    for part, example in zip(np.atleast_1d(np.asarray(figure.subfigures(len(examples)))), examples, strict=True):
        part.suptitle(example.title, fontsize="medium", x=0.01, ha="left")
        grid = part.subplots(2, max(1, len(example.frames)), squeeze=False, height_ratios=[2, 1])
        for axes in grid.flat:
            axes.axis("off")
        for axes, pixels, seconds in zip(grid[0], example.frames, example.seconds, strict=False):
            axes.imshow(pixels)
            axes.set_title(f"{seconds:g} s", fontsize="x-small", pad=2)
        text = "\n".join(line for each in example.lines for line in textwrap.wrap(each, 130) or [""])
        part.text(0.01, 0.3, text, va="top", ha="left", fontsize="small")  # outside the frames' layout
    return _saved(figure, file_format)


def _draw(panel: Panel, axes: Axes, colours: dict[str, str], *, markers: bool) -> None:
    for name, points in panel.lines.items():
        colour = colours.setdefault(name, f"C{len(colours)}")
        if panel.is_log:
            points = [point for point in points if point[1] > 0]
        axes.plot(*_columns(points), marker="." if markers else "", color=colour, label=name, gid=name)
        if band := panel.bands.get(name):
            xs, low, high = zip(*band, strict=True)
            axes.fill_between(xs, low, high, color=colour, alpha=0.12, linewidth=0)
        axes.plot(*_columns(panel.dots.get(name, ())), "o", mec="black", ms=5, color=colour, gid=f"{name} dots")
    if any(panel.dots.values()) and panel.dots_label:
        axes.plot([], [], "o", mec="black", ms=5, color="white", label=panel.dots_label)
    for name, value in panel.levels.items():
        axes.axhline(value, color="black", linestyle="--", linewidth=1, label=name, gid=name)
    axes.set_ylabel(panel.y_label)
    axes.grid(alpha=0.3)
    if panel.is_log:
        _use_log_scale(axes, [y for points in panel.lines.values() for _, y in points if y > 0])
    if panel.y_range is not None:
        axes.set_ylim(*panel.y_range)


def _use_log_scale(axes: Axes, values: Sequence[float]) -> None:
    """Labels 1, 2 and 5 of each decade, or round numbers if the values span less than a decade."""
    from matplotlib.ticker import FuncFormatter, LogLocator, MaxNLocator, NullFormatter

    axes.set_yscale("log")
    is_wide = bool(values) and max(values) >= 10 * min(values)
    axes.yaxis.set_major_locator(LogLocator(subs=(1, 2, 5)) if is_wide else MaxNLocator(5))
    axes.yaxis.set_major_formatter(FuncFormatter(lambda value, _: f"{value:g}"))
    axes.yaxis.set_minor_formatter(NullFormatter())


def _draw_parts(axes: Axes, parts: Sequence[Part]) -> None:
    if not parts:
        return
    starts = [0.0, *(part.end for part in parts[:-1])]
    for start in starts[1:]:
        axes.axvline(100 * start, color="tab:red", linewidth=0.8)
        axes.axhline(100 * start, color="tab:red", linewidth=0.8)
    named = [
        (50 * (start + part.end), part.name)
        for start, part in zip(starts, parts, strict=True)
        if part.end - start >= MIN_LABELLED_SHARE
    ]
    above: Any = axes.secondary_xaxis("top")
    above.set_xticks([middle for middle, _ in named], [name for _, name in named], rotation=30, ha="left")
    above.tick_params(length=0, colors="tab:red", labelsize="small")


def _figure(width: float, height: float) -> Figure:
    from matplotlib.figure import Figure  # takes half a second to import

    return Figure(figsize=(width, height), layout="constrained")


def _columns(points: Sequence[Point]) -> tuple[list[float], list[float]]:
    return [x for x, _ in points], [y for _, y in points]


def _saved(figure: Figure, file_format: FileFormat) -> bytes:
    import matplotlib

    metadata = {"Date": None} if file_format == "svg" else None
    buffer = io.BytesIO()
    with matplotlib.rc_context({"svg.hashsalt": "timeviper", "svg.fonttype": "none"}):  # text, not outlines
        figure.draw_without_rendering()
        figure.set_layout_engine("none")  # already laid out; saving would do it twice more
        figure.savefig(buffer, format=file_format, metadata=metadata)
    return buffer.getvalue()

"""Draws the figures' numbers."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

from timeviper_platform.common.charts import (
    Example,
    FileFormat,
    Panel,
    Part,
    examples_picture,
    heat_map,
    line_chart,
    value_grid,
)
from timeviper_platform.evaluation.figures.examples import AnsweredExample
from timeviper_platform.evaluation.figures.maps import KINDS, LayerMap

Row = dict[str, Any]

FLOWS = {"v2i": "vision to instruction", "v2r": "vision to response"}
SCOPES = {"layer": "one block", "window": "window", "from_layer": "from the block on"}


def blocking(rows: Sequence[Row], file_format: FileFormat) -> bytes:
    """Figure 3: a panel per task; bands are 95 % intervals."""

    def name(row: Row) -> str:
        return f"{FLOWS[row['flow']]}, {SCOPES[row['scope']]}" + ("" if row["kind"] == "both" else f", {row['kind']}")

    return _sweep(rows, name, "as trained", "Figure 3: generated answers with flows from vision cut", file_format)


def dropping(rows: Sequence[Row], file_format: FileFormat) -> bytes:
    """Figure 4: a panel per task; bands are 95 % intervals."""
    return _sweep(
        rows,
        lambda row: f"{row['select']}, keep {row['keep']:.0%}",
        "nothing dropped",
        "Figure 4: generated answers with vision tokens dropped before a block",
        file_format,
    )


def _sweep(
    rows: Sequence[Row], name: Callable[[Row], str], baseline: str, title: str, file_format: FileFormat
) -> bytes:
    panels = []
    for task in dict.fromkeys(row["task"] for row in rows):
        start, *measured = [row for row in rows if row["task"] == task]
        lines: dict[str, list[tuple[float, float]]] = {}
        bands: dict[str, list[tuple[float, float, float]]] = {}
        for row in measured:
            lines.setdefault(name(row), []).append((row["layer"], row["score"]))
            bands.setdefault(name(row), []).append((row["layer"], row["low"], row["high"]))
        label = f"{start['metric']}, {start['num_questions']} questions"
        panels.append(
            Panel(lines, label, levels={baseline: start["score"]}, y_range=(-0.03, 1.03), bands=bands, title=task)
        )
    return line_chart(panels, title=title, x_label="block (from 0)", markers=True, file_format=file_format)


def layer_map(layer_map: LayerMap, head: int | None, file_format: FileFormat) -> bytes:
    """Figure 5: one head, or the mean over heads."""
    picture = layer_map.picture_BB if head is None else layer_map.picture_HBB[head]
    which = "mean over heads" if head is None else f"head {head}"
    return heat_map(
        picture.nan_to_num().tolist(),
        title=f"Figure 5: block {layer_map.layer}, {layer_map.block_type}, {which}",
        x_label="token read, position in the block's input (%)",
        y_label="query, position in the block's input (%)",
        colour_label="share of the query's absolute weights",
        parts=[Part(name, end) for name, end in zip(KINDS, layer_map.kind_ends, strict=True)],
        file_format=file_format,
    )


def groups(rows: Sequence[Row], file_format: FileFormat) -> bytes:
    """Figure 6: a row per kind of query, a column per model; system tokens read system tokens alone."""
    models = list(dict.fromkeys(row["model"] for row in rows))
    titles = {"weights": "hybrid", "transformer": "Transformer"} if len(models) > 1 else {}
    panels = []
    for query in KINDS[1:]:
        for model in models:
            lines: dict[str, list[tuple[float, float]]] = {}
            attention: dict[str, list[tuple[float, float]]] = {}
            own = [row for row in rows if row["model"] == model]
            is_hybrid = any(row["block"] == "mamba" for row in own)
            for row in own:
                if row["from"] == query:
                    point, name = (row["layer"], row["share"]), f"reads {row['to']}"
                    lines.setdefault(name, []).append(point)
                    if is_hybrid and row["block"] == "attention":
                        attention.setdefault(name, []).append(point)
            panels.append(
                Panel(
                    lines,
                    f"share of weights,\n{query} queries",
                    dots=attention,
                    dots_label="attention block",
                    y_range=(-0.03, 1.03),
                    title=titles.get(model, "") if query == KINDS[1] else "",
                )
            )
    return line_chart(
        panels,
        title="Figure 6: what each kind of token reads, by absolute weights",
        x_label="block (from 0)",
        markers=True,
        num_columns=len(models),
        file_format=file_format,
    )


def curves(found: Row, file_format: FileFormat) -> bytes:
    """Sparsity by block, and stability between a block and the next that mixes tokens."""
    layers, blocks = found["layers"], found["blocks"]
    sparse = {f"hold {float(mass):.0%} of importance": shares for mass, shares in found["sparsity"].items()}
    after = list(zip(layers[1:], range(len(layers) - 1), strict=True))
    stable = {
        f"shared top {found['top_share']:.0%}": [(x, found["overlap_LL"][i][i + 1]) for x, i in after],
        "rank correlation": [(x, found["correlation_LL"][i][i + 1]) for x, i in after],
    }
    lines = {name: list(zip(layers, shares, strict=True)) for name, shares in sparse.items()}
    dots = {
        name: [point for point, block in zip(points, blocks, strict=True) if block == "attention"]
        for name, points in lines.items()
    }
    label = "attention block" if "mamba" in blocks else ""
    panels = [
        Panel(lines, "share of vision tokens", dots=dots if label else {}, dots_label=label, y_range=(-0.03, 1.03)),
        Panel(stable, "with the block before", y_range=(-1.03, 1.03), levels={"chance of the top": found["top_share"]}),
    ]
    title = "Importance of vision tokens for the instruction: sparsity and stability"
    return line_chart(panels, title=title, x_label="block (from 0)", markers=True, file_format=file_format)


def overlaps(found: Row, file_format: FileFormat) -> bytes:
    """The shared part of the top tokens of any two blocks."""
    letters = {"mamba": "M", "attention": "A"}
    names = [f"{letters[block]}{layer}" for layer, block in zip(found["layers"], found["blocks"], strict=True)]
    return value_grid(
        found["overlap_LL"],
        x_names=names,
        y_names=names,
        title=f"Shared top {found['top_share']:.0%} of vision tokens of two blocks",
        x_label="block (M = Mamba-2, A = attention)",
        y_label="block",
        colour_label="shared part",
        file_format=file_format,
    )


def examples(found: Sequence[AnsweredExample], file_format: FileFormat) -> bytes:
    """Figure 7: a panel per task."""
    return examples_picture(
        [
            Example(
                title=example.row["task"],
                frames=example.frames,
                seconds=example.row["frame_seconds"],
                lines=[
                    *([example.row["note"]] if example.row["note"] else []),
                    f"Question: {example.row['question']}",
                    f"Generated: {example.row['generated']}",
                    f"Expected: {example.row['expected']}  ({example.row['metric']} {example.row['score']:.2f})",
                ],
            )
            for example in found
        ],
        title="Figure 7: generated answers",
        file_format=file_format,
    )


def speed(rows: Sequence[Row], device: str, file_format: FileFormat) -> bytes:
    """Figure 1: a panel per batch size; lengths whose run did not fit into memory are missing."""
    panels = []
    for batch_size in dict.fromkeys(row["batch_size"] for row in rows):
        lines: dict[str, list[tuple[float, float]]] = {}
        for row in rows:
            if row["batch_size"] == batch_size and row["tokens_per_second"] is not None:
                lines.setdefault(row["model"], []).append((row["num_prompt_tokens"], row["tokens_per_second"]))
        panels.append(Panel(lines, "generated tokens/s", is_log=True, title=f"batch {batch_size}"))
    new = rows[0]["num_new_tokens"]
    return line_chart(
        panels,
        title=f"Figure 1: generated tokens per second, prefill included ({new} per answer, {device})",
        x_label="prompt tokens",
        markers=True,
        log_x=True,
        file_format=file_format,
    )


def needle(rows: Sequence[Row], model: str, file_format: FileFormat) -> bytes:
    lengths, depths = (list(dict.fromkeys(row[key] for row in rows)) for key in ("num_frames", "depth"))
    cells = {(row["depth"], row["num_frames"]): row["accuracy"] for row in rows}
    return value_grid(
        [[cells.get((depth, length)) for length in lengths] for depth in depths],
        x_names=[f"{length:,}" for length in lengths],
        y_names=[f"{depth:.0%}" for depth in depths],
        title=f"Needle, {model}",
        x_label="frames",
        y_label="depth of the needle",
        colour_label=f"accuracy (questions per cell: {rows[0]['num_questions']}, chance {rows[0]['chance']:.2f})",
        file_format=file_format,
    )

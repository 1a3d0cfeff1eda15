"""Writes the paper's Figures 3 to 6 as JSON, CSV and SVG."""

from __future__ import annotations

import csv
import io
import logging
import math
from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import dataclass, field, replace
from typing import Any, Literal

import torch

from timeviper_model.timeviper import TimeViper
from timeviper_model.weights.metadata import trained_time_text
from timeviper_model.weights.weights_folder import load_tokenizer
from timeviper_platform.common import storage
from timeviper_platform.common.charts import Panel, Part, heat_map, line_chart
from timeviper_platform.common.cluster_checks import refuse_lost_outputs
from timeviper_platform.common.config import with_absolute_paths
from timeviper_platform.common.machine_cache import local_copy
from timeviper_platform.common.ray_task import run_as_task
from timeviper_platform.data.store.reader import FeatureStore
from timeviper_platform.evaluation.answering import Answerer, Prompt
from timeviper_platform.evaluation.evaluator import AnsweringConfig, QuestionFault, load_model, read_prompt
from timeviper_platform.evaluation.figures import (
    KINDS,
    Answered,
    BlockingSweep,
    DroppingSweep,
    LayerMap,
    MapsConfig,
    blocking_rows,
    dropping_rows,
    layer_maps,
)
from timeviper_platform.evaluation.outcomes import Question
from timeviper_platform.evaluation.run import check_inputs, read_questions

logger = logging.getLogger(__name__)

PATHS = ("weights", "feature_store", "questions", "output")
"""Keys made absolute for a task, which runs in another folder."""

Figure = Literal["blocking", "dropping", "maps"]


@dataclass(frozen=True, kw_only=True, slots=True)
class AnalyzeConfig:
    weights: str
    """URI of the weights folder."""
    feature_store: str
    """Feature store URI."""
    questions: str
    """Folder of the QUESTIONS files."""
    output: str
    """Folder for the figures; existing files are replaced."""
    tasks: tuple[str, ...] = ("choice",)
    """File names in `questions`, without .parquet."""
    max_questions: int | None = 64
    """Maximum questions per task; null = all."""
    figures: tuple[Figure, ...] = ("blocking", "dropping", "maps")
    """Figure 3 (blocking), 4 (dropping), 5 and 6 (maps)."""
    resources: dict[str, float] = field(default_factory=lambda: {"CPU": 1.0})
    """Ray resources of the task on a cluster, with at least one GPU if `answering.device` is one."""
    answering: AnsweringConfig = field(default_factory=AnsweringConfig)
    blocking: BlockingSweep = field(default_factory=BlockingSweep)
    dropping: DroppingSweep = field(default_factory=DroppingSweep)
    maps: MapsConfig = field(default_factory=MapsConfig)

    def __post_init__(self) -> None:
        if not self.tasks or not self.figures:
            raise ValueError(f"{self.tasks = } and {self.figures = } must each name at least one")


def analyze(config: AnalyzeConfig) -> list[str]:
    """Runs `run_analysis` as a task of the cluster in RAY_ADDRESS, else in this process.

    Raises:
        ValueError: for invalid inputs, or resources that no node can have.
        RuntimeError: if the task's node has an output folder of its own.
    """
    refuse_lost_outputs({"output": config.output})
    config = with_absolute_paths(config, PATHS)
    check_inputs(config.weights, config.feature_store)
    is_on_gpu = config.answering.device.startswith("cuda")
    resources = ({"GPU": 1.0} if is_on_gpu else {}) | config.resources
    return run_as_task(
        run_analysis,
        config,
        resources=resources,
        wanted_by="the analysis",
        way_out="change `resources`",
        folders={"output": config.output},
    )


def run_analysis(config: AnalyzeConfig) -> list[str]:
    """Writes each figure as soon as it is computed; returns the files' URIs.

    Raises:
        ValueError: for invalid inputs, or when no question has its media.
    """
    rows = read_questions(config.questions, config.tasks, config.max_questions)
    check_inputs(config.weights, config.feature_store)
    storage.ensure_writable(config.output)
    torch.set_num_threads(config.answering.num_threads)
    config = replace(config, weights=local_copy(config.weights))
    model = load_model(config.weights, config.answering)
    answerer = Answerer(model, load_tokenizer(config.weights), max_pack_tokens=config.answering.max_pack_tokens)
    prompts = list(_with_media(rows, config, dim=model.config.vision.row_size))
    if not prompts:
        raise ValueError(f"none of {len(rows)} questions has its media in {config.feature_store!r}")
    logger.info("analyze: %d of %d questions have their media", len(prompts), len(rows))
    written: list[str] = []
    for figure in config.figures:
        written += _WRITERS[figure](model, answerer, prompts, config)
    return written


_QuestionPrompt = tuple[Question, Prompt]


def _with_media(rows: Sequence[Question], config: AnalyzeConfig, *, dim: int) -> Iterator[_QuestionPrompt]:
    store, trained = FeatureStore.open(config.feature_store), trained_time_text(config.weights)
    for row in rows:
        try:
            prompt = read_prompt(store, row, config.answering, dim=dim, trained=trained)
        except QuestionFault as fault:
            logger.info("%s is left out: %s", row["sample_id"], fault.detail)
        else:
            yield row, prompt


def make_answered(answerer: Answerer, prompts: Sequence[_QuestionPrompt]) -> Answered:
    """Packs each question with its choices or, without choices, its answer."""
    options = [row["choices"] if row["answer"] in (row["choices"] or []) else [row["answer"]] for row, _ in prompts]
    pairs = [(prompt, text) for (_, prompt), texts in zip(prompts, options, strict=True) for text in texts]
    return Answered(
        batches=tuple(answerer.pack_answers(pairs)),
        num_options=tuple(len(texts) for texts in options),
        right=tuple(texts.index(row["answer"]) for (row, _), texts in zip(prompts, options, strict=True)),
    )


def _write_blocking(
    model: TimeViper, answerer: Answerer, prompts: Sequence[_QuestionPrompt], config: AnalyzeConfig
) -> list[str]:
    rows = list(_logged("blocking", blocking_rows(model, make_answered(answerer, prompts), config.blocking)))
    return _write_sweep(config.output, "blocking", rows, _blocking_series, "Figure 3: flows from vision cut")


def _write_dropping(
    model: TimeViper, answerer: Answerer, prompts: Sequence[_QuestionPrompt], config: AnalyzeConfig
) -> list[str]:
    rows = list(_logged("dropping", dropping_rows(model, make_answered(answerer, prompts), config.dropping)))
    return _write_sweep(config.output, "dropping", rows, _dropping_series, "Figure 4: vision tokens dropped")


def _write_maps(
    model: TimeViper, answerer: Answerer, prompts: Sequence[_QuestionPrompt], config: AnalyzeConfig
) -> list[str]:
    pairs = [(prompt, row["answer"]) for row, prompt in prompts[: config.maps.num_questions]]
    batches = [batch for pair in pairs for batch in answerer.pack_answers([pair])]
    maps = layer_maps(model, batches, config.maps)
    rows = [row for layer_map in maps for row in layer_map.rows()]
    values = [_map_values(layer_map) for layer_map in maps]
    pictures = {f"map-{layer_map.layer:02d}.svg": _map_picture(layer_map) for layer_map in maps}
    pictures["groups.svg"] = _groups_picture(rows)
    return [
        _write_json(config.output, "maps.json", values),
        _write_csv(config.output, "groups.csv", rows),
        *(_write(config.output, name, picture) for name, picture in pictures.items()),
    ]


_WRITERS = {"blocking": _write_blocking, "dropping": _write_dropping, "maps": _write_maps}


def _map_picture(layer_map: LayerMap) -> bytes:
    return heat_map(
        layer_map.picture_BB.nan_to_num().tolist(),
        title=f"Figure 5: block {layer_map.layer}, {layer_map.block_type}",
        x_label="token read, position in the block's input (%)",
        y_label="query, position in the block's input (%)",
        colour_label="share of the query's absolute weights, mean over heads",
        parts=[Part(name, end) for name, end in zip(KINDS, layer_map.kind_ends, strict=True)],
    )


def _groups_picture(rows: Sequence[dict[str, Any]]) -> bytes:
    """Draws a panel per kind of query; a system token reads system tokens alone."""
    panels = []
    for query in KINDS[1:]:
        lines: dict[str, list[tuple[float, float]]] = {}
        attention: dict[str, list[tuple[float, float]]] = {}
        for row in rows:
            if row["from"] == query:
                point, name = (row["layer"], row["share"]), f"reads {row['to']}"
                lines.setdefault(name, []).append(point)
                if row["block"] == "attention":
                    attention.setdefault(name, []).append(point)
        label = f"share of weights,\n{query} queries"
        panels.append(Panel(lines, label, dots=attention, dots_label="attention block", y_range=(-0.03, 1.03)))
    title = "Figure 6: what each kind of token reads"
    return line_chart(panels, title=title, x_label="block (from 0)", markers=True)


def _map_values(layer_map: LayerMap) -> dict[str, Any]:
    shares = layer_map.groups.share_HAB
    return {
        "layer": layer_map.layer,
        "block": layer_map.block_type,
        "groups": list(layer_map.rows()),
        "groups_by_head": [[[_plain(value) for value in row] for row in head] for head in shares.tolist()],
        "picture": [[_plain(value) for value in row] for row in layer_map.picture_BB.tolist()],
        "kind_ends": dict(zip(KINDS, layer_map.kind_ends, strict=True)),
        "heads": {name: values.tolist() for name, values in layer_map.heads._asdict().items()},
    }


def _write_sweep(
    folder: str, name: str, rows: Sequence[dict[str, Any]], series: Callable[[dict[str, Any]], str], title: str
) -> list[str]:
    """Writes JSON, CSV, and a chart with a line per name that `series` gives."""
    baseline, *measured = rows
    reference = "as trained" if name == "blocking" else "nothing dropped"
    panels = []
    labels = {"log_prob": "log-probability of the right\nanswer (nats per token)", "accuracy": "accuracy of choices"}
    for value, y_label in labels.items():
        lines: dict[str, list[tuple[float, float]]] = {}
        for row in measured:
            if row[value] is not None:
                lines.setdefault(series(row), []).append((row["layer"], row[value]))
        if lines:
            y_range = (-0.03, 1.03) if value == "accuracy" else None
            panels.append(Panel(lines, y_label, levels={reference: baseline[value]}, y_range=y_range))
    picture = line_chart(panels, title=title, x_label="block (from 0)", markers=True)
    return [
        _write_json(folder, f"{name}.json", rows),
        _write_csv(folder, f"{name}.csv", rows),
        _write(folder, f"{name}.svg", picture),
    ]


def _blocking_series(row: dict[str, Any]) -> str:
    flow = {"v2i": "vision to instruction", "v2r": "vision to response"}[row["flow"]]
    scope = {"layer": "one block", "window": "window", "from_layer": "from the block on"}[row["scope"]]
    return f"{flow}, {scope}" + ("" if row["kind"] == "both" else f", {row['kind']}")


def _dropping_series(row: dict[str, Any]) -> str:
    return f"{row['select']}, keep {row['keep']:.0%}"


def _logged(name: str, rows: Iterable[dict[str, Any]]) -> Iterator[dict[str, Any]]:
    for count, row in enumerate(rows, start=1):
        logger.info("%s %d: %s", name, count, row)
        yield row


def _plain(value: float) -> float | None:
    """Replaces NaN, which JSON lacks, by None."""
    return None if math.isnan(value) else value


def _write_csv(folder: str, name: str, rows: Sequence[dict[str, Any]]) -> str:
    file = io.StringIO()
    writer = csv.DictWriter(file, list(rows[0]), lineterminator="\n")
    writer.writeheader()
    writer.writerows(rows)
    return _write(folder, name, file.getvalue().encode())


def _write_json(folder: str, name: str, value: Any) -> str:
    uri = storage.join_uri(folder, name)
    storage.write_json(uri, value)
    return uri


def _write(folder: str, name: str, content: bytes) -> str:
    uri = storage.join_uri(folder, name)
    storage.write_bytes(uri, content)
    return uri

"""Writes the paper's Figures 1 and 3 to 7, and two curves of importance, as JSON, CSV, SVG and PNG."""

from __future__ import annotations

import logging
import math
from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import dataclass, field, replace
from functools import partial
from typing import Any, Literal, NamedTuple

import torch

from timeviper_model.batching.batch import PackedBatch
from timeviper_model.config import PRESETS
from timeviper_model.timeviper import TimeViper
from timeviper_model.weights.metadata import trained_time_text
from timeviper_model.weights.weights_folder import load_tokenizer
from timeviper_platform.common import storage
from timeviper_platform.common.cluster_checks import refuse_lost_outputs
from timeviper_platform.common.config import with_absolute_paths
from timeviper_platform.common.machine_cache import local_copy
from timeviper_platform.common.ray_task import run_as_task
from timeviper_platform.data.store.reader import FeatureStore
from timeviper_platform.evaluation.answering import Answerer, Prompt
from timeviper_platform.evaluation.evaluator import AnsweringConfig, QuestionFault, load_model, read_prompt
from timeviper_platform.evaluation.figures import pictures
from timeviper_platform.evaluation.figures.curves import CurvesConfig, importance_curves
from timeviper_platform.evaluation.figures.examples import answered_examples
from timeviper_platform.evaluation.figures.files import Draw, write_csv, write_json, write_pictures
from timeviper_platform.evaluation.figures.frames import frame_rows
from timeviper_platform.evaluation.figures.maps import KINDS, LayerMap, MapsConfig, layer_maps
from timeviper_platform.evaluation.figures.needle import NeedleConfig, find_needles, needle_rows
from timeviper_platform.evaluation.figures.reduction import ReductionConfig, reduction_rows
from timeviper_platform.evaluation.figures.speed import SpeedConfig, speed_rows
from timeviper_platform.evaluation.figures.sweeps import (
    BlockingSweep,
    DroppingSweep,
    TaskPrompts,
    blocking_rows,
    dropping_rows,
)
from timeviper_platform.evaluation.outcomes import Question
from timeviper_platform.evaluation.run import check_inputs, read_questions

logger = logging.getLogger(__name__)

PATHS = ("weights", "transformer", "feature_store", "questions", "output")
"""Keys made absolute for a task, which runs in another folder."""

Figure = Literal["blocking", "dropping", "maps", "curves", "examples", "speed", "needle", "frames", "reduction"]


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
    transformer: str | None = None
    """URI of a Transformer's weights for the same questions, drawn next to `weights` in Figure 6; null = none."""
    tasks: tuple[str, ...] = ("choice", "grounding", "caption")
    """File names in `questions`, without .parquet. Each is a panel of Figures 3, 4 and 7."""
    max_questions: int | None = 64
    """Maximum questions per task; null = all."""
    figures: tuple[Figure, ...] = ("blocking", "dropping", "maps", "curves", "examples")
    """Figure 3 (blocking), 4 (dropping), 5 and 6 (maps), sparsity and stability of importance (curves), 7 (examples),
    1 (speed), accuracy by length and depth (needle), how many frames fit a memory (frames),
    other ways to drop tokens (reduction)."""
    resources: dict[str, float] = field(default_factory=lambda: {"CPU": 1.0})
    """Ray resources of the task on a cluster, with at least one GPU if `answering.device` is one."""
    answering: AnsweringConfig = field(default_factory=AnsweringConfig)
    blocking: BlockingSweep = field(default_factory=BlockingSweep)
    dropping: DroppingSweep = field(default_factory=DroppingSweep)
    maps: MapsConfig = field(default_factory=MapsConfig)
    curves: CurvesConfig = field(default_factory=CurvesConfig)
    speed: SpeedConfig = field(default_factory=SpeedConfig)
    needle: NeedleConfig = field(default_factory=NeedleConfig)
    reduction: ReductionConfig = field(default_factory=ReductionConfig)
    memory_gb: tuple[float, ...] = (16.0, 24.0, 48.0, 80.0, 141.0)
    """Memories in units of 10^9 bytes for figure `frames`."""
    memory_presets: tuple[str, ...] = ()
    """Presets that figure `frames` computes in addition to `weights`, in bfloat16 on a GPU. They need no weights."""

    def __post_init__(self) -> None:
        if not self.tasks or not self.figures:
            raise ValueError(f"{self.tasks = } and {self.figures = } must each name at least one")
        if unknown := sorted(set(self.memory_presets) - set(PRESETS)):
            raise ValueError(f"memory_presets: there are no presets {unknown}; there are {sorted(PRESETS)}")


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
    opened = _open(config.weights, config, rows)
    if not opened.tasks:
        raise ValueError(f"none of {len(rows)} questions has its media in {config.feature_store!r}")
    written: list[str] = []
    for figure in config.figures:
        written += _WRITERS[figure](opened, config, rows)
    return written


class _Opened(NamedTuple):
    """A model with the questions whose media are stored."""

    model: TimeViper
    answerer_of: Callable[[TimeViper], Answerer]
    tasks: list[TaskPrompts]

    @property
    def answerer(self) -> Answerer:
        return self.answerer_of(self.model)

    def answered_batches(self, num_questions: int) -> list[PackedBatch]:
        """Every n-th question with its right answer, one per batch."""
        answerer = self.answerer
        pairs = [
            (prompt, row["answer"])
            for task in self.tasks
            for row, prompt in zip(task.questions, task.prompts, strict=True)
        ]
        step = max(1, len(pairs) // num_questions)
        return [batch for pair in pairs[::step][:num_questions] for batch in answerer.pack_answers([pair])]


def _open(weights: str, config: AnalyzeConfig, rows: Sequence[Question]) -> _Opened:
    model = load_model(weights, config.answering)
    tokenizer = load_tokenizer(weights)
    answerer_of = partial(_make_answerer, tokenizer=tokenizer, max_pack_tokens=config.answering.max_pack_tokens)
    store, trained = FeatureStore.open(config.feature_store), trained_time_text(weights)
    found: dict[str, list[tuple[Question, Prompt]]] = {}
    for row in rows:
        try:
            prompt = read_prompt(store, row, config.answering, dim=model.config.vision.row_size, trained=trained)
        except QuestionFault as fault:
            logger.info("%s is left out: %s", row["sample_id"], fault.detail)
        else:
            found.setdefault(row["source"], []).append((row, prompt))
    logger.info("analyze: %d of %d questions have their media", sum(map(len, found.values())), len(rows))
    tasks = [TaskPrompts(name, *map(tuple, zip(*pairs, strict=True))) for name, pairs in found.items()]
    return _Opened(model, answerer_of, tasks)


def _make_answerer(model: TimeViper, *, tokenizer: Any, max_pack_tokens: int) -> Answerer:
    return Answerer(model, tokenizer, max_pack_tokens=max_pack_tokens)


def _write_blocking(opened: _Opened, config: AnalyzeConfig, _: Sequence[Question]) -> list[str]:
    num_new = config.answering.max_new_tokens
    rows = [
        row
        for task in opened.tasks
        for row in _logged(
            "blocking",
            blocking_rows(opened.model, opened.answerer, task, config.blocking, max_new_tokens=num_new),
        )
    ]
    return _write_rows(config.output, "blocking", rows, lambda kind: pictures.blocking(rows, kind))


def _write_dropping(opened: _Opened, config: AnalyzeConfig, _: Sequence[Question]) -> list[str]:
    num_new = config.answering.max_new_tokens
    rows = [
        row
        for task in opened.tasks
        for row in _logged(
            "dropping",
            dropping_rows(opened.model, opened.answerer_of, task, config.dropping, max_new_tokens=num_new),
        )
    ]
    return _write_rows(config.output, "dropping", rows, lambda kind: pictures.dropping(rows, kind))


def _write_maps(opened: _Opened, config: AnalyzeConfig, questions: Sequence[Question]) -> list[str]:
    maps = layer_maps(opened.model, opened.answered_batches(config.maps.num_questions), config.maps)
    models = {"weights": maps}
    if config.transformer is not None:
        other = _open(local_copy(config.transformer), config, questions)
        own = replace(config.maps, layers=None, heads=())
        models["transformer"] = layer_maps(other.model, other.answered_batches(own.num_questions), own)
    rows = [{"model": name} | row for name, own_maps in models.items() for one in own_maps for row in one.rows()]
    written = [
        write_json(config.output, "maps", [_map_values(one, config.maps.heads) for one in maps]),
        write_csv(config.output, "groups", rows),
        *write_pictures(config.output, "groups", lambda kind: pictures.groups(rows, kind)),
    ]
    for one in maps:
        written += write_pictures(config.output, f"map-{one.layer:02d}", partial(pictures.layer_map, one, None))
    by_layer = {one.layer: one for one in maps}
    for layer, head in config.maps.heads:
        draw = partial(pictures.layer_map, by_layer[layer], head)
        written += write_pictures(config.output, f"map-{layer:02d}-head-{head:03d}", draw)
    return written


def _write_curves(opened: _Opened, config: AnalyzeConfig, _: Sequence[Question]) -> list[str]:
    found = importance_curves(opened.model, opened.answered_batches(config.curves.num_questions), config.curves)
    return [
        write_json(config.output, "curves", found),
        *write_pictures(config.output, "curves", lambda kind: pictures.curves(found, kind)),
        *write_pictures(config.output, "curves-overlap", lambda kind: pictures.overlaps(found, kind)),
    ]


def _write_examples(opened: _Opened, config: AnalyzeConfig, _: Sequence[Question]) -> list[str]:
    store = FeatureStore.open(config.feature_store)
    found = answered_examples(opened.answerer, opened.tasks, store, config.answering)
    return [
        write_json(config.output, "examples", [example.row for example in found]),
        *write_pictures(config.output, "examples", lambda kind: pictures.examples(found, kind)),
    ]


def _write_speed(opened: _Opened, config: AnalyzeConfig, _: Sequence[Question]) -> list[str]:
    rows = list(_logged("speed", speed_rows(opened.model, config.speed, backend=config.answering.backend)))
    device = str(config.answering.device)
    return _write_rows(config.output, "speed", rows, lambda kind: pictures.speed(rows, device, kind))


def _write_needle(opened: _Opened, config: AnalyzeConfig, _: Sequence[Question]) -> list[str]:
    own = config.needle
    questions, intervals = (read_questions(config.questions, (task,), None) for task in (own.task, own.intervals))
    needles, haystack = find_needles(FeatureStore.open(config.feature_store), questions, intervals, own)
    num_new = config.answering.max_new_tokens
    found = needle_rows(opened.model, opened.answerer_of, needles, haystack, own, max_new_tokens=num_new)
    rows: list[dict[str, Any]] = []
    written: list[str] = []
    for row in _logged("needle", found):  # the longest take hours: each cell is logged
        rows.append(row)
        written = [write_json(config.output, "needle", rows), write_csv(config.output, "needle", rows)]
    for name in dict.fromkeys(row["model"] for row in rows):
        draw = partial(pictures.needle, [row for row in rows if row["model"] == name], name)
        written += write_pictures(config.output, f"needle-{name.replace(' ', '-').lower()}", draw)
    return written


def _write_frames(opened: _Opened, config: AnalyzeConfig, _: Sequence[Question]) -> list[str]:
    weight = opened.model.lm_head.weight
    own = opened.model.config
    rows = list(frame_rows("weights", own, config.memory_gb, dtype=weight.dtype, device_type=weight.device.type))
    for name in config.memory_presets:
        rows += frame_rows(name, PRESETS[name], config.memory_gb, dtype=torch.bfloat16, device_type="cuda")
    return [write_json(config.output, "frames", rows), write_csv(config.output, "frames", rows)]


def _write_reduction(opened: _Opened, config: AnalyzeConfig, _: Sequence[Question]) -> list[str]:
    found = reduction_rows(
        opened.model,
        opened.answerer_of,
        opened.tasks,
        config.reduction,
        max_new_tokens=config.answering.max_new_tokens,
    )
    rows = list(_logged("reduction", found))
    return [write_json(config.output, "reduction", rows), write_csv(config.output, "reduction", rows)]


_WRITERS = {
    "blocking": _write_blocking,
    "dropping": _write_dropping,
    "maps": _write_maps,
    "curves": _write_curves,
    "examples": _write_examples,
    "speed": _write_speed,
    "needle": _write_needle,
    "frames": _write_frames,
    "reduction": _write_reduction,
}


def _write_rows(folder: str, name: str, rows: Sequence[dict[str, Any]], draw: Draw) -> list[str]:
    return [
        write_json(folder, name, rows),
        write_csv(folder, name, rows),
        *write_pictures(folder, name, draw),
    ]


def _map_values(layer_map: LayerMap, heads: Sequence[tuple[int, int]]) -> dict[str, Any]:
    own = {head: layer_map.picture_HBB[head] for layer, head in heads if layer == layer_map.layer}
    return {
        "layer": layer_map.layer,
        "block": layer_map.block_type,
        "groups": list(layer_map.rows()),
        "groups_by_head": [[_plain(row) for row in head] for head in layer_map.groups.share_HAB.tolist()],
        "picture": [_plain(row) for row in layer_map.picture_BB.tolist()],
        "picture_by_head": {head: [_plain(row) for row in picture.tolist()] for head, picture in own.items()},
        "kind_ends": dict(zip(KINDS, layer_map.kind_ends, strict=True)),
        "heads": {name: values.tolist() for name, values in layer_map.heads._asdict().items()},
    }


def _plain(values: Iterable[float]) -> list[float | None]:
    """Replaces NaN, which JSON lacks, by None."""
    return [None if math.isnan(value) else value for value in values]


def _logged(name: str, rows: Iterable[dict[str, Any]]) -> Iterator[dict[str, Any]]:
    for count, row in enumerate(rows, start=1):
        logger.info("%s %d: %s", name, count, row)
        yield row

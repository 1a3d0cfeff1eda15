"""Evaluates weights on question files with Ray Data."""

from __future__ import annotations

import logging
import time
from collections.abc import Iterator, Sequence
from dataclasses import asdict, dataclass, field
from typing import Any

import pyarrow as pa
import pyarrow.parquet as pq

from timeviper_model.weights.weights_folder import config_from_dict
from timeviper_platform.common import schemas, storage
from timeviper_platform.common.config import with_absolute_paths
from timeviper_platform.data.store.compatibility import check_same_towers
from timeviper_platform.data.store.reader import FeatureStore
from timeviper_platform.evaluation.evaluator import AnsweringConfig, Evaluator, Outcome
from timeviper_platform.evaluation.report import summarise

logger = logging.getLogger(__name__)

OUTCOMES = pa.schema(
    [
        pa.field("sample_id", pa.string()),
        pa.field("task", pa.string()),
        pa.field("status", pa.string()),
        pa.field("expected", pa.string()),
        pa.field("answer", pa.string()),
        pa.field("answer_without_video", pa.string()),
        pa.field("score", pa.float64()),
        pa.field("score_without_video", pa.float64()),
        pa.field("chance", pa.float64()),
    ]
)


PATHS = ("weights", "feature_store", "questions", "output")
"""Keys made absolute for workers, which run in another folder."""


@dataclass(frozen=True, kw_only=True, slots=True)
class EvalWorkersConfig:
    num_workers: int = 1
    """Processes, each with a copy of the weights."""
    cpus_per_worker: float = 0.75
    """CPUs per worker. Below 1 leaves room for Ray's own tasks."""
    gpus_per_worker: float = 0.0
    """GPUs per worker."""
    batch_size: int = 16
    """Questions per batch."""

    def __post_init__(self) -> None:
        if self.num_workers < 1 or self.batch_size < 1:
            raise ValueError(f"{self.num_workers = } and {self.batch_size = } must be at least 1")


@dataclass(frozen=True, kw_only=True, slots=True)
class EvaluateConfig:
    weights: str
    """Weights folder, readable by every worker."""
    feature_store: str
    """Feature store URI."""
    questions: str
    """Folder of the QUESTIONS files."""
    output: str
    """JSON report. Outcomes go to the same name with .outcomes.parquet."""
    tasks: tuple[str, ...] = ("choice", "order", "count", "grounding")
    """File names in `questions`, without .parquet."""
    max_questions: int | None = None
    """Maximum questions per task; null = all."""
    answering: AnsweringConfig = field(default_factory=AnsweringConfig)
    workers: EvalWorkersConfig = field(default_factory=EvalWorkersConfig)

    def __post_init__(self) -> None:
        if not self.tasks or len(set(self.tasks)) != len(self.tasks):
            raise ValueError(f"{self.tasks = } must name each task once, and at least one")


def read_questions(folder: str, tasks: Sequence[str], max_questions: int | None) -> list[dict[str, Any]]:
    """Returns the first `max_questions` rows of each task.

    Raises:
        ValueError: when a file is missing or has another schema.
    """
    rows: list[dict[str, Any]] = []
    for task in tasks:
        uri = storage.join_uri(folder, f"{task}.parquet")
        filesystem, path = storage.split_uri(uri)
        if not filesystem.isfile(path):
            names = [name.rsplit("/", 1)[-1] for name in storage.files_in(folder, ".parquet")]
            raise ValueError(f"task {task!r} has no file {uri}; the folder has {', '.join(names) or 'no questions'}")
        with filesystem.open(path, "rb") as file:
            table = pq.read_table(file)
        schemas.check_version(table.schema, schemas.QUESTIONS, source=uri)
        rows += [row | {"source": task} for row in table.slice(0, max_questions).to_pylist()]
    return rows


def run_evaluation(config: EvaluateConfig) -> dict[str, Any]:
    """Writes and returns the report, using the connected cluster."""
    config = with_absolute_paths(config, PATHS)
    questions = read_questions(config.questions, config.tasks, config.max_questions)
    check_inputs(config.weights, config.feature_store)
    folder = config.output.rpartition("/")[0]
    storage.ensure_writable(folder)
    outcomes: list[Outcome] = []
    started = time.monotonic()
    next_report = 0
    for outcome in answer_on_ray(questions, config):
        outcomes.append(outcome)
        if len(outcomes) >= next_report:
            seconds = time.monotonic() - started
            logger.info("evaluate: %d of %d questions, %.0f s", len(outcomes), len(questions), seconds)
            next_report = len(outcomes) + max(1, len(questions) // 10)
    return write_report(config, questions, outcomes)


def check_inputs(weights: str, feature_store: str) -> None:
    """Raises ValueError, before workers start, for missing inputs or different vision towers."""
    file = storage.join_uri(weights, "config.json")
    if not storage.exists(file):
        raise ValueError(f"no weights folder at {weights!r}; run jobs/export.py with output: {weights}")
    vision = config_from_dict(storage.read_json(file), where=file).vision
    check_same_towers(vision, FeatureStore.open(feature_store), weights)


def answer_on_ray(questions: Sequence[dict[str, Any]], config: EvaluateConfig) -> Iterator[Outcome]:
    """Yields outcomes in any order."""
    import ray

    context = ray.data.DataContext.get_current()
    context.enable_progress_bars = False
    workers = config.workers
    size = workers.batch_size
    # a read task would need a whole CPU
    blocks = [_questions_table(questions[first : first + size]) for first in range(0, len(questions), size)]
    dataset = ray.data.from_arrow(blocks).map_batches(
        AnswerQuestions,
        fn_constructor_kwargs={
            "weights_folder": config.weights,
            "feature_store": config.feature_store,
            "config": config.answering,
        },
        batch_size=size,
        batch_format="pyarrow",
        zero_copy_batch=True,
        num_cpus=workers.cpus_per_worker,
        num_gpus=workers.gpus_per_worker or None,
        compute=ray.data.ActorPoolStrategy(size=min(workers.num_workers, len(blocks))),
    )
    for batch in dataset.iter_batches(batch_size=None, batch_format="pyarrow", prefetch_batches=0):
        yield from (Outcome(**row) for row in batch.to_pylist())


class AnswerQuestions:
    def __init__(self, *, weights_folder: str, feature_store: str, config: AnsweringConfig) -> None:
        self._evaluator = Evaluator(weights_folder=weights_folder, feature_store=feature_store, config=config)

    def __call__(self, table: Any) -> Any:
        outcomes = self._evaluator.evaluate(table.to_pylist())
        return pa.Table.from_pylist([asdict(outcome) for outcome in outcomes], schema=OUTCOMES)


def write_report(
    config: EvaluateConfig, questions: Sequence[dict[str, Any]], outcomes: Sequence[Outcome]
) -> dict[str, Any]:
    """Writes the report, and the outcomes in question order.

    Raises:
        RuntimeError: unless every question has exactly one outcome.
    """
    by_question = {(outcome.task, outcome.sample_id): outcome for outcome in outcomes}
    keys = [(question["source"], question["sample_id"]) for question in questions]
    if len(outcomes) != len(keys) or set(keys) != set(by_question):
        raise RuntimeError(f"{len(keys)} questions came back as {len(outcomes)} outcomes; are sample ids unique?")
    ordered = [by_question[key] for key in keys]
    table = pa.Table.from_pylist([asdict(outcome) for outcome in ordered], schema=OUTCOMES)
    outcomes_uri = f"{config.output.removesuffix('.json')}.outcomes.parquet"
    storage.write_atomic(outcomes_uri, lambda file: pq.write_table(table, file))
    report = summarise(ordered)
    storage.write_json(config.output, report)
    return report


def _questions_table(rows: Sequence[dict[str, Any]]) -> Any:
    return pa.Table.from_pylist(list(rows), schema=schemas.QUESTIONS)

"""The evaluation job: question files -> Ray Data actors that hold the weights -> report.json. Knows Ray.

A batch of questions is a block; blocks go to whichever worker is free. What a worker does with one is Evaluator's.
"""

from __future__ import annotations

import logging
import time
from collections.abc import Iterator, Sequence
from dataclasses import asdict, dataclass, field, replace
from typing import Any

import pyarrow as pa
import pyarrow.parquet as pq

from timeviper_model.weights.weights_folder import config_from_dict
from timeviper_platform.common import schemas, storage
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
"""One row a question, as it comes back from the workers and lies beside the report."""


@dataclass(frozen=True, kw_only=True, slots=True)
class WorkersConfig:
    """How the questions are spread."""

    num_workers: int = 1
    """processes, each with its own copy of the weights"""
    cpus_per_worker: float = 0.75
    """below 1, so that Ray's own small tasks find room on a small machine"""
    gpus_per_worker: float = 0.0
    batch_size: int = 16
    """questions that a worker takes at a time; free answers use as many slots"""

    def __post_init__(self) -> None:
        if self.num_workers < 1 or self.batch_size < 1:
            raise ValueError(f"{self.num_workers = } and {self.batch_size = } must be at least 1")


@dataclass(frozen=True, kw_only=True, slots=True)
class EvaluateConfig:
    """One evaluation.

    Raises:
        ValueError: when no task is named.
    """

    weights: str
    """weights folder, seen by every worker"""
    features: str
    """feature store"""
    questions: str
    """folder with one QUESTIONS file a task"""
    output: str
    """JSON file to write; the outcomes of all questions go beside it, with .outcomes.parquet instead of .json"""
    tasks: tuple[str, ...] = ("choice", "order", "count", "grounding")
    """names of the files in `questions`, without .parquet"""
    max_questions: int | None = None
    """of each task, the first ones; None = all"""
    answering: AnsweringConfig = field(default_factory=AnsweringConfig)
    workers: WorkersConfig = field(default_factory=WorkersConfig)

    def __post_init__(self) -> None:
        if not self.tasks or len(set(self.tasks)) != len(self.tasks):
            raise ValueError(f"{self.tasks = } must name each task once, and at least one")


def read_questions(folder: str, tasks: Sequence[str], max_questions: int | None) -> list[dict[str, Any]]:
    """The rows of all tasks, in order; of each the first `max_questions`.

    Raises:
        ValueError: when a task has no file, or it is of another schema.
    """
    rows: list[dict[str, Any]] = []
    for task in tasks:
        uri = storage.join_uri(folder, f"{task}.parquet")
        filesystem, path = storage.split_uri(uri)
        if not filesystem.isfile(path):
            there = [name.rsplit("/", 1)[-1] for name in storage.list_files(folder, ".parquet")]
            raise ValueError(f"task {task!r} has no file {uri}; there are {', '.join(there) or 'none'} in that folder")
        with filesystem.open(path, "rb") as file:
            table = pq.read_table(file)
        schemas.check_version(table.schema, schemas.QUESTIONS, source=uri)
        rows += [row | {"source": task} for row in table.slice(0, max_questions).to_pylist()]
    return rows


def run_evaluation(config: EvaluateConfig) -> dict[str, Any]:
    """Asks every question on the connected cluster, writes the report and returns it.

    Raises:
        ValueError: for wrong questions, weights or features.
        RuntimeError: when the output cannot be written, or a worker dies.
    """
    config = with_absolute_paths(config)
    questions = read_questions(config.questions, config.tasks, config.max_questions)
    check_inputs(config.weights, config.features)
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


def with_absolute_paths(config: EvaluateConfig) -> EvaluateConfig:
    """Local paths from the file system's root: workers run in another folder. Hub names and URIs stay."""
    return replace(
        config,
        weights=_absolute(config.weights),
        features=_absolute(config.features),
        questions=_absolute(config.questions),
        output=_absolute(config.output),
    )


def check_inputs(weights: str, features: str) -> None:
    """Passes when weights and store are there and of the same towers, so that this is said here and not by a worker.

    Raises:
        ValueError: when one is not there, or they do not fit.
    """
    file = storage.join_uri(weights, "config.json")
    if not storage.exists(file):
        raise ValueError(f"no weights folder at {weights!r}; run jobs/export.py with output: {weights}")
    vision = config_from_dict(storage.read_json(file), where=file).vision
    check_same_towers(vision, FeatureStore.open(features), weights)


def answer_on_ray(questions: Sequence[dict[str, Any]], config: EvaluateConfig) -> Iterator[Outcome]:
    """The outcomes of all questions as batches finish, in any order."""
    import ray

    context = ray.data.DataContext.get_current()
    context.enable_progress_bars = False
    workers = config.workers
    size = workers.batch_size
    # one block a batch, put there by the driver: a read task of a whole CPU finds no room on a small machine
    blocks = [_questions_table(questions[first : first + size]) for first in range(0, len(questions), size)]
    dataset = ray.data.from_arrow(blocks).map_batches(
        AnswerQuestions,
        fn_constructor_kwargs={
            "weights_folder": config.weights,
            "features_uri": config.features,
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
    """Evaluator as Ray Data calls it: an Arrow table of questions in, one of outcomes out."""

    def __init__(self, *, weights_folder: str, features_uri: str, config: AnsweringConfig) -> None:
        self._evaluator = Evaluator(weights_folder=weights_folder, features_uri=features_uri, config=config)

    def __call__(self, table: Any) -> Any:
        outcomes = self._evaluator.evaluate(table.to_pylist())
        return pa.Table.from_pylist([asdict(outcome) for outcome in outcomes], schema=OUTCOMES)


def write_report(
    config: EvaluateConfig, questions: Sequence[dict[str, Any]], outcomes: Sequence[Outcome]
) -> dict[str, Any]:
    """The report, with every question's outcome in a file beside it, both in the order of the questions.

    Raises:
        RuntimeError: when a question has no outcome or two.
    """
    by_question = {(outcome.task, outcome.sample_id): outcome for outcome in outcomes}
    asked = [(question["source"], question["sample_id"]) for question in questions]
    if len(outcomes) != len(asked) or set(asked) != set(by_question):
        raise RuntimeError(f"{len(asked)} questions came back as {len(outcomes)} outcomes; are sample ids unique?")
    ordered = [by_question[key] for key in asked]
    table = pa.Table.from_pylist([asdict(outcome) for outcome in ordered], schema=OUTCOMES)
    beside = f"{config.output.removesuffix('.json')}.outcomes.parquet"
    storage.write_atomic(beside, lambda file: pq.write_table(table, file))
    report = summarise(ordered)
    storage.write_json(config.output, report)
    return report


def _questions_table(rows: Sequence[dict[str, Any]]) -> Any:
    return pa.Table.from_pylist(list(rows), schema=schemas.QUESTIONS)


def _absolute(uri: str) -> str:
    return storage.split_uri(uri)[1] if storage.is_local(uri) else uri

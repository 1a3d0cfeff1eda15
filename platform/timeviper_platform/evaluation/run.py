"""Evaluates weights on question files with Ray Data."""

from __future__ import annotations

import logging
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import asdict, dataclass, field
from typing import Any

import pyarrow as pa
import pyarrow.parquet as pq

from timeviper_model.weights.weights_folder import config_from_dict
from timeviper_platform.common import schemas, storage
from timeviper_platform.common.cluster_checks import (
    StorageProof,
    check_cluster_can_give,
    check_every_node,
    refuse_lost_outputs,
)
from timeviper_platform.common.config import with_absolute_paths
from timeviper_platform.common.devices import check_gpus_are_reserved
from timeviper_platform.common.job import JobError
from timeviper_platform.common.machine_cache import listed_files
from timeviper_platform.data.store.compatibility import check_same_towers
from timeviper_platform.data.store.reader import FeatureStore
from timeviper_platform.evaluation.benchmark_config import BenchmarkConfig
from timeviper_platform.evaluation.evaluator import AnsweringConfig, Evaluator
from timeviper_platform.evaluation.judging.judge import JudgeConfig
from timeviper_platform.evaluation.outcomes import (
    OUTCOMES,
    SCORED,
    Outcome,
    OutcomeLog,
    Question,
    hash_of,
    outcomes_of,
    outcomes_table,
    question_hash,
)
from timeviper_platform.evaluation.partial_log import only_writer_of
from timeviper_platform.evaluation.report import summarise

logger = logging.getLogger(__name__)

PATHS = ("weights", "feature_store", "questions", "output", "benchmark.folder")
"""Keys made absolute for workers, which run in another folder."""

SPEED_OPTIONS = ("num_threads", "max_pack_tokens", "prefix_cache_bytes")
"""Keys of `answering` that change no answer beyond rounding."""

MAX_FAILED_SHARE = 0.01
"""Share of failed questions above which an evaluation ends with an error."""

AnswerQuestionsOf = Callable[[Sequence[Question], "EvaluateConfig"], Iterator[list[Outcome]]]
"""Yields batches of outcomes in any order."""


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
    """URI of the weights folder; each node downloads a remote one once."""
    feature_store: str
    """Feature store URI."""
    output: str
    """JSON report. Outcomes go to the same name with .outcomes.parquet, those of an unfinished run to .partial."""
    questions: str | None = None
    """Folder of the QUESTIONS files. Either this or `benchmark`."""
    benchmark: BenchmarkConfig | None = None
    """A published benchmark. Its report is also written as .html, its answers as .answers.parquet."""
    tasks: tuple[str, ...] = ("choice", "order", "count", "grounding")
    """File names in `questions`, without .parquet."""
    max_questions: int | None = None
    """Maximum questions per task, or of the benchmark; null = all."""
    answering: AnsweringConfig = field(default_factory=AnsweringConfig)
    judge: JudgeConfig | None = None
    """Judge of captions, called by `--judge` after the evaluation."""
    workers: EvalWorkersConfig = field(default_factory=EvalWorkersConfig)

    def __post_init__(self) -> None:
        if (self.questions is None) == (self.benchmark is None):
            raise ValueError("set either `questions` or `benchmark`")
        if not self.tasks or len(set(self.tasks)) != len(self.tasks):
            raise ValueError(f"{self.tasks = } must name each task once, and at least one")
        check_gpus_are_reserved(
            self.answering.device,
            self.workers.gpus_per_worker,
            device_key="answering.device",
            gpus_key="workers.gpus_per_worker",
        )


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


def run_evaluation(config: EvaluateConfig, answer: AnswerQuestionsOf | None = None) -> dict[str, Any]:
    """Writes and returns the report, using the connected cluster.

    Outcomes are written as they arrive; after a kill, the same configuration continues with the remaining questions.

    Args:
        answer: default `answer_on_ray`.

    Raises:
        JobError: after the report, when no question was scored, or too many failed.
        LeaseHeldError: if another evaluation writes to `output`.
    """
    refuse_lost_outputs({"output": config.output})
    config = with_absolute_paths(config, PATHS)
    assert config.questions is not None
    questions = read_questions(config.questions, config.tasks, config.max_questions)
    if not questions:
        raise ValueError(f"tasks {', '.join(config.tasks)} have no questions in {config.questions!r}; fix `questions`")
    check_inputs(config.weights, config.feature_store)
    storage.ensure_writable(config.output.rpartition("/")[0])
    with only_writer_of(config.output):
        return _run(config, questions, answer or answer_on_ray)


def _run(config: EvaluateConfig, questions: Sequence[Question], answer: AnswerQuestionsOf) -> dict[str, Any]:
    log = OutcomeLog(config.output, run_hash(config))
    outcomes = log.read()
    left = [question for question in questions if question_hash(question) not in outcomes]
    if len(left) < len(questions):
        logger.info("evaluate: an earlier run answered %d of %d questions", len(questions) - len(left), len(questions))
    started = time.monotonic()
    num_new, next_report = 0, 0
    for batch in answer(left, config) if left else ():
        log.append(batch)
        outcomes |= {outcome.question_hash: outcome for outcome in batch}
        num_new += len(batch)
        if num_new >= next_report:
            logger.info("evaluate: %d of %d questions, %.0f s", num_new, len(left), time.monotonic() - started)
            next_report = num_new + max(1, len(left) // 10)
    report = write_report(config, questions, outcomes)
    check_outcomes([outcomes[question_hash(question)] for question in questions])
    log.remove()
    return report


def run_hash(config: EvaluateConfig) -> str:
    """Identifies what determines an outcome besides its question, without reading the weights."""
    return hash_of([*answering_facts(config), OUTCOMES.names])


def answering_facts(config: EvaluateConfig) -> list[Any]:
    """Returns versions of weights and features, and the options that change an answer, as JSON values."""
    store = FeatureStore.open(config.feature_store)
    answering = {name: value for name, value in asdict(config.answering).items() if name not in SPEED_OPTIONS}
    return [listed_files(config.weights), store.recipe_hash, store.index_digest(), answering]


def check_outcomes(outcomes: Sequence[Outcome]) -> None:
    """Raises JobError when no question was scored, or too many failed."""
    unscored = [outcome for outcome in outcomes if outcome.status not in SCORED]
    if outcomes and len(unscored) == len(outcomes):
        first = unscored[0]
        raise JobError(f"none of {len(outcomes)} questions could be scored; {first.sample_id}: {first.detail}")
    failed = [outcome for outcome in outcomes if outcome.status == "failed"]
    if len(failed) > MAX_FAILED_SHARE * len(outcomes):
        raise JobError(
            f"{len(failed)} of {len(outcomes)} questions failed, {failed[0].sample_id} by {failed[0].detail};"
            " run the same command to ask them again"
        )


def check_inputs(weights: str, feature_store: str) -> None:
    """Raises ValueError, before workers start, for missing inputs or different vision towers."""
    file = storage.join_uri(weights, "config.json")
    if not storage.exists(file):
        raise ValueError(f"no weights folder at {weights!r}; run jobs/export.py with output: {weights}")
    vision = config_from_dict(storage.read_json(file), where=file).vision
    check_same_towers(vision, FeatureStore.open(feature_store), weights)


def answer_tables_on_ray(
    tables: Sequence[pa.Table], step: type, config: EvaluateConfig, **options: Any
) -> Iterator[pa.Table]:
    """Yields `step` of each table in any order, from an actor pool of the connected Ray.

    Args:
        step: a class of one table to another; its constructor gets weights_folder, feature_store, config and `options`.

    Raises:
        ValueError: for workers that no node can hold.
        RuntimeError: for a node that lacks the inputs.
    """
    import ray

    workers = config.workers
    needed = {"CPU": workers.cpus_per_worker, "GPU": workers.gpus_per_worker}
    check_cluster_can_give(
        {name: amount for name, amount in needed.items() if amount},
        wanted_by="each worker (workers.cpus_per_worker, workers.gpus_per_worker)",
        way_out="lower them, or start Ray on larger machines",
    )
    check_every_node(StorageProof(inputs={key: getattr(config, key) for key in ("weights", "feature_store")}))
    ray.data.DataContext.get_current().enable_progress_bars = False
    inputs = {"weights_folder": config.weights, "feature_store": config.feature_store, "config": config.answering}
    # from the driver: a read task would need a whole CPU
    dataset = ray.data.from_arrow(list(tables)).map_batches(
        step,
        fn_constructor_kwargs=inputs | options,
        batch_size=None,
        batch_format="pyarrow",
        zero_copy_batch=True,
        num_cpus=workers.cpus_per_worker,
        num_gpus=workers.gpus_per_worker or None,
        compute=ray.data.ActorPoolStrategy(size=min(workers.num_workers, len(tables))),
    )
    yield from dataset.iter_batches(batch_size=None, batch_format="pyarrow", prefetch_batches=0)


def answer_on_ray(questions: Sequence[Question], config: EvaluateConfig) -> Iterator[list[Outcome]]:
    """Yields batches of outcomes in any order."""
    size = config.workers.batch_size
    tables = [_questions_table(questions[first : first + size]) for first in range(0, len(questions), size)]
    for table in answer_tables_on_ray(tables, AnswerQuestions, config):
        yield outcomes_of(table)


class AnswerQuestions:
    def __init__(self, *, weights_folder: str, feature_store: str, config: AnsweringConfig) -> None:
        self._evaluator = Evaluator(weights_folder=weights_folder, feature_store=feature_store, config=config)

    def __call__(self, table: Any) -> Any:
        return outcomes_table(self._evaluator.evaluate(table.to_pylist()))


def write_report(
    config: EvaluateConfig, questions: Sequence[Question], outcomes: Mapping[str, Outcome]
) -> dict[str, Any]:
    """Writes the report, and the outcomes in question order.

    Args:
        outcomes: by question hash.

    Raises:
        RuntimeError: when a question has no outcome.
    """
    hashes = [question_hash(question) for question in questions]
    if missing := sum(key not in outcomes for key in hashes):
        raise RuntimeError(f"{missing} of {len(hashes)} questions have no outcome; run the same command to ask them")
    ordered = [outcomes[key] for key in hashes]
    outcomes_uri = f"{config.output.removesuffix('.json')}.outcomes.parquet"
    storage.write_atomic(outcomes_uri, lambda file: pq.write_table(outcomes_table(ordered), file))
    report = summarise(ordered)
    storage.write_report(config.output, report)
    return report


def _questions_table(rows: Sequence[dict[str, Any]]) -> Any:
    return pa.Table.from_pylist(list(rows), schema=schemas.QUESTIONS)

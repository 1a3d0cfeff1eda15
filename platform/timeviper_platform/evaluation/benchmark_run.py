"""Evaluates weights on a published benchmark with Ray Data, and scores stored answers again."""

from __future__ import annotations

import json
import logging
import time
from collections.abc import Callable, Iterator, Sequence
from dataclasses import asdict
from typing import Any

import pyarrow as pa
import pyarrow.parquet as pq

from timeviper_platform.common import schemas, storage
from timeviper_platform.common.cluster_checks import refuse_lost_outputs
from timeviper_platform.common.config import absolute_path, with_absolute_paths
from timeviper_platform.common.job import JobError
from timeviper_platform.evaluation.benchmark_answers import (
    BENCHMARK_ANSWERS,
    BenchmarkAnswer,
    BenchmarkAnswerer,
    BenchmarkTask,
)
from timeviper_platform.evaluation.benchmarks.frame_folders import is_frame_folder, write_frames_as_video
from timeviper_platform.evaluation.benchmarks.question import BenchmarkQuestion, Clip, question_of
from timeviper_platform.evaluation.benchmarks.registry import BENCHMARKS
from timeviper_platform.evaluation.judging.exams import Call
from timeviper_platform.evaluation.judging.run import ask_judge, read_replies
from timeviper_platform.evaluation.outcomes import hash_of
from timeviper_platform.evaluation.partial_log import PartialLog, only_writer_of, write_rows
from timeviper_platform.evaluation.results.html_report import html_report
from timeviper_platform.evaluation.results.rows import ANSWER_ROWS, answer_rows
from timeviper_platform.evaluation.results.scores import score_answers
from timeviper_platform.evaluation.run import (
    MAX_FAILED_SHARE,
    PATHS,
    EvaluateConfig,
    answer_tables_on_ray,
    answering_facts,
    check_inputs,
)

logger = logging.getLogger(__name__)

FRAME_VIDEOS = "frame_videos"

AnswerTasks = Callable[[Sequence[Sequence[BenchmarkTask]], EvaluateConfig], Iterator[list[BenchmarkAnswer]]]
"""Answers blocks of tasks, each about whole videos; yields answers of a block in any order."""


def run_benchmark(config: EvaluateConfig, answer: AnswerTasks | None = None) -> dict[str, Any]:
    """Writes and returns the report, using the connected cluster.

    Answers are written as they arrive; after a kill, the same configuration continues with the remaining tasks.

    Args:
        answer: default `answer_on_ray`.

    Raises:
        JobError: after the report, when every video is missing, or too many questions failed.
        LeaseHeldError: if another evaluation writes to `output`.
    """
    refuse_lost_outputs({"output": config.output})
    config = with_absolute_paths(config, PATHS)
    tasks = read_tasks(config)
    check_inputs(config.weights, config.feature_store)
    storage.ensure_writable(config.output.rpartition("/")[0])
    with only_writer_of(config.output):
        return _run(config, tasks, answer or answer_on_ray)


def _run(config: EvaluateConfig, tasks: Sequence[BenchmarkTask], answer: AnswerTasks) -> dict[str, Any]:
    log = PartialLog(config.output, _run_hash(config), BENCHMARK_ANSWERS)
    earlier = [BenchmarkAnswer.from_row(row) for row in log.read()]
    answers = {row.task_hash: row for row in earlier if row.status != "failed"}
    left = [task for task in tasks if task.task_hash not in answers]
    if len(left) < len(tasks):
        logger.info("evaluate: an earlier run answered %d of %d questions", len(tasks) - len(left), len(tasks))
    started, num_new, num_cached, next_report = time.monotonic(), 0, 0, 0
    for batch in answer(blocks_of(left, config.workers.batch_size), config) if left else ():
        log.append([asdict(row) for row in batch])
        answers |= {row.task_hash: row for row in batch}
        num_new += len(batch)
        num_cached += sum(row.num_cached_tokens > 0 for row in batch)
        if num_new >= next_report:
            seconds = time.monotonic() - started
            logger.info(
                "evaluate: %d of %d questions, %.0f s, %.2f questions/s, %d from the prefix cache",
                *(num_new, len(left), seconds, num_new / max(seconds, 1e-9), num_cached),
            )
            next_report = num_new + max(1, len(left) // 10)
    ordered = [answers[task.task_hash] for task in tasks]
    report = write_benchmark_report(config, ordered)
    _check(ordered)
    log.remove()
    return report


def read_benchmark(config: EvaluateConfig) -> list[BenchmarkQuestion]:
    """Returns the benchmark's questions, those about one clip next to each other.

    Raises:
        ValueError: with file and field, for files in another layout.
    """
    assert config.benchmark is not None
    options = config.benchmark
    videos = {} if options.videos is None else {"videos": options.videos}
    questions = BENCHMARKS[options.name].read(options.folder, subtitles=options.subtitles, **videos)
    if not questions:
        raise ValueError(f"{options.folder} has no question of {options.name}; set benchmark.folder to the data set")
    names = [question.question_id for question in questions]
    if len(set(names)) < len(names):
        twice = next(name for name in names if names.count(name) > 1)
        raise ValueError(f"{options.folder}: question {twice!r} occurs twice; download the annotations again")
    order: dict[Clip, int] = {}
    for question in questions:
        order.setdefault(question.clip, len(order))
    return sorted(questions[: config.max_questions], key=lambda question: order[question.clip])


def read_tasks(config: EvaluateConfig) -> list[BenchmarkTask]:
    """Returns every question under every protocol, by clip."""
    assert config.benchmark is not None
    groups: dict[Clip, list[BenchmarkQuestion]] = {}
    for question in read_benchmark(config):
        groups.setdefault(question.clip, []).append(question)
    return [
        BenchmarkTask(question=question, protocol=protocol)
        for group in groups.values()
        for protocol in config.benchmark.protocols
        for question in group
    ]


def blocks_of(tasks: Sequence[BenchmarkTask], size: int) -> list[list[BenchmarkTask]]:
    """Groups consecutive tasks into blocks of about `size`, never splitting the tasks of a clip."""
    blocks: list[list[BenchmarkTask]] = []
    for task in tasks:
        last = blocks[-1][-1] if blocks else None
        is_same = last is not None and last.question.clip == task.question.clip
        if last is None or (len(blocks[-1]) >= size and not is_same):
            blocks.append([])
        blocks[-1].append(task)
    return blocks


def _run_hash(config: EvaluateConfig) -> str:
    """Identifies what determines an answer besides its task, without reading the weights."""
    assert config.benchmark is not None
    options = config.benchmark
    asked = [options.name, options.prompts, options.subtitles, options.scores_options, options.media_prefix]
    return hash_of([*answering_facts(config), asked, BENCHMARK_ANSWERS.names])


def _check(answers: Sequence[BenchmarkAnswer]) -> None:
    usable = [answer for answer in answers if answer.status in ("ok", "failed")]
    if not usable:
        raise JobError(f"none of {len(answers)} questions could be asked; the first: {answers[0].detail}")
    failed = [answer for answer in usable if answer.status == "failed"]
    if len(failed) > MAX_FAILED_SHARE * len(usable):
        raise JobError(
            f"{len(failed)} of {len(usable)} questions failed, {failed[0].asked().question_id} by {failed[0].detail};"
            " run the same command to ask them again"
        )


def answer_on_ray(blocks: Sequence[Sequence[BenchmarkTask]], config: EvaluateConfig) -> Iterator[list[BenchmarkAnswer]]:
    """Yields answers a block at a time, in any order."""
    assert config.benchmark is not None
    options = {
        "benchmark": config.benchmark.name,
        "prompts": config.benchmark.prompts,
        "media_prefix": config.benchmark.media_prefix,
        "scores_options": config.benchmark.scores_options,
    }
    tables = [_task_table(block) for block in blocks]
    for table in answer_tables_on_ray(tables, AnswerTaskTables, config, **options):
        yield [BenchmarkAnswer.from_row(row) for row in table.to_pylist()]


class AnswerTaskTables:
    def __init__(self, **options: Any) -> None:
        self._answerer = BenchmarkAnswerer(**options)

    def __call__(self, table: Any) -> Any:
        tasks = [
            BenchmarkTask(question=question_of(json.loads(row["question"])), protocol=row["protocol"])
            for row in table.to_pylist()
        ]
        answers = self._answerer.answer(tasks)
        return pa.Table.from_pylist([asdict(answer) for answer in answers], schema=BENCHMARK_ANSWERS)


def _task_table(tasks: Sequence[BenchmarkTask]) -> Any:
    return pa.Table.from_pylist(
        [{"question": json.dumps(asdict(task.question)), "protocol": task.protocol} for task in tasks]
    )


def answers_uri(output: str) -> str:
    return f"{output.removesuffix('.json')}.answers.parquet"


def write_benchmark_report(config: EvaluateConfig, answers: Sequence[BenchmarkAnswer]) -> dict[str, Any]:
    """Writes and returns the JSON report; also writes one row per answer, and the HTML report."""
    assert config.benchmark is not None
    replies = read_replies(config.output)
    report = {
        "weights": config.weights,
        "feature_store": config.feature_store,
        "prompts": config.benchmark.prompts,
        "subtitles": config.benchmark.subtitles,
        "max_frames": config.answering.max_frames,
        **score_answers(config.benchmark.name, answers, replies),
    }
    write_rows(answers_uri(config.output), answer_rows(config.benchmark.name, answers, replies), ANSWER_ROWS)
    storage.write_report(config.output, report)
    page = html_report(
        report,
        answers,
        feature_store=config.feature_store,
        num_examples=config.benchmark.num_examples,
        replies=replies,
    )
    storage.write_bytes(f"{config.output.removesuffix('.json')}.html", page.encode())
    return report


def rescore(config: EvaluateConfig) -> dict[str, Any]:
    """Scores stored answers again, without weights, features or the benchmark's files.

    Raises:
        ValueError: when there are no answers.
    """
    config = with_absolute_paths(config, PATHS)
    answers = _stored_answers(config)
    with only_writer_of(config.output):
        return write_benchmark_report(config, answers)


def judge(config: EvaluateConfig, ask: Callable[[Call], str] | None = None) -> dict[str, Any]:
    """Asks the judge about stored captions, then scores again. Repeats no answered call.

    Args:
        ask: default: the endpoint of `config.judge`.

    Raises:
        ValueError: without a judge, answers, or captions.
        JobError: after the report, when calls failed.
    """
    config = with_absolute_paths(config, PATHS)
    if config.judge is None:
        raise ValueError("set judge.base_url and judge.model, see docs/evaluate.md")
    answers = _stored_answers(config)
    if not any(answer.asked().kind == "caption" for answer in answers):
        raise ValueError(f"{answers_uri(config.output)} has no captions; a judge is for vdc, mlvu_generation and such")
    with only_writer_of(config.output):
        outcome = ask_judge(config.judge, config.output, answers, ask=ask)
        report = write_benchmark_report(config, answers)
    if outcome.num_failed:
        raise JobError(
            f"{outcome.num_failed} of {outcome.num_asked} calls to the judge failed, the first by"
            f" {outcome.first_failure}; run the same command to repeat those alone"
        )
    return report


def _stored_answers(config: EvaluateConfig) -> list[BenchmarkAnswer]:
    uri = answers_uri(config.output)
    if not storage.exists(uri):
        raise ValueError(f"no answers at {uri}; run the evaluation first")
    with storage.open_file(uri) as file:
        rows = pq.read_table(file).to_pylist()
    return [BenchmarkAnswer.from_row(row) for row in rows]


def write_manifest(config: EvaluateConfig, uri: str) -> tuple[int, list[str]]:
    """Writes a manifest of the benchmark's videos and clips for jobs/preprocess.py.

    Folders of frames become video files in FRAME_VIDEOS next to the manifest.

    Returns:
        the number of its media, and the paths of missing videos, which it leaves out.
    """
    config = with_absolute_paths(config, PATHS)
    assert config.benchmark is not None
    folder, prefix = config.benchmark.folder, config.benchmark.media_prefix
    rows, missing = [], []
    beside = storage.join_uri(absolute_path(uri).rpartition("/")[0], FRAME_VIDEOS)
    for clip in dict.fromkeys(question.clip for question in read_benchmark(config)):
        path = storage.join_uri(folder, clip.path)
        if not storage.exists(path):
            missing.append(clip.path)
            continue
        if is_frame_folder(path):
            frames, path = path, storage.join_uri(beside, f"{clip.path}.mkv")
            if not storage.exists(path):
                write_frames_as_video(frames, path)
        own_id, _ = clip.media_ids(prefix)
        bounds = {"start_seconds": clip.start_seconds, "end_seconds": clip.end_seconds}
        rows.append({"uri": path, "media_id": own_id, **bounds})
    if not rows:
        raise ValueError(f"{folder} has none of {len(missing)} videos, such as {missing[0]}; set benchmark.videos")
    write_rows(uri, rows, schemas.MANIFEST)
    return len(rows), list(dict.fromkeys(missing))

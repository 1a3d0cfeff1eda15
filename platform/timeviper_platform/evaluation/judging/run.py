"""Asks a judge about stored captions. Replies are written as they arrive, so that no call is made twice."""

from __future__ import annotations

import logging
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from concurrent.futures import FIRST_COMPLETED, Future, ThreadPoolExecutor, wait
from dataclasses import dataclass
from typing import Any

import pyarrow as pa
import pyarrow.parquet as pq

from timeviper_platform.common import storage
from timeviper_platform.evaluation.benchmark_answers import BenchmarkAnswer
from timeviper_platform.evaluation.judging.exams import Call, Exam, exams_of
from timeviper_platform.evaluation.judging.judge import Judge, JudgeConfig
from timeviper_platform.evaluation.partial_log import PartialLog, write_rows

logger = logging.getLogger(__name__)

REPLIES = pa.schema(
    [
        pa.field("judge", pa.string()),
        pa.field("call_hash", pa.string()),
        pa.field("question_id", pa.string()),
        pa.field("system", pa.string()),
        pa.field("user", pa.string()),
        pa.field("reply", pa.string()),
    ]
)
"""A row per call that was answered."""

WRITE_SECONDS = 2.0
"""Seconds of replies that a kill may lose."""
MAX_FAILURES_IN_A_ROW = 50
"""Consecutive failed calls after which the judge counts as unavailable."""

Ask = Callable[[Call], str]


@dataclass(frozen=True, slots=True)
class JudgeOutcome:
    num_asked: int
    num_failed: int
    first_failure: str = ""


def replies_uri(output: str) -> str:
    return f"{output.removesuffix('.json')}.replies.parquet"


def read_replies(output: str) -> dict[str, dict[str, str]]:
    """Returns stored replies by judge and call hash; {} if no judge was asked."""
    found: dict[str, dict[str, str]] = {}
    for row in _stored_rows(output):
        found.setdefault(row["judge"], {})[row["call_hash"]] = row["reply"]
    return found


def _stored_rows(output: str) -> list[dict[str, Any]]:
    uri = replies_uri(output)
    rows: list[dict[str, Any]] = []
    if storage.exists(uri):
        with storage.open_file(uri) as file:
            rows = pq.read_table(file).to_pylist()
    return rows + _log(output).read()


def _log(output: str) -> PartialLog:
    return PartialLog(f"{output.removesuffix('.json')}.replies.json", "calls", REPLIES)


def ask_judge(
    config: JudgeConfig, output: str, answers: Sequence[BenchmarkAnswer], *, ask: Ask | None = None
) -> JudgeOutcome:
    """Makes the calls about every caption that have no reply yet; writes replies to `replies_uri(output)`.

    A failed call leaves its caption unjudged until the next run.

    Args:
        output: JSON report of the evaluation.
        ask: default: the endpoint of `config`.
    """
    rows = {(row["judge"], row["call_hash"]): row for row in _stored_rows(output)}
    known = {call_hash: row["reply"] for (judge, call_hash), row in rows.items() if judge == config.model}
    log = _log(output)
    log.read()  # continues after the files of an earlier run
    waiting: list[dict[str, Any]] = []
    num_asked = num_failed = in_a_row = 0
    first_failure, written_at = "", time.monotonic()
    try:
        for question_id, call, reply, failure in _replies(config, answers, known, ask or Judge(config).ask):
            num_asked += 1
            if failure:
                num_failed, in_a_row, first_failure = num_failed + 1, in_a_row + 1, first_failure or failure
                if in_a_row >= MAX_FAILURES_IN_A_ROW:
                    break
                continue
            in_a_row = 0
            row = {"judge": config.model, "call_hash": call.call_hash, "question_id": question_id}
            row |= {"system": call.system, "user": call.user, "reply": reply}
            rows[config.model, call.call_hash] = row
            waiting.append(row)
            if time.monotonic() - written_at > WRITE_SECONDS:
                log.append(waiting)
                waiting, written_at = [], time.monotonic()
                logger.info("judge: %d calls, %d failed", num_asked, num_failed)
    finally:
        if waiting:
            log.append(waiting)
    write_rows(replies_uri(output), list(rows.values()), REPLIES)
    log.remove()
    return JudgeOutcome(num_asked, num_failed, first_failure)


def _replies(
    config: JudgeConfig, answers: Sequence[BenchmarkAnswer], known: Mapping[str, str], ask: Ask
) -> Iterator[tuple[str, Call, str, str]]:
    """Yields (question id, call, reply, failure) of new calls; runs exams concurrently, steps in order."""
    found = dict(known)
    exams = (
        (answer.asked().question_id, exam)
        for answer in answers
        if answer.status == "ok"
        for exam in exams_of(answer.asked(), answer.answer)
    )
    running: dict[Future[str], tuple[str, Call]] = {}
    waiting: dict[str, list[tuple[str, Exam]]] = {}  # exams by the call that they wait for
    failed: set[str] = set()
    pool = ThreadPoolExecutor(config.num_concurrent, thread_name_prefix="judge")

    def start(question_id: str, exam: Exam) -> None:
        """Makes the exam's first call that has no reply yet; exams that share it make it once."""
        call = exam.next_call(found)
        if call is None or call.call_hash in failed:
            return
        if call.call_hash not in waiting:
            running[pool.submit(ask, call)] = (question_id, call)
        waiting.setdefault(call.call_hash, []).append((question_id, exam))

    try:
        while True:
            while len(running) < config.num_concurrent and (following := next(exams, None)) is not None:
                start(*following)
            if not running:
                return
            for future in wait(running, return_when=FIRST_COMPLETED).done:
                question_id, call = running.pop(future)
                exams_after = waiting.pop(call.call_hash)
                try:
                    reply = future.result()
                except RuntimeError as error:
                    failed.add(call.call_hash)
                    yield question_id, call, "", str(error)
                    continue
                found[call.call_hash] = reply
                yield question_id, call, reply, ""
                for exam in exams_after:
                    start(*exam)
    finally:
        pool.shutdown(wait=False, cancel_futures=True)

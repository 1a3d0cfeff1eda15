"""Outcomes of questions, written as they arrive, so that a killed evaluation can continue."""

from __future__ import annotations

import hashlib
import json
from collections.abc import Sequence
from dataclasses import asdict, dataclass
from typing import Any, Literal

import pyarrow as pa

from timeviper_platform.evaluation.partial_log import PartialLog

Question = dict[str, Any]
"""A QUESTIONS row."""

Status = Literal[
    "ok",
    "unparsable",
    "no_features",
    "no_frames",
    "bad_times",
    "no_answer_format",
    "answer_is_no_choice",
    "failed",
]
"""ok                    scored
unparsable            scored 0: the generated text holds no interval
no_features           a medium is not in the store
no_frames             no frame lies in a clip
bad_times             a clip, or the expected interval, does not exist
no_answer_format      neither choices nor an interval are given
answer_is_no_choice   the expected answer is not among the choices
failed                see `detail`; tried again by the next run
"""

SCORED: tuple[Status, ...] = ("ok", "unparsable")


@dataclass(frozen=True, kw_only=True, slots=True)
class Outcome:
    question_hash: str
    sample_id: str
    task: str
    video: str
    """Media ids; questions with the same are not independent."""
    status: Status
    detail: str
    """Cause, unless the question is scored."""
    expected: str
    answer: str
    """Likeliest option, or generated text."""
    answer_without_video: str
    score: float
    """1 or 0 for choices; temporal IoU for grounding."""
    score_without_video: float
    chance: float | None
    """1 / number of choices."""


OUTCOMES = pa.schema(
    [
        pa.field("question_hash", pa.string()),
        pa.field("sample_id", pa.string()),
        pa.field("task", pa.string()),
        pa.field("video", pa.string()),
        pa.field("status", pa.string()),
        pa.field("detail", pa.string()),
        pa.field("expected", pa.string()),
        pa.field("answer", pa.string()),
        pa.field("answer_without_video", pa.string()),
        pa.field("score", pa.float64()),
        pa.field("score_without_video", pa.float64()),
        pa.field("chance", pa.float64()),
    ]
)


def question_hash(question: Question) -> str:
    """Identifies a question by its whole row."""
    return hash_of({name: value for name, value in question.items() if name != "source"} | {"task": question["source"]})


def hash_of(value: Any) -> str:
    """Returns 32 hex digits for a JSON value."""
    return hashlib.sha256(json.dumps(value, sort_keys=True).encode()).hexdigest()[:32]


def outcomes_table(outcomes: Sequence[Outcome]) -> Any:
    return pa.Table.from_pylist([asdict(outcome) for outcome in outcomes], schema=OUTCOMES)


def outcomes_of(table: Any) -> list[Outcome]:
    return [Outcome(**row) for row in table.to_pylist()]


class OutcomeLog:
    """Outcomes of an unfinished evaluation, see `PartialLog`."""

    def __init__(self, output: str, run_hash: str) -> None:
        self._log = PartialLog(output, run_hash, OUTCOMES)

    def read(self) -> dict[str, Outcome]:
        """Returns what earlier runs answered, by question hash. Leaves out failed questions, which are tried again."""
        outcomes = [Outcome(**row) for row in self._log.read()]
        return {outcome.question_hash: outcome for outcome in outcomes if outcome.status != "failed"}

    def append(self, outcomes: Sequence[Outcome]) -> None:
        self._log.append([asdict(outcome) for outcome in outcomes])

    def remove(self) -> None:
        self._log.remove()

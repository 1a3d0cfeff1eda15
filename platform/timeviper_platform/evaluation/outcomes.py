"""Outcomes of questions, written as they come, so that a killed evaluation goes on."""

from __future__ import annotations

import hashlib
import json
from collections.abc import Sequence
from dataclasses import asdict, dataclass
from typing import Any, Literal

import pyarrow as pa
import pyarrow.parquet as pq

from timeviper_platform.common import storage

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
failed                see `detail`; asked again by the next run
"""

SCORED: tuple[Status, ...] = ("ok", "unparsable")


@dataclass(frozen=True, kw_only=True, slots=True)
class Outcome:
    question_hash: str
    sample_id: str
    task: str
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
    """Outcomes of an unfinished evaluation, a file per batch below OUTPUT.partial.

    Args:
        output: JSON report of the evaluation.
        run_hash: identifies weights, features and options; outcomes of another run are not read.
    """

    def __init__(self, output: str, run_hash: str) -> None:
        self._root = f"{output.removesuffix('.json')}.partial"
        self._folder = storage.join_uri(self._root, run_hash)
        self._num_files = 0

    def read(self) -> dict[str, Outcome]:
        """Returns what earlier runs answered, by question hash. Failed questions are left out, to be asked again."""
        files = storage.files_in(self._folder, ".parquet")
        self._num_files = 1 + max((int(uri.rpartition("/")[2].split(".")[0]) for uri in files), default=-1)
        outcomes = [outcome for uri in files for outcome in outcomes_of(_read_table(uri))]
        return {outcome.question_hash: outcome for outcome in outcomes if outcome.status != "failed"}

    def append(self, outcomes: Sequence[Outcome]) -> None:
        uri = storage.join_uri(self._folder, f"{self._num_files:06d}.parquet")
        storage.write_atomic(uri, lambda file: pq.write_table(outcomes_table(outcomes), file))
        self._num_files += 1

    def remove(self) -> None:
        storage.remove(self._root)


def _read_table(uri: str) -> Any:
    with storage.open_file(uri) as file:
        return pq.read_table(file)

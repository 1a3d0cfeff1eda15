"""Builds a judge's prompts about a caption, and reads its replies.

VDC           two calls per question-answer pair: an answer from the caption alone, then whether it is right
MLVU          two marks from 1 to 5: of a scene's points, or of a summary
TempCompass   the caption must be enough to choose the right option
"""

from __future__ import annotations

import re
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Literal, NamedTuple

from timeviper_platform.evaluation.benchmarks.question import BenchmarkQuestion
from timeviper_platform.evaluation.outcomes import hash_of
from timeviper_platform.evaluation.scoring.letters import find_letter

ExamKind = Literal["pairs", "mlvu_sub_scene", "mlvu_summary", "tempcompass"]
"""Value of a question's `details["judge"]`."""

MARKS: dict[str, tuple[str, str]] = {
    "mlvu_sub_scene": ("accuracy", "relevance"),
    "mlvu_summary": ("completeness", "reliability"),
}
"""The two marks of each task of MLVU."""

_ANSWERS = (
    "You answer questions about a video from its description alone. Read the description carefully, use nothing else,"
    " and answer with a short phrase."
)
_COMPARES = (
    "You compare a predicted answer with the correct one. They match if they mean the same; synonyms and paraphrases"
    " count."
)
_VERDICT = (
    "Reply with a JSON object alone: 'pred' is \"yes\" or \"no\", and 'score' is an integer from 0 to 5, where 5 is a"
    ' perfect match, such as {"pred": "yes", "score": 5}.'
)
_SCENE = (
    "You grade an answer about one scene of a long video. accuracy: whether the answer states the scoring points"
    " correctly. relevance: whether it speaks of what the question asks for. Both are integers from 1 to 5."
)
_SUMMARY = (
    "You grade the summary of a long video against a reference. completeness: whether it covers the reference's main"
    " events. reliability: whether what it states agrees with the reference. Both are integers from 1 to 5."
)
_CHOOSES = (
    "You read the description of a video and a multiple-choice question, and choose the option that the description"
    " supports. If it supports none, or says too little, the answer is: None of the choices are correct. Reply with a"
    " line 'Reasoning: ...', then a line 'Answer: ...' that repeats the option."
)


class Call(NamedTuple):
    system: str
    user: str

    @property
    def call_hash(self) -> str:
        return hash_of([self.system, self.user])


@dataclass(frozen=True, slots=True)
class Exam:
    """Calls about one point of a caption, each built from the replies before it."""

    steps: tuple[Callable[[Sequence[str]], Call], ...]

    def replies(self, known: Mapping[str, str]) -> tuple[str, ...] | None:
        """Returns the replies to all steps by call hash; None if one is not known."""
        found: list[str] = []
        for step in self.steps:
            reply = known.get(step(found).call_hash)
            if reply is None:
                return None
            found.append(reply)
        return tuple(found)

    def next_call(self, known: Mapping[str, str]) -> Call | None:
        """Returns the first call without a known reply; None after the last."""
        found: list[str] = []
        for step in self.steps:
            call = step(found)
            if (reply := known.get(call.call_hash)) is None:
                return call
            found.append(reply)
        return None


def exams_of(question: BenchmarkQuestion, caption: str) -> list[Exam]:
    """Returns what a judge examines; nothing for an empty caption, which is wrong."""
    if not caption.strip():
        return []
    kind: ExamKind = question.details["judge"]
    if kind == "pairs":
        return [_pair_exam(pair["question"], pair["answer"], caption) for pair in question.details["pairs"]]
    if kind == "tempcompass":
        text = f"Description: {caption}\nQuestion:\n{question.details['question']}"
        return [Exam((lambda _: Call(_CHOOSES, text),))]
    names = " and ".join(f"'{name}'" for name in MARKS[kind])
    system = _SCENE if kind == "mlvu_sub_scene" else _SUMMARY
    heading = "Scoring points" if kind == "mlvu_sub_scene" else "Reference"
    marks = (
        f"Question: {question.text}\n{heading}: {question.details['reference']}\nAnswer to grade: {caption}\n"
        f"Reply with a JSON object alone, with the keys {names}."
    )
    return [Exam((lambda _: Call(system, marks),))]


def _pair_exam(question: str, truth: str, caption: str) -> Exam:
    def compare(replies: Sequence[str]) -> Call:
        answers = f"Question: {question}\nCorrect answer: {truth}\nPredicted answer: {replies[0].strip()}"
        return Call(_COMPARES, f"{answers}\n{_VERDICT}")

    return Exam((lambda _: Call(_ANSWERS, f"Description: {caption}\nQuestion: {question}"), compare))


class Verdict(NamedTuple):
    values: dict[str, float]
    """By metric, within 0 and 1."""
    num_unparsable: int


def verdict_of(question: BenchmarkQuestion, replies: Sequence[Sequence[str]]) -> Verdict:
    """Reads the replies to all exams of a caption. Unparsable ones are wrong, and counted."""
    kind: ExamKind = question.details["judge"]
    last = [row[-1] for row in replies]
    if kind == "pairs":
        pairs = [_yes_and_score(reply) for reply in last]
        num_pairs = len(question.details["pairs"])
        found = [pair for pair in pairs if pair is not None]
        values = {
            "accuracy": sum(yes for yes, _ in found) / num_pairs,
            "score of 5": sum(score for _, score in found) / 5 / num_pairs,
        }
        return Verdict(values, len(pairs) - len(found))
    if kind == "tempcompass":
        letter = _chosen_letter(last[0], question.details["options"]) if last else None
        unread = sum(letter is None and not _is_none(reply) for reply in last)
        return Verdict({"accuracy": float(letter == question.details["answer"])}, unread)
    marks = [_mark(last[0], name) if last else None for name in MARKS[kind]]
    values = {f"{name} of 5": (mark or 0) / 5 for name, mark in zip(MARKS[kind], marks, strict=True)}
    return Verdict({"G-Avg": sum(mark or 0 for mark in marks) / 10} | values, len(last) if None in marks else 0)


def _yes_and_score(reply: str) -> tuple[float, float] | None:
    """'{"pred": "Yes", "score": 4.8}' becomes (1.0, 4.8); quotes and case are free."""
    yes = re.search(r"[\"']?pred[\"']?\s*[:=]\s*[\"']?(yes|no)\b", reply, re.IGNORECASE)
    score = _mark(reply, "score")
    return None if yes is None or score is None else (float(yes[1].lower() == "yes"), score)


def _mark(reply: str, name: str) -> float | None:
    """The last mark with this name, at most 5."""
    found = re.findall(rf"[\"']?{name}[\"']?\s*[:=]\s*[\"']?(\d+(?:\.\d+)?)", reply, re.IGNORECASE)
    return min(float(found[-1]), 5.0) if found else None


def _chosen_letter(reply: str, options: Sequence[str]) -> str | None:
    stated = re.split(r"(?i)\banswer\s*:", reply)[-1].strip()
    return None if _is_none(stated) else find_letter("strict", stated, options)


def _is_none(reply: str) -> bool:
    return "none of the choices" in reply.lower()

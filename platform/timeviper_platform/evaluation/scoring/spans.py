"""Time spans in answers, by our rule and by those of public scorers, and their overlap."""

from __future__ import annotations

import re
from collections.abc import Callable, Iterator
from typing import Literal, NamedTuple

SpanRule = Literal["strict", "lmms_eval_charades", "lmms_eval_timelens", "lmms_eval_extremewhen"]
"""lmms_eval_NAME: the functions of lmms-eval 0.7.3 for one benchmark."""


class Span(NamedTuple):
    start_seconds: float
    end_seconds: float


def find_span(rule: SpanRule, answer: str, duration_seconds: float | None = None) -> Span | None:
    """Returns the span that `answer` names, or None. Only `strict` uses the duration."""
    if rule == "strict":
        return parse_span(answer, duration_seconds)
    return _PUBLIC_RULES[rule](answer)


def temporal_iou(first: Span, second: Span) -> float:
    """Returns 0 for a span that is empty or ends before it starts."""
    if min(first.end_seconds - first.start_seconds, second.end_seconds - second.start_seconds) <= 0:
        return 0.0
    shared = min(first.end_seconds, second.end_seconds) - max(first.start_seconds, second.start_seconds)
    covered = max(first.end_seconds, second.end_seconds) - min(first.start_seconds, second.start_seconds)
    return max(0.0, shared) / covered


def parse_span(text: str, duration_seconds: float | None = None) -> Span | None:
    """Returns the last span after the word 'answer', else the last one; cut at the duration.

    Reads 'from 3 to 5 seconds', '3 - 5', '00:03 to 1:02:05', 'between 3s and 5s', 'starts at 3 and ends at 5',
    {"start": 3, "end": 5} and {"start_seconds": 3, "end_seconds": 5}. A reversed span stays reversed; one with a
    negative time is None.
    """
    spans = parse_spans(text, duration_seconds)
    if (answer := text.lower().rfind("answer")) >= 0 and (stated := parse_spans(text[answer:], duration_seconds)):
        return stated[-1]
    return spans[-1] if spans else None


def parse_spans(text: str, duration_seconds: float | None = None) -> list[Span]:
    """Returns all spans in the order of the text; none if the last one has a negative time."""
    found = list(_matches(text))
    if not found or "-" in (found[-1]["sign"] or "") + (found[-1]["sign2"] or ""):
        return []
    limit = float("inf") if duration_seconds is None else duration_seconds
    times = [(_seconds(match["a"]), _seconds(match["b"])) for match in found if not (match["sign"] or match["sign2"])]
    return [Span(min(start, limit), min(end, limit)) for start, end in times]


_TIME = r"(?:(?:\d+:)?\d{1,2}:\d{2}(?:\.\d+)?|\d+(?:\.\d+)?)(?![\d:])"
_UNIT = r"\s*(?:s\b|secs?\b|seconds?\b)?"
_FIRST, _SECOND = rf"(?<![\w.:])(?P<sign>-)?(?P<a>{_TIME}){_UNIT}", rf"(?P<sign2>-)?(?P<b>{_TIME})"
_START, _END = r"[\"']start(?:_seconds|_time)?[\"']\s*:\s*[\"']?", r"[\"']end(?:_seconds|_time)?[\"']\s*:\s*[\"']?"
_SPAN = re.compile(
    "|".join(
        pattern.replace("<sign>", f"<sign_{n}>")
        .replace("<a>", f"<a_{n}>")
        .replace("<sign2>", f"<sign2_{n}>")
        .replace("<b>", f"<b_{n}>")
        for n, pattern in enumerate(
            (
                rf"{_START}(?P<sign>-)?(?P<a>{_TIME})[\"']?{_UNIT}[\"']?\s*,\s*{_END}{_SECOND}",
                rf"\bstart(?:s|ing)?(?:\s+time)?(?:\s+(?:at|from|is))?\s*:?\s*{_FIRST}\s*(?:,|;|\.)?\s*(?:and|to)?\s*(?:it\s+)?"
                rf"end(?:s|ing)?(?:\s+time)?(?:\s+(?:at|is))?\s*:?\s*{_SECOND}",
                rf"\bbetween\s+{_FIRST}\s*(?:and|[-–—])\s*{_SECOND}",
                rf"{_FIRST}\s*(?:to|until|till|[-–—~])\s*{_SECOND}",
            )
        )
    ),
    re.IGNORECASE,
)


def _matches(text: str) -> Iterator[dict[str, str | None]]:
    for match in _SPAN.finditer(text):
        groups = match.groupdict()
        number = next(n for n in range(4) if groups[f"a_{n}"] is not None)
        yield {name: groups[f"{name}_{number}"] for name in ("sign", "a", "sign2", "b")}


def _seconds(time: str | None) -> float:
    """'1:02:05.5' becomes 3725.5."""
    total = 0.0
    for part in (time or "").split(":"):
        total = 60 * total + float(part)
    return total


_CLOCK, _NUMBER = r"\b(\d{1,2}:\d{2}(?::\d{2})?)\b", r"(\d+(?:\.\d+)?)"
_CHARADES_EXAMPLE = "a specific example is : 20.8 - 30.0 seconds"
_CHARADES_WORDS = ("start", "end", "happen")


def _charades(answer: str) -> Span | None:
    """The first range in the first sentence that has one; times in turn if there is no range; swapped if reversed."""
    text = answer.lower().replace(_CHARADES_EXAMPLE, "").replace("to", "-")
    sentences = re.split(r"[!?\n]", text)
    sentences = [sentence for sentence in sentences if any(word in sentence for word in _CHARADES_WORDS)] or sentences
    for pattern in (rf"{_CLOCK}\s*[–-]\s*{_CLOCK}", rf"{_NUMBER}\s*[–-]\s*{_NUMBER}"):
        for sentence in sentences:
            if match := re.search(pattern, sentence):
                return _ordered(_seconds(match[1]), _seconds(match[2]))
    clocks = [_seconds(clock) for sentence in sentences for clock in re.findall(_CLOCK, sentence)]
    numbers = [re.search(rf"\b{_NUMBER}\b", sentence) for sentence in sentences]
    for times in (clocks, [float(number[1]) for number in numbers if number]):
        if len(times) > 1:
            return _ordered(times[0], times[1])
    for sentence in sentences:
        if match := re.search(rf"{_NUMBER}\s*s?\s*[–-]\s*{_NUMBER}\s*s?", sentence):
            return _ordered(float(match[1]), float(match[2]))
    return None


def _timelens(answer: str) -> Span | None:
    """The first two clock times, else the first 'A - B', 'A to B', or two numbers."""
    text = answer.lower()
    clocks = re.findall(r"\b(\d{1,2}:\d{2}:\d{2}(?:\.\d+)?|\d{1,2}:\d{2}(?:\.\d+)?)\b", text)
    if len(clocks) > 1:
        return Span(_seconds(clocks[0]), _seconds(clocks[1]))
    for pattern in (r"(\d+\.?\d*)\s*-\s*(\d+\.?\d*)", r"(\d+\.?\d*)\s+to\s+(\d+\.?\d*)"):
        if match := re.search(pattern, text):
            return Span(float(match[1]), float(match[2]))
    numbers = re.findall(r"\b\d+\.?\d*\b", text)
    return Span(float(numbers[0]), float(numbers[1])) if len(numbers) > 1 else None


def _extremewhen(answer: str) -> Span | None:
    """The last 'A - B' or 'A to B' in lower case, swapped if reversed."""
    found = re.findall(rf"{_NUMBER}\s*(?:-|to|~|–|—)\s*{_NUMBER}", answer)
    return _ordered(float(found[-1][0]), float(found[-1][1])) if found else None


def _ordered(first: float, second: float) -> Span:
    return Span(min(first, second), max(first, second))


_PUBLIC_RULES: dict[SpanRule, Callable[[str], Span | None]] = {
    "lmms_eval_charades": _charades,
    "lmms_eval_timelens": _timelens,
    "lmms_eval_extremewhen": _extremewhen,
}

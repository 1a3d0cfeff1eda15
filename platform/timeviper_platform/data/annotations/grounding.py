"""Temporal grounding: Charades-STA, DiDeMo and QVHighlights.

Charades-STA   AO8RW 0.0 6.9##a person is putting a book on a shelf.        a line; the file is AO8RW.mp4
DiDeMo         [{"annotation_id", "video": "NAME.mov", "description", "num_segments": 6, "times": [[2, 2], ...]}]
               times: first and last interval, per annotator
QVHighlights   {"qid", "vid", "query", "duration": s, "relevant_windows": [[s, s], ...]}   a line; VID.mp4
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterator, Sequence
from typing import Any

from timeviper_platform.data.annotations.rows import (
    BadRow,
    Labels,
    Row,
    check_span,
    read_lines,
    read_objects,
    span_text,
)

QUESTION = "When does this happen in the video: {}"

DIDEMO_INTERVAL_SECONDS = 5
"""Length of annotated intervals (Hendricks et al. 2017, section 3)."""


def convert_charades_sta(uri: str, labels: Labels) -> Iterator[Row | BadRow]:
    for index, line in enumerate(read_lines(uri)):
        head, marks, sentence = line.partition("##")
        try:
            name, start, end = head.split()
            span = (float(start), float(end))
        except ValueError:
            yield BadRow(index, "bad_row", f"not 'ID START END##sentence': {line!r:.80}")
            continue
        yield _convert(index, name, f"{name}.mp4", sentence if marks else None, [span], None, labels)


def convert_didemo(uri: str, labels: Labels) -> Iterator[Row | BadRow]:
    """Takes the interval that most annotators chose, at least two."""
    for index, entry in enumerate(read_objects(uri)):
        try:
            name, sentence = entry["video"], entry["description"]
            (first, last), votes = Counter(tuple(pair) for pair in entry["times"]).most_common(1)[0]
            span = (first * DIDEMO_INTERVAL_SECONDS, (last + 1) * DIDEMO_INTERVAL_SECONDS)
        except (KeyError, TypeError, ValueError, IndexError) as error:
            yield BadRow(index, "bad_row", f"{error!r}")
            continue
        labels.ignore_fields(entry, {"annotation_id", "video", "description", "times"})
        if votes < 2:
            yield BadRow(index, "no_segment", f"{name}: no two annotators agree")
            continue
        yield _convert(index, str(entry.get("annotation_id", "")), name, sentence, [span], None, labels)


def convert_qvhighlights(uri: str, labels: Labels) -> Iterator[Row | BadRow]:
    """The test split has no windows."""
    for index, entry in enumerate(read_objects(uri)):
        try:
            name, sentence, duration = entry["vid"], entry["query"], entry["duration"]
            windows = [tuple(window) for window in entry.get("relevant_windows", [])]
        except (AttributeError, KeyError, TypeError) as error:
            yield BadRow(index, "bad_row", f"{error!r}")
            continue
        labels.ignore_fields(entry, {"qid", "vid", "query", "duration", "relevant_windows"})
        yield _convert(index, str(entry.get("qid", "")), f"{name}.mp4", sentence, windows, duration, labels)


def _convert(
    index: int,
    key: str,
    name: Any,
    sentence: Any,
    spans: Sequence[tuple[Any, ...]],
    duration: Any,
    labels: Labels,
) -> Row | BadRow:
    if not isinstance(sentence, str) or not sentence.strip():
        return BadRow(index, "no_caption", f"{name}: no sentence")
    if not isinstance(name, str):
        return BadRow(index, "no_media", f"{name!r:.80} is not a name")
    if not spans:
        return BadRow(index, "no_segment", f"{name}: no interval")
    for span in spans:
        if fault := check_span(span, duration):
            return BadRow(index, "bad_times", f"{name}: {fault}")
    text = ", ".join(span_text(*span) for span in sorted(spans))
    turns = [("user", QUESTION.format(sentence.strip())), ("assistant", f"{text[0].upper()}{text[1:]}.")]
    return labels.sample(index, key, [labels.medium(name)], turns, kind="temporal")

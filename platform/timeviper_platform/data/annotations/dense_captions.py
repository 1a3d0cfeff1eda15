"""Dense captions, a sentence per event of a video: ActivityNet Captions and YouCook2.

    ActivityNet   {"v_ID": {"duration": s, "timestamps": [[s, s], ...], "sentences": [...]}, ...}
    YouCook2      {"database": {"ID": {"duration": s, "annotations": [{"segment": [s, s], "sentence": ...}, ...]}}}

A sample lists the events of ID.mp4 in order of time.
"""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

from timeviper_platform.data.annotations.rows import BadRow, Labels, Row, check_span, read_value, span_text

INSTRUCTION = "What happens in the video? Give the start and the end of each event in seconds."


def convert_activitynet(uri: str, labels: Labels) -> Iterator[Row | BadRow]:
    for index, (name, entry) in enumerate(read_value(uri).items()):
        try:
            events = list(zip(entry["timestamps"], entry["sentences"], strict=True))
            duration = entry["duration"]
        except (KeyError, TypeError, ValueError) as error:
            yield BadRow(index, "bad_row", f"{name}: {error!r}")
            continue
        labels.ignore_fields(entry, {"duration", "timestamps", "sentences"})
        yield _convert(index, name, duration, events, labels)


def convert_youcook2(uri: str, labels: Labels) -> Iterator[Row | BadRow]:
    """The test subset has no annotations."""
    for index, (name, entry) in enumerate(read_value(uri)["database"].items()):
        try:
            events = [(event["segment"], event["sentence"]) for event in entry.get("annotations", [])]
            duration = entry["duration"]
        except (AttributeError, KeyError, TypeError) as error:
            yield BadRow(index, "bad_row", f"{name}: {error!r}")
            continue
        labels.ignore_fields(entry, {"duration", "annotations"})
        for event in entry.get("annotations", []):
            labels.ignore_fields(event, {"segment", "sentence"}, where="annotations.")
        yield _convert(index, name, duration, events, labels)


def _convert(index: int, name: str, duration: Any, events: list[tuple[Any, Any]], labels: Labels) -> Row | BadRow:
    if not events:
        return BadRow(index, "no_segment", f"{name} has no events")
    lines = []
    for span, sentence in events:
        if fault := check_span(span, duration):  # one wrong event makes the order of all doubtful
            return BadRow(index, "bad_times", f"{name}: {fault}")
        if not isinstance(sentence, str) or not sentence.strip():
            return BadRow(index, "no_caption", f"{name}: an event has no sentence")
        lines.append((span[0], span[1], sentence.strip()))
    text = "\n".join(f"{span_text(start, end).capitalize()}: {sentence}" for start, end, sentence in sorted(lines))
    turns = [("user", INSTRUCTION), ("assistant", text)]
    return labels.sample(index, name, [labels.medium(f"{name}.mp4")], turns, kind="temporal")

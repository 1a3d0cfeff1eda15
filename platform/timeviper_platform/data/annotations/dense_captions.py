"""Videos with a sentence for each of their events: ActivityNet Captions and YouCook2.

    ActivityNet   {"v_ID": {"duration": s, "timestamps": [[s, s], ...], "sentences": [...]}, ...}
    YouCook2      {"database": {"ID": {"duration": s, "annotations": [{"segment": [s, s], "sentence": ...}, ...]}}}

One sample a video: its events in order of time. The video's file is ID.mp4.
"""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

from timeviper_platform.data.annotations.rows import Labels, Reject, Row, check_span, read_value, span_text

INSTRUCTION = "What happens in the video? Give the start and the end of each event in seconds."


def convert_activitynet(uri: str, labels: Labels) -> Iterator[Row | Reject]:
    """A sample a video."""
    for number, (name, entry) in enumerate(read_value(uri).items()):
        try:
            events = list(zip(entry["timestamps"], entry["sentences"], strict=True))
            duration = entry["duration"]
        except (KeyError, TypeError, ValueError) as error:
            yield Reject(number, "bad_row", f"{name}: {error!r}")
            continue
        yield _convert(number, name, duration, events, labels)


def convert_youcook2(uri: str, labels: Labels) -> Iterator[Row | Reject]:
    """A sample a video; those of the test subset have no annotations."""
    for number, (name, entry) in enumerate(read_value(uri)["database"].items()):
        try:
            events = [(event["segment"], event["sentence"]) for event in entry.get("annotations", [])]
            duration = entry["duration"]
        except (AttributeError, KeyError, TypeError) as error:
            yield Reject(number, "bad_row", f"{name}: {error!r}")
            continue
        yield _convert(number, name, duration, events, labels)


def _convert(number: int, name: str, duration: Any, events: list[tuple[Any, Any]], labels: Labels) -> Row | Reject:
    if not events:
        return Reject(number, "no_segment", f"{name} has no events")
    lines = []
    for span, sentence in events:
        wrong = check_span(span, duration)
        if wrong:  # one wrong event makes the order of all of them doubtful
            return Reject(number, "bad_times", f"{name}: {wrong}")
        if not isinstance(sentence, str) or not sentence.strip():
            return Reject(number, "no_caption", f"{name}: an event has no sentence")
        lines.append((span[0], span[1], sentence.strip()))
    text = "\n".join(f"{span_text(start, end).capitalize()}: {sentence}" for start, end, sentence in sorted(lines))
    turns = [("user", INSTRUCTION), ("assistant", text)]
    return labels.sample(number, name, [labels.medium(f"{name}.mp4")], turns)

"""Subtitle files to the lines that are on screen at sampled frames."""

from __future__ import annotations

import re
from collections.abc import Sequence
from typing import NamedTuple

from timeviper_platform.common import storage
from timeviper_platform.evaluation.benchmarks.annotation_files import AnnotationError, Fields, read_json_rows

_SRT_TIMES = re.compile(r"(\d+):(\d{2}):(\d{2})[,.](\d{1,3})\s*-->\s*(\d+):(\d{2}):(\d{2})[,.](\d{1,3})")
_CLOCK = re.compile(r"(\d+):(\d{2}):(\d{2}(?:\.\d+)?)")
_TAGS = re.compile(r"<[^>]*>|\{\\[^}]*\}")


class Cue(NamedTuple):
    start_seconds: float
    end_seconds: float
    text: str


def subtitle_text(uri: str, times_seconds: Sequence[float], *, start_seconds: float, duration_seconds: float) -> str:
    """Returns the lines on screen at any of `times_seconds`, in order; "" if the video has no file.

    Args:
        start_seconds: time of the file's 0, subtracted from its times.
    """
    if not storage.exists(uri):
        return ""
    cues = [
        Cue(cue.start_seconds - start_seconds, cue.end_seconds - start_seconds, cue.text)
        for cue in read_subtitles(uri, duration_seconds + start_seconds)
    ]
    times = sorted(times_seconds)
    shown = [cue for cue in cues if any(cue.start_seconds <= time < cue.end_seconds for time in times)]
    return (" " if uri.endswith(".jsonl") else "\n").join(cue.text for cue in shown)  # .jsonl has one word per line


def read_subtitles(uri: str, duration_seconds: float) -> list[Cue]:
    """Reads .srt, .jsonl of VideoMME-v2 (text, start_time, end_time), and .json of LongVideoBench.

    LongVideoBench has {"timestamp": [start, end], "text"} or {"start": "0:00:01.2", "end", "line"}; an end may be null.
    """
    if uri.endswith(".srt"):
        return _read_srt(uri)
    cues = []
    for row in read_json_rows(uri):
        if "start_time" in row.values:
            cues.append(Cue(row.number("start_time"), row.number("end_time"), row.text("text", "")))
        elif "timestamp" in row.values:
            bounds = row.values["timestamp"]
            if not isinstance(bounds, list) or len(bounds) != 2 or not isinstance(bounds[0], int | float):
                raise row.error("timestamp", "a pair of seconds")
            end = bounds[1] if isinstance(bounds[1], int | float) else duration_seconds
            cues.append(Cue(float(bounds[0]), float(end), row.text("text", "")))
        else:
            cues.append(Cue(_clock(row.text("start"), row), _clock(row.text("end"), row), row.text("line", "")))
    return cues


def _read_srt(uri: str) -> list[Cue]:
    text = storage.read_bytes(uri).decode("utf-8-sig", "replace").replace("\r\n", "\n")
    cues = []
    for block in re.split(r"\n\s*\n", text.strip()):
        match = _SRT_TIMES.search(block)
        if match is None:
            continue  # a stray number
        times = [int(part) for part in match.groups()]
        start, end = (h * 3600 + m * 60 + s + ms / 1000 for h, m, s, ms in (times[:4], times[4:]))
        words = " ".join(_TAGS.sub("", block[match.end() :]).split())
        if words:
            cues.append(Cue(start, end, words))
    if text.strip() and not cues:
        raise AnnotationError(uri, "no '00:00:01,000 --> 00:00:02,000' line")
    return cues


def _clock(text: str, row: Fields) -> float:
    match = _CLOCK.fullmatch(text)
    if match is None:
        raise AnnotationError(row.where, f"{text!r} is not a time like '0:00:01.2'")
    return int(match[1]) * 3600 + int(match[2]) * 60 + float(match[3])

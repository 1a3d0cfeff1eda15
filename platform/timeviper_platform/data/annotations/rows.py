"""Shared helpers of the converters."""

from __future__ import annotations

import json
import math
from collections import Counter
from collections.abc import Collection, Iterator, Sequence
from dataclasses import dataclass, field
from typing import Any, Literal, NamedTuple

from timeviper_platform.common import storage
from timeviper_platform.common.storage import open_file
from timeviper_platform.data.inputs.manifest import is_utf8
from timeviper_platform.data.inputs.tables import JSON_CHUNK_CHARS, json_values, open_text
from timeviper_platform.data.media.medium import media_id_of

RejectReason = Literal[
    "bad_row",
    "bad_text",
    "bad_turns",
    "marker_mismatch",
    "no_answer",
    "no_caption",
    "no_media",
    "not_captioned",
    "bad_times",
    "no_segment",
]

Row = dict[str, Any]
"""A SAMPLES row."""


class BadRow(NamedTuple):
    row: int
    reason: RejectReason
    detail: str


@dataclass(frozen=True, kw_only=True, slots=True)
class Labels:
    source: str
    media_prefix: str = ""
    """Path from the preprocessed folder to the media."""
    weight: float = 1.0
    ignored_fields: Counter[str] = field(default_factory=Counter)
    """Number of objects by field that no converter reads."""

    def ignore_fields(self, entry: dict[str, Any], known: Collection[str], *, where: str = "") -> None:
        """Counts fields outside `known`; `where` precedes their names."""
        self.ignored_fields.update(f"{where}{name}" for name in entry if name not in known)

    def medium(self, name: str, start_seconds: float | None = None, end_seconds: float | None = None) -> Row:
        """`name` is a URL or a path below `media_prefix`."""
        is_url = "://" in name
        media_id = media_id_of(name if is_url else storage.join_uri(self.media_prefix, name).lstrip("/"), "")
        return {"media_id": media_id, "start_seconds": start_seconds, "end_seconds": end_seconds}

    def sample(
        self,
        row: int,
        name: str,
        media: Sequence[Row],
        turns: Sequence[tuple[str, str]],
        *,
        kind: Literal["temporal"] | None = None,
    ) -> Row | BadRow:
        """The id contains `row`, because the input's ids may repeat."""
        if not is_utf8(name, *(text for _, text in turns)):
            return BadRow(row, "bad_text", f"{name} has text that is not UTF-8")
        return {
            "sample_id": f"{self.source}/{row}/{name}",
            "media": list(media),
            "conversation": [{"role": role, "text": text} for role, text in turns],
            "source": self.source,
            "weight": self.weight,
            "kind": kind,
        }


def span_text(start_seconds: float, end_seconds: float) -> str:
    """Formats a clip as evaluation parses it."""
    return f"from {round(start_seconds, 1):g} to {round(end_seconds, 1):g} seconds"


def check_span(span: Any, duration: Any = None) -> str | None:
    """Returns the fault of [start, end]. One second past the duration counts as rounding."""
    if not isinstance(span, list | tuple) or len(span) != 2:
        return f"{span!r} is not a pair"
    start, end = span
    if not (_is_seconds(start) and _is_seconds(end)):
        return f"{start!r}..{end!r} are not seconds"
    if duration is not None and not _is_seconds(duration):
        return f"the duration {duration!r} is not in seconds"
    if start < 0 or end <= start:
        return f"{start}..{end} s is not an interval"
    if duration is not None and end > duration + 1:
        return f"{start}..{end} s is past the duration of {duration} s"
    return None


def check_clip(start: Any, end: Any) -> str | None:
    """Returns the fault of a clip whose bounds may be None."""
    if not all(bound is None or _is_seconds(bound) for bound in (start, end)):
        return f"{start!r}..{end!r} are not seconds"
    first = 0 if start is None else start
    return None if first >= 0 and (end is None or end > first) else f"{start}..{end} s is not an interval"


def _is_seconds(value: Any) -> bool:
    return isinstance(value, int | float) and not isinstance(value, bool) and math.isfinite(value)


def read_lines(uri: str) -> Iterator[str]:
    """Yields non-blank lines. Invalid UTF-8 becomes surrogates, which samples reject."""
    with open_file(uri) as file:
        for line in file:
            if (text := line.decode("utf-8", "surrogateescape").rstrip("\r\n")).strip():
                yield text


def read_value(uri: str) -> Any:
    """Decodes JSON as in `read_lines`."""
    return json.loads(storage.read_bytes(uri).decode("utf-8", "surrogateescape").removeprefix("\ufeff"))


def read_objects(uri: str, *, chunk_chars: int = JSON_CHUNK_CHARS) -> Iterator[Any]:
    """Yields the entries of a JSON array or JSON lines without reading the whole file.

    Raises:
        ValueError: when the text is not JSON.
    """
    with open_text(uri) as file:
        try:
            yield from json_values(file.read, chunk_chars=chunk_chars)
        except ValueError as error:
            raise ValueError(f"{uri} is neither a JSON array nor JSON lines: {error}") from error

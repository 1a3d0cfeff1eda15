"""What all converters share: SAMPLES rows with the media ids of preprocessing, rejects, and text files read as streams.

Knows ids, turns and times in answers. Does not know any format.
"""

from __future__ import annotations

import io
import json
import math
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import Any, Literal, NamedTuple

from timeviper_platform.common import storage
from timeviper_platform.common.storage import open_file
from timeviper_platform.data.inputs.manifest import is_text
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
"""Why a row became no sample; each is explained where it is given."""

Row = dict[str, Any]
"""One SAMPLES row."""

_JSON_PIECE = 1 << 20
"""Characters."""


class Reject(NamedTuple):
    """A row of the input that became no sample."""

    row: int
    reason: RejectReason
    detail: str


@dataclass(frozen=True, kw_only=True, slots=True)
class Labels:
    """What every sample of a conversion gets."""

    source: str
    media_prefix: str = ""
    """between the folder that was preprocessed and the names in the annotations, e.g. videos/"""
    weight: float = 1.0

    def medium(self, name: str, start_seconds: float | None = None, end_seconds: float | None = None) -> Row:
        """The entry of a medium: a name relative to the folder that was preprocessed, or a URL."""
        is_url = "://" in name
        media_id = media_id_of(name if is_url else storage.join_uri(self.media_prefix, name).lstrip("/"), "")
        return {"media_id": media_id, "start_seconds": start_seconds, "end_seconds": end_seconds}

    def sample(self, row: int, name: str, media: Sequence[Row], turns: Sequence[tuple[str, str]]) -> Row | Reject:
        """A SAMPLES row; the row's number makes its id one of a kind, whatever the input's ids are."""
        if not is_text(name, *(text for _, text in turns)):
            return Reject(row, "bad_text", f"{name} has text that is no UTF-8")
        return {
            "sample_id": f"{self.source}/{row}/{name}",
            "media": list(media),
            "conversation": [{"role": role, "text": text} for role, text in turns],
            "source": self.source,
            "weight": self.weight,
        }


def span_text(start_seconds: float, end_seconds: float) -> str:
    """`from 0 to 6.9 seconds`, which evaluation reads back; to a tenth of a second."""
    return f"from {round(start_seconds, 1):g} to {round(end_seconds, 1):g} seconds"


def check_span(span: Any, duration: Any = None) -> str | None:
    """What is wrong with [start, end] in seconds; None when nothing is. A second past the duration is rounding."""
    if not isinstance(span, list | tuple) or len(span) != 2:
        return f"{span!r} is no pair"
    start, end = span
    if not (_is_seconds(start) and _is_seconds(end)):
        return f"{start!r}..{end!r} are no seconds"
    if duration is not None and not _is_seconds(duration):
        return f"the duration {duration!r} is no seconds"
    if start < 0 or end <= start:
        return f"{start}..{end} s is no interval"
    if duration is not None and end > duration + 1:
        return f"{start}..{end} s is past the duration of {duration} s"
    return None


def _is_seconds(value: Any) -> bool:
    return isinstance(value, int | float) and not isinstance(value, bool) and math.isfinite(value)


def read_lines(uri: str) -> Iterator[str]:
    """The lines of a text file that are not blank; bytes that are no UTF-8 become surrogates, which no sample takes."""
    with open_file(uri) as file:
        for line in file:
            if (text := line.decode("utf-8", "surrogateescape").rstrip("\r\n")).strip():
                yield text


def read_value(uri: str) -> Any:
    """The value of a JSON file; bytes that are no UTF-8 as in `read_lines`."""
    return json.loads(storage.read_bytes(uri).decode("utf-8", "surrogateescape").removeprefix("\ufeff"))


def read_objects(uri: str) -> Iterator[Any]:
    """The entries of a JSON array, or of JSON lines, one at a time: such files have gigabytes.

    Raises:
        ValueError: where the text is no JSON.
    """
    decoder = json.JSONDecoder()
    with io.TextIOWrapper(open_file(uri), encoding="utf-8", errors="surrogateescape") as file:
        text = file.read(_JSON_PIECE).lstrip()
        is_array = text.startswith("[")
        between = " \t\r\n," if is_array else " \t\r\n"
        place, is_end = int(is_array), False
        while True:
            while place < len(text) and text[place] in between:
                place += 1
            if is_array and text.startswith("]", place):
                return
            try:
                value, stop = decoder.raw_decode(text, place)
                if stop == len(text) and not is_end:
                    raise ValueError("a number may go on in the next piece")
            except ValueError as error:
                if is_end and place == len(text) and not is_array:
                    return
                if is_end:
                    raise ValueError(f"{uri} is no JSON array and no JSON lines: {error}") from error
                piece = file.read(_JSON_PIECE)
                text, place, is_end = text[place:] + piece, 0, not piece
            else:
                yield value
                place = stop

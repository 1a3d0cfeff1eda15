"""Converts annotations into SAMPLES rows, one page in memory at a time."""

from __future__ import annotations

import json
import logging
import tarfile
from collections import Counter
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from typing import IO, Literal

import pyarrow as pa
import pyarrow.parquet as pq

from timeviper_platform.common import storage
from timeviper_platform.common.listing import pages
from timeviper_platform.common.schemas import SAMPLES
from timeviper_platform.data.annotations.captions import convert_cc12m, convert_pixelprose, convert_webdataset
from timeviper_platform.data.annotations.chat import convert_llava, convert_messages
from timeviper_platform.data.annotations.dense_captions import convert_activitynet, convert_youcook2
from timeviper_platform.data.annotations.grounding import convert_charades_sta, convert_didemo, convert_qvhighlights
from timeviper_platform.data.annotations.rows import BadRow, Labels, Row

logger = logging.getLogger(__name__)

Format = Literal[
    "llava",
    "messages",
    "cc12m",
    "pixelprose",
    "webdataset",
    "activitynet",
    "youcook2",
    "charades_sta",
    "didemo",
    "qvhighlights",
]

CONVERTERS: dict[str, Callable[[str, Labels], Iterator[Row | BadRow]]] = {
    "llava": convert_llava,
    "messages": convert_messages,
    "cc12m": convert_cc12m,
    "pixelprose": convert_pixelprose,
    "webdataset": convert_webdataset,
    "activitynet": convert_activitynet,
    "youcook2": convert_youcook2,
    "charades_sta": convert_charades_sta,
    "didemo": convert_didemo,
    "qvhighlights": convert_qvhighlights,
}

PAGE_ROWS = 8192
LOGGED_REJECTS = 3
"""Maximum log lines per reason."""


@dataclass(frozen=True, kw_only=True, slots=True)
class ConvertConfig:
    format: Format
    """Annotation format."""
    input: str
    """URI of the annotation file; for pixelprose and webdataset also a glob."""
    output: str
    """URI of the samples, a Parquet file. Rejects go to the same name with .rejects.jsonl."""
    source: str
    """Name of these samples in ids and reports."""
    media_prefix: str = ""
    """Path from the preprocessed folder to the media, such as videos/."""
    weight: float = 1.0
    """Occurrences of each sample per epoch."""

    def __post_init__(self) -> None:
        if self.weight < 0:
            raise ValueError(f"{self.weight = } must be at least 0")


@dataclass(frozen=True, slots=True)
class ConvertReport:
    samples: int
    rejects: dict[str, int] = field(default_factory=dict)
    """Rows by reason."""
    ignored_fields: dict[str, int] = field(default_factory=dict)
    """Number of objects by field that no converter reads; a turn's field is named `conversations.weight`."""

    def lines(self) -> list[str]:
        num_rejects = sum(self.rejects.values())
        counted = f" = {_counts(self.rejects)}" if num_rejects else ""
        lines = [
            f"rows       {self.samples + num_rejects}",
            f"samples    {self.samples}",
            f"rejected   {num_rejects}{counted}",
        ]
        return [*lines, f"ignored    {_counts(self.ignored_fields)}"] if self.ignored_fields else lines


def rejects_uri(output: str) -> str:
    """URI of the JSON lines {row, reason, detail}; `row` counts from 0."""
    return f"{output.removesuffix('.parquet')}.rejects.jsonl"


def convert(config: ConvertConfig) -> ConvertReport:
    """Writes `config.output` and its rejects, each atomically.

    Raises:
        ValueError: when the input is missing or has another format.
        RuntimeError: when the output cannot be written.
    """
    labels = Labels(source=config.source, media_prefix=config.media_prefix, weight=config.weight)
    rejects: Counter[str] = Counter()
    num_samples = 0

    def write_samples(file: IO[bytes], rejects_file: IO[bytes]) -> None:
        nonlocal num_samples
        with pq.ParquetWriter(file, SAMPLES, compression="zstd", write_page_checksum=True) as writer:
            for page in pages(_entries(config, labels), PAGE_ROWS):
                rows = [entry for entry in page if not isinstance(entry, BadRow)]
                for entry in page:
                    if isinstance(entry, BadRow):
                        rejects[entry.reason] += 1
                        rejects_file.write(_reject_line(entry, is_logged=rejects[entry.reason] <= LOGGED_REJECTS))
                writer.write_table(pa.Table.from_pylist(rows, schema=SAMPLES))
                num_samples += len(rows)

    storage.write_atomic(
        rejects_uri(config.output),
        lambda rejects_file: storage.write_atomic(config.output, lambda file: write_samples(file, rejects_file)),
    )
    return ConvertReport(num_samples, dict(rejects), dict(labels.ignored_fields))


def _entries(config: ConvertConfig, labels: Labels) -> Iterator[Row | BadRow]:
    """Yields samples and rejects.

    Raises:
        ValueError: for an unreadable file or another format.
    """
    num_entries = 0
    try:
        for entry in CONVERTERS[config.format](config.input, labels):
            num_entries += 1
            yield entry
    except OSError as error:
        raise ValueError(f"cannot read {config.input}: {error}") from error
    except (KeyError, TypeError, AttributeError, UnicodeDecodeError, pa.ArrowInvalid, tarfile.TarError) as error:
        raise ValueError(f"{config.input} is not in the format {config.format}: {error!r}") from error
    if not num_entries:
        raise ValueError(f"{config.input} has no rows of format {config.format}; fix `input` or `format`")


def _reject_line(reject: BadRow, *, is_logged: bool) -> bytes:
    detail = reject.detail.encode("utf-8", "backslashreplace").decode("utf-8")
    if is_logged:
        logger.info("row %d: %s: %s", reject.row, reject.reason, detail)
    return (json.dumps({"row": reject.row, "reason": reject.reason, "detail": detail}) + "\n").encode()


def _counts(counts: dict[str, int]) -> str:
    return ", ".join(f"{count} {name}" for name, count in sorted(counts.items()))

"""Stops a job when many media in a row fail for the same reason."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass

import pyarrow as pa

from timeviper_platform.data.media.container import ErrorType

ADVICE: dict[str, str] = {
    ErrorType.NOT_FOUND: "check the paths, and that the share is mounted on the workers",
    ErrorType.PERMISSION_DENIED: "check that the workers' user or credentials may read them",
    ErrorType.READ_FAILED: "check that the storage is up and within its rate limits",
    ErrorType.BAD_URI: "correct the addresses",
    ErrorType.BAD_ROW: "correct the manifest",
    ErrorType.CORRUPT_FILE: "check that the files were copied whole",
    ErrorType.UNKNOWN_FORMAT: "check that the input names media",
    ErrorType.UNKNOWN_HOST: "check the network and the hosts' names",
    ErrorType.NO_DECODER: "check that this FFmpeg has the codec",
}


_ERROR_COLUMNS = ("error_stage", "error_type", "error_message")


@dataclass(slots=True)
class ConsecutiveFailureLimit:
    limit: int | None
    """None = never stop"""
    origin_of: Callable[[str], str] = lambda media_id: ""
    """Returns manifest and row of a medium whose message does not name them."""
    _reason: str = ""
    _num_media: int = 0
    _last_media_id: str = ""

    def add(self, media: Iterable[str], reasons: Iterable[str], messages: Iterable[str]) -> None:
        """Raises RuntimeError at the limit. The reason "" means success; messages name file and row."""
        for media_id, reason, message in zip(media, reasons, messages, strict=True):
            if not reason or reason != self._reason:
                self._reason, self._num_media, self._last_media_id = reason, 0, ""
            if reason and media_id != self._last_media_id:  # a long film's segments are one medium
                self._num_media, self._last_media_id = self._num_media + 1, media_id
            if self.limit is not None and self._num_media >= self.limit:
                raise RuntimeError(self._text(message))

    def check(self, tables: Iterable[pa.Table]) -> Iterator[pa.Table]:
        """Counts the media of PLAN tables, except those that a downloader could not fetch."""
        for table in tables:
            columns = (table[name].to_pylist() for name in ("media_id", "status", *_ERROR_COLUMNS))
            tried = [row for row in zip(*columns, strict=True) if row[2] != "download"]
            reasons = [f"{stage}/{kind}" if status == "error" else "" for _, status, stage, kind, _ in tried]
            self.add([row[0] for row in tried], reasons, [row[-1] or "" for row in tried])
            yield table

    def _text(self, message: str) -> str:
        advice = ADVICE.get(self._reason.partition("/")[2], "inspect one of them with ffprobe")
        row = "" if " row " in message else self.origin_of(self._last_media_id)
        cause = "; ".join(filter(None, (message, row)))
        return (
            f"{self._num_media} media in a row failed for one reason, {self._reason}: {advice}. The last was"
            f" {self._last_media_id}" + (f" ({cause})" if cause else "") + ". Finished work is kept: run the job"
            " again, or raise execution.max_consecutive_failures (null = never stop) if the media are at fault"
        )

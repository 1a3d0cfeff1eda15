"""Writes index, rejects and audit of a run in bounded memory."""

from __future__ import annotations

import shutil
import tempfile
from collections import Counter
from collections.abc import Iterable
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import pyarrow as pa
import pyarrow.compute as pc
import pyarrow.parquet as pq

from timeviper_platform.common import storage
from timeviper_platform.common.schemas import REJECTS
from timeviper_platform.data.preprocess.repeats import Repeats
from timeviper_platform.data.store.audit import Audit, audit, count_reasons
from timeviper_platform.data.store.commits import num_feature_bytes
from timeviper_platform.data.store.index import ROW_GROUP_ROWS
from timeviper_platform.data.store.index_writer import MediaRows, merge_index
from timeviper_platform.data.store.layout import REJECTS_FILE


@dataclass(slots=True)
class Totals:
    """Sums over the media of a plan."""

    audit: Audit = field(default_factory=Audit)
    frames: int = 0
    """stored frames"""
    frames_missing: int = 0
    """sampled frames that are not stored"""
    repeats: Repeats = field(default_factory=Repeats)
    bytes: int = 0
    """stored feature bytes"""
    reasons: dict[str, Counter[str]] = field(default_factory=dict)
    """stage -> error type -> media that are partial or rejected"""

    def add(self, media: MediaRows) -> pa.Table:
        """Adds all rows of a few media; returns their REJECTS rows."""
        planned = media.planned.filter(pc.equal(media.planned["status"], "planned"))
        self.audit += audit(media.planned, media.committed)
        index = media.index.filter(pc.is_in(media.index["segment_id"], planned["segment_id"].combine_chunks()))
        rejects = reject_table(media.planned, index)
        self.frames += pc.sum(index["num_frames"]).as_py() or 0
        self.frames_missing += pc.sum(index["frames_missing"]).as_py() or 0
        self.repeats.add(index)
        self.bytes += num_feature_bytes(index)
        for stage, kinds in count_reasons(rejects).items():
            self.reasons.setdefault(stage, Counter()).update(kinds)
        return rejects

    def errors_by_stage(self) -> dict[str, dict[str, int]]:
        return {stage: dict(sorted(kinds.items())) for stage, kinds in sorted(self.reasons.items())}


def finalize_store(
    uri: str,
    planned: Iterable[pa.Table],
    *,
    max_repeated_share: float = 1.0,
    row_group_rows: int = ROW_GROUP_ROWS,
) -> Totals:
    """`max_repeated_share`: see `Repeats`."""
    totals = Totals(repeats=Repeats(max_repeated_share))
    with tempfile.TemporaryDirectory(prefix="timeviper-rejects-") as folder:
        local_file = Path(folder, REJECTS_FILE)
        with pq.ParquetWriter(local_file, REJECTS, compression="zstd", write_page_checksum=True) as writer:

            def visit(media: MediaRows) -> None:
                rejects = totals.add(media)
                if rejects.num_rows:
                    writer.write_table(rejects)

            merge_index(uri, planned, visit, row_group_rows=row_group_rows)
        with local_file.open("rb") as source:
            storage.write_atomic(storage.join_uri(uri, REJECTS_FILE), lambda file: shutil.copyfileobj(source, file))
    return totals


def reject_table(planned: pa.Table, index: pa.Table) -> pa.Table:
    """Returns one REJECTS row for each medium, status, stage and type.

    Args:
        planned: PLAN rows; only media in error count.
        index: INDEX rows; only those not ok count.
    """
    rows: dict[tuple[str, ...], dict[str, Any]] = {}
    for error in planned.filter(pc.field("status") == "error").select(_REJECT_FIELDS).to_pylist():
        rows[_reject_key(error)] = {**error, "num_segments": 0, "frames_missing": 0}
    for segment in index.filter(pc.field("status") != "ok").select([*_REJECT_FIELDS, "frames_missing"]).to_pylist():
        row = rows.setdefault(_reject_key(segment), {**segment, "num_segments": 0, "frames_missing": 0})
        row["num_segments"] += 1
        row["frames_missing"] += segment["frames_missing"]
    return pa.Table.from_pylist(list(rows.values()), schema=REJECTS)


def _reject_key(row: dict[str, Any]) -> tuple[str, ...]:
    return tuple(row[name] for name in ("media_id", "status", "error_stage", "error_type"))


_REJECT_FIELDS = ["media_id", "uri", "status", "error_stage", "error_type", "error_message"]

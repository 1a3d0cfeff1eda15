"""The end of a run: index, rejects and audit of all that was planned, in memory that does not grow with it.

Knows what is counted. The joining by medium is in index_writer.py, what a reject or a gap is in report.py.
"""

from __future__ import annotations

import shutil
import tempfile
from collections import Counter
from collections.abc import Iterable
from dataclasses import dataclass, field
from pathlib import Path

import pyarrow as pa
import pyarrow.compute as pc
import pyarrow.parquet as pq

from timeviper_platform.common import storage
from timeviper_platform.common.schemas import REJECTS
from timeviper_platform.data.plan.segments import errors_of
from timeviper_platform.data.preprocess.report import reject_table
from timeviper_platform.data.store.audit import AUDIT_KEYS, audit, count_rejects
from timeviper_platform.data.store.commits import num_feature_bytes
from timeviper_platform.data.store.index_writer import MediaRows, merge_index

REJECTS_FILE = "rejects.parquet"


@dataclass(slots=True)
class Totals:
    """What became of a plan; sums over media, so that some media at a time can be added."""

    audit: Counter[str] = field(default_factory=Counter)
    """planned, ok, partial, error, missing, duplicate -> segments"""
    frames: int = 0
    """stored"""
    bytes: int = 0
    """of features stored"""
    rejected_media: int = 0
    rejects: dict[str, Counter[str]] = field(default_factory=dict)
    """stage -> type -> media"""

    def add(self, media: MediaRows) -> pa.Table:
        """Counts all rows of a few media; returns their REJECTS rows."""
        planned = media.planned.filter(pc.equal(media.planned["status"], "planned"))
        segment_ids = planned["segment_id"]
        self.audit.update(audit(segment_ids.to_pylist(), media.committed))
        mine = media.index.filter(pc.is_in(media.index["segment_id"], segment_ids.combine_chunks()))
        rejects = reject_table(errors_of(media.planned), mine)
        self.frames += pc.sum(mine["num_frames"]).as_py() or 0
        self.bytes += num_feature_bytes(mine)
        self.rejected_media += len(pc.unique(rejects["media_id"]))
        for stage, kinds in count_rejects(rejects).items():
            self.rejects.setdefault(stage, Counter()).update(kinds)
        return rejects

    def counts(self) -> dict[str, int]:
        """The audit with every key, also those that are 0."""
        return {name: self.audit[name] for name in AUDIT_KEYS}

    def errors_by_stage(self) -> dict[str, dict[str, int]]:
        """`rejects` in the order of its words."""
        return {stage: dict(sorted(kinds.items())) for stage, kinds in sorted(self.rejects.items())}


def finalize_store(uri: str, planned: Iterable[pa.Table]) -> Totals:
    """Writes index.parquet and rejects.parquet of the store at `uri`.

    Args:
        uri: the store.
        planned: PLAN tables of all that was planned, in the order of the plan.
    """
    totals = Totals()
    with tempfile.TemporaryDirectory(prefix="timeviper-rejects-") as folder:
        spooled = Path(folder, REJECTS_FILE)
        with pq.ParquetWriter(spooled, REJECTS, compression="zstd", write_page_checksum=True) as writer:

            def visit(media: MediaRows) -> None:
                rejects = totals.add(media)
                if rejects.num_rows:
                    writer.write_table(rejects)

            merge_index(uri, planned, visit)
        with spooled.open("rb") as source:
            storage.write_atomic(storage.join_uri(uri, REJECTS_FILE), lambda file: shutil.copyfileobj(source, file))
    return totals

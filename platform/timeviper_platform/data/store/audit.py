"""Counts planned media and segments by outcome; progress, report, metrics and verification all use these counts."""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterable
from dataclasses import dataclass, fields

import pyarrow as pa

from timeviper_platform.data.store.commits import STATUS_RANK


@dataclass(frozen=True, kw_only=True, slots=True)
class Outcomes:
    """Numbers of media or segments: planned = ok + partial + rejected + missing."""

    planned: int = 0
    ok: int = 0
    partial: int = 0
    """stored without some frames"""
    rejected: int = 0
    """nothing is stored; status "error" in the tables"""
    missing: int = 0
    """not committed"""
    duplicate: int = 0
    """committed more than once"""

    @classmethod
    def of(cls, statuses: Iterable[str | None], *, duplicate: int = 0) -> Outcomes:
        """Counts statuses of tables; None = missing."""
        counts = Counter(statuses)
        return cls(
            planned=counts.total(),
            ok=counts["ok"],
            partial=counts["partial"],
            rejected=counts["error"],
            missing=counts[None],
            duplicate=duplicate,
        )

    def __add__(self, other: Outcomes) -> Outcomes:
        return Outcomes(**{f.name: getattr(self, f.name) + getattr(other, f.name) for f in fields(self)})

    def __str__(self) -> str:
        return f"{self.planned} planned = {self.parts()}"

    def parts(self) -> str:
        parts = f"{self.ok} ok + {self.partial} partial + {self.rejected} rejected"
        parts += f" + {self.missing} missing" if self.missing else ""
        return parts + (f"; {self.duplicate} duplicate" if self.duplicate else "")


@dataclass(frozen=True, slots=True)
class Audit:
    media: Outcomes = Outcomes()
    segments: Outcomes = Outcomes()

    def __add__(self, other: Audit) -> Audit:
        return Audit(self.media + other.media, self.segments + other.segments)


def audit(planned: pa.Table, committed: pa.Table) -> Audit:
    """Counts media and segments.

    Args:
        planned: `media_id`, `segment_id` and `status` of all PLAN rows of some media.
        committed: `segment_id` and `status` of their committed rows; the best row of a segment counts.
    """
    columns = (planned[name].to_pylist() for name in ("media_id", "segment_id", "status"))
    rows = list(zip(*columns, strict=True))
    outcomes: dict[str, str | None] = {segment_id: None for _, segment_id, status in rows if status != "error"}
    num_duplicates = 0
    for segment_id, status in zip(committed["segment_id"].to_pylist(), committed["status"].to_pylist(), strict=True):
        if segment_id in outcomes:
            before = outcomes[segment_id]
            num_duplicates += before not in (None, "error") and status != "error"
            if before is None or STATUS_RANK[status] < STATUS_RANK[before]:
                outcomes[segment_id] = status
    media: dict[str, set[str | None]] = {}
    for media_id, segment_id, status in rows:
        media.setdefault(media_id, set()).add(status if status == "error" else outcomes[segment_id])
    return Audit(
        Outcomes.of(medium_status(statuses) for statuses in media.values()),
        Outcomes.of(outcomes.values(), duplicate=num_duplicates),
    )


def medium_status(statuses: set[str | None]) -> str | None:
    """Returns a medium's status by its segments': partial if they differ, None if one is missing."""
    if None in statuses:
        return None
    return next(iter(statuses)) if len(statuses) == 1 else "partial"


def count_reasons(rejects: pa.Table) -> dict[str, dict[str, int]]:
    """Error stage -> error type -> media, of REJECTS rows. A medium with two reasons counts in both."""
    media = {
        (row["error_stage"], row["error_type"], row["media_id"])
        for row in rejects.select(["error_stage", "error_type", "media_id"]).to_pylist()
    }
    counts: dict[str, dict[str, int]] = {}
    for stage, kind, _ in sorted(media):
        counts.setdefault(stage, {}).setdefault(kind, 0)
        counts[stage][kind] += 1
    return counts

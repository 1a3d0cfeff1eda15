"""Counts of a plan's segments by outcome, and of rejected media by reason."""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterable

import pyarrow as pa

AUDIT_KEYS = ("planned", "ok", "partial", "error", "missing", "duplicate")


def audit(planned: Iterable[str], committed: pa.Table) -> dict[str, int]:
    """Counts planned segments by AUDIT_KEYS. `missing` and `duplicate` must be 0."""
    planned = set(planned)
    status: dict[str, str] = {}
    num_duplicates = 0
    pairs = zip(committed["segment_id"].to_pylist(), committed["status"].to_pylist(), strict=True)
    for segment_id, outcome in pairs:
        if segment_id in planned:
            before = status.get(segment_id, "error")
            num_duplicates += before != "error" and outcome != "error"
            status[segment_id] = outcome if before == "error" else before
    counts = Counter(status.values())
    return {
        "planned": len(planned),
        "ok": counts["ok"],
        "partial": counts["partial"],
        "error": counts["error"],
        "missing": len(planned) - len(status),
        "duplicate": num_duplicates,
    }


def count_rejects(rejects: pa.Table) -> dict[str, dict[str, int]]:
    """Error stage -> error type -> number of media."""
    media = {
        (row["error_stage"], row["error_type"], row["media_id"])
        for row in rejects.select(["error_stage", "error_type", "media_id"]).to_pylist()
    }
    counts: dict[str, dict[str, int]] = {}
    for stage, kind, _ in sorted(media):
        counts.setdefault(stage, {}).setdefault(kind, 0)
        counts[stage][kind] += 1
    return counts

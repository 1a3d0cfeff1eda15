"""Deletes uploads that are expired, too old, or the oldest of too many bytes."""

from __future__ import annotations

import asyncio
import logging
import random
import time

from timeviper_platform.serving.gateway.config import Retention
from timeviper_platform.serving.gateway.media.uploads import FileRecord, MediaStore

logger = logging.getLogger(__name__)

DAY_S = 86_400.0


async def keep_clean(store: MediaStore, retention: Retention) -> None:
    """Cleans every `interval_s`, until cancelled. Runs in every gateway replica; deleting twice is harmless."""
    while True:
        await asyncio.sleep(retention.interval_s * random.uniform(0.5, 1.5))  # replicas take turns
        try:
            if deleted := await asyncio.to_thread(clean, store, retention):
                logger.info("deleted %d uploads of %d bytes", len(deleted), sum(record.num_bytes for record in deleted))
        except (OSError, RuntimeError, ValueError) as error:
            logger.error("cleaning the uploads failed: %s", type(error).__name__)


def clean(store: MediaStore, retention: Retention) -> list[FileRecord]:
    """Returns the deleted records."""
    now = time.time()
    oldest = -float("inf") if retention.max_age_days is None else now - retention.max_age_days * DAY_S
    deleted: list[FileRecord] = []
    kept: list[tuple[str, FileRecord]] = []
    for tenant in store.tenants():
        store.delete_unrecorded(tenant, before=now - DAY_S)
        for record in store.records(tenant):
            if record.is_expired() or record.created_at < oldest:
                store.discard(tenant, record)
                deleted.append(record)
            else:
                kept.append((tenant, record))
    surplus = -1 if retention.max_bytes is None else sum(r.num_bytes for _, r in kept) - retention.max_bytes
    for tenant, record in sorted(kept, key=lambda entry: entry[1].created_at):
        if surplus <= 0:
            break
        store.discard(tenant, record)
        deleted.append(record)
        surplus -= record.num_bytes
    return deleted

"""Measures the usable rows of a mixture and rejects the others.

    rank r builds every world_size-th block of rows  ->  all sizes on all ranks  ->  one cached file

The table does not depend on the number of ranks.
"""

from __future__ import annotations

import hashlib
import json
import logging
import math
import time
import zipfile
from array import array
from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Protocol

import numpy as np
import torch.distributed as dist

from timeviper_platform.common import storage
from timeviper_platform.training.batches.rows import SampleRows
from timeviper_platform.training.batches.samples import Reject, SampleBuilder, TokenizedSample
from timeviper_platform.training.distributed import from_rank_0

logger = logging.getLogger(__name__)

TABLE_VERSION = 2
"""Increase it when the same rows give other sizes, to invalidate cached tables."""

BLOCK_ROWS = 1024
"""Rows per block; amortizes reading from Arrow."""

PROGRESS_S = 30.0

Block = tuple[np.ndarray, list[Reject]]
"""(n, 5) row index, tokens, vision tokens, frames and targets of the usable rows; and the rejects."""


@dataclass(frozen=True, kw_only=True, slots=True)
class SampleTable:
    """Sizes of the usable rows. Arrays have one element per row."""

    row_indices: np.ndarray
    """Indices into SampleRows."""
    weights: np.ndarray
    num_tokens: np.ndarray
    """Text and vision tokens."""
    num_vision_tokens: np.ndarray
    num_frames: np.ndarray
    num_targets: np.ndarray
    """Labelled positions."""
    fingerprint: str
    """Hash of every usable row's id, weight and sizes."""
    rejects: Sequence[Reject] = ()

    def __len__(self) -> int:
        return len(self.row_indices)

    def sizes(self, index: int) -> tuple[int, ...]:
        """Returns a sample's `TokenizedSample.sizes`."""
        columns = (self.num_tokens, self.num_vision_tokens, self.num_frames, self.num_targets)
        return tuple(int(column[index]) for column in columns)


class Measure(Protocol):
    def __call__(
        self, rows: SampleRows, builder: SampleBuilder, *, max_tokens: int, max_frames: int | None
    ) -> SampleTable:
        """See `measure_samples`."""


def measure_samples(
    rows: SampleRows, builder: SampleBuilder, *, max_tokens: int, max_frames: int | None
) -> SampleTable:
    """Measures the rows that fit one pack, and lists the rejects.

    Raises:
        ValueError: when no row is usable.
    """
    return join_blocks(rows, [measure_blocks(rows, builder, max_tokens, max_frames, rank=0, world_size=1)])


class MeasureOnAllRanks:
    """`measure_samples` shared by all ranks and cached in `folder`, a URI; collective."""

    def __init__(self, folder: str) -> None:
        self._folder = folder

    def __call__(
        self, rows: SampleRows, builder: SampleBuilder, *, max_tokens: int, max_frames: int | None
    ) -> SampleTable:
        rank, world_size = dist.get_rank(), dist.get_world_size()
        file, cached = from_rank_0(lambda: self._cached(rows, builder, max_tokens, max_frames))
        if cached is not None:
            return cached
        shard = measure_blocks(rows, builder, max_tokens, max_frames, rank=rank, world_size=world_size)
        shards = [shard] * world_size
        dist.all_gather_object(shards, shard)
        usable, rejects = _joined(rows, shards)
        fingerprint = from_rank_0(lambda: _fingerprint(rows, usable))  # takes seconds for millions of rows
        table = _table(rows, usable, fingerprint, rejects)
        if rank == 0:
            _write(file, table)
        return table

    def _cached(
        self, rows: SampleRows, builder: SampleBuilder, max_tokens: int, max_frames: int | None
    ) -> tuple[str, SampleTable | None]:
        file = storage.join_uri(self._folder, f"{_key(rows, builder, max_tokens, max_frames)}.npz")
        return file, _read(file, rows)


def count_rejects(rejects: Sequence[Reject]) -> dict[str, int]:
    return dict(sorted(Counter(reject.reason for reject in rejects).items()))


def measure_blocks(
    rows: SampleRows,
    builder: SampleBuilder,
    max_tokens: int,
    max_frames: int | None,
    *,
    rank: int,
    world_size: int,
    block_rows: int = BLOCK_ROWS,
) -> list[Block]:
    """Measures every `world_size`-th block of rows, from block `rank` on."""
    blocks = []
    logged = time.monotonic()
    for start in range(rank * block_rows, len(rows), world_size * block_rows):
        usable = array("q")
        rejects: list[Reject] = []
        for index, row in enumerate(rows.block(start, block_rows), start=start):
            if rows.weights[index] == 0:
                continue
            item = _checked_weight(row["sample_id"], float(rows.weights[index])) or builder.build(row)
            if isinstance(item, TokenizedSample):
                item = within_caps(row["sample_id"], item, max_tokens, max_frames)
            if isinstance(item, Reject):
                rejects.append(item)
            else:
                usable.extend((index, *item.sizes))
        blocks.append((np.array(usable, dtype=np.int64).reshape(-1, 5), rejects))
        if time.monotonic() - logged > PROGRESS_S:
            logged = time.monotonic()
            logger.info("measuring samples: row %d of %d", start, len(rows))
    return blocks


def _checked_weight(sample_id: str, weight: float) -> Reject | None:
    if 0.0 <= weight < math.inf:
        return None
    return Reject(sample_id, "bad_weight", f"{weight = } must be finite and at least 0")


def within_caps(
    sample_id: str, item: TokenizedSample, max_tokens: int, max_frames: int | None
) -> TokenizedSample | Reject:
    if len(item.sample) > max_tokens:
        return Reject(sample_id, "too_long", f"{len(item.sample)} tokens, a pack holds {max_tokens}")
    if max_frames is not None and item.num_frames > max_frames:
        return Reject(sample_id, "too_many_frames", f"{item.num_frames} frames, a pack holds {max_frames}")
    return item


def join_blocks(rows: SampleRows, shards: Sequence[list[Block]]) -> SampleTable:
    """Joins the blocks of all ranks in row order; raises ValueError when no row is usable."""
    usable, rejects = _joined(rows, shards)
    return _table(rows, usable, _fingerprint(rows, usable), rejects)


def _joined(rows: SampleRows, shards: Sequence[list[Block]]) -> tuple[np.ndarray, list[Reject]]:
    num_blocks = sum(map(len, shards))
    blocks = [shards[block % len(shards)][block // len(shards)] for block in range(num_blocks)]
    usable = np.concatenate([sizes for sizes, _ in blocks])
    rejects = [reject for _, own in blocks for reject in own]
    if not len(usable):
        raise ValueError(f"none of {len(rows)} samples can be used: {count_rejects(rejects) or 'every weight is 0'}")
    return usable, rejects


def _table(rows: SampleRows, usable: np.ndarray, fingerprint: str, rejects: list[Reject]) -> SampleTable:
    row_indices, num_tokens, num_vision_tokens, num_frames, num_targets = np.ascontiguousarray(usable.T)
    return SampleTable(
        row_indices=row_indices,
        weights=rows.weights[row_indices],
        num_tokens=num_tokens,
        num_vision_tokens=num_vision_tokens,
        num_frames=num_frames,
        num_targets=num_targets,
        fingerprint=fingerprint,
        rejects=rejects,
    )


def _fingerprint(rows: SampleRows, usable: np.ndarray) -> str:
    digest = hashlib.sha256()
    for start in range(0, len(usable), BLOCK_ROWS):
        block = usable[start : start + BLOCK_ROWS]
        ids = rows.sample_ids(block[:, 0])
        for sample_id, (index, *sizes) in zip(ids, block.tolist(), strict=True):
            digest.update(f"{sample_id}\t{rows.weights[index]!r}\t{tuple(sizes)}\n".encode())
    return digest.hexdigest()


def _key(rows: SampleRows, builder: SampleBuilder, max_tokens: int, max_frames: int | None) -> str:
    parts = [TABLE_VERSION, rows.digest, builder.digest(), max_tokens, max_frames]
    return hashlib.sha256(json.dumps(parts).encode()).hexdigest()[:32]


def _write(file: str, table: SampleTable) -> None:
    columns = [table.row_indices, table.num_tokens, table.num_vision_tokens, table.num_frames, table.num_targets]
    rejects = json.dumps([reject._asdict() for reject in table.rejects]).encode()
    try:
        storage.write_atomic(
            file,
            lambda target: np.savez(
                target,
                usable=np.stack(columns, 1),
                fingerprint=np.frombuffer(table.fingerprint.encode(), np.uint8),
                rejects=np.frombuffer(rejects, np.uint8),
            ),
        )
    except (RuntimeError, OSError) as error:  # the next run measures again
        logger.warning("the sizes of the samples are not cached: %s", error)
        return
    logger.info("cached the sizes of %d samples in %s", len(table), file)


def _read(file: str, rows: SampleRows) -> SampleTable | None:
    try:
        if not storage.exists(file):
            return None
        with storage.open_file(file) as source, np.load(source, allow_pickle=False) as arrays:
            usable = arrays["usable"]
            fingerprint, rejects = arrays["fingerprint"].tobytes(), arrays["rejects"].tobytes()
    except (zipfile.BadZipFile, ValueError, KeyError, EOFError, OSError) as error:
        logger.warning("%s cannot be read (%s); measuring the samples again", file, error)
        return None
    logger.info("read the sizes of %d samples from %s", len(usable), file)
    return _table(rows, usable, fingerprint.decode(), [Reject(**values) for values in json.loads(rejects)])

"""Sizes of a mixture's usable rows, and why the others are left out: all that a pack plan needs.

Tokenising millions of conversations takes long, so that the ranks share it and keep what came out:

    rank r builds every world_size-th block of rows  ->  the sizes of all, on all  ->  one file that later attempts read

Knows SampleRows and SampleBuilder; does not know packs or steps. The table is the same for any number of ranks, and
whether it was measured or read.
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
from typing import NamedTuple, Protocol

import numpy as np
import torch.distributed as dist

from timeviper_model.batching.batch import IGNORE_INDEX
from timeviper_platform.common import storage
from timeviper_platform.training.batches.rows import SampleRows
from timeviper_platform.training.batches.samples import Reject, SampleBuilder, TokenizedSample

logger = logging.getLogger(__name__)

TABLE_VERSION = 1
"""Raise it whenever the same rows give other sizes: tables that were kept are then measured anew."""

BLOCK_ROWS = 1024
"""rows that one rank takes together; enough that reading them from Arrow is cheap"""

PROGRESS_S = 30.0


class SampleSizes(NamedTuple):
    """What a plan is made from."""

    num_tokens: int
    num_vision_tokens: int
    num_frames: int
    num_targets: int
    """labelled positions"""


@dataclass(frozen=True, kw_only=True, slots=True)
class SampleTable:
    """Sizes of the usable rows, all that a pack plan needs; arrays have one entry a usable row."""

    rows: np.ndarray
    """row numbers in SampleRows"""
    weights: np.ndarray
    num_tokens: np.ndarray
    """text and vision"""
    num_vision_tokens: np.ndarray
    num_frames: np.ndarray
    num_targets: np.ndarray
    """labelled positions"""
    fingerprint: str
    """hash of every usable row's id, weight and sizes"""

    def __len__(self) -> int:
        return len(self.rows)

    def sizes(self, entry: int) -> SampleSizes:
        """What `sample_sizes` says of the entry's sample."""
        columns = (self.num_tokens, self.num_vision_tokens, self.num_frames, self.num_targets)
        return SampleSizes(*(int(column[entry]) for column in columns))


class Measured(NamedTuple):
    """What is known of a mixture's rows."""

    table: SampleTable
    rejects: list[Reject]


class Measure(Protocol):
    """How a phase comes by its table: `measure_samples`, or `MeasureOnAllRanks`."""

    def __call__(
        self, rows: SampleRows, builder: SampleBuilder, *, max_tokens: int, max_frames: int | None
    ) -> Measured:
        """See `measure_samples`."""


def measure_samples(rows: SampleRows, builder: SampleBuilder, *, max_tokens: int, max_frames: int | None) -> Measured:
    """Sizes of the rows that can be used under these caps of one pack, and the rejects.

    Raises:
        ValueError: when no row is left, with the counts by reason.
    """
    return join_parts(rows, [measure_part(rows, builder, max_tokens, max_frames, part=0, num_parts=1)])


class MeasureOnAllRanks:
    """`measure_samples` by all ranks, each its share; collective.

    Args:
        folder: where tables are kept, by the hash of what they depend on; any URI that all runs share.
    """

    def __init__(self, folder: str) -> None:
        self._folder = folder

    def __call__(
        self, rows: SampleRows, builder: SampleBuilder, *, max_tokens: int, max_frames: int | None
    ) -> Measured:
        """See `measure_samples`."""
        rank, world_size = dist.get_rank(), dist.get_world_size()
        file = ""
        kept: list[Measured | None] = [None]
        if rank == 0:
            file = storage.join_uri(self._folder, f"{_key(rows, builder, max_tokens, max_frames)}.npz")
            kept = [_read(file, rows)]
        dist.broadcast_object_list(kept)
        if kept[0] is not None:
            return kept[0]
        part = measure_part(rows, builder, max_tokens, max_frames, part=rank, num_parts=world_size)
        parts = [part] * world_size
        dist.all_gather_object(parts, part)
        measured = join_parts(rows, parts)
        if rank == 0:
            _write(file, measured)
        return measured


def count_rejects(rejects: Sequence[Reject]) -> dict[str, int]:
    """How many rows were left out for each reason."""
    return dict(sorted(Counter(reject.reason for reject in rejects).items()))


class MeasuredPart(NamedTuple):
    """What one rank found."""

    usable: np.ndarray
    """(n, 5): row number, tokens, vision tokens, frames, targets"""
    rejects: list[tuple[int, Reject]]
    """with their row numbers"""


def measure_part(
    rows: SampleRows, builder: SampleBuilder, max_tokens: int, max_frames: int | None, *, part: int, num_parts: int
) -> MeasuredPart:
    """Sizes of every `num_parts`-th block of rows, from block `part` on."""
    usable = array("q")
    rejects: list[tuple[int, Reject]] = []
    told = time.monotonic()
    for start in range(part * BLOCK_ROWS, len(rows), num_parts * BLOCK_ROWS):
        for number, row in enumerate(rows.block(start, BLOCK_ROWS), start=start):
            if rows.weights[number] == 0:
                continue
            built = _checked_weight(row["sample_id"], float(rows.weights[number])) or builder.build(row)
            if isinstance(built, TokenizedSample):
                built = _within_caps(row["sample_id"], built, max_tokens, max_frames)
            if isinstance(built, Reject):
                rejects.append((number, built))
            else:
                usable.extend((number, *sample_sizes(built)))
        if time.monotonic() - told > PROGRESS_S:
            told = time.monotonic()
            logger.info("measuring samples: row %d of %d", start, len(rows))
    return MeasuredPart(np.array(usable, dtype=np.int64).reshape(-1, 5), rejects)


def sample_sizes(built: TokenizedSample) -> SampleSizes:
    """Sizes of a sample."""
    num_targets = len(built.sample) - built.sample.labels.count(IGNORE_INDEX)
    return SampleSizes(len(built.sample), built.sample.num_vision_tokens, built.num_frames, num_targets)


def _checked_weight(sample_id: str, weight: float) -> Reject | None:
    if 0.0 <= weight < math.inf:
        return None
    return Reject(sample_id, "bad_weight", f"{weight = } must be a number of times, at least 0")


def _within_caps(
    sample_id: str, built: TokenizedSample, max_tokens: int, max_frames: int | None
) -> TokenizedSample | Reject:
    if len(built.sample) > max_tokens:
        return Reject(sample_id, "too_long", f"{len(built.sample)} tokens, a pack holds {max_tokens}")
    if max_frames is not None and built.num_frames > max_frames:
        return Reject(sample_id, "too_many_frames", f"{built.num_frames} frames, a pack holds {max_frames}")
    return built


def join_parts(rows: SampleRows, parts: Sequence[MeasuredPart]) -> Measured:
    """The parts in the order of the rows.

    Raises:
        ValueError: when no row is left.
    """
    usable = np.concatenate([part.usable for part in parts])
    usable = usable[np.argsort(usable[:, 0])]
    rejects = [reject for _, reject in sorted((item for part in parts for item in part.rejects), key=lambda i: i[0])]
    if not len(usable):
        raise ValueError(f"none of {len(rows)} samples can be used: {count_rejects(rejects) or 'every weight is 0'}")
    return Measured(_table(rows, usable, _fingerprint(rows, usable)), rejects)


def _table(rows: SampleRows, usable: np.ndarray, fingerprint: str) -> SampleTable:
    numbers, num_tokens, num_vision_tokens, num_frames, num_targets = np.ascontiguousarray(usable.T)
    return SampleTable(
        rows=numbers,
        weights=rows.weights[numbers],
        num_tokens=num_tokens,
        num_vision_tokens=num_vision_tokens,
        num_frames=num_frames,
        num_targets=num_targets,
        fingerprint=fingerprint,
    )


def _fingerprint(rows: SampleRows, usable: np.ndarray) -> str:
    digest = hashlib.sha256()
    for start in range(0, len(usable), BLOCK_ROWS):
        block = usable[start : start + BLOCK_ROWS]
        ids = rows.sample_ids(block[:, 0])
        for sample_id, (number, *sizes) in zip(ids, block.tolist(), strict=True):
            digest.update(f"{sample_id}\t{rows.weights[number]!r}\t{tuple(sizes)}\n".encode())
    return digest.hexdigest()


def _key(rows: SampleRows, builder: SampleBuilder, max_tokens: int, max_frames: int | None) -> str:
    """Hash of all that the sizes depend on."""
    parts = [TABLE_VERSION, rows.digest, builder.digest(), max_tokens, max_frames]
    return hashlib.sha256(json.dumps(parts).encode()).hexdigest()[:32]


def _write(file: str, measured: Measured) -> None:
    table = measured.table
    usable = np.stack([table.rows, table.num_tokens, table.num_vision_tokens, table.num_frames, table.num_targets], 1)
    rejects = json.dumps([reject._asdict() for reject in measured.rejects]).encode()
    storage.write_atomic(
        file,
        lambda target: np.savez(
            target,
            usable=usable,
            fingerprint=np.frombuffer(table.fingerprint.encode(), np.uint8),
            rejects=np.frombuffer(rejects, np.uint8),
        ),
    )
    logger.info("sizes of %d samples are kept in %s", len(table), file)


def _read(file: str, rows: SampleRows) -> Measured | None:
    """The table that an earlier attempt kept; None when there is none, or it is damaged."""
    if not storage.exists(file):
        return None
    filesystem, path = storage.split_uri(file)
    try:
        with filesystem.open(path, "rb") as source, np.load(source, allow_pickle=False) as arrays:
            usable = arrays["usable"]
            fingerprint, rejects = arrays["fingerprint"].tobytes(), arrays["rejects"].tobytes()
    except (zipfile.BadZipFile, ValueError, KeyError, EOFError) as error:
        logger.warning("%s is damaged (%s); the samples are measured again", file, error)
        return None
    logger.info("sizes of %d samples come from %s", len(usable), file)
    return Measured(_table(rows, usable, fingerprint.decode()), [Reject(**values) for values in json.loads(rejects)])

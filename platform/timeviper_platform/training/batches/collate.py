"""Samples and their stored features to one PackedBatch, and the dummy that stands in for a missing pack.

Knows tensors and the feature store's reader; does not know plans, ranks or losses. A sample whose features are damaged
is left out and named; nothing takes its place.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import NamedTuple

import torch
from torch import Tensor

from timeviper_model.batching.batch import IGNORE_INDEX, PackedBatch, Sample, TokenKind, pack_samples
from timeviper_platform.data.store.reader import FeatureStore
from timeviper_platform.training.batches.samples import MediaFrames, TokenizedSample

DUMMY_LENGTH = 2
"""Tokens of a dummy: the least in which one token precedes another."""


class Collated(NamedTuple):
    """A pack's tensors."""

    batch: PackedBatch | None
    """None where every sample is damaged"""
    damaged: dict[int, str]
    """what is wrong with a sample's features, by its place in the pack"""


def read_vision_rows(store: FeatureStore, media: Sequence[MediaFrames], dim: int) -> Tensor:
    """A sample's vision rows (num_vision_tokens, dim) in bf16; (0, dim) for text alone.

    Raises:
        RuntimeError: when a data file of the store is gone or damaged, or a row is not finite.
        StorageUnavailableError: when the store cannot be reached, which says nothing about the sample.
    """
    parts = []
    for item in media:
        rows = store.read(item.media_id, item.frames).features.reshape(-1, dim)
        if not bool(rows.isfinite().all()):
            raise RuntimeError(f"features of {item.media_id!r} in {store.uri} are not finite")
        parts.append(rows)
    return torch.cat(parts) if parts else torch.empty(0, dim, dtype=torch.bfloat16)


def collate(
    built: Sequence[TokenizedSample], store: FeatureStore, dim: int, *, pad_to: int | None, pad_token_id: int
) -> Collated:
    """The pack of these samples, in their order. Shapes: see PackedBatch.

    Raises:
        StorageUnavailableError: see `read_vision_rows`; the run ends and can go on, as leaving the sample out would
            give another curve than the next attempt's.
    """
    samples, features, damaged = [], [], {}
    for number, item in enumerate(built):
        try:
            features.append(read_vision_rows(store, item.media, dim))
        except RuntimeError as error:
            damaged[number] = str(error)
        else:
            samples.append(item.sample)
    batch = pack_samples(samples, features, pad_to=pad_to, pad_token_id=pad_token_id) if samples else None
    return Collated(batch, damaged)


def dummy_batch(dim: int, *, pad_token_id: int) -> PackedBatch:
    """A text-only batch without targets: it keeps a rank in step when there are fewer packs than ranks."""
    sample = Sample(
        input_ids=[pad_token_id] * DUMMY_LENGTH,
        vision_index=[-1] * DUMMY_LENGTH,
        token_kind=[int(TokenKind.SYSTEM)] * DUMMY_LENGTH,
        labels=[IGNORE_INDEX] * DUMMY_LENGTH,
    )
    return pack_samples([sample], [torch.empty(0, dim, dtype=torch.bfloat16)], pad_token_id=pad_token_id)


def batch_bytes(batch: PackedBatch) -> int:
    """Memory of a batch's tensors."""
    return sum(getattr(batch, name).nbytes for name in batch.__slots__)

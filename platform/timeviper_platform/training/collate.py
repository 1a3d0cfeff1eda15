"""Samples and their stored features to one PackedBatch, and the dummy that stands in for a missing pack.

Knows tensors and the feature store's reader; does not know plans, ranks or losses.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from timeviper_model.batch import IGNORE_INDEX, PackedBatch, Sample, TokenKind, pack_samples
from timeviper_platform.data.features import FeatureStore
from timeviper_platform.training.samples import BuiltSample, MediaFrames

DUMMY_LENGTH = 2
"""Tokens of a dummy: the least in which one token precedes another."""


def read_vision_rows(store: FeatureStore, media: Sequence[MediaFrames], dim: int) -> Tensor:
    """A sample's vision rows (num_vision_tokens, dim) in bf16; (0, dim) for text alone.

    Raises:
        RuntimeError: when a data file of the store is gone or damaged.
    """
    parts = [store.read(item.media_id, item.frames).features.reshape(-1, dim) for item in media]
    return torch.cat(parts) if parts else torch.empty(0, dim, dtype=torch.bfloat16)


def collate(
    built: Sequence[BuiltSample], store: FeatureStore, dim: int, *, pad_to: int | None, pad_token_id: int
) -> PackedBatch:
    """The pack of these samples, in their order. Shapes: see PackedBatch."""
    features = [read_vision_rows(store, item.media, dim) for item in built]
    return pack_samples([item.sample for item in built], features, pad_to=pad_to, pad_token_id=pad_token_id)


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

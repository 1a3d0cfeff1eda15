"""Reads planned packs into tensors."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor

from timeviper_model.batching.batch import IGNORE_INDEX, PackedBatch, Sample, TokenKind, pack_samples
from timeviper_platform.training.batches.samples import Reject, SampleBuilder, TokenizedSample
from timeviper_platform.training.batches.step_batches import BatchShape, DamagedSample, MicroBatch, PackTask

DUMMY_LENGTH = 2
"""Shortest length with a token to predict."""


class PackReader:
    """Turns planned packs into micro-batches. Can be pickled."""

    def __init__(self, builder: SampleBuilder, shape: BatchShape) -> None:
        self.builder = builder
        self.shape = shape
        self.dummy = dummy_batch(shape.dim, pad_token_id=shape.pad_token_id)

    def read(self, packs: Sequence[PackTask]) -> list[MicroBatch]:
        """Returns one micro-batch per pack, without samples whose features are damaged.

        Raises:
            RuntimeError: when a sample differs from its plan.
            StorageUnavailableError: when the store cannot be reached.
        """
        return [self._read_pack(pack) for pack in packs]

    def tokenize(self, row: dict[str, Any], sizes: tuple[int, ...]) -> TokenizedSample:
        """Raises RuntimeError when the sample's sizes differ from the plan."""
        item = self.builder.build(row)
        if isinstance(item, Reject):
            raise RuntimeError(
                f"sample {item.sample_id} was usable when the plan was made but is rejected now: {item.detail};"
                " the samples or the feature store changed during the run"
            )
        if item.sizes != sizes:
            raise RuntimeError(
                f"sample {row['sample_id']} has (tokens, vision tokens, frames, targets) {item.sizes}, planned"
                f" {sizes}: the samples or the feature store changed during the run, or the cached sizes come"
                " from another release; delete the folder sample-tables in the runs folder"
            )
        return item

    def read_features(self, sample: TokenizedSample) -> Tensor:
        """Returns vision rows (num_vision_tokens, dim) in bf16.

        Raises:
            RuntimeError: when features are missing, damaged or not finite.
        """
        store, dim = self.builder.store, self.shape.dim
        chunks = []
        for media_id, frames in zip(sample.media_ids, sample.frames, strict=True):
            rows = store.read(media_id, frames).features.reshape(-1, dim)
            if not bool(rows.isfinite().all()):
                raise RuntimeError(f"features of {media_id!r} in {store.uri} are not finite")
            chunks.append(rows)
        return torch.cat(chunks) if chunks else torch.empty(0, dim, dtype=torch.bfloat16)

    def _read_pack(self, pack: PackTask) -> MicroBatch:
        samples, features, sample_ids, damaged = [], [], [], []
        tokenized = [self.tokenize(row, sizes) for row, sizes in zip(pack.rows, pack.sizes, strict=True)]
        for row, item in zip(pack.rows, tokenized, strict=True):
            try:
                features.append(self.read_features(item))
            except RuntimeError as error:
                damaged.append(DamagedSample(row["sample_id"], str(error), len(item.sample), item.num_targets))
            else:
                samples.append(item.sample)
                sample_ids.append(row["sample_id"])
        if not samples:
            return MicroBatch(self.dummy, is_dummy=True, damaged=tuple(damaged))
        batch = pack_samples(samples, features, pad_to=self.shape.pad_to, pad_token_id=self.shape.pad_token_id)
        return MicroBatch(batch, pack_index=pack.pack_index, sample_ids=tuple(sample_ids), damaged=tuple(damaged))


def dummy_batch(dim: int, *, pad_token_id: int) -> PackedBatch:
    """Returns a batch without targets, for a rank with fewer packs than others."""
    sample = Sample(
        input_ids=[pad_token_id] * DUMMY_LENGTH,
        vision_index=[-1] * DUMMY_LENGTH,
        token_kind=[int(TokenKind.SYSTEM)] * DUMMY_LENGTH,
        labels=[IGNORE_INDEX] * DUMMY_LENGTH,
    )
    return pack_samples([sample], [torch.empty(0, dim, dtype=torch.bfloat16)], pad_token_id=pad_token_id)

"""Samples packed into one flat sequence of T tokens.

input_ids     SSvvvvIIRR|SvvIR|p    S system, I instruction, R response; v and p hold the pad id
segment_ids   0000000000|11111|-    - is -1
vision_index  --0123----|-45--|-    row of vision_features
position_ids  0123456789|01234|0
token_kind    0011112233|01123|0
labels        .......RR.|...R.|.    id of the next token if a response, else IGNORE_INDEX
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace
from enum import IntEnum
from itertools import chain

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor

IGNORE_INDEX = -100

PADDING_SEGMENT = -1

DTYPES = {
    "input_ids": torch.int64,
    "vision_index": torch.int64,
    "segment_ids": torch.int32,  # required by the CUDA kernels
    "position_ids": torch.int64,
    "labels": torch.int64,
    "token_kind": torch.int8,
}


class TokenKind(IntEnum):
    """Part of the conversation; TransV transfers to INSTRUCTION tokens only."""

    SYSTEM = 0
    """Tokens before the first vision token."""
    VISION = 1
    INSTRUCTION = 2
    """Non-response tokens after the first vision token."""
    RESPONSE = 3


@dataclass(frozen=True, kw_only=True, slots=True)
class Sample:
    input_ids: list[int]
    vision_index: list[int]
    token_kind: list[int]
    labels: list[int]

    def __post_init__(self) -> None:
        lengths = {len(self.input_ids), len(self.vision_index), len(self.token_kind), len(self.labels)}
        if len(lengths) != 1:
            raise ValueError(f"a sample's lists must have equal lengths, not {sorted(lengths)}")

    def __len__(self) -> int:
        return len(self.input_ids)

    @property
    def num_vision_tokens(self) -> int:
        return len(self.vision_index) - self.vision_index.count(-1)


@dataclass(frozen=True, kw_only=True, slots=True)
class PackedBatch:
    """Whole samples in one flat sequence.

    Construction checks shapes and dtypes, and on a CPU also values: elsewhere the host would wait.
    """

    input_ids: Tensor
    vision_index: Tensor
    vision_features: Tensor
    """(V, dim)"""
    segment_ids: Tensor
    position_ids: Tensor
    labels: Tensor
    token_kind: Tensor

    def __post_init__(self) -> None:
        shape = self.input_ids.shape
        if len(shape) != 1:
            raise ValueError(f"input_ids must be flat (T,), not {tuple(shape)}; pack samples with pack_samples()")
        for name in ("vision_index", "segment_ids", "position_ids", "labels", "token_kind"):
            if getattr(self, name).shape != shape:
                raise ValueError(f"{name} has shape {tuple(getattr(self, name).shape)}, input_ids {tuple(shape)}")
        for name, dtype in DTYPES.items():
            if getattr(self, name).dtype != dtype:
                raise ValueError(f"{name} must be {dtype}, not {getattr(self, name).dtype}; convert it first")
        features = self.vision_features
        if features.ndim != 2 or not features.is_floating_point():
            raise ValueError(f"vision_features must be floating (V, dim), not {features.dtype} {tuple(features.shape)}")
        if shape[0] and self.input_ids.device.type == "cpu":
            self._check_segments()
            self._check_vision()

    def _check_segments(self) -> None:
        ids = self.segment_ids[: int((self.segment_ids != PADDING_SEGMENT).sum())]
        steps = ids.diff(prepend=ids[:1])
        is_wrong = (steps != 0) & (steps != 1)
        is_wrong[:1] = ids[:1] != 0
        if bool(is_wrong.any()):
            index = int(is_wrong.nonzero()[0])
            raise ValueError(
                f"segment_ids[{index}] = {int(ids[index])}: segments must be contiguous and count 0, 1, 2, ..., with"
                f" padding ({PADDING_SEGMENT}) only at the end; pack samples with pack_samples()"
            )
        expected = torch.arange(len(ids)) - torch.searchsorted(ids, ids)
        if not torch.equal(self.position_ids[: len(ids)], expected):
            raise ValueError("position_ids must count from 0 in every segment; pack samples with pack_samples()")

    def _check_vision(self) -> None:
        low, high = (int(value) for value in self.vision_index.aminmax())
        if low < -1 or high >= self.vision_features.shape[0]:
            raise ValueError(
                f"vision_index ranges from {low} to {high}, but there are {self.vision_features.shape[0]} rows;"
                " use -1 for text"
            )
        if bool(((self.token_kind == TokenKind.VISION) != (self.vision_index >= 0)).any()):
            raise ValueError("token_kind must be VISION exactly where vision_index is not -1")

    @property
    def num_segments(self) -> int:
        return int(self.segment_ids.max()) + 1 if self.segment_ids.numel() else 0

    def to(self, device: torch.device | str, dtype: torch.dtype | None = None) -> PackedBatch:
        """Copies to `device`; converts only vision features to `dtype`."""
        # validation needs the complete copy
        is_to_device = torch.device(device).type != "cpu"
        moved = {name: getattr(self, name).to(device, non_blocking=is_to_device) for name in self.__slots__}
        if dtype is not None:
            moved["vision_features"] = moved["vision_features"].to(dtype)
        return replace(self, **moved)


def pack_samples(
    samples: Sequence[Sample], features: Sequence[Tensor], *, pad_to: int | None = None, pad_token_id: int = 0
) -> PackedBatch:
    """Packs `samples` in order.

    Args:
        features: (num_vision_tokens, dim) of each sample; (0, dim) for text only.
        pad_to: length of the pack.
    """
    if not samples or len(samples) != len(features):
        raise ValueError(f"need at least one sample and as many feature tensors: {len(samples)}, {len(features)}")
    for index, (sample, rows) in enumerate(zip(samples, features, strict=True)):
        if sample.num_vision_tokens != rows.shape[0]:
            raise ValueError(f"sample {index} has {sample.num_vision_tokens} vision tokens but {rows.shape[0]} rows")
    lengths = torch.tensor([len(sample) for sample in samples])
    total = int(lengths.sum())
    length = total if pad_to is None else pad_to
    if length < total:
        raise ValueError(f"{total} tokens do not fit {pad_to = }")
    segment_ids = torch.repeat_interleave(lengths)
    num_rows = torch.tensor([rows.shape[0] for rows in features])
    vision_index = _joined([sample.vision_index for sample in samples])
    vision_index += torch.where(vision_index >= 0, (num_rows.cumsum(0) - num_rows)[segment_ids], 0)
    values = {
        "input_ids": (_joined([sample.input_ids for sample in samples]), pad_token_id),
        "vision_index": (vision_index, -1),
        "segment_ids": (segment_ids, PADDING_SEGMENT),
        "position_ids": (torch.arange(total) - (lengths.cumsum(0) - lengths)[segment_ids], 0),
        "labels": (_joined([sample.labels for sample in samples]), IGNORE_INDEX),
        "token_kind": (_joined([sample.token_kind for sample in samples]), int(TokenKind.SYSTEM)),
    }
    padded = {
        name: F.pad(tensor, (0, length - total), value=pad).to(DTYPES[name]) for name, (tensor, pad) in values.items()
    }
    return PackedBatch(vision_features=torch.cat(list(features)), **padded)


def _joined(lists: Sequence[list[int]]) -> Tensor:
    """NumPy takes a third of torch.tensor's time."""
    return torch.from_numpy(np.fromiter(chain.from_iterable(lists), np.int64, sum(map(len, lists))))

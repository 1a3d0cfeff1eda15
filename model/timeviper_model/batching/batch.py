"""PackedBatch: several samples flat in one sequence, the one input that training, evaluation and engine share.

Purely token ids, where vision rows go, and which sample each token belongs to; knows nothing of text or files.

    input_ids     S S . . . . I I R R | S . . I R | pad
    segment_ids   0 0 0 0 0 0 0 0 0 0 | 1 1 1 1 1 | -1
    vision_index -1-1 0 1 2 3-1-1-1-1 |-1 4 5-1-1 | -1      rows of vision_features, -1 = not vision
    position_ids  0 1 2 3 4 5 6 7 8 9 | 0 1 2 3 4 | 0
    token_kind    0 0 1 1 1 1 2 2 3 3 | 0 1 1 2 3 | 0
    labels        . . . . . . . R R . | . . . R . | .       already shifted: labels[t] is the id after t
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
"""torch.nn.functional.cross_entropy's own default for 'no target here'."""

PADDING_SEGMENT = -1

DTYPES = {
    "input_ids": torch.int64,
    "vision_index": torch.int64,
    "segment_ids": torch.int32,  # the CUDA kernels take nothing else
    "position_ids": torch.int64,
    "labels": torch.int64,
    "token_kind": torch.int8,
}
"""of a pack's tensors"""


class TokenKind(IntEnum):
    """What a token is to TransV; only INSTRUCTION tokens receive what dropped vision tokens know."""

    SYSTEM = 0
    """before the first vision token"""
    VISION = 1
    INSTRUCTION = 2
    """every non-response token after the first vision token, assistant headers included"""
    RESPONSE = 3
    """an answer and its end token"""


@dataclass(frozen=True, kw_only=True, slots=True)
class Sample:
    """One tokenised conversation before packing. Lists of equal length L; `vision_index` counts from 0."""

    input_ids: list[int]
    vision_index: list[int]
    token_kind: list[int]
    labels: list[int]
    """shifted by one: labels[i] is input_ids[i + 1] where that is a response token, else IGNORE_INDEX"""

    def __post_init__(self) -> None:
        lengths = {len(self.input_ids), len(self.vision_index), len(self.token_kind), len(self.labels)}
        if len(lengths) != 1:
            raise ValueError(f"a sample's lists must have one length, not {sorted(lengths)}")

    def __len__(self) -> int:
        return len(self.input_ids)

    @property
    def num_vision_tokens(self) -> int:
        """How many rows of vision features the sample takes."""
        return len(self.vision_index) - self.vision_index.count(-1)


@dataclass(frozen=True, kw_only=True, slots=True)
class PackedBatch:
    """A flat batch of whole samples; checks itself when built.

    Values are looked at where the batch is made, on the host; on a device that would make the host wait for it.

    Raises:
        ValueError: when shapes or dtypes do not fit, a segment is not contiguous or not numbered in order, padding
            is not at the end, positions do not count from 0, or a vision row is out of range.
    """

    input_ids: Tensor
    """(T,) int64; the pad id at vision positions"""
    vision_index: Tensor
    """(T,) int64; row of `vision_features`, -1 = text"""
    vision_features: Tensor
    """(V, dim) floating"""
    segment_ids: Tensor
    """(T,) int32; which sample, ascending from 0, PADDING_SEGMENT at the end"""
    position_ids: Tensor
    """(T,) int64; from 0 in every sample"""
    labels: Tensor
    """(T,) int64; IGNORE_INDEX where nothing is to be predicted"""
    token_kind: Tensor
    """(T,) int8 of TokenKind"""

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
            place = int(is_wrong.nonzero()[0])
            raise ValueError(
                f"segment_ids[{place}] = {int(ids[place])}: segments must be contiguous and count 0, 1, 2, ..., with"
                f" padding ({PADDING_SEGMENT}) at the end alone; pack samples with pack_samples()"
            )
        expected = torch.arange(len(ids)) - torch.searchsorted(ids, ids)
        if not torch.equal(self.position_ids[: len(ids)], expected):
            raise ValueError("position_ids must count from 0 in every segment; pack samples with pack_samples()")

    def _check_vision(self) -> None:
        low, high = (int(value) for value in self.vision_index.aminmax())
        if low < -1 or high >= self.vision_features.shape[0]:
            raise ValueError(
                f"vision_index reaches from {low} to {high}, but there are {self.vision_features.shape[0]} rows and"
                " -1 for text"
            )
        if bool(((self.token_kind == TokenKind.VISION) != (self.vision_index >= 0)).any()):
            raise ValueError("token_kind must be VISION exactly where vision_index is not -1")

    @property
    def num_segments(self) -> int:
        """How many samples are packed."""
        return int(self.segment_ids.max()) + 1 if self.segment_ids.numel() else 0

    def to(self, device: torch.device | str, dtype: torch.dtype | None = None) -> PackedBatch:
        """The batch on `device`; `dtype` casts the vision features alone."""
        # towards the host, an unfinished copy would be looked at here already
        is_upwards = torch.device(device).type != "cpu"
        moved = {name: getattr(self, name).to(device, non_blocking=is_upwards) for name in self.__slots__}
        if dtype is not None:
            moved["vision_features"] = moved["vision_features"].to(dtype)
        return replace(self, **moved)


def pack_samples(
    samples: Sequence[Sample], features: Sequence[Tensor], *, pad_to: int | None = None, pad_token_id: int = 0
) -> PackedBatch:
    """One flat batch of `samples`, in their order.

    Args:
        samples: at least one.
        features: for each sample its vision rows (num_vision_tokens, dim); (0, dim) for a text-only sample.
        pad_to: length T of the result; default the sum of lengths.

    Raises:
        ValueError: when a sample's vision tokens and feature rows differ in number, or they do not fit `pad_to`.
    """
    if not samples or len(samples) != len(features):
        raise ValueError(f"need as many feature tensors as samples and at least one: {len(samples)}, {len(features)}")
    for number, (sample, rows) in enumerate(zip(samples, features, strict=True)):
        if sample.num_vision_tokens != rows.shape[0]:
            raise ValueError(f"sample {number} has {sample.num_vision_tokens} vision tokens but {rows.shape[0]} rows")
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
    """The numbers of all lists, (L,) int64; by NumPy, which takes a third of torch.tensor's time for Python numbers."""
    return torch.from_numpy(np.fromiter(chain.from_iterable(lists), np.int64, sum(map(len, lists))))

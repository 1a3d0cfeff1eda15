"""Positions of samples in a flat pack, and padded rows.

segment_ids   000112222222    bucket 0   000    bucket 1   2222222
positions     012010123456               11.
"""

from __future__ import annotations

from dataclasses import dataclass
from functools import cached_property

import torch
from torch import Tensor

from timeviper_model.batching.shapes import put_rows, take_rows

MAX_ROW_WASTE = 1.35
"""Maximum padded cells per token of a bucket; lower values launch more, smaller kernels."""


@dataclass(frozen=True, kw_only=True)
class RowBucket:
    """R segments of similar length, padded to L cells each; M real tokens."""

    token_index: Tensor
    """(M,) indices in the flat pack."""
    cell_index: Tensor
    """(M,) indices among the R * L cells."""
    segment_index: Tensor
    row_lengths: Tensor
    num_rows: int
    length: int
    is_dense: bool
    """True when pad and unpad are views."""

    def pad(self, x: Tensor) -> Tensor:
        """(T, ...) -> (R, L, ...)"""
        return self.put(x if len(x) == len(self.token_index) else take_rows(x, self.token_index))

    def put(self, x: Tensor) -> Tensor:
        """(M, ...) -> (R, L, ...)"""
        if self.is_dense:
            return x.view(self.num_rows, self.length, *x.shape[1:])
        rows = put_rows(x, self.cell_index, self.num_rows * self.length)
        return rows.view(self.num_rows, self.length, *x.shape[1:])

    def unpad(self, x: Tensor) -> Tensor:
        """(R, L, ...) -> (M, ...)"""
        flat = x.reshape(self.num_rows * self.length, *x.shape[2:])
        return flat if self.is_dense else take_rows(flat, self.cell_index)


class Segments:
    """Lengths and positions of S contiguous, possibly empty segments.

    ids                    00000111    keep([0, 3, 4, 5, 7]):   00011
    positions_T            01234012                             01201
    original_positions_T   01234012                             03402
    """

    def __init__(self, ids: Tensor, num_segments: int, original_positions_T: Tensor | None = None) -> None:
        self.ids = ids.long()
        self.num_segments = num_segments
        self._original_positions_T = original_positions_T
        self.lengths_S = torch.bincount(self.ids, minlength=num_segments)
        self.lengths: list[int] = self.lengths_S.tolist()
        if len(self.lengths) != num_segments:
            raise ValueError(f"segment ids reach {len(self.lengths) - 1} but {num_segments = }")
        if original_positions_T is not None and original_positions_T.shape != ids.shape:
            raise ValueError(f"{tuple(original_positions_T.shape)} original positions for {tuple(ids.shape)} ids")

    @cached_property
    def starts_S(self) -> Tensor:
        return self.lengths_S.cumsum(0) - self.lengths_S

    @cached_property
    def positions_T(self) -> Tensor:
        """Index among the remaining tokens."""
        return torch.arange(len(self.ids), device=self.ids.device) - self.starts_S[self.ids]

    @property
    def original_positions_T(self) -> Tensor:
        """Index in the whole sample, for RoPE."""
        return self.positions_T if self._original_positions_T is None else self._original_positions_T

    @cached_property
    def seq_idx_T(self) -> Tensor | None:
        """int32 ids for kernels; None for a single segment."""
        return self.ids.int() if sum(length > 0 for length in self.lengths) > 1 else None

    @cached_property
    def buckets(self) -> tuple[RowBucket, ...]:
        """Non-empty segments, longest first."""
        return tuple(self.rows(members) for members in group_by_length(self.lengths))

    def join(self, outputs: list[Tensor]) -> Tensor:
        """Restores flat order of all buckets' unpadded outputs."""
        if len(outputs) == 1:
            return outputs[0]
        return put_rows(torch.cat(outputs), torch.cat([b.token_index for b in self.buckets]), len(self.ids))

    def keep(self, index: Tensor) -> Segments:
        ids, positions = (of_T.index_select(0, index) for of_T in (self.ids, self.original_positions_T))
        return Segments(ids, self.num_segments, positions)

    def rows(self, members: list[int]) -> RowBucket:
        device = self.ids.device
        lengths = [self.lengths[member] for member in members]
        length = max(lengths)
        row_of_segment = torch.full((self.num_segments,), -1)
        row_of_segment[members] = torch.arange(len(members))
        row_T = row_of_segment.to(device)[self.ids]
        token_index = (row_T >= 0).nonzero().squeeze(1)
        segment_index = torch.tensor(members, device=device)
        return RowBucket(
            token_index=token_index,
            cell_index=(row_T * length + self.positions_T)[token_index],
            segment_index=segment_index,
            row_lengths=self.lengths_S[segment_index],
            num_rows=len(members),
            length=length,
            is_dense=min(lengths) == length and members == sorted(members),
        )


def group_by_length(lengths: list[int]) -> list[list[int]]:
    """Groups the indices of non-zero lengths within MAX_ROW_WASTE, longest first."""
    groups: list[list[int]] = []
    num_real = 0
    for index in sorted((i for i, length in enumerate(lengths) if length > 0), key=lambda i: (-lengths[i], i)):
        num_real += lengths[index]
        if groups and lengths[groups[-1][0]] * (len(groups[-1]) + 1) <= MAX_ROW_WASTE * num_real:
            groups[-1].append(index)
        else:
            groups.append([index])
            num_real = lengths[index]
    return groups

"""Token merging (ToMe, arXiv 2210.09461). Shapes: B frames, P tokens, D width."""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor


def merge_rounds(num_patches: int, num_tokens: int) -> list[int]:
    """Tokens merged in each round.

    >>> merge_rounds(729, 16)
    [364, 182, 91, 46, 23, 7]
    """
    rounds = []
    while num_patches > num_tokens:
        rounds.append(min(num_patches // 2, num_patches - num_tokens))
        num_patches -= rounds[-1]
    return rounds


@torch.no_grad()
def merge_tokens(x_BPD: Tensor, num_tokens: int, *, num_heads: int = 16) -> Tensor:
    """Merges each frame's tokens to `num_tokens`, unless there are fewer.

    In each round even-indexed tokens pair with the odd-indexed one of highest cosine (features averaged over heads).
    The best pairs merge to means weighted by token sizes.

    Returns:
        (B, num_tokens, D): unmerged tokens by descending similarity, then destinations.
    """
    if num_tokens < 1:
        raise ValueError(f"{num_tokens = } must be at least 1")
    if x_BPD.shape[-1] % num_heads:
        raise ValueError(f"{num_heads = } must divide the features' width {x_BPD.shape[-1]}")
    # bf16 counts exactly only up to 256
    merged = x_BPD.float()
    sizes = merged.new_ones(*merged.shape[:2], 1)
    for num_merged in merge_rounds(x_BPD.shape[1], num_tokens):
        merged, sizes = _merge_round(merged, sizes, num_merged, num_heads)
    return merged.to(x_BPD.dtype)


def _merge_round(x_BPD: Tensor, sizes_BP1: Tensor, num_merged: int, num_heads: int) -> tuple[Tensor, Tensor]:
    metric = F.normalize(x_BPD.reshape(*x_BPD.shape[:2], num_heads, -1).mean(dim=2), dim=-1)
    similarity = metric[:, ::2] @ metric[:, 1::2].transpose(1, 2)  # (B, sources, destinations)
    best_score, best_destination = similarity.max(dim=-1)
    order = best_score.argsort(dim=-1, descending=True, stable=True)  # ties: the earlier token merges first
    merged, unmerged = order[:, :num_merged], order[:, num_merged:]
    destination = best_destination.gather(1, merged)
    weighted = torch.cat([x_BPD * sizes_BP1, sizes_BP1], dim=-1)  # sums and sizes in one scatter
    sources, destinations = weighted[:, ::2], weighted[:, 1::2].clone()
    destinations.scatter_add_(1, _expand(destination, weighted), sources.gather(1, _expand(merged, weighted)))
    result = torch.cat([sources.gather(1, _expand(unmerged, weighted)), destinations], dim=1)
    return result[..., :-1] / result[..., -1:], result[..., -1:]


def _expand(index_BK: Tensor, like: Tensor) -> Tensor:
    return index_BK.unsqueeze(-1).expand(-1, -1, like.shape[-1])

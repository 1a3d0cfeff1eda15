"""Efficient Video Sampling (EVS, arXiv 2510.14624): vision tokens that differ most from the frame before.

Tokens merged by ToMe have no place in the frame, so each is compared with its most similar token of the frame before.
The first frame of a medium ranks before all changes.
"""

from __future__ import annotations

import torch
from torch import Tensor
from torch.nn import functional as F

from timeviper_model.batching.batch import TokenKind
from timeviper_model.ops.precision import widen


def keep_changes(features_VD: Tensor, token_kind_T: Tensor, tokens_per_frame: int, num_kept: int) -> Tensor:
    """(V,) bool: the `num_kept` vision tokens of one sample that changed most; ties go to the lower index.

    Args:
        features_VD: rows of the sample's vision tokens, in order.
        token_kind_T: of all its tokens. Adjacent vision tokens are one medium.
    """
    is_vision_T = token_kind_T == TokenKind.VISION
    starts_T = is_vision_T.clone()
    starts_T[1:] &= ~is_vision_T[:-1]
    runs = torch.bincount((starts_T.cumsum(0) - 1)[is_vision_T]).tolist()
    changes_V = torch.cat(
        [features_VD.new_zeros(0), *(_changes(x, tokens_per_frame) for x in torch.split(features_VD, runs))]
    )
    kept_V = torch.zeros(len(features_VD), dtype=torch.bool, device=features_VD.device)
    kept_V[changes_V.sort(descending=True, stable=True).indices[:num_kept]] = True
    return kept_V


def _changes(features_VD: Tensor, tokens_per_frame: int) -> Tensor:
    """(V,) 1 - the largest cosine to a token of the frame before; infinite in the first frame."""
    num_frames = -(-len(features_VD) // tokens_per_frame)
    padded = F.pad(features_VD, (0, 0, 0, num_frames * tokens_per_frame - len(features_VD)))
    unit_FPD = F.normalize(widen(padded), dim=-1).view(num_frames, tokens_per_frame, features_VD.shape[1])
    cosine_FP = (unit_FPD[1:] @ unit_FPD[:-1].transpose(1, 2)).amax(-1)
    first_1P = cosine_FP.new_full((1, tokens_per_frame), -torch.inf)
    return (1.0 - torch.cat([first_1P, cosine_FP])).flatten()[: len(features_VD)]

"""One training step: micro-batches forward and backward, one update, and the sums that describe it.

Knows the ds_engine and the model's output; does not know where batches come from or where metrics go.
"""

from __future__ import annotations

from typing import Any, NamedTuple

import torch
import torch.distributed as dist

from timeviper_platform.training.feed import StepBatches
from timeviper_platform.training.zero import loss_scale


class StepResult(NamedTuple):
    """A step's figures over all ranks."""

    loss: float
    """mean cross entropy over the labelled positions of the global batch"""
    grad_norm: float
    """before clipping"""
    num_vision_tokens: tuple[int, ...]
    """entering the language model, and left after every TransV site"""


def train_step(
    ds_engine: Any, batches: StepBatches, *, use_transv: bool, device: torch.device, dtype: torch.dtype
) -> StepResult:
    """Runs the step's micro-batches and updates the parameters.

    Raises:
        RuntimeError: when the loss is not finite, before the update's effect is saved anywhere.
    """
    scale = loss_scale(batches.num_targets, dist.get_world_size())
    sums: torch.Tensor | None = None
    for number, (batch, is_dummy) in enumerate(batches.micro_batches, start=1):
        output = ds_engine(batch.to(device, dtype), use_transv=use_transv)
        weight = 0.0 if is_dummy else scale
        ds_engine.backward(output.loss_sum * weight, scale_wrt_gas=False)
        figures = torch.cat([output.loss_sum.detach().double()[None], output.num_vision_tokens.double()])
        figures = figures * (0.0 if is_dummy else 1.0)
        sums = figures if sums is None else sums + figures
        norm = _unpartitioned_norm(ds_engine) if number == len(batches.micro_batches) else None
        ds_engine.step()
    assert sums is not None
    dist.all_reduce(sums)
    loss_sum, *num_vision_tokens = sums.tolist()
    loss = loss_sum / batches.num_targets
    if loss != loss or loss in (float("inf"), float("-inf")):
        raise RuntimeError(
            f"loss is {loss} at step {batches.step}; resume from an earlier checkpoint with a lower learning rate"
        )
    grad_norm = ds_engine.get_global_grad_norm() if norm is None else norm
    return StepResult(loss, float(grad_norm or 0.0), tuple(int(count) for count in num_vision_tokens))


def _unpartitioned_norm(ds_engine: Any) -> float | None:
    """Stage 0 in fp32 has no DeepSpeed optimizer that keeps the norm; its gradients are whole on every rank."""
    if ds_engine.zero_optimization() or ds_engine.bfloat16_enabled():
        return None
    norms = [p.grad.norm() for p in ds_engine.module.parameters() if p.grad is not None]
    return float(torch.linalg.vector_norm(torch.stack(norms)))

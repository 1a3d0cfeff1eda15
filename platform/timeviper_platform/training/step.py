"""One training step: what the ranks agree on before it, micro-batches forward and backward, one update, and its sums.

Knows the ds_engine and the model's output; does not know where batches come from or where metrics go.
"""

from __future__ import annotations

import math
from collections.abc import Iterable
from typing import Any, NamedTuple

import torch
import torch.distributed as dist

from timeviper_platform.training.batches.step_batches import StepBatches
from timeviper_platform.training.distributed import sum_over_ranks
from timeviper_platform.training.interrupts import FatalTrainingError, Interrupt, out_of_memory_advice
from timeviper_platform.training.optim.deepspeed_engine import loss_scale


class StepResult(NamedTuple):
    """A step's figures over all ranks."""

    loss: float
    """mean cross entropy over the labelled positions of the global batch"""
    grad_norm: float
    """before clipping"""
    num_vision_tokens: tuple[int, ...]
    """entering the language model, and left after every TransV site"""


class Agreement(NamedTuple):
    """What all ranks know alike before a step."""

    batches: StepBatches
    """with the counts of what is really there"""
    num_damaged: int
    """samples of the global batch that some rank cannot read"""
    interrupt: Interrupt


def agree(batches: StepBatches, interrupt: Interrupt, *, device: torch.device) -> Agreement:
    """The step without what any rank found damaged, and the strongest interrupt; one small collective."""
    lost = [len(batches.damaged), sum(item.num_tokens for item in batches.damaged)]
    lost += [sum(item.num_targets for item in batches.damaged)]
    interrupts = [int(interrupt is Interrupt.SAVE), int(interrupt is Interrupt.STOP)]
    sums = torch.tensor(lost + interrupts, dtype=torch.int64, device=device)
    dist.all_reduce(sums)
    num_samples, num_tokens, num_targets, num_save, num_stop = (int(count) for count in sums.tolist())
    counts = batches.counts._replace(
        num_samples=batches.counts.num_samples - num_samples,
        num_tokens=batches.counts.num_tokens - num_tokens,
        num_targets=batches.counts.num_targets - num_targets,
    )
    agreed = batches._replace(counts=counts)
    return Agreement(
        agreed, num_samples, Interrupt.STOP if num_stop else Interrupt.SAVE if num_save else Interrupt.NONE
    )


def strongest_interrupt(interrupt: Interrupt, *, device: torch.device) -> Interrupt:
    """The strongest interrupt of all ranks; one small collective."""
    strongest = torch.tensor(int(interrupt), device=device)
    dist.all_reduce(strongest, op=dist.ReduceOp.MAX)
    return Interrupt(int(strongest))


def train_step(
    ds_engine: Any, batches: StepBatches, *, use_transv: bool, device: torch.device, dtype: torch.dtype
) -> StepResult:
    """Runs the step's micro-batches and updates the parameters.

    Raises:
        FatalTrainingError: when loss or gradient norm are not finite, before the update's effect is saved anywhere.
        RuntimeError: when the memory does not suffice.
    """
    largest = max(len(item.batch.input_ids) for item in batches.micro_batches)
    with out_of_memory_advice(step=batches.counts.step, largest_pack=largest):
        return _train_step(ds_engine, batches, use_transv=use_transv, device=device, dtype=dtype)


def _train_step(
    ds_engine: Any, batches: StepBatches, *, use_transv: bool, device: torch.device, dtype: torch.dtype
) -> StepResult:
    scale = loss_scale(max(1, batches.counts.num_targets), dist.get_world_size())
    sums: torch.Tensor | None = None
    losses = []
    for number, item in enumerate(batches.micro_batches, start=1):
        is_dummy = item.is_dummy
        output = ds_engine(item.batch.to(device, dtype), use_transv=use_transv)
        losses.append(output.loss_sum.detach())
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
    loss = loss_sum / max(1, batches.counts.num_targets)
    grad_norm = float((ds_engine.get_global_grad_norm() if norm is None else norm) or 0.0)
    if not math.isfinite(loss) or not math.isfinite(grad_norm):
        raise FatalTrainingError(_not_finite(batches, loss, grad_norm, torch.stack(losses)))
    return StepResult(loss, grad_norm, tuple(int(count) for count in num_vision_tokens))


@torch.no_grad()
def validation_loss(
    forward: Any, steps: Iterable[StepBatches], *, use_transv: bool, device: torch.device, dtype: torch.dtype
) -> float:
    """Mean cross entropy over the labelled positions of all ranks' batches, without an update; collective.

    Args:
        forward: the ds_engine, or a model alone.
        steps: this rank's batches.
        use_transv: as in training.
        device: of the model.
        dtype: of its activations.
    """
    sums = torch.zeros(2, dtype=torch.float64, device=device)
    for item in (item for step in steps for item in step.micro_batches):
        output = forward(item.batch.to(device, dtype), use_transv=use_transv)
        if not item.is_dummy:
            sums += torch.stack([output.loss_sum.double(), output.num_targets.double()])
    sum_over_ranks(sums)
    loss_sum, num_targets = sums.tolist()
    return float(loss_sum / max(1.0, num_targets))


def _not_finite(batches: StepBatches, loss: float, grad_norm: float, losses: torch.Tensor) -> str:
    """Says which packs of which rank it came from, as far as their losses tell; collective."""
    own = [
        (f"pack {item.pack_index} (samples {', '.join(item.sample_ids)})", finite)
        for item, finite in zip(batches.micro_batches, losses.isfinite().tolist(), strict=True)
        if not item.is_dummy
    ]
    found: list[list[tuple[str, bool]]] = [[] for _ in range(dist.get_world_size())]
    dist.all_gather_object(found, own)
    packs = [pack for packs in found for pack in packs]
    guilty = [name for name, finite in packs if not finite]
    where = "in " + "; ".join(guilty or [name for name, _ in packs])
    where = where if guilty else f"though the loss of every pack is finite: a backward pass overflowed {where}"
    return f"loss is {loss} and the gradient norm {grad_norm} at step {batches.counts.step}, {where}"


def _unpartitioned_norm(ds_engine: Any) -> float | None:
    """Stage 0 in fp32 has no DeepSpeed optimizer that keeps the norm; its gradients are whole on every rank."""
    if ds_engine.zero_optimization() or ds_engine.bfloat16_enabled():
        return None
    norms = [p.grad.norm() for p in ds_engine.module.parameters() if p.grad is not None]
    return float(torch.linalg.vector_norm(torch.stack(norms)))

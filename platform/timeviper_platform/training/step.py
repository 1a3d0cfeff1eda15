"""One training step, and the validation loss."""

from __future__ import annotations

import math
from collections.abc import Iterable
from dataclasses import dataclass
from typing import Any, NamedTuple

import torch
import torch.distributed as dist

from timeviper_platform.training.batches.step_batches import StepBatches
from timeviper_platform.training.distributed import sum_over_ranks
from timeviper_platform.training.interrupts import FatalTrainingError, Interrupt, out_of_memory_advice
from timeviper_platform.training.optim.deepspeed_engine import loss_scale


@dataclass(frozen=True, kw_only=True, slots=True)
class TrainContext:
    device: torch.device
    dtype: torch.dtype
    """Dtype of activations."""
    use_transv: bool
    rank: int = 0
    world_size: int = 1


class StepResult(NamedTuple):
    """Results over all ranks."""

    loss: float
    """Mean over the labelled positions of the global batch."""
    grad_norm: float
    """Gradient norm before clipping."""
    num_vision_tokens: tuple[int, ...]
    """Vision tokens at the language model's input, then after every TransV site."""


class Agreement(NamedTuple):
    batches: StepBatches
    """Batches whose counts exclude damaged samples."""
    num_damaged: int
    """Damaged samples over all ranks."""
    interrupt: Interrupt


def agree(batches: StepBatches, interrupt: Interrupt, *, device: torch.device) -> Agreement:
    """Subtracts damaged samples and picks the strongest interrupt; collective."""
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
    strongest = Interrupt.STOP if num_stop else Interrupt.SAVE if num_save else Interrupt.NONE
    return Agreement(batches._replace(counts=counts), num_samples, strongest)


def strongest_interrupt(interrupt: Interrupt, *, device: torch.device) -> Interrupt:
    strongest = torch.tensor(int(interrupt), device=device)
    dist.all_reduce(strongest, op=dist.ReduceOp.MAX)
    return Interrupt(int(strongest))


def train_step(ds_engine: Any, batches: StepBatches, context: TrainContext) -> StepResult:
    """Runs the micro-batches forward and backward, and updates once.

    Raises:
        FatalTrainingError: if the loss or gradient norm is not finite.
    """
    largest_pack = max(len(item.batch.input_ids) for item in batches.micro_batches)
    with out_of_memory_advice(rank=context.rank, step=batches.counts.step, largest_pack=largest_pack):
        sums, losses, norm = _run_micro_batches(ds_engine, batches, context)
        dist.all_reduce(sums)
        loss_sum, *num_vision_tokens = sums.tolist()
        loss = loss_sum / max(1, batches.counts.num_targets)
        grad_norm = float((ds_engine.get_global_grad_norm() if norm is None else norm) or 0.0)
        if not math.isfinite(loss) or not math.isfinite(grad_norm):
            raise FatalTrainingError(describe_non_finite(batches, loss, grad_norm, losses))
        return StepResult(loss, grad_norm, tuple(int(count) for count in num_vision_tokens))


def _run_micro_batches(
    ds_engine: Any, batches: StepBatches, context: TrainContext
) -> tuple[torch.Tensor, torch.Tensor, float | None]:
    scale = loss_scale(max(1, batches.counts.num_targets), context.world_size)
    norm: float | None = None
    sums: torch.Tensor | None = None
    losses = []
    for number, item in enumerate(batches.micro_batches, start=1):
        output = ds_engine(item.batch.to(context.device, context.dtype), use_transv=context.use_transv)
        losses.append(output.loss_sum.detach())
        ds_engine.backward(output.loss_sum * (0.0 if item.is_dummy else scale), scale_wrt_gas=False)
        counts = torch.cat([output.loss_sum.detach().double()[None], output.num_vision_tokens.double()])
        counts = counts * (0.0 if item.is_dummy else 1.0)
        sums = counts if sums is None else sums + counts
        if number == len(batches.micro_batches):
            norm = _unpartitioned_norm(ds_engine)
        ds_engine.step()
    assert sums is not None
    return sums, torch.stack(losses), norm


@torch.no_grad()
def validation_loss(forward: Any, steps: Iterable[StepBatches], context: TrainContext) -> float:
    """Returns the mean over the labelled positions of all ranks; collective."""
    sums = torch.zeros(2, dtype=torch.float64, device=context.device)
    for item in (item for step in steps for item in step.micro_batches):
        output = forward(item.batch.to(context.device, context.dtype), use_transv=context.use_transv)
        if not item.is_dummy:
            sums += torch.stack([output.loss_sum.double(), output.num_targets.double()])
    sum_over_ranks(sums)
    loss_sum, num_targets = sums.tolist()
    return float(loss_sum / max(1.0, num_targets))


def describe_non_finite(batches: StepBatches, loss: float, grad_norm: float, losses: torch.Tensor) -> str:
    """Names packs with a non-finite loss, or all packs if only gradients overflowed; collective."""
    own = [
        (f"pack {item.pack_index} (samples {', '.join(item.sample_ids)})", finite)
        for item, finite in zip(batches.micro_batches, losses.isfinite().tolist(), strict=True)
        if not item.is_dummy
    ]
    gathered: list[list[tuple[str, bool]]] = [[] for _ in range(dist.get_world_size())]
    dist.all_gather_object(gathered, own)
    packs = [pack for packs in gathered for pack in packs]
    broken = [name for name, finite in packs if not finite]
    where = "in " + "; ".join(broken or [name for name, _ in packs])
    where = where if broken else f"though the loss of every pack is finite: a backward pass overflowed {where}"
    return f"loss is {loss} and the gradient norm {grad_norm} at step {batches.counts.step}, {where}"


def _unpartitioned_norm(ds_engine: Any) -> float | None:
    """Computes the norm at stage 0 in float32, where DeepSpeed keeps none."""
    if ds_engine.zero_optimization() or ds_engine.bfloat16_enabled():
        return None
    norms = [p.grad.norm() for p in ds_engine.module.parameters() if p.grad is not None]
    return float(torch.linalg.vector_norm(torch.stack(norms)))

"""A minimal training loop in one process: plain torch without DeepSpeed, prefetching or checkpoints."""

from __future__ import annotations

import torch

from timeviper_platform.training.batches.packing import PackPosition
from timeviper_platform.training.optim.deepspeed_engine import ZeroConfig
from timeviper_platform.training.optim.lr_schedule import learning_rate_factor
from timeviper_platform.training.optim.parameter_groups import freeze_others
from timeviper_platform.training.phase import Phase


def train_bare(phase: Phase, zero: ZeroConfig) -> list[float]:
    """Trains the phase's model; returns the mean loss of each step."""
    freeze_others(phase.model, phase.groups)
    parameters = dict(phase.model.named_parameters())
    optimizer = torch.optim.AdamW(
        [
            {"params": [parameters[name] for name in g.parameter_names], "lr": g.lr, "weight_decay": g.weight_decay}
            for g in phase.groups
        ],
        betas=zero.betas,
        eps=zero.eps,
    )
    losses = []
    for batches in phase.loader.steps(PackPosition(0, 0), 0, phase.num_steps):
        for own, group in zip(optimizer.param_groups, phase.groups, strict=True):
            own["lr"] = group.lr * learning_rate_factor(batches.counts.step, phase.num_steps, phase.config.schedule)
        outputs = [
            phase.model(item.batch.to("cpu", torch.float32), use_transv=phase.config.use_transv).loss_sum
            for item in batches.micro_batches
        ]
        loss = torch.stack(outputs).sum() / sum(int((i.batch.labels >= 0).sum()) for i in batches.micro_batches)
        loss.backward()
        torch.nn.utils.clip_grad_norm_(parameters.values(), zero.max_grad_norm)
        optimizer.step()
        optimizer.zero_grad()
        losses.append(loss.item())
    return losses

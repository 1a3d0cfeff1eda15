"""DeepSpeed from a small typed configuration: a model and its parameter groups to a ds_engine.

Knows DeepSpeed's JSON and the keys that make it run with plain torch on any device. Does not know packs, phases or
checkpoints. `loss_scale` is the one place where DeepSpeed's averaging is undone.
"""

from __future__ import annotations

import os
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any, Literal

import torch
from torch import nn

from timeviper_platform.common.devices import Dtype
from timeviper_platform.training.optim.parameter_groups import ParameterGroup, freeze_others


@dataclass(frozen=True, kw_only=True, slots=True)
class ZeroConfig:
    """What is partitioned over the ranks, and the optimizer's constants."""

    stage: Literal[0, 1, 2, 3] = 2
    """0 nothing, 1 optimizer states, 2 and gradients, 3 and parameters"""
    bucket_size: int = 50_000_000
    """elements that are reduced or gathered at one time"""
    betas: tuple[float, float] = (0.9, 0.999)
    eps: float = 1e-8
    max_grad_norm: float = 1.0
    """gradients are scaled down to this global norm; 0 leaves them"""
    offload_optimizer: bool = False
    """keep masters and moments in the host's memory and step there: slower, and 12 bytes a trained parameter less"""

    def __post_init__(self) -> None:
        if self.offload_optimizer and self.stage == 0:
            raise ValueError("zero.offload_optimizer needs zero.stage 1, 2 or 3: stage 0 has no optimizer of its own")


def deepspeed_config(config: ZeroConfig, *, dtype: Dtype, world_size: int, num_micro_steps: int) -> dict[str, Any]:
    """DeepSpeed's own configuration; a micro-batch is one pack."""
    offload = {"offload_optimizer": {"device": "cpu"}} if config.offload_optimizer else {}
    return {
        "train_micro_batch_size_per_gpu": 1,
        "gradient_accumulation_steps": num_micro_steps,
        "train_batch_size": num_micro_steps * world_size,
        "gradient_clipping": config.max_grad_norm,
        "bf16": {"enabled": dtype == "bfloat16"},
        "zero_optimization": {
            "stage": config.stage,
            "reduce_bucket_size": config.bucket_size,
            "allgather_bucket_size": config.bucket_size,
            "stage3_prefetch_bucket_size": config.bucket_size,
            "overlap_comm": False,  # on CPU there is no second stream; on CUDA a part of the performance work
            "contiguous_gradients": True,
            **offload,
        },
        # torch's AdamW everywhere: DeepSpeed's own for CPU is compiled at first use, for minutes
        "zero_allow_untested_optimizer": True,
        "zero_force_ds_cpu_optimizer": False,
        "steps_per_print": 1_000_000_000,
        "wall_clock_breakdown": False,
    }


def build_ds_engine(
    model: nn.Module,
    groups: Sequence[ParameterGroup],
    config: ZeroConfig,
    *,
    dtype: Dtype,
    num_micro_steps: int,
) -> Any:
    """A DeepSpeed engine that trains `groups` of `model` and nothing else; torch.distributed must be up.

    Its optimizer's groups keep the order of `groups`, so that learning rates can be set by position.
    """
    deepspeed = import_deepspeed()
    freeze_others(model, groups)
    parameters = dict(model.named_parameters())
    optimizer = torch.optim.AdamW(
        [
            {
                "params": [parameters[name] for name in group.parameter_names],
                "lr": group.lr,
                "weight_decay": group.weight_decay,
            }
            for group in groups
        ],
        betas=config.betas,
        eps=config.eps,
    )
    ds_engine, *_ = deepspeed.initialize(
        model=model,
        optimizer=optimizer,
        config=deepspeed_config(
            config,
            dtype=dtype,
            world_size=torch.distributed.get_world_size(),
            num_micro_steps=num_micro_steps,
        ),
        dist_init_required=False,
    )
    return ds_engine


def import_deepspeed() -> Any:
    """The library, told which device it runs on before it looks for one itself: over gloo a CPU, GPU or not."""
    is_over_gloo = torch.distributed.is_initialized() and torch.distributed.get_backend() == "gloo"
    if is_over_gloo or not torch.cuda.is_available():
        os.environ.setdefault("DS_ACCELERATOR", "cpu")
    import logging
    import warnings

    import deepspeed

    # else it compiles kernels for shared memory at first use wherever there is a compiler; gloo is there already
    deepspeed.ops.__compatible_ops__["deepspeed_shm_comm"] = False
    logging.getLogger("DeepSpeed").setLevel(logging.WARNING)  # its own progress is a page an engine
    warnings.filterwarnings("ignore", "`torch.distributed.*is deprecated", FutureWarning)  # in its calls, not in ours
    return deepspeed


def loss_scale(num_targets: int, world_size: int) -> float:
    """Factor on a micro-batch's loss sum, so that a step's gradient is that of the mean over ALL labelled positions.

    DeepSpeed divides gradients by the number of ranks (and, unless told not to, by the micro-steps); the number of
    labelled positions of the global batch is known from the plan.
    """
    return world_size / num_targets


def set_groups(ds_engine: Any, groups: Sequence[ParameterGroup], lr_factor: float) -> None:
    """Learning rate and decay of every optimizer group, as the configuration says and not as a checkpoint left them."""
    for own, group in zip(ds_engine.optimizer.param_groups, groups, strict=True):
        own["lr"] = group.lr * lr_factor
        own["weight_decay"] = group.weight_decay

"""Builds the DeepSpeed engine."""

from __future__ import annotations

import logging
import os
import warnings
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any, Literal

import torch
from torch import nn

from timeviper_platform.common.devices import Dtype
from timeviper_platform.training.optim.parameter_groups import ParameterGroup, freeze_others

SUPPORTED_VERSION = "0.19."


@dataclass(frozen=True, kw_only=True, slots=True)
class ZeroConfig:
    """ZeRO partitioning and the constants of AdamW."""

    stage: Literal[0, 1, 2, 3] = 2
    """Partitioned state: 0 none, 1 optimizer, 2 also gradients, 3 also parameters."""
    bucket_size: int = 50_000_000
    """Elements reduced or gathered together."""
    betas: tuple[float, float] = (0.9, 0.999)
    eps: float = 1e-8
    max_grad_norm: float = 1.0
    """Maximum global gradient norm; 0 disables clipping."""
    offload_optimizer: bool = False
    """Keep and step the optimizer in host memory: slower, saves 12 bytes per trained parameter."""

    def __post_init__(self) -> None:
        if self.offload_optimizer and self.stage == 0:
            raise ValueError(
                "zero.offload_optimizer needs zero.stage 1, 2 or 3; stage 0 does not partition the optimizer"
            )


def deepspeed_config(config: ZeroConfig, *, dtype: Dtype, world_size: int, num_micro_steps: int) -> dict[str, Any]:
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
            "overlap_comm": False,  # a CPU has no second stream
            "contiguous_gradients": True,
            **offload,
        },
        # torch's AdamW: compiling DeepSpeed's CPU optimizer takes minutes
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
    """Builds an engine that trains only `groups`, in their order. Needs torch.distributed."""
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
    """Raises RuntimeError when the version is not supported."""
    is_over_gloo = torch.distributed.is_initialized() and torch.distributed.get_backend() == "gloo"
    if is_over_gloo or not torch.cuda.is_available():
        os.environ.setdefault("DS_ACCELERATOR", "cpu")
    import deepspeed

    if not deepspeed.__version__.startswith(SUPPORTED_VERSION):
        raise RuntimeError(
            f"deepspeed {deepspeed.__version__} is installed, but this release uses internals of {SUPPORTED_VERSION}x;"
            f" pip install deepspeed=={SUPPORTED_VERSION}*"
        )
    # else DeepSpeed compiles shared-memory kernels at first use
    deepspeed.ops.__compatible_ops__["deepspeed_shm_comm"] = False
    logging.getLogger("DeepSpeed").setLevel(logging.WARNING)
    warnings.filterwarnings("ignore", "`torch.distributed.*is deprecated", FutureWarning)
    return deepspeed


def loss_scale(num_targets: int, world_size: int) -> float:
    """Returns the factor that turns a micro-batch's loss sum into its part of the mean over ALL labelled positions.

    Undoes DeepSpeed's average over ranks.
    """
    return world_size / num_targets


def set_groups(ds_engine: Any, groups: Sequence[ParameterGroup], lr_factor: float) -> None:
    for target, group in zip(ds_engine.optimizer.param_groups, groups, strict=True):
        target["lr"] = group.lr * lr_factor
        target["weight_decay"] = group.weight_decay

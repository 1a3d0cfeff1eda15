"""Estimates what a node needs besides device memory: host memory, disk, and time for saves and resumes."""

from __future__ import annotations

from typing import NamedTuple

from timeviper_platform.common.devices import Dtype, torch_dtype
from timeviper_platform.training.cost.memory import FP32_BYTES, ModelSizes, state_bytes

GPUS_PER_NODE = 8
"""Assumed ranks of a node with GPUs."""
STORAGE_BYTES_PER_S = 1e9
"""Assumed rate of a node's storage, in each direction."""


class CheckpointBytes(NamedTuple):
    shared: int
    """Written by rank 0 and read by every node."""
    per_rank: int
    """Written and, at the same number of ranks, read by each rank."""

    def of_node(self, num_ranks: int) -> int:
        """Bytes that the first node writes, and any node reads."""
        return self.shared + num_ranks * self.per_rank


class NodeNeeds(NamedTuple):
    """Bytes, and seconds at STORAGE_BYTES_PER_S."""

    num_ranks: int
    checkpoint: int
    """All ranks' files of a checkpoint."""
    traffic: int
    """Bytes of a save or a resume."""
    host_start: int
    """Float32 weights that each rank builds before it moves them to its device."""
    host_save: int
    """Copies that a save writes while training continues."""
    host_optimizer: int
    """Optimizer of all ranks, if `zero.offload_optimizer`."""
    host_caches: int
    """Features and micro-batches read ahead."""
    disk: int
    """TMPDIR, with remote storage: a checkpoint being fetched, and the weights before the phase."""

    @property
    def host(self) -> int:
        return self.host_optimizer + max(self.host_start, self.host_save + self.host_caches)

    @property
    def seconds(self) -> float:
        return self.traffic / STORAGE_BYTES_PER_S


def checkpoint_bytes(sizes: ModelSizes, *, zero_stage: int, world_size: int, dtype: Dtype) -> CheckpointBytes:
    """Returns the tensors' bytes in DeepSpeed's files.

    Stage 0 in float32 has no master weights; stage 3 saves trained parameters only as master weights.
    """
    width = torch_dtype(dtype).itemsize
    has_masters = zero_stage > 0 or dtype != "float32"
    optimizer = sizes.num_trained * FP32_BYTES * (3 if has_masters else 2)
    if zero_stage == 0:
        return CheckpointBytes(sizes.num_parameters * width + optimizer, 0)
    if zero_stage < 3:
        return CheckpointBytes(sizes.num_parameters * width, -(-optimizer // world_size))
    frozen = (sizes.num_parameters - sizes.num_trained) * width
    return CheckpointBytes(0, -(-(optimizer + frozen) // world_size))


def node_needs(
    sizes: ModelSizes,
    *,
    zero_stage: int,
    world_size: int,
    dtype: Dtype,
    use_gpu: bool,
    offload_optimizer: bool,
    cache_bytes: int,
    remote: bool,
) -> NodeNeeds:
    """Returns the needs of a node with GPUS_PER_NODE ranks, or with all ranks if they use no GPU.

    Args:
        cache_bytes: of a rank's loader.
        remote: whether the run folder is in an object store, so that files pass through TMPDIR.
    """
    num_ranks = min(world_size, GPUS_PER_NODE) if use_gpu else world_size
    checkpoint = checkpoint_bytes(sizes, zero_stage=zero_stage, world_size=world_size, dtype=dtype)
    optimizer = state_bytes(sizes, zero_stage=zero_stage, world_size=world_size, dtype=dtype).optimizer
    weights, traffic = sizes.num_parameters * FP32_BYTES, checkpoint.of_node(num_ranks)
    return NodeNeeds(
        num_ranks=num_ranks,
        checkpoint=checkpoint.of_node(world_size),
        traffic=traffic,
        host_start=num_ranks * weights,
        host_save=traffic,
        host_optimizer=num_ranks * optimizer if offload_optimizer else 0,
        host_caches=num_ranks * cache_bytes,
        disk=traffic + weights if remote else 0,
    )

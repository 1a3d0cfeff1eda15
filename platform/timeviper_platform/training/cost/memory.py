"""Estimates a rank's memory for each ZeRO stage, without DeepSpeed's buckets, fragmentation and NCCL buffers."""

from __future__ import annotations

from collections.abc import Callable
from typing import NamedTuple

import torch
from torch import Tensor, nn

from timeviper_model.batching.segments import Segments
from timeviper_model.config import BlockType, HybridConfig, TextConfig, TimeViperConfig
from timeviper_model.layers.backbone import make_block
from timeviper_model.layers.transv import num_kept
from timeviper_model.timeviper import LOGITS_ELEMENTS
from timeviper_platform.common.devices import Dtype, torch_dtype
from timeviper_platform.training.batches.packing import Pack

PROBE_CHUNKS = 2
"""Chunks in the probed sequence; two, to include the state between chunks."""
PROBE_CHUNK_SIZE = 128
"""Tokens per chunk for models without a scan."""
FP32_BYTES = 4


class ModelSizes(NamedTuple):
    num_parameters: int
    num_trained: int


class StateBytes(NamedTuple):
    """Bytes that one rank holds between steps."""

    parameters: int
    gradients: int
    optimizer: int
    """fp32 master weights and AdamW's two moments."""

    @property
    def total(self) -> int:
        return sum(self)


def state_bytes(sizes: ModelSizes, *, zero_stage: int, world_size: int, dtype: Dtype) -> StateBytes:
    """Returns the bytes of one rank (arXiv 1910.02054, section 5)."""
    width = torch_dtype(dtype).itemsize
    has_masters = zero_stage > 0 or dtype != "float32"
    optimizer = sizes.num_trained * FP32_BYTES * (3 if has_masters else 2)
    return StateBytes(
        parameters=_share(sizes.num_parameters * width, world_size if zero_stage >= 3 else 1),
        gradients=_share(sizes.num_trained * width, world_size if zero_stage >= 2 else 1),
        optimizer=_share(optimizer, world_size if zero_stage >= 1 else 1),
    )


def tokens_by_layer(config: TimeViperConfig, pack: Pack, *, use_transv: bool) -> list[int]:
    num_text = pack.num_tokens - pack.num_vision_tokens
    return [num_text + sum(present) for present in vision_by_layer(config, pack, use_transv=use_transv)]


def vision_by_layer(config: TimeViperConfig, pack: Pack, *, use_transv: bool) -> list[list[int]]:
    sites = {site.layer: site for site in config.transv} if use_transv else {}
    present, by_layer = list(pack.vision_counts), []
    for layer in range(config.text.num_hidden_layers):
        if layer in sites:
            keep = sites[layer].keep
            present = [num_kept(n, here, keep) for n, here in zip(pack.vision_counts, present, strict=True)]
        by_layer.append(present)
    return by_layer


def activation_bytes(
    config: TimeViperConfig,
    pack: Pack,
    *,
    dtype: Dtype,
    use_transv: bool,
    activation_checkpointing: bool,
    trains_blocks: bool = True,
) -> int:
    """Returns the bytes of one pack that autograd keeps between forward and backward.

    With activation_checkpointing, blocks keep their input and are recomputed one at a time. Linear maps of frozen
    blocks keep no input.
    """
    kinds = sorted(set(config.text.block_types))
    own = {kind: saved_bytes_per_token(config.text, kind, torch_dtype(dtype), trained=trains_blocks) for kind in kinds}
    num_tokens = tokens_by_layer(config, pack, use_transv=use_transv)
    blocks = [count * own[kind] for count, kind in zip(num_tokens, config.text.block_types, strict=True)]
    if activation_checkpointing:
        inputs = sum(num_tokens) * config.text.hidden_size * torch_dtype(dtype).itemsize
        return round(inputs + max(blocks)) + _logits_bytes(config, pack, torch_dtype(dtype))
    return round(sum(blocks)) + _logits_bytes(config, pack, torch_dtype(dtype))


def saved_bytes_per_token(config: TextConfig, kind: BlockType, dtype: torch.dtype, *, trained: bool = True) -> float:
    """Measures the bytes per token that autograd keeps in a block."""
    num_tokens = PROBE_CHUNKS * (config.chunk_size if isinstance(config, HybridConfig) else PROBE_CHUNK_SIZE)
    block = make_block(config, kind).to(dtype).requires_grad_(trained)
    for parameter in block.parameters():
        nn.init.normal_(parameter, 0.0, 0.02)
    hidden = torch.randn(num_tokens, config.hidden_size, dtype=dtype, requires_grad=True)
    segments = Segments(torch.zeros(num_tokens, dtype=torch.long), 1)
    return saved_bytes(lambda: block(hidden, segments), list(block.parameters())) / num_tokens


def saved_bytes(run: Callable[[], object], parameters: list[Tensor]) -> int:
    """Returns the bytes that autograd keeps for the backward pass of `run()`."""
    own = {parameter.untyped_storage().data_ptr() for parameter in parameters}
    sizes: dict[int, int] = {}
    kept: list[Tensor] = []  # alive until the end, because addresses of freed storages are reused

    def pack(tensor: Tensor) -> Tensor:
        storage = tensor.untyped_storage()
        if storage.data_ptr() not in own:
            sizes[storage.data_ptr()] = storage.nbytes()
            kept.append(tensor)
        return tensor

    with torch.autograd.graph.saved_tensors_hooks(pack, lambda tensor: tensor):
        result = run()
    del result
    return sum(sizes.values())


def _logits_bytes(config: TimeViperConfig, pack: Pack, dtype: torch.dtype) -> int:
    rows = min(pack.num_targets, max(1, LOGITS_ELEMENTS // config.text.vocab_size))
    width = FP32_BYTES + (0 if dtype == torch.float32 else dtype.itemsize + FP32_BYTES)
    return rows * config.text.vocab_size * width


def _share(num_bytes: int, parts: int) -> int:
    return -(-num_bytes // parts)

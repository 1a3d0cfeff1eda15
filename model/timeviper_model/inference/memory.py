"""Bytes that requests take in the caches."""

from __future__ import annotations

from typing import NamedTuple

import torch

from timeviper_model.config import HybridConfig, TimeViperConfig
from timeviper_model.inference.chunked_transv import SitePlan, plan_sites
from timeviper_model.inference.requests import EngineConfig
from timeviper_model.layers.cache import HybridCache
from timeviper_model.ops.linear import Linear
from timeviper_model.timeviper import TimeViper

NUM_MIXTURES = 16
"""Mixtures of text and vision for which the longest request is computed."""


class RequestMemory(NamedTuple):
    """What a request needs from its admission to its end."""

    tokens: dict[int, int]
    """Tokens of prompt and whole answer, by attention layer."""
    working_bytes: int
    """Bytes that TransV keeps of the prompt while it is read."""


def request_memory(
    config: TimeViperConfig, num_text: int, num_vision: int, num_new: int, *, dtype: torch.dtype
) -> RequestMemory:
    tokens = tokens_by_layer(config, num_text + num_new, num_vision)
    return RequestMemory(tokens, working_bytes(config, num_text, num_vision, dtype=dtype))


def check_limits(config: TimeViperConfig, limits: EngineConfig, cache: HybridCache, *, dtype: torch.dtype) -> None:
    """Raises ValueError if the longest request that `limits` allow, or all caches together, cannot fit."""
    if not limits.kv_cache_bytes:
        return
    lengths = limits.max_prompt_tokens, limits.max_new_tokens
    for num_text, num_vision in ((lengths[0], 0), (0, lengths[0])):
        memory = request_memory(config, num_text, num_vision, lengths[1], dtype=dtype)
        needed = cache.room_bytes(memory.tokens) + memory.working_bytes
        if needed > limits.kv_cache_bytes:
            raise ValueError(
                f"{limits.kv_cache_bytes = } cannot hold a prompt of max_prompt_tokens = {lengths[0]} with an answer of"
                f" max_new_tokens = {lengths[1]}, which takes {needed} bytes; raise the first or lower the others"
            )
    device = cache.device
    if device.type == "cuda":
        caches, free = limits.kv_cache_bytes + limits.prefix_cache_bytes, torch.cuda.mem_get_info(device)[0]
        if caches > free:
            raise ValueError(
                f"kv_cache_bytes and prefix_cache_bytes may take {caches} bytes, but {device} has {free} left besides"
                " the weights and Mamba states; lower them or num_slots"
            )


class ServingBytes(NamedTuple):
    """Memory of an engine at its fullest."""

    weights: int
    mamba_states: int
    keys_and_values: int
    """With what TransV keeps of prompts being read."""
    prefix_cache: int
    activations: int

    @property
    def total(self) -> int:
        return sum(self)

    def __str__(self) -> str:
        parts = ", ".join(f"{name.replace('_', ' ')} {value / 1e9:.2f}" for name, value in self._asdict().items())
        return f"{self.total / 1e9:.2f} GB ({parts})"


def serving_bytes(
    config: TimeViperConfig, limits: EngineConfig, *, dtype: torch.dtype, device_type: str
) -> ServingBytes:
    """Computes the memory with every slot and cache full, without building the model.

    Without `kv_cache_bytes`, every slot holds the longest prompt with the longest answer.
    """
    with torch.device("meta"):
        model = TimeViper(config)
    weights = sum(parameter.numel() for parameter in model.parameters()) * dtype.itemsize
    if limits.pack_weights and device_type == "cpu" and dtype == torch.float32:
        packed = {id(module.weight): module.weight for module in model.modules() if isinstance(module, Linear)}
        weights += sum(weight.numel() for weight in packed.values()) * dtype.itemsize
    cache = HybridCache(config.text, limits.num_slots, device="meta", dtype=dtype)
    keys_and_values = limits.kv_cache_bytes or limits.num_slots * longest_request_bytes(config, limits, cache, dtype)
    return ServingBytes(
        weights=weights,
        mamba_states=cache.num_bytes,
        keys_and_values=keys_and_values,
        prefix_cache=limits.prefix_cache_bytes + (limits.prefix_host_bytes if device_type == "cpu" else 0),
        activations=_activation_bytes(model, limits, dtype),
    )


def longest_request_bytes(config: TimeViperConfig, limits: EngineConfig, cache: HybridCache, dtype: torch.dtype) -> int:
    """Returns the most that one request within `limits` takes, over mixtures of text and vision."""
    num_prompt, needed = limits.max_prompt_tokens, 0
    for num_vision in {num_prompt * share // NUM_MIXTURES for share in range(NUM_MIXTURES + 1)}:
        memory = request_memory(config, num_prompt - num_vision, num_vision, limits.max_new_tokens, dtype=dtype)
        needed = max(needed, cache.room_bytes(memory.tokens) + memory.working_bytes)
    return needed


def _activation_bytes(model: TimeViper, limits: EngineConfig, dtype: torch.dtype) -> int:
    """Memory of one block for a chunk of a prompt, three times its output and widest product (of a Mamba-2 block:
    projection, convolution, scan and gated norm), and the float32 logits of a step.
    """
    text = model.config.text
    tokens = min(limits.max_prompt_tokens, limits.max_prefill_tokens)
    blocks = (module for name, module in model.named_modules() if name.startswith("backbone.layers"))
    widest = max(module.out_features for module in blocks if isinstance(module, Linear))
    logits = limits.num_slots * text.vocab_size * torch.float32.itemsize
    return tokens * 3 * (text.hidden_size + widest) * dtype.itemsize + 2 * logits


def is_out_of_memory(error: Exception) -> bool:
    """True on a CPU too, where PyTorch raises a plain RuntimeError."""
    return isinstance(error, torch.OutOfMemoryError) or "DefaultCPUAllocator: can't allocate memory" in str(error)


def tokens_by_layer(config: TimeViperConfig, num_text: int, num_vision: int) -> dict[int, int]:
    """Tokens of a prompt whose keys and values each attention layer keeps."""
    plans, present, tokens = plan_sites(config, num_vision), num_vision, {}
    for layer, block_type in enumerate(config.text.block_types):
        present = plans[layer].num_kept if layer in plans else present
        if block_type == "attention":
            tokens[layer] = num_text + present
    return tokens


def working_bytes(config: TimeViperConfig, num_text: int, num_vision: int, *, dtype: torch.dtype) -> int:
    """Bytes that sites keep of a prompt while it is read: sources, tokens that wait for the instruction with the inputs
    of their importance, and features of a whole video for EVS.
    """
    total = 0
    for plan in plan_sites(config, num_vision).values():
        if plan.waits:
            total += _waiting_bytes(config, num_text, plan, dtype=dtype)
            if plan.site.select == "importance":
                total += (num_text + plan.num_present) * _score_bytes(config, plan.site.layer, dtype)
        elif plan.site.select == "evs":
            total += 2 * num_vision * config.vision.row_size * dtype.itemsize
        else:
            total += plan.num_sources * _kv_bytes(config, dtype)
    return total


def _waiting_bytes(config: TimeViperConfig, num_text: int, plan: SitePlan, *, dtype: torch.dtype) -> int:
    """Bytes of tokens before a site that waits: state, score key for attention, position and kind, and sources."""
    kv_bytes = _kv_bytes(config, dtype)
    key_bytes = kv_bytes // 2 if plan.site.select == "attention" else 0
    token_bytes = config.text.hidden_size * dtype.itemsize + key_bytes + 8 + 1
    transfers = plan.site.transfer == "cross_attention"
    return (num_text + plan.num_present) * token_bytes + plan.num_present * kv_bytes * transfers


def _score_bytes(config: TimeViperConfig, layer: int, dtype: torch.dtype) -> int:
    """Bytes per token of the keys that importance reads: B and dt of Mamba-2, both at least fp32."""
    text = config.text
    if isinstance(text, HybridConfig) and text.block_types[layer] == "mamba":
        return (text.n_groups * text.ssm_state_size + text.mamba_num_heads) * max(4, dtype.itemsize)
    return _kv_bytes(config, dtype) // 2


def _kv_bytes(config: TimeViperConfig, dtype: torch.dtype) -> int:
    return 2 * config.text.num_key_value_heads * config.text.head_dim * dtype.itemsize


def prefix_entry_bytes(config: TimeViperConfig, num_system: int, num_vision: int, *, dtype: torch.dtype) -> int:
    """Bytes of an entry; 2.63 GB for the 9B, the paper's plan, 10,000 frames of 16 tokens and bfloat16."""
    text, size = config.text, dtype.itemsize
    kv_bytes = _kv_bytes(config, dtype)
    state_size = 8 if dtype == torch.float64 else 4
    mamba_bytes = 0
    if isinstance(text, HybridConfig):
        window, state = (text.conv_kernel - 1) * text.conv_dim, text.mamba_intermediate_size * text.ssm_state_size
        mamba_bytes = window * size + state * state_size
    plans = plan_sites(config, num_vision)
    total, present = 0, num_vision
    for layer, block_type in enumerate(text.block_types):
        plan = plans.get(layer)
        if plan is not None and plan.waits:
            return total + _waiting_bytes(config, num_system, plan, dtype=dtype)
        if plan is not None:
            total += plan.num_sources * kv_bytes
            present = plan.num_kept
        if block_type == "attention":
            total += (num_system + present) * kv_bytes
        elif block_type == "mamba":
            total += mamba_bytes
    return total

"""Keys of config.json and tensor names of each model family.

ours                     Nemotron-H, NVIDIA      Nemotron-H, transformers    Qwen2
backbone.embeddings      backbone.embeddings     model.embeddings            model.embed_tokens
backbone.layers.0.*      backbone.layers.0.*     model.layers.0.*            model.layers.0.*
backbone.norm_f          backbone.norm_f         model.norm_f                model.norm
"""

from __future__ import annotations

import math
import re
from collections.abc import Mapping
from dataclasses import asdict, fields
from typing import Any

from pydantic import TypeAdapter, ValidationError

from timeviper_model.config import HybridConfig, Qwen2Config, TextConfig, YarnScaling
from timeviper_model.weights.hub_folder import check_not_quantised

LAYER_LETTERS = {
    "mamba": "M",
    "linear_attention": "M",
    "attention": "*",
    "full_attention": "*",
    "mlp": "-",
    "moe": "E",
}
"""transformers' `layers_block_type` to NVIDIA's `hybrid_override_pattern`."""

ACTIVATIONS = {"mlp_hidden_act": "relu2", "mamba_hidden_act": "silu", "hidden_act": "silu"}

FIXED_KEYS: dict[type, dict[str, Any]] = {
    HybridConfig: dict.fromkeys(
        ("residual_in_fp32", "attention_bias", "mlp_bias", "use_bias", "mamba_proj_bias"), False
    )
    | {"sliding_window": None},
    Qwen2Config: {"use_mrope": False},
}
"""Keys of which this model supports one value."""

UNUSED_TENSORS = re.compile(r"mtp\..*|.*\.rotary_emb\.inv_freq")
"""Multi-token-prediction heads, which the model lacks, and buffers that transformers once stored."""

QWEN2_NAMES = (
    ("backbone.embeddings.", "model.embed_tokens."),
    ("backbone.layers.", "model.layers."),
    ("backbone.norm_f.", "model.norm."),
)


def text_config_to_dict(config: TextConfig) -> dict[str, Any]:
    text = asdict(config)
    if isinstance(config, HybridConfig):
        text["time_step_limit"] = [
            value if math.isfinite(value) else {"__float__": "Infinity"} for value in config.time_step_limit
        ]  # as in transformers: JSON has no infinity
        text |= {"model_type": "nemotron_h", "num_hidden_layers": config.num_hidden_layers}
        text |= {name: ACTIVATIONS[name] for name in ("mlp_hidden_act", "mamba_hidden_act")}
        return text | {"architectures": ["NemotronHForCausalLM"]}
    if config.rope_scaling is not None:
        text["rope_scaling"]["rope_type"] = "yarn"
    text |= {"model_type": "qwen2", "hidden_act": ACTIVATIONS["hidden_act"], "architectures": ["Qwen2ForCausalLM"]}
    return text


def text_config_from_dict(raw: Mapping[str, Any], *, where: str) -> TextConfig:
    """Parses a `config.json`, ignoring keys that do not affect the computation."""
    check_not_quantised(raw, where)
    model_type = raw.get("model_type")
    if model_type == "nemotron_h":
        own = {**_nemotron_pattern(raw), **_nemotron_time_step_limit(raw), **_nemotron_head_dim(raw)}
        return _known_fields(HybridConfig, {**raw, **own}, where)
    if model_type == "qwen2":
        return _known_fields(Qwen2Config, {**raw, **_qwen2_rope(raw, where), **_qwen2_window(raw)}, where)
    raise ValueError(f"{where}: the language model's model_type is {model_type!r}; supported are nemotron_h and qwen2")


def file_name(name: str, config: TextConfig) -> str:
    if isinstance(config, HybridConfig):
        return name
    return _swap_prefix(name, QWEN2_NAMES)


def own_name(name: str, config: TextConfig) -> str:
    """Returns our name of a tensor; unknown names are unchanged."""
    if isinstance(config, HybridConfig):
        return _swap_prefix(name, (("model.", "backbone."),))
    return _swap_prefix(name, tuple((theirs, ours) for ours, theirs in QWEN2_NAMES))


def validated(adapter: TypeAdapter[Any], values: Any, where: str) -> Any:
    """Raises ValueError with `where` and each wrong field."""
    try:
        return adapter.validate_python(values)
    except ValidationError as error:
        lines = [f"{'.'.join(map(str, item['loc'])) or 'config'}: {item['msg']}" for item in error.errors()]
        raise ValueError(f"{where}: " + "; ".join(lines)) from error


def _known_fields(kind: type[HybridConfig] | type[Qwen2Config], raw: Mapping[str, Any], where: str) -> TextConfig:
    known = {field.name for field in fields(kind)}
    values = {name: value for name, value in raw.items() if name in known and value is not None}
    config: TextConfig = validated(TypeAdapter(kind), values, where)
    fixed = {**ACTIVATIONS, "num_hidden_layers": config.num_hidden_layers}
    fixed |= dict.fromkeys(("head_dim", "attention_head_dim"), config.head_dim) | FIXED_KEYS[type(config)]
    for name, own in fixed.items():
        if raw.get(name) not in (None, own):
            raise ValueError(
                f"{where}: {name} = {raw[name]!r} is not supported with the other fields; this model computes"
                f" {name} = {own!r}"
            )
    return config


def _nemotron_pattern(raw: Mapping[str, Any]) -> dict[str, str]:
    layers = raw.get("layers_block_type")
    if layers is None or raw.get("hybrid_override_pattern"):
        return {}
    return {"hybrid_override_pattern": "".join(LAYER_LETTERS.get(layer, "?") for layer in layers)}


def _nemotron_head_dim(raw: Mapping[str, Any]) -> dict[str, Any]:
    """NVIDIA's first configurations use `attention_head_dim`."""
    return {} if raw.get("head_dim") is not None else {"head_dim": raw.get("attention_head_dim")}


def _nemotron_time_step_limit(raw: Mapping[str, Any]) -> dict[str, list[Any]]:
    """transformers writes infinity as {"__float__": "Infinity"}."""
    limit = raw.get("time_step_limit") or ()
    values = [value["__float__"] if isinstance(value, dict) else value for value in limit]
    return {"time_step_limit": values} if values else {}


def _qwen2_rope(raw: Mapping[str, Any], where: str) -> dict[str, Any]:
    """transformers 5 writes `rope_theta` and the scaling inside `rope_parameters`."""
    rope = dict(raw.get("rope_parameters") or raw.get("rope_scaling") or {})
    kinds = {rope.pop(key, None) for key in ("rope_type", "type")} - {None}
    theta = {"rope_theta": rope.pop("rope_theta")} if "rope_theta" in rope else {}
    kind = kinds.pop() if kinds else "default"
    if kind == "default":
        return {**theta, "rope_scaling": None}
    if kind != "yarn":
        raise ValueError(f"{where}: RoPE of type {kind!r} is not supported; 'default' and 'yarn' are")
    rope.setdefault("original_max_position_embeddings", raw.get("max_position_embeddings"))
    known = {field.name for field in fields(YarnScaling)}
    other = sorted(key for key, value in rope.items() if key not in known and value is not None)
    if other:
        raise ValueError(f"{where}: rope_scaling has {', '.join(other)}, which this model does not compute")
    scaling = {key: value for key, value in rope.items() if value is not None}
    return {**theta, "rope_scaling": validated(TypeAdapter(YarnScaling), scaling, where)}


def _qwen2_window(raw: Mapping[str, Any]) -> dict[str, bool]:
    """A window that no layer uses is none, as in transformers."""
    if raw.get("layer_types"):
        return {"use_sliding_window": "sliding_attention" in raw["layer_types"]}
    num_layers = raw.get("num_hidden_layers", 0)
    is_used = raw.get("sliding_window", 4096) is not None and raw.get("max_window_layers", 28) < num_layers
    return {"use_sliding_window": bool(raw.get("use_sliding_window")) and is_used}


def _swap_prefix(name: str, prefixes: tuple[tuple[str, str], ...]) -> str:
    for old, new in prefixes:
        if name.startswith(old):
            return new + name.removeprefix(old)
    return name

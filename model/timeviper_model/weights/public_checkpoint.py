"""Checkpoints of TimeViper's public code (github.com/xiaomi-research/timeviper, November 2025; no weights were public).

vision_backbone.*                                        skipped
projector.projector.{0,2}.{weight,bias}                  projector.fc1, projector.fc2
llm_backbone.llm.{backbone,model}.*, .lm_head.weight     backbone.*, lm_head.weight
llm_backbone.llm.{backbone,model}.merge_modules.K.*      transv.<layer of the K-th site>.*
llm_backbone.llm.{backbone,model}.alpha                  alpha of all sites, in order
"""

from __future__ import annotations

import re
from collections.abc import Iterable, Iterator
from pathlib import Path

import torch
from torch import Tensor

from timeviper_model.config import TimeViperConfig, with_text
from timeviper_model.timeviper import TimeViper
from timeviper_model.weights.families import own_name, text_config_from_dict
from timeviper_model.weights.hub_folder import CONFIG_FILE, file_tensors, read_json, weight_files
from timeviper_model.weights.weights_folder import assign_tensors

LLM = "llm_backbone.llm."
WHOLE_FILES = ("pytorch_model.bin", "model.safetensors", "pytorch_model_manual.bin")
PROJECTOR = {"projector.projector.0.": "projector.fc1.", "projector.projector.2.": "projector.fc2."}
MERGE_MODULE = re.compile(r"(?:backbone|model)\.merge_modules\.(\d+)\.(.+)")
ALPHA = re.compile(r"(?:backbone|model)\.alpha")


def load_public_checkpoint(
    path: str | Path, config: TimeViperConfig, *, dtype: torch.dtype = torch.float32
) -> TimeViper:
    """Loads a state dict, or the folder that the public code's training leaves, in evaluation mode.

    `config` must have the same number of TransV sites.

    Raises:
        ValueError: if no file holds the whole model, or its tensors do not fit `config`.
    """
    stored = [tensor for file in public_files(Path(path)) for tensor in file_tensors(file)]
    tensors = ((tensor.name, tensor.read()) for tensor in stored)
    with torch.device("meta"):
        model = TimeViper(config)
    assign_tensors(model, rename_public(tensors, config), where=str(path), dtype=dtype, device="cpu")
    return model.eval()


def public_files(path: Path) -> list[Path]:
    """Returns the file of the whole model, or its shards; training also saves the language model alone."""
    if not path.is_dir():
        return [path]
    whole = [path / name for name in WHOLE_FILES if (path / name).is_file()]
    for files in [*([file] for file in whole), weight_files(path)]:
        if any(tensor.name.startswith((LLM, "projector.")) for file in files for tensor in file_tensors(file)):
            return files
    raise ValueError(f"{path}: no file has tensors of {LLM}*; name a checkpoint that TimeViper's public code saved")


def public_config(path: str | Path, preset: TimeViperConfig) -> TimeViperConfig:
    """Returns `preset` with the sizes of the language model in the folder's config.json, if there is one."""
    file = Path(path) / CONFIG_FILE
    return with_text(text_config_from_dict(read_json(file), where=str(file)), preset) if file.is_file() else preset


def rename_public(tensors: Iterable[tuple[str, Tensor]], config: TimeViperConfig) -> Iterator[tuple[str, Tensor]]:
    layers = [site.layer for site in config.transv]
    for name, tensor in tensors:
        if name.startswith("vision_backbone."):
            continue
        if not name.startswith(LLM):
            prefix = next((prefix for prefix in PROJECTOR if name.startswith(prefix)), "")
            yield PROJECTOR.get(prefix, "") + name.removeprefix(prefix), tensor
            continue
        inner = name.removeprefix(LLM)
        merge = MERGE_MODULE.fullmatch(inner)
        if merge and int(merge[1]) < len(layers):
            yield f"transv.{layers[int(merge[1])]}.{merge[2]}", tensor
        elif ALPHA.fullmatch(inner) and len(tensor) == len(layers):
            yield from ((f"transv.{layer}.alpha", tensor[n : n + 1]) for n, layer in enumerate(layers))
        elif inner == "lm_head.weight" and config.text.tie_word_embeddings:
            continue  # stored twice
        else:
            yield own_name(inner, config.text), tensor

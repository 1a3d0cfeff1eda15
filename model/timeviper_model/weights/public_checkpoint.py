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

from timeviper_model.config import TimeViperConfig
from timeviper_model.timeviper import TimeViper
from timeviper_model.weights.families import own_name
from timeviper_model.weights.weights_folder import assign_tensors, iter_tensors

LLM = "llm_backbone.llm."
PROJECTOR = {"projector.projector.0.": "projector.fc1.", "projector.projector.2.": "projector.fc2."}
MERGE_MODULE = re.compile(r"(?:backbone|model)\.merge_modules\.(\d+)\.(.+)")
ALPHA = re.compile(r"(?:backbone|model)\.alpha")


def load_public_checkpoint(
    path: str | Path, config: TimeViperConfig, *, dtype: torch.dtype = torch.float32
) -> TimeViper:
    """Loads a `.bin` or `.pt` state dict, or a folder of safetensors files, in evaluation mode.

    `config` must have the same number of TransV sites.
    """
    path = Path(path)
    if path.is_dir():
        tensors: Iterable[tuple[str, Tensor]] = iter_tensors(path)
    else:
        tensors = torch.load(path, map_location="cpu", weights_only=True, mmap=True).items()
    with torch.device("meta"):
        model = TimeViper(config)
    assign_tensors(model, rename_public(tensors, config), where=str(path), dtype=dtype, device="cpu")
    return model.eval()


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

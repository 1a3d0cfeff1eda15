"""Describes a tower from its files."""

from __future__ import annotations

import hashlib
import json
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from timeviper_model.layers.vision_transformer import PREPROCESSOR_FILE, Preprocessing, VisionTransformer

SIGLIP_TYPES = {"siglip", "siglip_vision_model"}


@dataclass(frozen=True, kw_only=True, slots=True)
class TowerDescription:
    weights_hash: str
    """sha256 of configuration and weights, as `VisionTransformer` computes it"""
    image_size: int
    hidden_size: int
    num_patches: int

    @classmethod
    def of(cls, tower: VisionTransformer) -> TowerDescription:
        return cls(
            weights_hash=tower.weights_hash,
            image_size=tower.image_size,
            hidden_size=tower.hidden_size,
            num_patches=tower.num_patches,
        )


def describe_tower(name_or_folder: str, layer: int) -> TowerDescription:
    """Describes the tower without building it, with one tensor at a time in memory.

    Builds it if the weight files use other names than the model, or to report an error.

    Raises:
        ValueError: as `VisionTransformer.from_pretrained`.
    """
    description = _from_files(name_or_folder, layer)
    return description or TowerDescription.of(VisionTransformer.from_pretrained(name_or_folder, layer=layer))


def _from_files(name_or_folder: str, layer: int) -> TowerDescription | None:
    from transformers import AutoConfig, AutoModel, SiglipVisionModel
    from transformers.utils import cached_file

    def local(file: str) -> Path:
        return Path(str(cached_file(name_or_folder, file)))

    try:
        config = AutoConfig.from_pretrained(name_or_folder)
        processor_bytes = local(PREPROCESSOR_FILE).read_bytes()
        files = _weights_files(local)
    except (OSError, ValueError):
        return None
    if not files:
        return None
    with torch.device("meta"):
        if config.model_type in SIGLIP_TYPES:
            tower: Any = SiglipVisionModel(getattr(config, "vision_config", config))
        else:
            tower = AutoModel.from_config(config)
        prefix = "vision_model." if hasattr(tower, "vision_model") else ""
        tower = getattr(tower, "vision_model", tower)
    num_blocks = getattr(tower.config, "num_hidden_layers", 0)
    if not 1 <= (layer if layer >= 0 else num_blocks + 1 + layer) <= num_blocks:
        return None
    digest = hashlib.sha256(local("config.json").read_bytes())
    digest.update(processor_bytes)
    for name, shape in sorted((name, tensor.shape) for name, tensor in tower.state_dict().items()):
        tensor = _read(files, [name, prefix + name, f"vision_model.{name}"])
        if tensor is None or tensor.shape != shape:
            return None
        values = tensor.float() if tensor.is_floating_point() else tensor
        digest.update(name.encode())
        digest.update(values.contiguous().view(-1).view(torch.uint8).numpy().tobytes())
    preprocessing = Preprocessing.from_processor(
        json.loads(processor_bytes), image_size=int(tower.config.image_size), where=name_or_folder
    )
    return TowerDescription(
        weights_hash=digest.hexdigest(),
        image_size=preprocessing.image_size,
        hidden_size=int(tower.config.hidden_size),
        num_patches=(preprocessing.image_size // int(tower.config.patch_size)) ** 2,
    )


def _weights_files(local: Any) -> dict[str, Path]:
    from safetensors import safe_open

    try:
        path = local("model.safetensors")
    except OSError:
        index = local("model.safetensors.index.json")
        names: dict[str, str] = json.loads(index.read_text(encoding="utf-8"))["weight_map"]
        return {name: local(file) for name, file in names.items()}
    with safe_open(path, "pt") as file:
        return dict.fromkeys(file.keys(), path)


def _read(files: dict[str, Path], names: list[str]) -> Tensor | None:
    from safetensors import safe_open

    name = next((name for name in names if name in files), None)
    if name is None:
        return None
    with safe_open(files[name], "pt") as file:
        tensor: Tensor = file.get_tensor(name)
    return tensor

"""Encodes frames as merged bf16 tokens: vision towers, then ToMe.

Results depend on the batch shape (1e-6 at width 1152 in fp32), so all batches have the same shape.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from torch import Tensor
from torch.nn import functional as F

from timeviper_model.layers.projector import combine_towers
from timeviper_model.layers.tome import merge_tokens
from timeviper_model.layers.vision_transformer import Resample
from timeviper_model.weights.vision_tower import TowerDescription, describe_vision_tower, load_vision_tower
from timeviper_platform.common.devices import Dtype, torch_dtype
from timeviper_platform.common.machine_cache import local_copy
from timeviper_platform.data.encode.recipe import RECIPE_VERSION, differences


@dataclass(frozen=True, kw_only=True, slots=True)
class TowerConfig:
    model: str
    """Hugging Face name, or URI of a folder."""
    revision: str | None = None
    """Commit, tag or branch of a Hugging Face name; None = its main branch."""
    layer: int = -2
    """Index into hidden_states."""
    num_tokens_per_frame: int = 16
    """Tokens per frame after merging."""
    merge_heads: int = 16

    def __post_init__(self) -> None:
        if self.num_tokens_per_frame < 1:
            raise ValueError(f"{self.num_tokens_per_frame = } must be at least 1")


@dataclass(frozen=True, kw_only=True, slots=True)
class VisionTowerConfig(TowerConfig):
    model: str = "google/siglip-so400m-patch14-384"
    dtype: Dtype = "float32"
    """Dtype of the towers. Features are stored in bfloat16."""
    encode_batch_frames: int = 32
    """Frames per batch. Part of the recipe."""
    device: str = "cpu"
    compile: bool = False
    """torch.compile: fewer kernels, a minute or more per worker start. Part of the recipe, since rounding differs."""
    second: TowerConfig | None = None
    """Second tower for the same frames, decoded at the larger image size."""

    def __post_init__(self) -> None:
        TowerConfig.__post_init__(self)
        if self.encode_batch_frames < 1:
            raise ValueError(f"{self.encode_batch_frames = } must be at least 1")

    @property
    def towers(self) -> tuple[TowerConfig, ...]:
        return (self,) if self.second is None else (self, self.second)


@dataclass(frozen=True, kw_only=True, slots=True)
class EncoderDescription:
    recipe: dict[str, Any]
    image_size: int
    """side of the input frames"""
    resample: Resample
    """interpolation of the input frames, the larger tower's"""
    dim: int
    """width of a token"""
    num_tokens_per_frame: int

    @classmethod
    def of(cls, config: VisionTowerConfig, towers: Sequence[TowerDescription]) -> EncoderDescription:
        num_tokens = [
            min(part.num_tokens_per_frame, tower.num_patches) for part, tower in zip(config.towers, towers, strict=True)
        ]
        first, *others = (_tower_recipe(*values) for values in zip(config.towers, towers, num_tokens, strict=True))
        recipe = {
            "recipe_version": RECIPE_VERSION,
            **first,
            "dtype": {"compute": config.dtype, "stored": "bfloat16"},
            "encode_batch_frames": config.encode_batch_frames,
        }
        if config.compile:
            recipe["compiled"] = True
        for second in others:  # recipes of one tower keep the hash they had before second towers
            recipe["hidden_size"] = towers[0].hidden_size
            recipe["second"] = {**second, "hidden_size": towers[1].hidden_size}
        return cls(
            recipe=recipe,
            image_size=max(tower.image_size for tower in towers),
            resample=max(towers, key=lambda tower: tower.image_size).resample,
            dim=max(tower.hidden_size for tower in towers),
            num_tokens_per_frame=sum(num_tokens),
        )


def describe_encoder(config: VisionTowerConfig) -> EncoderDescription:
    """Describes `FrameEncoder(config)` without building it. Raises the same errors."""
    return EncoderDescription.of(config, [_describe(tower) for tower in config.towers])


def _describe(tower: TowerConfig) -> TowerDescription:
    return describe_vision_tower(local_copy(tower.model), layer=tower.layer, revision=tower.revision)


def _tower_recipe(config: TowerConfig, tower: TowerDescription, num_tokens_per_frame: int) -> dict[str, Any]:
    return {
        "encoder": {"weights_hash": tower.weights_hash, "layer": config.layer},
        "preprocessing": {"image_size": tower.image_size, "resize": tower.resample, "aspect": "squeezed"},
        "merge": {"method": "tome", "num_tokens_per_frame": num_tokens_per_frame, "heads": config.merge_heads},
    }


class FrameEncoder:
    """Raises ValueError if a tower cannot be loaded. `combine_towers` joins the tokens of two towers."""

    def __init__(self, config: VisionTowerConfig) -> None:
        self.config = config
        self.towers = [MergingTower(tower, config) for tower in config.towers]
        description = EncoderDescription.of(config, [TowerDescription.of(tower.vision) for tower in self.towers])
        self.recipe = description.recipe
        self.image_size = description.image_size
        self.resample = description.resample
        self.dim = description.dim
        self.num_tokens_per_frame = description.num_tokens_per_frame

    def check_recipe(self, expected: Mapping[str, Any]) -> None:
        """Raises RuntimeError if this process built another encoder than `expected` describes, for example from another
        node's copy of the weights.
        """
        own = {key: expected.get(key) for key in self.recipe}
        if lines := differences(own, self.recipe):
            names = " and ".join(repr(tower.model) for tower in self.config.towers)
            raise RuntimeError(
                f"the vision tower {names} loaded here is not the one of the recipe ({'; '.join(lines)});"
                " pin encoder.revision, or give every node the same folder"
            )

    @torch.inference_mode()
    def encode(self, frames: Tensor | np.ndarray) -> Tensor:
        """Encodes (F, S, S, 3) uint8 frames, S = `image_size`, as (F, N, dim) bfloat16 on the CPU.

        A frame's tokens do not depend on the other frames.
        """
        pixels = torch.as_tensor(frames)
        size = self.config.encode_batch_frames
        result = torch.empty(len(pixels), self.num_tokens_per_frame, self.dim, dtype=torch.bfloat16)
        for start in range(0, len(pixels), size):
            some = pixels[start : start + size]
            batch = some.new_zeros(size, *some.shape[1:])
            batch[: len(some)] = some
            batch = batch.to(self.config.device)
            first, *others = (tower.tokens(batch) for tower in self.towers)
            tokens = combine_towers(first, *others) if others else first
            result[start : start + size] = tokens[: len(some)].to("cpu", torch.bfloat16)
        return result


class MergingTower:
    def __init__(self, config: TowerConfig, encoder: VisionTowerConfig) -> None:
        self.vision = load_vision_tower(local_copy(config.model), layer=config.layer, revision=config.revision)
        self.vision.to(device=encoder.device, dtype=torch_dtype(encoder.dtype))
        self._patches: Callable[[Tensor], Tensor] = (
            torch.compile(self.vision, dynamic=False) if encoder.compile else self.vision
        )
        self._num_tokens_per_frame = min(config.num_tokens_per_frame, self.vision.num_patches)
        self._merge_heads = config.merge_heads

    def tokens(self, frames: Tensor) -> Tensor:
        """(B, S, S, 3) uint8 -> (B, N, D)."""
        patches = self._patches(
            self.vision.preprocess(resize_frames(frames, self.vision.image_size, self.vision.preprocessing.resample))
        )
        return merge_tokens(patches, self._num_tokens_per_frame, num_heads=self._merge_heads)


def resize_frames(frames: Tensor, image_size: int, resample: Resample = "bicubic") -> Tensor:
    """Resizes uint8 frames (B, S, S, 3) as Pillow does."""
    if frames.shape[1] == image_size:
        return frames
    pixels = frames.permute(0, 3, 1, 2).float()
    resized = F.interpolate(pixels, (image_size, image_size), mode=resample, antialias=True)
    return resized.round().clamp(0, 255).to(torch.uint8).permute(0, 2, 3, 1)

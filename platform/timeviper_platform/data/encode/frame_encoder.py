"""Frames to merged bf16 tokens, in ONE fixed batch shape: one or two vision towers, then ToMe.

Knows batching and number formats. Does not know where frames come from or where tokens go; preprocessing and serving
share this class so that both see the same tokens. A batched vision transformer's result depends on the shape of its
batch (1e-6 at width 1152 in fp32), hence the last batch is padded, even for a lone frame.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, replace
from typing import Any, Literal

import numpy as np
import torch
from torch import Tensor
from torch.nn import functional as F

from timeviper_model.layers.projector import combine_towers
from timeviper_model.layers.tome import merge_tokens
from timeviper_model.layers.vision_transformer import VisionTransformer

RECIPE_VERSION = 2
"""Raised whenever the same configuration would give other features; 2: videos are turned upright, as pictures were."""

_DTYPES: dict[str, torch.dtype] = {"float32": torch.float32, "bfloat16": torch.bfloat16}


@dataclass(frozen=True, kw_only=True, slots=True)
class TowerConfig:
    """One vision tower, and how its tokens are merged."""

    model: str
    """Hugging Face name or local folder"""
    layer: int = -2
    """index into hidden_states"""
    num_tokens_per_frame: int = 16
    merge_heads: int = 16

    def __post_init__(self) -> None:
        if self.num_tokens_per_frame < 1:
            raise ValueError(f"{self.num_tokens_per_frame = } must be at least 1")


@dataclass(frozen=True, kw_only=True, slots=True)
class VisionTowerConfig(TowerConfig):
    """Which towers see every frame, and how they run. Its own fields are the first tower's."""

    model: str = "google/siglip-so400m-patch14-384"
    dtype: Literal["float32", "bfloat16"] = "float32"
    """in which the towers compute; features are stored in bf16 either way"""
    encode_batch_frames: int = 32
    """frames in every batch, padded if need be; part of the recipe"""
    device: str = "cpu"
    compile: bool = False
    """each tower as one program by torch.compile: a minute or more at a worker's start, fewer kernels after it;
    other kernels round differently, so this too is part of the recipe"""
    second: TowerConfig | None = None
    """another tower for the same frames, which are decoded once, at the larger of both image sizes"""

    def __post_init__(self) -> None:
        TowerConfig.__post_init__(self)
        if self.encode_batch_frames < 1:
            raise ValueError(f"{self.encode_batch_frames = } must be at least 1")

    @property
    def towers(self) -> tuple[TowerConfig, ...]:
        """The first, and the second if there is one."""
        return (self,) if self.second is None else (self, self.second)

    def with_names(self, name: Callable[[str], str]) -> VisionTowerConfig:
        """The same with each tower's `model` renamed, such as to an absolute path."""
        second = self.second and replace(self.second, model=name(self.second.model))
        return replace(self, model=name(self.model), second=second)


class FrameEncoder:
    """uint8 frames to (F, N, dim) bf16 tokens; of two towers, `combine_towers` of what each gives alone.

    Raises:
        ValueError: when a tower cannot be loaded.
    """

    def __init__(self, config: VisionTowerConfig) -> None:
        self.config = config
        self._towers = [_Tower(tower, config) for tower in config.towers]
        self.image_size: int = max(tower.image_size for tower in self._towers)
        """side of the frames that `encode` takes"""
        self.dim: int = max(tower.hidden_size for tower in self._towers)
        self.num_tokens_per_frame = sum(tower.num_tokens_per_frame for tower in self._towers)

    @property
    def recipe(self) -> dict[str, Any]:
        """Everything about the towers that decides the features' values; towers.py reads it."""
        first, second = self._towers[0], self._towers[-1]
        recipe = {
            "recipe_version": RECIPE_VERSION,
            **first.recipe,
            "dtype": {"compute": self.config.dtype, "stored": "bfloat16"},
            "encode_batch_frames": self.config.encode_batch_frames,
        }
        if self.config.compile:
            recipe["compiled"] = True
        if self.config.second is not None:  # no key of these for one tower: its stores' hashes stay
            recipe["hidden_size"] = first.hidden_size
            recipe["second"] = {**second.recipe, "hidden_size": second.hidden_size}
        return recipe

    @torch.inference_mode()
    def encode(self, frames: Tensor | np.ndarray) -> Tensor:
        """Merged tokens of frames.

        Args:
            frames: (F, S, S, 3) uint8 with S = `image_size`; any F.

        Returns:
            (F, N, dim) bfloat16 on the CPU; a frame's values do not depend on the others.
        """
        pixels = torch.as_tensor(frames)
        size = self.config.encode_batch_frames
        result = torch.empty(len(pixels), self.num_tokens_per_frame, self.dim, dtype=torch.bfloat16)
        for start in range(0, len(pixels), size):
            piece = pixels[start : start + size]
            batch = piece.new_zeros(size, *piece.shape[1:])
            batch[: len(piece)] = piece
            batch = batch.to(self.config.device)
            first, *others = (tower.tokens(batch) for tower in self._towers)
            tokens = combine_towers(first, *others) if others else first
            result[start : start + size] = tokens[: len(piece)].to("cpu", torch.bfloat16)
        return result


class _Tower:
    """One tower on its device."""

    def __init__(self, config: TowerConfig, shared: VisionTowerConfig) -> None:
        self._config = config
        self.vision = VisionTransformer.from_pretrained(config.model, layer=config.layer)
        self.vision.to(device=shared.device, dtype=_DTYPES[shared.dtype])
        self._patches: Callable[[Tensor], Tensor] = (
            torch.compile(self.vision, dynamic=False) if shared.compile else self.vision
        )
        self.image_size: int = self.vision.image_size
        self.hidden_size: int = self.vision.hidden_size
        self.num_tokens_per_frame = min(config.num_tokens_per_frame, self.vision.num_patches)

    @property
    def recipe(self) -> dict[str, Any]:
        """What decides this tower's values."""
        return {
            "encoder": {"weights_hash": self.vision.weights_hash, "layer": self._config.layer},
            "preprocessing": {"image_size": self.image_size, "resize": "bicubic", "aspect": "squeezed"},
            "merge": {
                "method": "tome",
                "num_tokens_per_frame": self.num_tokens_per_frame,
                "heads": self._config.merge_heads,
            },
        }

    def tokens(self, frames: Tensor) -> Tensor:
        """Merged tokens (B, N, D) of uint8 frames (B, S, S, 3), S at least `image_size`."""
        patches = self._patches(self.vision.preprocess(resize_frames(frames, self.image_size)))
        return merge_tokens(patches, self.num_tokens_per_frame, num_heads=self._config.merge_heads)


def resize_frames(frames: Tensor, image_size: int) -> Tensor:
    """uint8 frames (B, S, S, 3) at another side, bicubic as in decoding, on their device; the same where S fits."""
    if frames.shape[1] == image_size:
        return frames
    pixels = frames.permute(0, 3, 1, 2).float()
    resized = F.interpolate(pixels, (image_size, image_size), mode="bicubic", antialias=True)
    return resized.round().clamp(0, 255).to(torch.uint8).permute(0, 2, 3, 1)

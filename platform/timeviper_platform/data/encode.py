"""Frames to merged bf16 tokens, in ONE fixed batch shape: vision encoder, then ToMe.

Knows batching and number formats. Does not know where frames come from or where tokens go; preprocessing and serving
share this class so that both see the same tokens. A batched vision transformer's result depends on the shape of its
batch (1e-6 at width 1152 in fp32), hence the last batch is padded, even for a lone frame.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any, Literal

import numpy as np
import torch
from torch import Tensor

from timeviper_model.tome import merge_tokens
from timeviper_model.vision import VisionEncoder

RECIPE_VERSION = 1
"""Raised whenever the same configuration would give other features."""

_DTYPES: dict[str, torch.dtype] = {"float32": torch.float32, "bfloat16": torch.bfloat16}


@dataclass(frozen=True, kw_only=True, slots=True)
class EncoderConfig:
    """Which encoder, and how its tokens are merged."""

    encoder: str = "google/siglip-so400m-patch14-384"
    """Hugging Face name or local folder"""
    layer: int = -2
    """index into hidden_states"""
    num_tokens_per_frame: int = 16
    merge_heads: int = 16
    dtype: Literal["float32", "bfloat16"] = "float32"
    """in which the encoder computes; features are stored in bf16 either way"""
    encode_batch_frames: int = 32
    """frames in every batch, padded if need be; part of the recipe"""
    device: str = "cpu"
    compile: bool = False
    """the vision tower as one program by torch.compile: a minute or more at a worker's start, fewer kernels after it;
    other kernels round differently, so this too is part of the recipe"""

    def __post_init__(self) -> None:
        if self.encode_batch_frames < 1 or self.num_tokens_per_frame < 1:
            raise ValueError(f"{self.encode_batch_frames = } and {self.num_tokens_per_frame = } must be at least 1")


class FrameEncoder:
    """uint8 frames to (F, N, dim) bf16 tokens.

    Raises:
        ValueError: when the encoder cannot be loaded.
    """

    def __init__(self, config: EncoderConfig) -> None:
        self.config = config
        self._vision = VisionEncoder.from_pretrained(config.encoder, layer=config.layer)
        self._vision.to(device=config.device, dtype=_DTYPES[config.dtype])
        self._patches: Callable[[Tensor], Tensor] = (
            torch.compile(self._vision, dynamic=False) if config.compile else self._vision
        )
        self.image_size: int = self._vision.image_size
        self.dim: int = self._vision.hidden_size
        self.num_tokens_per_frame = min(config.num_tokens_per_frame, self._vision.num_patches)
        self.weights_hash: str = self._vision.weights_hash

    @property
    def recipe(self) -> dict[str, Any]:
        """Everything about the encoder that decides the features' values."""
        return {
            "recipe_version": RECIPE_VERSION,
            "encoder": {"weights_hash": self.weights_hash, "layer": self.config.layer},
            "preprocessing": {"image_size": self.image_size, "resize": "bicubic", "aspect": "squeezed"},
            "merge": {
                "method": "tome",
                "num_tokens_per_frame": self.num_tokens_per_frame,
                "heads": self.config.merge_heads,
            },
            "dtype": {"compute": self.config.dtype, "stored": "bfloat16"},
            "encode_batch_frames": self.config.encode_batch_frames,
        } | ({"compiled": True} if self.config.compile else {})

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
            patches = self._patches(self._vision.preprocess(batch.to(self.config.device)))
            tokens = merge_tokens(patches, self.num_tokens_per_frame, num_heads=self.config.merge_heads)
            result[start : start + size] = tokens[: len(piece)].to("cpu", torch.bfloat16)
        return result

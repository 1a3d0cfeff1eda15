"""Frozen Hugging Face vision towers. Shapes: B frames, S image side, P patch tokens, D width."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any, Literal

import torch
from torch import Tensor, nn
from torch.nn import functional as F

PREPROCESSOR_FILE = "preprocessor_config.json"


Resample = Literal["bilinear", "bicubic"]
RESAMPLES: dict[int, Resample] = {2: "bilinear", 3: "bicubic"}
"""Pillow's constants."""


@dataclass(frozen=True, kw_only=True, slots=True)
class Preprocessing:
    image_size: int
    """Side of the square that frames are resized to, regardless of aspect ratio (paper)."""
    resample: Resample
    mean: tuple[float, ...]
    std: tuple[float, ...]
    white: float = 255.0
    """Byte value that becomes 1."""

    @classmethod
    def from_processor(cls, values: Mapping[str, Any], *, image_size: int, where: str) -> Preprocessing:
        """Parses a `preprocessor_config.json` or transformers 5's `processor_config.json`.

        A null is an absent key; a number for `image_mean` or `image_std` applies to all channels.

        Raises:
            ValueError: for unsupported steps.
        """
        values = {name: value for name, value in values.get("image_processor", values).items() if value is not None}
        if not values.get("do_resize", True):
            raise ValueError(
                f"{where}: do_resize = {values['do_resize']} in {PREPROCESSOR_FILE} is not supported: frames of any"
                " size are resized to the tower's square"
            )
        factor = values.get("rescale_factor", 1.0 / 255.0) if values.get("do_rescale", True) else 1.0
        if not factor > 0.0:
            raise ValueError(f"{where}: rescale_factor = {factor} in {PREPROCESSOR_FILE} must be above 0")
        if not values.get("do_normalize", True):
            values |= {"image_mean": 0.0, "image_std": 1.0}
        missing = [name for name in ("image_mean", "image_std") if name not in values]
        if missing:
            raise ValueError(f"{where}: {PREPROCESSOR_FILE} lacks {' and '.join(missing)}")
        resample = values.get("resample", 3)
        if resample not in RESAMPLES:
            raise ValueError(
                f"{where}: resample = {resample} is not supported; Pillow's 2 (bilinear) and 3 (bicubic) are"
            )
        return cls(
            image_size=_side(values, where) or image_size,
            resample=RESAMPLES[resample],
            mean=_channels(values["image_mean"], "image_mean", where),
            std=_channels(values["image_std"], "image_std", where),
            white=1.0 / factor,
        )


class VisionTransformer(nn.Module):
    """Frozen vision tower, cut after block `layer`. -2 skips the last block and norm (paper)."""

    def __init__(self, tower: Any, *, layer: int, preprocessing: Preprocessing, weights_hash: str) -> None:
        """Takes over `tower`, a transformers vision model."""
        super().__init__()
        config = tower.config
        num_blocks = config.num_hidden_layers
        _, blocks = find_blocks(tower, num_blocks)
        del blocks[num_used_blocks(layer, num_blocks) :]
        if getattr(tower, "use_head", False):  # SigLIP
            tower.use_head = False  # unused pooling: 15 of 428 million parameters
            del tower.head
        self.preprocessing = preprocessing
        self.image_size = preprocessing.image_size
        self.hidden_size = int(config.hidden_size)
        self.num_patches = (self.image_size // int(config.patch_size)) ** 2
        self.weights_hash = weights_hash
        self._tower = tower
        self._mean_std = torch.tensor([preprocessing.mean, preprocessing.std]).view(2, 1, 3, 1, 1)
        """Not a buffer: bf16 would round it."""
        self.requires_grad_(False)
        self.eval()

    def preprocess(self, frames: Tensor) -> Tensor:
        """uint8 frames (B, height, width, 3) to normalised pixels (B, 3, S, S)."""
        if frames.dtype != torch.uint8 or frames.ndim != 4 or frames.shape[-1] != 3:
            raise ValueError(f"frames must be uint8 (B, height, width, 3), not {frames.dtype} {tuple(frames.shape)}")
        pixels = frames.permute(0, 3, 1, 2).float()
        size = (self.image_size, self.image_size)
        if tuple(pixels.shape[2:]) != size:
            pixels = F.interpolate(pixels, size, mode=self.preprocessing.resample, antialias=True)
            pixels = pixels.round().clamp(0, 255)  # as Pillow, which returns bytes
        self._mean_std = self._mean_std.to(pixels.device)
        mean, std = self._mean_std
        return ((pixels / self.preprocessing.white - mean) / std).to(next(self.parameters()).dtype)

    @torch.no_grad()
    def forward(self, pixel_values: Tensor) -> Tensor:
        """(B, P, D) without class and register tokens."""
        hidden = self._tower(pixel_values=pixel_values, output_hidden_states=True).hidden_states[-1]
        return hidden[:, hidden.shape[1] - self.num_patches :]


def num_used_blocks(layer: int, num_blocks: int) -> int:
    """Raises ValueError if `layer` is not the output of a block."""
    num_used = layer if layer >= 0 else num_blocks + 1 + layer
    if not 1 <= num_used <= num_blocks:
        raise ValueError(
            f"{layer = } is not the output of one of this tower's {num_blocks} blocks; "
            f"use 1 to {num_blocks}, or -{num_blocks} to -1"
        )
    return num_used


def find_blocks(tower: nn.Module, num_blocks: int) -> tuple[str, nn.ModuleList]:
    """Returns name and list of the tower's blocks."""
    for name, module in tower.named_modules():
        if isinstance(module, nn.ModuleList) and len(module) == num_blocks:
            return name, module
    raise ValueError(f"{type(tower).__name__} has no list of {num_blocks} blocks; is it a vision transformer?")


def _side(values: Mapping[str, Any], where: str) -> int | None:
    """The side of the square; an int is one, or the shorter edge of a frame that is squeezed to a square."""
    size = values.get("crop_size" if values.get("do_center_crop") else "size")
    if size is None or isinstance(size, int):
        return size
    if isinstance(size, Mapping):
        sides = {size[name] for name in ("height", "width", "shortest_edge") if size.get(name)}
    else:
        sides = set(size)
    if len(sides) != 1:
        raise ValueError(f"{where}: {size = } in the processor's file must be square")
    return int(sides.pop())


def _channels(value: Any, name: str, where: str) -> tuple[float, ...]:
    """Three channels' values; a number applies to all."""
    values = (float(value),) * 3 if isinstance(value, int | float) else tuple(float(each) for each in value)
    if len(values) != 3:
        raise ValueError(f"{where}: {name} = {value} must hold three values, for red, green and blue")
    return values

"""Row group `vision`: frames per second and MFU of SigLIP so400m with token merging, with random weights."""

from __future__ import annotations

import logging
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from timeviper_model.layers.tome import merge_tokens
from timeviper_model.layers.vision_transformer import Preprocessing, VisionTransformer
from timeviper_platform.benchmarks.gpu.device import DTYPE, make_row, measure
from timeviper_platform.benchmarks.measure import Row
from timeviper_platform.common.devices import device_name, peak_flops

logger = logging.getLogger(__name__)

TOKENS_PER_FRAME = 16
MERGE_HEADS = 16
LAYER = -2
"""Output of the second-to-last block; the last block does not run."""


@dataclass(frozen=True, kw_only=True, slots=True)
class TowerSize:
    """Sizes of a SigLIP vision tower; the default is so400m/14 at 384 px (Google's config.json)."""

    hidden_size: int = 1152
    intermediate_size: int = 4304
    num_hidden_layers: int = 27
    num_attention_heads: int = 16
    image_size: int = 384
    patch_size: int = 14

    @property
    def num_patches(self) -> int:
        return (self.image_size // self.patch_size) ** 2


def vision_rows(
    device: torch.device,
    *,
    size: TowerSize | None = None,
    batch_frames: int = 64,
    num_batches: int = 8,
    peak: float | None = None,
    repeats: int = 5,
) -> list[Row]:
    """Frames per second and MFU.

    Args:
        num_batches: batches per measured pass.
        peak: FLOP/s; None = the device's. Unknown devices have no MFU.
    """
    size = size or TowerSize()
    encoder = make_tower(size, device)
    shape = (batch_frames, size.image_size, size.image_size, 3)
    generator = torch.Generator(device=device).manual_seed(0)
    frames = torch.randint(256, shape, generator=generator, device=device, dtype=torch.uint8)

    def patches() -> Tensor:
        return encoder(encoder.preprocess(frames))

    @torch.inference_mode()
    def tower_alone() -> None:
        for _ in range(num_batches):
            patches()

    @torch.inference_mode()
    def encode() -> None:
        for _ in range(num_batches):
            merge_tokens(patches(), TOKENS_PER_FRAME, num_heads=MERGE_HEADS)

    whole, tower = (measure(run, device, repeats=repeats) for run in (encode, tower_alone))
    rate = num_batches * batch_frames / whole.seconds
    label = f"SigLIP {size.hidden_size} x {size.num_hidden_layers} at {size.image_size} px, bf16, batch {batch_frames}"
    rows = [
        make_row("vision", f"{label}: ViT and ToMe", rate, "frames/s"),
        make_row("vision", f"{label}: ToMe's share of the time", 1 - tower.seconds / whole.seconds, ""),
        make_row("vision", f"{label}: operations done", rate * tower_flops(size) / 1e12, "TFLOP/s"),
        make_row("vision", f"{label}: peak memory", whole.peak_bytes / 1e9, "GB"),
    ]
    peak = peak_flops(device_name(device)) if peak is None else peak
    if peak is None:
        logger.warning("no MFU row: the peak of %r is not in PEAK_FLOPS; add it there", device_name(device))
        return rows
    return [*rows, make_row("vision", f"{label}: MFU", mfu(rate, size, peak), "", ">= 0.45")]


def make_tower(size: TowerSize, device: torch.device) -> VisionTransformer:
    from transformers import SiglipVisionConfig, SiglipVisionModel

    config: Any = SiglipVisionConfig(
        hidden_size=size.hidden_size,
        intermediate_size=size.intermediate_size,
        num_hidden_layers=size.num_hidden_layers,
        num_attention_heads=size.num_attention_heads,
        image_size=size.image_size,
        patch_size=size.patch_size,
        hidden_act="gelu_pytorch_tanh",
    )
    config.vision_use_head = False
    preprocessing = Preprocessing(
        image_size=size.image_size, resample="bicubic", mean=(0.5, 0.5, 0.5), std=(0.5, 0.5, 0.5)
    )
    tower = VisionTransformer(
        SiglipVisionModel(config), layer=LAYER, preprocessing=preprocessing, weights_hash="random"
    )
    return tower.to(device=device, dtype=DTYPE)


def tower_flops(size: TowerSize) -> float:
    """FLOPs of the blocks that run, per frame; so400m: 0.642e12.

    Counts two operations per weight and token, and full attention, but no norms or ToMe.
    """
    patches, width = size.num_patches, size.hidden_size
    weights = 4 * width**2 + 2 * width * size.intermediate_size
    block = 2 * patches * weights + 4 * patches**2 * width
    return (size.num_hidden_layers - 1) * block + 2 * patches * 3 * size.patch_size**2 * width


def mfu(frames_per_second: float, size: TowerSize, peak: float) -> float:
    """FLOPs of the tower over the peak; the time includes ToMe."""
    return frames_per_second * tower_flops(size) / peak

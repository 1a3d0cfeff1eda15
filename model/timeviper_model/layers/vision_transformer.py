"""Frames to patch tokens by a frozen Hugging Face vision tower: SigLIP, SigLIP 2 of fixed resolution, DINOv2, ...

Knows pixels and what the tower's processor configuration says of them; not videos, merging or storage.

Shapes: B frames, S image side, P patch tokens, D width.
"""

from __future__ import annotations

import hashlib
import json
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

import torch
from torch import Tensor, nn
from torch.nn import functional as F

PREPROCESSOR_FILE = "preprocessor_config.json"
WEIGHTS_FILES = ("model.safetensors", "model.safetensors.index.json")


Resample = Literal["bilinear", "bicubic"]
RESAMPLES: dict[int, Resample] = {2: "bilinear", 3: "bicubic"}
"""Pillow's numbers, which processor configurations hold"""


@dataclass(frozen=True, kw_only=True, slots=True)
class Preprocessing:
    """How a tower wants its pixels."""

    image_size: int
    """side of the square that every frame is squeezed into, whatever its shape (the paper's choice: nothing is cut)"""
    resample: Resample
    mean: tuple[float, ...]
    std: tuple[float, ...]
    """of rescaled pixels"""
    white: float = 255.0
    """the byte that rescaling makes 1"""

    @classmethod
    def from_processor(cls, values: Mapping[str, Any], *, image_size: int, where: str) -> Preprocessing:
        """What a `preprocessor_config.json` says.

        Args:
            image_size: where it names no size.

        Raises:
            ValueError: when mean or std is missing, or the size, the resampling or a step is one that is not supported.
        """
        if not values.get("do_resize", True):
            raise ValueError(
                f"{where}: do_resize = {values['do_resize']} in {PREPROCESSOR_FILE} is not supported: frames of any"
                " size become the tower's square"
            )
        factor = values.get("rescale_factor", 1.0 / 255.0) if values.get("do_rescale", True) else 1.0
        if not factor > 0.0:
            raise ValueError(f"{where}: rescale_factor = {factor} in {PREPROCESSOR_FILE} must be above 0")
        if not values.get("do_normalize", True):
            values = {**values, "image_mean": (0.0,) * 3, "image_std": (1.0,) * 3}
        missing = [name for name in ("image_mean", "image_std") if name not in values]
        if missing:
            raise ValueError(f"{where}: {PREPROCESSOR_FILE} lacks {' and '.join(missing)}")
        number = values.get("resample", 3)
        if number not in RESAMPLES:
            raise ValueError(
                f"{where}: resample = {number} is not supported; Pillow's 2 (bilinear) and 3 (bicubic) are"
            )
        return cls(
            image_size=_side(values, where) or image_size,
            resample=RESAMPLES[number],
            mean=tuple(values["image_mean"]),
            std=tuple(values["image_std"]),
            white=1.0 / factor,
        )


class VisionTransformer(nn.Module):
    """A vision tower cut after the block whose output is used; frozen and in eval mode.

    Build it with `from_pretrained`. The default `layer=-2` is `hidden_states[-2]` of the whole tower: the output of
    the second-to-last block, without the final norm (TimeViper, arXiv 2511.16595, and LLaVA before it).
    """

    def __init__(self, tower: Any, *, layer: int, preprocessing: Preprocessing, weights_hash: str) -> None:
        """Takes over `tower` (a transformers vision model) and removes the blocks that are not needed."""
        super().__init__()
        config = tower.config
        num_blocks = config.num_hidden_layers
        num_used = layer if layer >= 0 else num_blocks + 1 + layer
        if not 1 <= num_used <= num_blocks:
            raise ValueError(
                f"{layer = } is not the output of one of this tower's {num_blocks} blocks; use 1 or -1 ..."
            )
        blocks = _find_blocks(tower, num_blocks)
        del blocks[num_used:]
        if getattr(tower, "use_head", False):  # SigLIP's
            tower.use_head = False  # pools all tokens into one, which nobody asks for: 15 of 428 million parameters
            del tower.head
        self.preprocessing = preprocessing
        self.image_size = preprocessing.image_size
        self.hidden_size = int(config.hidden_size)
        self.num_patches = (self.image_size // int(config.patch_size)) ** 2
        self.weights_hash = weights_hash
        self._tower = tower
        self._mean_std = torch.tensor([preprocessing.mean, preprocessing.std]).view(2, 1, 3, 1, 1)
        """no buffer: a tower in bf16 would round it too"""
        self.requires_grad_(False)
        self.eval()

    @classmethod
    def from_pretrained(cls, name_or_folder: str, *, layer: int = -2) -> VisionTransformer:
        """The tower from a local folder or the Hugging Face hub, in fp32 on the CPU.

        Raises:
            ValueError: when the folder or name holds no vision model in safetensors form, or `layer` does not exist.
        """
        from transformers import AutoConfig, AutoModel, SiglipVisionModel  # seconds of a start that needs no tower

        try:
            config = AutoConfig.from_pretrained(name_or_folder)
        except (OSError, ValueError) as error:
            raise ValueError(
                f"no vision encoder at {name_or_folder!r}: pass a folder with config.json and model.safetensors,"
                f" or a Hugging Face name that this machine can fetch ({error})"
            ) from error
        if config.model_type in {"siglip2", "siglip2_vision_model"}:
            raise ValueError(
                f"{name_or_folder!r} is SigLIP 2 of variable resolution (NaFlex), which takes patches, not frames;"
                " use a SigLIP 2 checkpoint of fixed resolution, such as google/siglip2-so400m-patch14-384"
            )
        if config.model_type in {"siglip", "siglip_vision_model"}:
            tower = SiglipVisionModel.from_pretrained(name_or_folder, dtype=torch.float32)
        else:
            tower = AutoModel.from_pretrained(name_or_folder, dtype=torch.float32)
            tower = getattr(tower, "vision_model", tower)
        processor = json.loads(_local_file(name_or_folder, PREPROCESSOR_FILE).read_text(encoding="utf-8"))
        return cls(
            tower,
            layer=layer,
            preprocessing=Preprocessing.from_processor(
                processor, image_size=int(tower.config.image_size), where=name_or_folder
            ),
            weights_hash=_hash_weights(name_or_folder, tower),
        )

    def preprocess(self, frames: Tensor) -> Tensor:
        """uint8 frames (B, height, width, 3) as normalised pixels (B, 3, S, S), S = `image_size`, in its dtype.

        Frames of another size are resized as the processor would; those of size S are taken as they are.

        Raises:
            ValueError: for another shape or dtype.
        """
        if frames.dtype != torch.uint8 or frames.ndim != 4 or frames.shape[-1] != 3:
            raise ValueError(f"frames must be uint8 (B, height, width, 3), not {frames.dtype} {tuple(frames.shape)}")
        pixels = frames.permute(0, 3, 1, 2).float()
        size = (self.image_size, self.image_size)
        if tuple(pixels.shape[2:]) != size:
            pixels = F.interpolate(pixels, size, mode=self.preprocessing.resample, antialias=True)
            pixels = pixels.round().clamp(0, 255)  # Pillow's result is bytes
        self._mean_std = self._mean_std.to(pixels.device)
        mean, std = self._mean_std
        return ((pixels / self.preprocessing.white - mean) / std).to(next(self.parameters()).dtype)

    @torch.no_grad()
    def forward(self, pixel_values: Tensor) -> Tensor:
        """Patch tokens (B, P, D) of the chosen hidden state; class and register tokens are left out."""
        hidden = self._tower(pixel_values=pixel_values, output_hidden_states=True).hidden_states[-1]
        return hidden[:, hidden.shape[1] - self.num_patches :]


def _side(values: Mapping[str, Any], where: str) -> int | None:
    """The side of the square that reaches the tower: the crop's where the processor crops, else the size's."""
    size = values.get("crop_size" if values.get("do_center_crop") else "size")
    if size is None or isinstance(size, int):
        return size
    sides = {size[name] for name in ("height", "width", "shortest_edge") if name in size}
    if len(sides) != 1:
        raise ValueError(f"{where}: {size = } in {PREPROCESSOR_FILE} is no square, which every tower here needs")
    return int(sides.pop())


def _find_blocks(tower: Any, num_blocks: int) -> nn.ModuleList:
    """The tower's list of blocks: the one ModuleList that has as many entries as the configuration says."""
    lists = [m for m in tower.modules() if isinstance(m, nn.ModuleList) and len(m) == num_blocks]
    if not lists:
        raise ValueError(f"{type(tower).__name__} has no list of {num_blocks} blocks; is it a vision transformer?")
    return lists[0]


def _local_file(name_or_folder: str, file: str) -> Path:
    from transformers.utils import cached_file

    try:
        found = cached_file(name_or_folder, file)
    except OSError as error:
        raise ValueError(
            f"{name_or_folder!r} has no {file}, which holds mean and std of the pixels: {error}"
        ) from error
    return Path(str(found))


def _hash_weights(name_or_folder: str, tower: Any) -> str:
    """sha256 over the configuration and every tensor, so that it does not depend on how the files are sharded."""
    digest = hashlib.sha256(_local_file(name_or_folder, "config.json").read_bytes())
    digest.update(_local_file(name_or_folder, PREPROCESSOR_FILE).read_bytes())
    for name, tensor in sorted(tower.state_dict().items()):
        digest.update(name.encode())
        digest.update(tensor.detach().contiguous().view(-1).view(torch.uint8).numpy().tobytes())
    return digest.hexdigest()

"""Loads vision towers from Hugging Face folders or names, and describes them without building them."""

from __future__ import annotations

import hashlib
import logging
from collections.abc import Iterable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from timeviper_model.layers.vision_transformer import (
    PREPROCESSOR_FILE,
    Preprocessing,
    Resample,
    VisionTransformer,
    find_blocks,
    num_used_blocks,
)
from timeviper_model.weights.hub_folder import (
    CONFIG_FILE,
    StoredTensor,
    check_not_quantised,
    listed_names,
    local_folder,
    read_json,
    stored_tensors,
)

SIGLIP_TYPES = {"siglip", "siglip_vision_model"}
NAFLEX_TYPES = {"siglip2", "siglip2_vision_model"}

PROCESSOR_FILES = (PREPROCESSOR_FILE, "processor_config.json")
"""transformers 5 writes the second file; the image processor is an entry of it."""

UNUSED_PARTS = ("pooler.", "head.")
"""Parts of a tower after its last block."""

OTHER_PARTS = (
    "text_model.",
    "text_projection",
    "visual_projection",
    "logit_scale",
    "logit_bias",
    "classifier",
    "lm_head",
    "decoder",
    "pooler",
    "head",
)
"""Parts of whole checkpoints other than their tower."""


@dataclass(frozen=True, kw_only=True, slots=True)
class TowerDescription:
    weights_hash: str
    """sha256 of configuration and weights."""
    image_size: int
    hidden_size: int
    num_patches: int
    resample: Resample

    @classmethod
    def of(cls, tower: VisionTransformer) -> TowerDescription:
        return cls(
            weights_hash=tower.weights_hash,
            image_size=tower.image_size,
            hidden_size=tower.hidden_size,
            num_patches=tower.num_patches,
            resample=tower.preprocessing.resample,
        )


def load_vision_tower(name_or_folder: str, *, layer: int = -2, revision: str | None = None) -> VisionTransformer:
    """Loads a tower in fp32 on the CPU.

    Args:
        layer: index into hidden_states.
        revision: commit, tag or branch of a repository.

    Raises:
        ValueError: if tensors that the features need are missing, unexpected or misshaped, or files are damaged.
    """
    files = _TowerFiles.open(name_or_folder, revision)
    list(stored_tensors(files.folder))  # damaged files raise here, in one line
    with _without_load_report():
        model, info = files.model_class.from_pretrained(
            str(files.folder), dtype=torch.float32, output_loading_info=True, ignore_mismatched_sizes=True
        )
    tower = _vision_part(model)
    unused = files.unused_prefixes(tower, layer)
    missing = {name.removeprefix("vision_model.") for name in info["missing_keys"]} & tower.state_dict().keys()
    _check_fit(
        name_or_folder,
        missing=[name for name in missing if not name.startswith(unused)],
        unexpected=[name for name in info["unexpected_keys"] if not _is_beside(name, unused)],
        misshaped=[
            f"{name} is {tuple(found)}, should be {tuple(expected)}"
            for name, found, expected in info["mismatched_keys"]
            if not _is_beside(name, unused)
        ],
    )
    preprocessing = files.preprocessing(tower)
    used = {name: tensor for name, tensor in tower.state_dict().items() if name not in missing}
    return VisionTransformer(
        tower,
        layer=layer,
        preprocessing=preprocessing,
        weights_hash=_hash(files, ((name, used[name]) for name in sorted(used))),
    )


def describe_vision_tower(name_or_folder: str, *, layer: int = -2, revision: str | None = None) -> TowerDescription:
    """Describes `load_vision_tower(...)` with one tensor at a time in memory.

    Builds the tower if its files use other names than the model, or to report an error.

    Raises:
        ValueError: as `load_vision_tower`.
    """
    files = _TowerFiles.open(name_or_folder, revision)
    tower = files.empty_tower()
    unused = files.unused_prefixes(tower, layer)
    stored = {tensor.name: tensor for tensor in stored_tensors(files.folder)}
    found: dict[str, StoredTensor] = {}
    for name, expected in tower.state_dict().items():
        tensor = next((stored[key] for key in (name, f"vision_model.{name}") if key in stored), None)
        if tensor is not None and tensor.shape == expected.shape:
            found[name] = tensor
        elif tensor is not None or not name.startswith(unused):
            return TowerDescription.of(load_vision_tower(name_or_folder, layer=layer, revision=revision))
    known = {tensor.name for tensor in found.values()}
    if any(name not in known and not _is_beside(name, unused) for name in stored):
        return TowerDescription.of(load_vision_tower(name_or_folder, layer=layer, revision=revision))
    preprocessing = files.preprocessing(tower)
    return TowerDescription(
        weights_hash=_hash(files, ((name, found[name].read()) for name in sorted(found))),
        image_size=preprocessing.image_size,
        hidden_size=int(tower.config.hidden_size),
        num_patches=(preprocessing.image_size // int(tower.config.patch_size)) ** 2,
        resample=preprocessing.resample,
    )


@dataclass(frozen=True, slots=True)
class _TowerFiles:
    """A tower's folder with its configuration and processor."""

    name: str
    folder: Path
    config: Any
    processor_file: Path

    @classmethod
    def open(cls, name_or_folder: str, revision: str | None) -> _TowerFiles:
        from transformers import AutoConfig  # slow import

        folder = local_folder(name_or_folder, revision=revision)
        raw = read_json(folder / CONFIG_FILE)
        check_not_quantised(raw, name_or_folder)
        try:
            config = AutoConfig.from_pretrained(str(folder))
        except (OSError, ValueError, KeyError, TypeError) as error:
            reason = (str(error).splitlines() or [type(error).__name__])[0]
            raise ValueError(
                f"{folder / CONFIG_FILE}: model_type {raw.get('model_type')!r} is not one that transformers reads"
                f" ({reason}); use a vision tower in its format, not timm's or OpenCLIP's"
            ) from error
        if config.model_type in NAFLEX_TYPES:
            raise ValueError(
                f"{name_or_folder!r} is SigLIP 2 of variable resolution (NaFlex), whose input is patches;"
                " use a SigLIP 2 checkpoint of fixed resolution, such as google/siglip2-so400m-patch14-384"
            )
        vision = getattr(config, "vision_config", config)
        lacking = [key for key in ("image_size", "patch_size", "hidden_size") if not hasattr(vision, key)]
        if lacking:
            raise ValueError(
                f"{name_or_folder!r} (model_type {config.model_type!r}) is not a vision transformer: its config.json"
                f" lacks {', '.join(lacking)}"
            )
        present = [folder / file for file in PROCESSOR_FILES if (folder / file).is_file()]
        if not present:
            raise ValueError(
                f"{name_or_folder!r} has no {PREPROCESSOR_FILE}, which gives size, mean and std of the pixels;"
                " download it too"
            )
        return cls(name_or_folder, folder, config, present[0])

    @property
    def model_class(self) -> Any:
        from transformers import AutoModel, SiglipVisionModel

        return SiglipVisionModel if self.config.model_type in SIGLIP_TYPES else AutoModel

    def empty_tower(self) -> Any:
        """Builds the tower on the meta device."""
        from transformers import AutoModel, SiglipVisionModel

        with torch.device("meta"):
            if self.model_class is SiglipVisionModel:
                return SiglipVisionModel(getattr(self.config, "vision_config", self.config))
            return _vision_part(AutoModel.from_config(self.config))

    def unused_prefixes(self, tower: Any, layer: int) -> tuple[str, ...]:
        """Prefixes of the names of parts that features of `layer` do not need."""
        num_blocks = int(tower.config.num_hidden_layers)
        prefix, _ = find_blocks(tower, num_blocks)
        num_used = num_used_blocks(layer, num_blocks)
        return (*UNUSED_PARTS, *(f"{prefix}.{index}." for index in range(num_used, num_blocks)))

    def preprocessing(self, tower: Any) -> Preprocessing:
        """Raises ValueError if the processor's image size does not fit the tower."""
        values = read_json(self.processor_file)
        found = Preprocessing.from_processor(values, image_size=int(tower.config.image_size), where=self.name)
        side, patch_size = found.image_size, int(tower.config.patch_size)
        embeddings = getattr(tower, "embeddings", None)
        if embeddings is None:
            return found
        device = next(embeddings.parameters()).device
        try:
            with torch.no_grad():
                tokens = embeddings(torch.zeros(1, 3, side, side, device=device))
            fits = tokens.ndim != 3 or tokens.shape[1] >= (side // patch_size) ** 2
        except (ValueError, RuntimeError):
            fits = False
        if not fits:
            raise ValueError(
                f"{self.name}: {self.processor_file.name} resizes frames to {side} px, but the tower takes"
                f" {tower.config.image_size} px; set the size to {tower.config.image_size}"
            )
        return found


@contextmanager
def _without_load_report() -> Iterator[None]:
    """transformers warns of each tensor of a whole checkpoint's text half."""
    logger = logging.getLogger("transformers")
    level = logger.level
    logger.setLevel(logging.ERROR)
    try:
        yield
    finally:
        logger.setLevel(level)


def _vision_part(model: Any) -> Any:
    return getattr(model, "vision_model", model)


def _is_beside(name: str, unused: tuple[str, ...]) -> bool:
    """Whether features do not need the tensor; `name` may begin with the name of a whole checkpoint's part."""
    candidates = (name, name.partition(".")[2])
    return name.endswith("position_ids") or any(each.startswith((*unused, *OTHER_PARTS)) for each in candidates)


def _check_fit(where: str, *, missing: Sequence[str], unexpected: Sequence[str], misshaped: Sequence[str]) -> None:
    kinds = {"missing": missing, "unexpected": unexpected, "misshaped": misshaped}
    found = [f"{len(names)} {kind}: {listed_names(sorted(names))}" for kind, names in kinds.items() if names]
    if found:
        raise ValueError(
            f"the weights in {where!r} do not fit the vision tower of its config.json; {'; '.join(found)}; use a"
            " folder in transformers' own format"
        )


def _hash(files: _TowerFiles, tensors: Iterable[tuple[str, Tensor]]) -> str:
    """sha256 over configuration and tensors in fp32, independent of sharding."""
    digest = hashlib.sha256((files.folder / CONFIG_FILE).read_bytes())
    digest.update(files.processor_file.read_bytes())
    for name, tensor in tensors:
        values = tensor.detach().float() if tensor.is_floating_point() else tensor
        digest.update(name.encode())
        digest.update(values.contiguous().view(-1).view(torch.uint8).numpy().tobytes())
    return digest.hexdigest()

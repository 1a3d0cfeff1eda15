"""Weights folders in Hugging Face layout.

config.json                         text_config in the language model's own keys, vision_config, transv
model-00001-of-00002.safetensors    ...
model.safetensors.index.json        each tensor's shard
"""

from __future__ import annotations

import hashlib
import json
import shutil
import tempfile
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import asdict
from pathlib import Path
from typing import Any

import torch
from pydantic import TypeAdapter
from safetensors import safe_open
from safetensors.torch import save_file
from torch import Tensor

from timeviper_model.config import TextConfig, TimeViperConfig
from timeviper_model.timeviper import TimeViper
from timeviper_model.weights.families import file_name, own_name, text_config_from_dict, text_config_to_dict, validated

MODEL_TYPE = "timeviper"
INDEX_NAME = "model.safetensors.index.json"
MAX_SHARD_BYTES = 4 * 2**30
"""Hugging Face's tools split at 5 GB."""

IGNORED_BACKBONE_PREFIXES = ("mtp.",)
"""Multi-token-prediction heads, which the model lacks."""

COMPUTING_FIELDS = (
    "hybrid_override_pattern",
    "num_hidden_layers",
    "num_attention_heads",
    "num_key_value_heads",
    "mamba_num_heads",
    "n_groups",
    "layer_norm_epsilon",
    "rms_norm_eps",
    "time_step_limit",
    "rope_theta",
)
"""Fields that change the computation but no tensor shape."""


def save_pretrained(
    model: TimeViper,
    folder: str | Path,
    *,
    tokenizer: Any | None = None,
    metadata: dict[str, str] | None = None,
    max_shard_bytes: int = MAX_SHARD_BYTES,
) -> None:
    """Writes a weights folder atomically, replacing an existing one.

    `metadata` goes to `timeviper_metadata` in config.json.
    """
    folder = Path(folder)
    folder.parent.mkdir(parents=True, exist_ok=True)
    temporary = Path(tempfile.mkdtemp(prefix=f".{folder.name}-", dir=folder.parent))
    try:
        config = config_to_dict(model.config) | {"timeviper_metadata": metadata or {}}
        config["torch_dtype"] = str(model.lm_head.weight.dtype).removeprefix("torch.")
        (temporary / "config.json").write_text(json.dumps(config, indent=2) + "\n")
        tensors = {file_name(name, model.config.text): tensor for name, tensor in named_tensors(model).items()}
        _write_shards(tensors, temporary, max_shard_bytes)
        if tokenizer is not None:
            tokenizer.save_pretrained(temporary)
        temporary.chmod(0o755)  # mkdtemp creates 0o700
        _replace(temporary, folder)
    finally:
        shutil.rmtree(temporary, ignore_errors=True)


def from_pretrained(folder: str | Path, *, dtype: torch.dtype = torch.float32, device: str = "cpu") -> TimeViper:
    """Loads a weights folder in evaluation mode, one shard at a time. Raises ValueError for wrong files."""
    folder = Path(folder)
    with torch.device("meta"):
        model = TimeViper(load_config(folder))
    tensors = ((own_name(name, model.config.text), tensor) for name, tensor in iter_tensors(folder))
    assign_tensors(model, tensors, where=str(folder), dtype=dtype, device=device)
    return model.eval()


def load_tokenizer(folder: str | Path) -> Any:
    from transformers import AutoTokenizer, PreTrainedTokenizerFast  # slow import

    if (Path(folder) / "tokenizer.json").is_file():  # AutoTokenizer does not know our model type
        return PreTrainedTokenizerFast.from_pretrained(str(folder))
    return AutoTokenizer.from_pretrained(str(folder))


def load_backbone(model: TimeViper, folder: str | Path) -> None:
    """Loads language model weights; TransV becomes copies of attention.

    Raises:
        ValueError: when tensors or config.json do not match; the model is then unchanged.
    """
    source = _local_folder(folder)
    if (source / "config.json").is_file():
        _check_computed_alike(model.config.text, load_text_config(source), where=str(source / "config.json"))
    expected = {name: tensor for name, tensor in named_tensors(model).items() if _is_backbone(name)}
    problems = _Problems(expected)
    for name, shape in _iter_shapes(source):
        if not name.startswith(IGNORED_BACKBONE_PREFIXES):
            problems.accept(own_name(name, model.config.text), shape)
    problems.check(str(folder))
    renamed = (
        (own_name(name, model.config.text), tensor)
        for name, tensor in iter_tensors(source)
        if not name.startswith(IGNORED_BACKBONE_PREFIXES)
    )
    copy_tensors(expected, renamed, where=str(folder))
    model.init_transv_from_attention()


def _check_computed_alike(own: TextConfig, found: TextConfig, *, where: str) -> None:
    wrong = [
        f"{name} = {getattr(found, name, None)!r}, the model's is {getattr(own, name)!r}"
        for name in COMPUTING_FIELDS
        if hasattr(own, name) and getattr(own, name) != getattr(found, name, None)
    ]
    if wrong:
        raise ValueError(f"{where}: {'; '.join(wrong)}. Choose the preset or the text configuration of these weights")


def load_config(folder: str | Path) -> TimeViperConfig:
    path = Path(folder) / "config.json"
    if not path.is_file():
        raise ValueError(f"{path} does not exist; pass a weights folder written by save_pretrained or jobs/export.py")
    return config_from_dict(json.loads(path.read_text()), where=str(path))


def load_text_config(folder: str | Path) -> TextConfig:
    path = _local_folder(folder) / "config.json"
    return text_config_from_dict(json.loads(path.read_text()), where=str(path))


def config_to_dict(config: TimeViperConfig) -> dict[str, Any]:
    return {
        "model_type": MODEL_TYPE,
        "architectures": ["TimeViper"],
        "text_config": text_config_to_dict(config.text),
        "vision_config": asdict(config.vision),
        "transv": [asdict(site) for site in config.transv],
        "chat_template": config.chat_template,
    }


def config_from_dict(raw: Mapping[str, Any], *, where: str = "config") -> TimeViperConfig:
    """Ignores keys of Hugging Face's tools."""
    if raw.get("model_type") != MODEL_TYPE:
        raise ValueError(
            f"{where}: model_type is {raw.get('model_type')!r}, not {MODEL_TYPE!r};"
            " for a bare language model use load_backbone"
        )
    values = {
        "text": text_config_from_dict(raw.get("text_config", {}), where=where),
        "vision": raw.get("vision_config", {}),
        "transv": raw.get("transv", []),
        "chat_template": raw.get("chat_template", "nemotron"),
    }
    config: TimeViperConfig = validated(TypeAdapter(TimeViperConfig), values, where)
    return config


def weights_hash(folder: str | Path) -> str:
    """sha256 over config.json and every shard, names included."""
    digest = hashlib.sha256()
    for path in [Path(folder) / "config.json", *_shards(Path(folder))]:
        digest.update(path.name.encode() + b"\0")
        with path.open("rb") as file:
            digest.update(hashlib.file_digest(file, "sha256").digest())
    return digest.hexdigest()


def iter_tensors(folder: str | Path) -> Iterator[tuple[str, Tensor]]:
    for shard in _shards(Path(folder)):
        with safe_open(shard, framework="pt") as file:
            for name in file.keys():  # noqa: SIM118  (safe_open is not a mapping)
                yield name, file.get_tensor(name)


def _iter_shapes(folder: Path) -> Iterator[tuple[str, list[int]]]:
    """Reads headers only."""
    for shard in _shards(folder):
        with safe_open(shard, framework="pt") as file:
            for name in file.keys():  # noqa: SIM118  (safe_open is not a mapping)
                yield name, file.get_slice(name).get_shape()


def _shards(folder: Path) -> list[Path]:
    index = folder / INDEX_NAME
    if index.is_file():
        names = sorted(set(json.loads(index.read_text())["weight_map"].values()))
        missing = [name for name in names if not (folder / name).is_file()]
        if missing:
            raise ValueError(f"{folder}: shards in the index are missing: {', '.join(missing)}")
        return [folder / name for name in names]
    shards = sorted(folder.glob("*.safetensors"))
    if not shards:
        raise ValueError(f"{folder} has no .safetensors file")
    return shards


def named_tensors(model: TimeViper) -> dict[str, Tensor]:
    """Tensors of a folder, a tied output matrix once."""
    tensors = dict(model.state_dict())
    if model.config.text.tie_word_embeddings:
        del tensors["lm_head.weight"]
    return tensors


def _is_backbone(name: str) -> bool:
    return name.startswith("backbone.") or name == "lm_head.weight"


def _write_shards(tensors: Mapping[str, Tensor], folder: Path, max_shard_bytes: int) -> None:
    shards: list[dict[str, Tensor]] = [{}]
    size = 0
    for name, tensor in tensors.items():
        if shards[-1] and size + tensor.nbytes > max_shard_bytes:
            shards.append({})
            size = 0
        shards[-1][name] = tensor
        size += tensor.nbytes
    weight_map: dict[str, str] = {}
    for number, shard in enumerate(shards, start=1):
        shard_name = f"model-{number:05d}-of-{len(shards):05d}.safetensors"
        save_file({name: tensor.detach().cpu().contiguous() for name, tensor in shard.items()}, folder / shard_name)
        weight_map |= dict.fromkeys(shard, shard_name)
    total = sum(tensor.nbytes for tensor in tensors.values())
    index = {"metadata": {"total_size": total}, "weight_map": weight_map}
    (folder / INDEX_NAME).write_text(json.dumps(index, indent=2) + "\n")


def _replace(temporary: Path, folder: Path) -> None:
    """Moves an existing folder aside first: a rename cannot replace a non-empty folder."""
    if folder.exists():
        aside = Path(tempfile.mkdtemp(prefix=f".{folder.name}-old-", dir=folder.parent))
        folder.replace(aside / "old")
        temporary.replace(folder)
        shutil.rmtree(aside)
    else:
        temporary.replace(folder)


def assign_tensors(
    model: TimeViper, tensors: Iterator[tuple[str, Tensor]], *, where: str, dtype: torch.dtype, device: str
) -> None:
    """Assigns every tensor of a model on the meta device."""
    expected = named_tensors(model)
    problems = _Problems(expected)
    for name, tensor in tensors:
        if problems.accept(name, tensor.shape):
            # sums over the file's unaligned tensors may differ in the last bit
            model.load_state_dict({name: tensor.to(device, dtype, copy=True)}, strict=False, assign=True)
    problems.check(where)
    model.tie_weights()


@torch.no_grad()
def copy_tensors(expected: Mapping[str, Tensor], tensors: Iterable[tuple[str, Tensor]], *, where: str) -> None:
    problems = _Problems(expected)
    for name, tensor in tensors:
        if problems.accept(name, tensor.shape):
            expected[name].copy_(tensor)
    problems.check(where)


class _Problems:
    def __init__(self, expected: Mapping[str, Tensor]) -> None:
        self._shapes = {name: tuple(tensor.shape) for name, tensor in expected.items()}
        self._missing = dict.fromkeys(expected)
        self._unexpected: list[str] = []
        self._misshaped: list[str] = []

    def accept(self, name: str, shape: Sequence[int]) -> bool:
        if name not in self._shapes:
            self._unexpected.append(name)
            return False
        self._missing.pop(name, None)
        if tuple(shape) != self._shapes[name]:
            self._misshaped.append(f"{name} is {tuple(shape)}, should be {self._shapes[name]}")
            return False
        return True

    def check(self, where: str) -> None:
        kinds = (("missing", [*self._missing]), ("unexpected", self._unexpected), ("misshaped", self._misshaped))
        found = [f"{kind}: {', '.join(names)}" for kind, names in kinds if names]
        if any(".experts." in name for name in self._unexpected):
            raise ValueError(f"{where} has expert layers, which are not supported; use a dense model of this family")
        if found:
            raise ValueError(f"{where} does not fit the model; " + "; ".join(found))


def _local_folder(name_or_folder: str | Path) -> Path:
    if Path(name_or_folder).is_dir():
        return Path(name_or_folder)
    from huggingface_hub import snapshot_download

    return Path(snapshot_download(str(name_or_folder), allow_patterns=["*.json", "*.safetensors"]))

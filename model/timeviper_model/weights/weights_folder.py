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
from dataclasses import asdict, replace
from pathlib import Path
from typing import Any

import torch
from pydantic import TypeAdapter
from safetensors.torch import save_file
from torch import Tensor

from timeviper_model.config import TextConfig, TimeViperConfig
from timeviper_model.timeviper import TimeViper
from timeviper_model.weights.export_files import (
    public_metadata,
    public_vision,
    write_card,
    write_processors,
    write_tokenizer,
)
from timeviper_model.weights.families import (
    UNUSED_TENSORS,
    file_name,
    own_name,
    text_config_from_dict,
    text_config_to_dict,
    validated,
)
from timeviper_model.weights.hub_folder import (
    CONFIG_FILE,
    DOWNLOAD_AGAIN,
    INDEX_NAME,
    StoredTensor,
    check_complete,
    listed_names,
    load_json,
    local_folder,
    read_json,
    stored_tensors,
    weight_files,
)

MODEL_TYPE = "timeviper"
MAX_SHARD_BYTES = 4 * 2**30
"""Hugging Face's tools split at 5 GB."""

TOKENIZER_FILES = ("*.json", "*.jinja", "*.model", "*.txt")

OUTPUT_MATRIX = "lm_head.weight"

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
    "rope_scaling",
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

    Raises:
        ValueError: if `folder` holds something else.
    """
    folder = Path(folder)
    check_replaceable(folder)
    folder.parent.mkdir(parents=True, exist_ok=True)
    temporary = Path(tempfile.mkdtemp(prefix=f".{folder.name}-", dir=folder.parent))
    try:
        public = replace(model.config, vision=public_vision(model.config.vision))
        config = config_to_dict(public) | {"timeviper_metadata": public_metadata(metadata or {})}
        config["torch_dtype"] = str(model.lm_head.weight.dtype).removeprefix("torch.")
        (temporary / "config.json").write_text(json.dumps(config, indent=2) + "\n")
        tensors = {file_name(name, model.config.text): tensor for name, tensor in named_tensors(model).items()}
        _write_shards(tensors, temporary, max_shard_bytes)
        if tokenizer is not None:
            write_tokenizer(temporary, tokenizer, model.config)
        write_processors(temporary, model.config.vision)
        write_card(temporary, model.config, metadata or {})
        temporary.chmod(0o755)  # mkdtemp creates 0o700
        for path in temporary.iterdir():  # safetensors creates 0o600
            path.chmod(0o644)
        _replace(temporary, folder)
    finally:
        shutil.rmtree(temporary, ignore_errors=True)


def check_replaceable(folder: Path) -> None:
    """Raises ValueError if `folder` exists and is neither empty nor a weights folder of this project."""
    if folder.is_dir():
        config = folder / CONFIG_FILE
        entries = {path.name: path.is_file() for path in folder.iterdir()}
        refuse_other_contents(str(folder), entries, config.read_bytes() if entries.get(CONFIG_FILE) else b"")
    elif folder.exists():
        refuse_other_contents(str(folder), {folder.name: True}, b"")


def refuse_other_contents(where: str, entries: Mapping[str, bool], config: bytes) -> None:
    """
    Args:
        where: folder that would be replaced.
        entries: its names; whether each is a file.
        config: its config.json.
    """
    try:
        values = json.loads(config)
    except ValueError:
        values = None
    is_ours = isinstance(values, dict) and values.get("model_type") == MODEL_TYPE and all(entries.values())
    if entries and not is_ours:
        raise ValueError(f"{where} exists and is no weights folder, and would be deleted; name another folder")


def from_pretrained(
    name_or_folder: str | Path,
    *,
    dtype: torch.dtype = torch.float32,
    device: str = "cpu",
    revision: str | None = None,
) -> TimeViper:
    """Loads a weights folder in evaluation mode, one shard at a time. Raises ValueError for wrong files."""
    folder = local_folder(name_or_folder, revision=revision)
    with torch.device("meta"):
        model = TimeViper(load_config(folder))
    tensors = ((own_name(tensor.name, model.config.text), tensor.read()) for tensor in stored_tensors(folder))
    assign_tensors(model, tensors, where=str(folder), dtype=dtype, device=device)
    return model.eval()


def load_tokenizer(name_or_folder: str | Path, *, revision: str | None = None) -> Any:
    """Loads a tokenizer, without running code from its folder. Raises ValueError for a missing or damaged one."""
    from transformers import AutoTokenizer, PreTrainedTokenizerFast  # slow import

    folder = local_folder(name_or_folder, revision=revision, patterns=TOKENIZER_FILES)
    present = [path for name in ("tokenizer.json", "tokenizer_config.json") if (path := folder / name).is_file()]
    for path in present:
        check_complete(path)
    # AutoTokenizer does not know our model type
    kind = PreTrainedTokenizerFast if folder / "tokenizer.json" in present else AutoTokenizer
    try:
        return kind.from_pretrained(str(folder))
    except Exception as error:  # the tokenizers library raises plain Exceptions
        reason = (str(error).splitlines() or [type(error).__name__])[0]
        raise ValueError(f"{folder} holds no tokenizer that transformers reads ({reason}); {DOWNLOAD_AGAIN}") from error


def load_backbone(model: TimeViper, name_or_folder: str | Path, *, revision: str | None = None) -> None:
    """Loads language model weights; TransV becomes copies of attention.

    Raises:
        ValueError: when tensors or config.json do not match; the model is then unchanged.
    """
    source, where = local_folder(name_or_folder, revision=revision), str(name_or_folder)
    text = text_config_from_dict(read_json(source / CONFIG_FILE), where=str(source / CONFIG_FILE))
    _check_computed_alike(model.config.text, text, where=str(source / CONFIG_FILE))
    expected = {name: tensor for name, tensor in named_tensors(model).items() if _is_backbone(name)}
    tensors = _language_model_tensors(source, model.config.text)
    problems = _Problems(expected)
    for tensor in tensors:
        problems.accept(tensor.name, tensor.shape)
    problems.check(where)
    copy_tensors(expected, ((tensor.name, tensor.read()) for tensor in tensors), where=where)
    model.init_transv_from_attention()


def _language_model_tensors(folder: Path, text: TextConfig) -> list[StoredTensor]:
    """Returns the tensors under our names, without those that this model computes or lacks.

    Raises:
        ValueError: if a tied output matrix is stored with other values.
    """
    tensors = {
        own_name(tensor.name, text): tensor
        for tensor in stored_tensors(folder)
        if not UNUSED_TENSORS.fullmatch(tensor.name)
    }
    head, embeddings = tensors.get(OUTPUT_MATRIX), tensors.get("backbone.embeddings.weight")
    if text.tie_word_embeddings and head is not None and embeddings is not None:
        if not torch.equal(head.read(), embeddings.read()):
            raise ValueError(
                f"{folder}: config.json has tie_word_embeddings = true, but {OUTPUT_MATRIX} differs from the"
                " embeddings; set tie_word_embeddings to false"
            )
        del tensors[OUTPUT_MATRIX]
    return [replace(tensor, name=name) for name, tensor in tensors.items()]


def _check_computed_alike(own: TextConfig, found: TextConfig, *, where: str) -> None:
    wrong = [
        f"{name} = {getattr(found, name, None)!r}, the model's is {getattr(own, name)!r}"
        for name in COMPUTING_FIELDS
        if hasattr(own, name) and getattr(own, name) != getattr(found, name, None)
    ]
    if wrong:
        raise ValueError(f"{where}: {'; '.join(wrong)}. Choose the preset or the text configuration of these weights")


def load_config(folder: str | Path) -> TimeViperConfig:
    path = local_folder(folder) / CONFIG_FILE
    if not path.is_file():
        raise ValueError(f"{path} does not exist; pass a weights folder written by save_pretrained or jobs/export.py")
    return config_from_dict(read_json(path), where=str(path))


def load_text_config(name_or_folder: str | Path, *, revision: str | None = None) -> TextConfig:
    """Reads a language model's sizes, without downloading its weights."""
    raw = load_json(name_or_folder, CONFIG_FILE, revision=revision)
    return text_config_from_dict(raw, where=f"{name_or_folder}/{CONFIG_FILE}")


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
    for path in [Path(folder) / CONFIG_FILE, *weight_files(Path(folder))]:
        digest.update(path.name.encode() + b"\0")
        with path.open("rb") as file:
            digest.update(hashlib.file_digest(file, "sha256").digest())
    return digest.hexdigest()


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
        found = [f"{kind}: {listed_names(names)}" for kind, names in kinds if names]
        if any(".experts." in name for name in self._unexpected):
            raise ValueError(f"{where} has expert layers, which are not supported; use a dense model of this family")
        if found:
            raise ValueError(f"{where} does not fit the model; " + "; ".join(found))

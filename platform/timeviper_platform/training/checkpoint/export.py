"""Exports a committed checkpoint as a model or a weights folder."""

from __future__ import annotations

import logging
import tempfile
from pathlib import Path, PurePosixPath
from typing import Any

import torch

from timeviper_model.batching.prompt import check_tokenizer
from timeviper_model.batching.tokenizer_template import chat_template
from timeviper_model.config import TimeViperConfig
from timeviper_model.layers.lora import merge_lora
from timeviper_model.timeviper import TimeViper
from timeviper_model.weights.hub_folder import CONFIG_FILE
from timeviper_model.weights.public_checkpoint import load_public_checkpoint, public_config
from timeviper_model.weights.weights_folder import (
    TOKENIZER_FILES,
    check_replaceable,
    config_from_dict,
    load_tokenizer,
    refuse_other_contents,
    save_pretrained,
)
from timeviper_platform.common import storage
from timeviper_platform.common.devices import Dtype, torch_dtype
from timeviper_platform.common.machine_cache import local_copy
from timeviper_platform.training.checkpoint.commit import DamagedCheckpointError
from timeviper_platform.training.checkpoint.initial_weights import InitialWeights
from timeviper_platform.training.checkpoint.local_files import open_checkpoint
from timeviper_platform.training.checkpoint.manager import Checkpoints, read_model, read_state
from timeviper_platform.training.checkpoint.state import TrainState

logger = logging.getLogger(__name__)


FLOAT32_BYTES = 4


def export_weights(checkpoint: str, output: str, *, dtype: Dtype = "float32") -> str:
    """Writes a committed checkpoint as a weights folder, replacing `output`; returns `checkpoint`.

    Raises:
        ValueError: if there is no committed checkpoint, it lacks parts of the model, or `output` holds other files.
        DamagedCheckpointError: if its files differ from their checksums.
    """
    _check_replaceable(output)
    state, description, model = checkpoint_model(checkpoint, unrounded=True)
    model = model.to(torch_dtype(dtype))
    metadata = {**description["metadata"], "phase": state.phase, "step": str(state.step)}
    tokenizer = load_tokenizer(local_copy(description["tokenizer"], TOKENIZER_FILES))
    _write_weights(model, output, tokenizer=tokenizer, metadata=metadata)
    logger.info("weights of %s at step %d of %s are in %s", state.phase, state.step, checkpoint, output)
    return checkpoint


def export_newest(checkpoints: str, output: str, *, dtype: Dtype = "float32") -> str:
    """Exports the newest intact checkpoint in the folder `checkpoints`; returns its URI.

    Raises:
        ValueError: if there is none.
    """
    faults = []
    for uri in reversed(Checkpoints(checkpoints).committed()):
        try:
            return export_weights(uri, output, dtype=dtype)
        except DamagedCheckpointError as error:
            logger.warning("damaged checkpoint: %s; trying the next older one", error)
            faults.append(str(error))
    if faults:
        raise ValueError(
            f"every checkpoint in {checkpoints} is damaged: {'; '.join(faults)}; restore files from a copy"
        )
    raise ValueError(f"no committed checkpoint in {checkpoints}; run jobs/train.py first")


def convert_public_checkpoint(
    checkpoint: str, output: str, *, preset: TimeViperConfig, tokenizer: str | None = None, dtype: Dtype = "float32"
) -> str:
    """Writes a checkpoint of TimeViper's public code as a weights folder, replacing `output`; returns `checkpoint`.

    Args:
        checkpoint: URI of a file or folder; a folder's config.json replaces the sizes of `preset`.
        tokenizer: URI of a folder, or Hugging Face name; None = the checkpoint's folder.

    Raises:
        ValueError: when tensors do not fit the model, or the tokenizer its template; if `output` holds other files.
    """
    _check_replaceable(output)
    path = _local_file_or_folder(checkpoint)
    folder = path if path.is_dir() else path.parent
    config = public_config(path, preset)
    loaded_tokenizer = load_tokenizer(folder if tokenizer is None else local_copy(tokenizer, TOKENIZER_FILES))
    check_tokenizer(loaded_tokenizer, chat_template(config.chat_template, loaded_tokenizer))
    model = load_public_checkpoint(path, config, dtype=torch_dtype(dtype))
    metadata = {"public_checkpoint": PurePosixPath(checkpoint).name, "time_text": "temporal"}
    _write_weights(model, output, tokenizer=loaded_tokenizer, metadata=metadata)
    return checkpoint


def export_bytes(checkpoint: str) -> int:
    """Returns the bytes of the tensors that `export_weights` holds at once.

    Raises:
        ValueError: if there is no committed checkpoint.
    """
    state, description = read_state(checkpoint), read_model(checkpoint)
    copies = 2 if state.dtype == "bfloat16" else 1  # its own tensors, and those that the phase started from
    return copies * FLOAT32_BYTES * num_parameters(config_from_dict(description["config"], where=checkpoint))


def num_parameters(config: TimeViperConfig) -> int:
    with torch.device("meta"):
        return sum(parameter.numel() for parameter in TimeViper(config).parameters())


def _local_file_or_folder(uri: str) -> Path:
    """Downloads a remote folder, or a file with the tokenizer and configuration in its folder."""
    if storage.is_local(uri):
        return Path(local_copy(uri))
    filesystem, path = storage.split_uri(uri)
    if not filesystem.isfile(path):
        return Path(local_copy(uri))
    folder, _, name = uri.rpartition("/")
    return Path(local_copy(folder, (name, *TOKENIZER_FILES)), name)


def _write_weights(model: TimeViper, output: str, *, tokenizer: Any, metadata: dict[str, str]) -> None:
    if storage.is_local(output):
        save_pretrained(model, storage.split_uri(output)[1], tokenizer=tokenizer, metadata=metadata)
    else:
        with tempfile.TemporaryDirectory(prefix="timeviper-weights-") as scratch:
            save_pretrained(model, Path(scratch) / "weights", tokenizer=tokenizer, metadata=metadata)
            _check_replaceable(output)
            storage.remove(output)
            # first the file that tells an unfinished upload from other contents
            for file in sorted((Path(scratch) / "weights").iterdir(), key=lambda file: file.name != CONFIG_FILE):
                storage.upload(file, storage.join_uri(output, file.name))


def _check_replaceable(output: str) -> None:
    if storage.is_local(output):
        check_replaceable(Path(storage.split_uri(output)[1]))
        return
    entries = {PurePosixPath(item["name"]).name: item["type"] == "file" for item in storage.entries_in(output)}
    if not entries and storage.exists(output) and not storage.is_folder(output):
        entries = {"": True}
    config = storage.read_bytes(storage.join_uri(output, CONFIG_FILE)) if entries.get(CONFIG_FILE) else b""
    refuse_other_contents(storage.shown_uri(output), entries, config)


def checkpoint_model(checkpoint: str, *, unrounded: bool = False) -> tuple[TrainState, dict[str, Any], TimeViper]:
    """Returns state, model.json and the float32 model with merged adapters.

    Args:
        unrounded: take tensors that were frozen in bfloat16 from the phase's initial weights, without rounding.
    """
    with open_checkpoint(checkpoint) as saved:
        state, description, tensors = saved.state, saved.model, saved.shards().tensors()
        trained = {name for group in saved.groups for name in group["parameter_names"]}
    frozen = tensors.keys() - trained
    if unrounded and frozen and state.dtype == "bfloat16" and description["initial"] is not None:
        config = config_from_dict(description["config"], where=checkpoint)
        tensors = InitialWeights(**description["initial"]).unrounded(tensors, frozen, config)
    if description["lora_scale"] is not None:
        tensors = merge_lora(tensors, description["lora_scale"])
    return state, description, _model_of(description, tensors, source=checkpoint)


def _model_of(description: dict[str, Any], tensors: dict[str, torch.Tensor], *, source: str) -> TimeViper:
    with torch.device("meta"):
        model = TimeViper(config_from_dict(description["config"], where=source))
    result = model.load_state_dict(tensors, strict=False, assign=True)
    missing = [
        name for name in result.missing_keys if not model.config.text.tie_word_embeddings or "lm_head" not in name
    ]
    if missing or result.unexpected_keys:
        raise ValueError(f"{source} does not hold this model: {missing = }, unexpected = {result.unexpected_keys}")
    model.tie_weights()
    return model

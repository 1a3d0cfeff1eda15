"""Folders in the layout of Hugging Face repositories, and repositories by name.

Pointers of Git LFS, unfinished downloads and quantised weights are errors of one line.
"""

from __future__ import annotations

import json
import re
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError, safe_open
from torch import Tensor

CONFIG_FILE = "config.json"
INDEX_NAME = "model.safetensors.index.json"

WEIGHT_FILES = ("model.safetensors", INDEX_NAME, "pytorch_model.bin", "pytorch_model.bin.index.json")
"""In the order in which transformers tries them."""

PICKLED = "*.bin"
"""Downloaded only from repositories without safetensors."""

REPOSITORY_FILES = ("*.json", "*.jinja", "*.model", "*.txt", "LICENSE*", "NOTICE*", "*.safetensors", PICKLED)

ADAPTER_FILES = ("adapter_model.safetensors", "adapter_model.bin")

REPOSITORY_NAME = re.compile(r"[A-Za-z0-9][\w.-]*(/[A-Za-z0-9][\w.-]*)?")

MAX_NAMES = 8
"""Names listed in an error."""

LFS_POINTER = b"version https://git-lfs.github.com/spec/"

DOWNLOAD_AGAIN = "download it again, for example with `hf download NAME --local-dir FOLDER`"

QUANTISED_NAMES = re.compile(r".*\.(qweight|qzeros|scales|weight_scale(_inv)?|weight_scale_2|absmax|quant_map)")

PLAIN_DTYPES = {torch.float64, torch.float32, torch.float16, torch.bfloat16, torch.int64, torch.bool}
"""int64 and bool are buffers, such as position ids."""

SAFETENSORS_DTYPES = {"F64", "F32", "F16", "BF16", "I64", "BOOL"}


@dataclass(frozen=True, slots=True)
class StoredTensor:
    name: str
    shape: tuple[int, ...]
    read: Callable[[], Tensor]
    """Reads the values."""


def local_folder(
    name_or_folder: str | Path,
    *,
    revision: str | None = None,
    patterns: Sequence[str] = REPOSITORY_FILES,
    cached_only: bool = False,
) -> Path:
    """Returns the folder, or the download of a repository's configuration, tokenizer and weights.

    Args:
        revision: commit, tag or branch of a repository; a folder ignores it.
        patterns: files to download.
        cached_only: whether to use only earlier downloads.

    Raises:
        ValueError: if there is neither.
    """
    folder = Path(name_or_folder).expanduser()
    if folder.is_dir():
        return folder
    name = str(name_or_folder)
    if folder.is_file():
        raise ValueError(f"{name!r} is a file; name the folder that holds it")
    if not REPOSITORY_NAME.fullmatch(name):
        raise ValueError(f"there is no folder {name!r}; create it, or name a Hugging Face repository (OWNER/NAME)")
    return _download(name, revision, patterns, cached_only=cached_only)


def load_json(name_or_folder: str | Path, file: str, *, revision: str | None = None) -> dict[str, Any]:
    """Reads a JSON file of a folder or repository, without downloading weights."""
    return read_json(local_folder(name_or_folder, revision=revision, patterns=[file]) / file)


def read_json(path: Path) -> dict[str, Any]:
    """Raises ValueError if the file is missing, or not a JSON object."""
    if not path.is_file():
        raise ValueError(f"{path.parent} has no {path.name}; {DOWNLOAD_AGAIN}")
    check_complete(path)
    try:
        values = json.loads(path.read_bytes())
    except ValueError as error:
        raise ValueError(f"{path} is not JSON ({error}); {DOWNLOAD_AGAIN}") from error
    if not isinstance(values, dict):
        raise ValueError(f"{path} holds a {type(values).__name__}, not an object; {DOWNLOAD_AGAIN}")
    return values


def check_complete(path: Path) -> None:
    """Raises ValueError for an empty file or a pointer of Git LFS."""
    with path.open("rb") as file:
        start = file.read(len(LFS_POINTER))
    if not start:
        raise ValueError(f"{path} is empty; {DOWNLOAD_AGAIN}")
    if start == LFS_POINTER:
        raise ValueError(f"{path} is a Git LFS pointer, not the file; run `git lfs pull` in its folder")


def check_not_quantised(config: Mapping[str, Any], where: str) -> None:
    """Raises ValueError if config.json announces quantised weights."""
    quantisation = config.get("quantization_config") or config.get("compression_config")
    if quantisation:
        method = quantisation.get("quant_method", "unknown") if isinstance(quantisation, dict) else quantisation
        raise ValueError(f"{where}: the weights are quantised (quant_method {method!r}); use the unquantised weights")


def weight_files(folder: Path) -> list[Path]:
    """Lists the files of the weights, as transformers chooses them.

    Raises:
        ValueError: if a file is missing.
    """
    for name in WEIGHT_FILES:
        if not (folder / name).is_file():
            continue
        if not name.endswith(".json"):
            return [folder / name]
        shards = sorted(set(read_json(folder / name)["weight_map"].values()))
        missing = [shard for shard in shards if not (folder / shard).is_file()]
        if missing:
            raise ValueError(f"{folder}: shards in {name} are missing: {listed_names(missing)}; {DOWNLOAD_AGAIN}")
        return [folder / shard for shard in shards]
    others = [path for path in sorted(folder.glob("*.safetensors")) if path.name not in ADAPTER_FILES]
    if others:
        return others
    for name in ADAPTER_FILES:
        if (folder / name).is_file():
            raise ValueError(f"{folder} has only an adapter, {name}; merge it into its base model first")
    raise ValueError(f"{folder} has no .safetensors file and no pytorch_model.bin; {DOWNLOAD_AGAIN}")


def stored_tensors(folder: Path) -> Iterator[StoredTensor]:
    """Yields the tensors of a folder; their values are read on demand.

    Raises:
        ValueError: if a file is missing or damaged, or holds quantised weights.
    """
    for path in weight_files(folder):
        yield from file_tensors(path)


def file_tensors(path: Path) -> Iterator[StoredTensor]:
    """`stored_tensors` of one safetensors or PyTorch file."""
    if not path.is_file():
        raise ValueError(f"{path} does not exist")
    check_complete(path)
    yield from (_safetensors if path.suffix == ".safetensors" else _pickled)(path)


def listed_names(names: Sequence[str]) -> str:
    """The first names of a list that may have hundreds."""
    rest = len(names) - MAX_NAMES
    return ", ".join(names[:MAX_NAMES]) + (f" and {rest} more" if rest > 0 else "")


def _safetensors(path: Path) -> Iterator[StoredTensor]:
    try:
        with safe_open(path, framework="pt") as file:
            headers = [(name, file.get_slice(name)) for name in file.keys()]  # noqa: SIM118  (not a mapping)
            found = [(name, tuple(header.get_shape()), str(header.get_dtype())) for name, header in headers]
    except SafetensorError as error:
        raise ValueError(f"{path} {_damage(path)} ({error}); {DOWNLOAD_AGAIN}") from error
    for name, shape, dtype in found:
        _check_plain(path, name, dtype, is_plain=dtype in SAFETENSORS_DTYPES)
        yield StoredTensor(name, shape, partial(_read, path, name))


def _read(path: Path, name: str) -> Tensor:
    with safe_open(path, framework="pt") as file:
        tensor: Tensor = file.get_tensor(name)
    return tensor


def _pickled(path: Path) -> Iterator[StoredTensor]:
    try:
        tensors = torch.load(path, map_location="cpu", weights_only=True, mmap=_is_zip(path))
    except Exception as error:  # a damaged archive raises many types
        reason = str(error).splitlines()[0]
        raise ValueError(f"{path} cannot be read as PyTorch weights ({reason}); {DOWNLOAD_AGAIN}") from error
    if not isinstance(tensors, dict):
        raise ValueError(f"{path} holds a {type(tensors).__name__}, not tensors by name")
    for name, tensor in tensors.items():
        if not isinstance(tensor, Tensor):
            raise ValueError(f"{path}: {name} is a {type(tensor).__name__}, not a tensor; save the model's state dict")
        _check_plain(path, name, str(tensor.dtype).removeprefix("torch."), is_plain=tensor.dtype in PLAIN_DTYPES)
        yield StoredTensor(name, tuple(tensor.shape), partial(_same, tensor))


def _same(tensor: Tensor) -> Tensor:
    return tensor


def _is_zip(path: Path) -> bool:
    """Older files of torch.save cannot be mapped."""
    with path.open("rb") as file:
        return file.read(2) == b"PK"


def _check_plain(path: Path, name: str, dtype: str, *, is_plain: bool) -> None:
    if not is_plain or QUANTISED_NAMES.fullmatch(name):
        raise ValueError(f"{path}: {name} ({dtype}) is of quantised weights; use the unquantised weights")


def _damage(path: Path) -> str:
    """Compares the size of a safetensors file with its header's last offset."""
    size = path.stat().st_size
    try:
        with path.open("rb") as file:
            header_bytes = int.from_bytes(file.read(8), "little")
            header = json.loads(file.read(header_bytes)) if header_bytes < size else None
        assert header is not None
        end = max(values["data_offsets"][1] for name, values in header.items() if name != "__metadata__")
    except (ValueError, KeyError, TypeError, AssertionError):
        return f"is not a whole safetensors file: its header cannot be read from {size:,} bytes"
    expected = 8 + header_bytes + end
    return f"has {size:,} of {expected:,} bytes" if size != expected else "is damaged"


def _download(name: str, revision: str | None, patterns: Sequence[str], *, cached_only: bool) -> Path:
    from huggingface_hub import snapshot_download
    from huggingface_hub.errors import GatedRepoError, RepositoryNotFoundError, RevisionNotFoundError

    def snapshot(patterns: Sequence[str]) -> Path:
        return Path(
            snapshot_download(
                name,
                revision=revision,
                allow_patterns=[*patterns],
                ignore_patterns=["*/*"],
                local_files_only=cached_only,
            )
        )

    try:
        folder = snapshot([pattern for pattern in patterns if pattern != PICKLED])
        return snapshot(patterns) if PICKLED in patterns and not any(folder.glob("*.safetensors")) else folder
    except GatedRepoError as error:
        raise ValueError(
            f"{name!r} is gated: accept its terms at https://huggingface.co/{name}, then run `hf auth login`"
        ) from error
    except RepositoryNotFoundError as error:
        raise ValueError(
            f"{name!r} is neither a folder nor a repository of huggingface.co that this account can read; check the"
            " name, or run `hf auth login`"
        ) from error
    except RevisionNotFoundError as error:
        raise ValueError(f"{name!r} has no {revision = }; name a commit, tag or branch") from error
    except Exception as error:  # the HTTP client's errors share no base class
        if found := getattr(error, "snapshot_path", None):  # some of the files; a reader names what it lacks
            return Path(found)
        reason = (str(error).splitlines() or [type(error).__name__])[0]
        raise ValueError(
            f"{name!r} is neither a folder nor in the download cache, and cannot be fetched: {reason}"
        ) from error

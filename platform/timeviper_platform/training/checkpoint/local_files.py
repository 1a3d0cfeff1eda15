"""Files of a committed checkpoint on this machine, checked against COMMIT while they are fetched.

On resuming, a machine fetches each file that its ranks read once: model states, the ranks' random generators and their
shards, or all shards where the number of ranks, ZeRO stage or dtype has changed. A damaged checkpoint is replaced by
the next older one.
"""

from __future__ import annotations

import contextlib
import logging
import re
import shutil
import tempfile
from collections.abc import Callable, Collection, Iterator, Mapping, Sequence
from dataclasses import dataclass
from functools import partial
from pathlib import Path, PurePosixPath
from typing import Any, NamedTuple

import torch.distributed as dist

from timeviper_platform.common import storage
from timeviper_platform.common.devices import Dtype
from timeviper_platform.common.machine_cache import check_free_space
from timeviper_platform.training.checkpoint.commit import (
    DamagedCheckpointError,
    FileFacts,
    check_file,
    check_sizes,
    read_document,
    set_aside,
)
from timeviper_platform.training.checkpoint.reshard import SavedShards
from timeviper_platform.training.checkpoint.state import TrainState
from timeviper_platform.training.distributed import from_rank_0, raise_on_all_ranks, ranks_of_machine

logger = logging.getLogger(__name__)

STATE_FILE = "state.json"
GROUPS_FILE = "groups.json"
MODEL_FILE = "model.json"


@dataclass(frozen=True, kw_only=True)
class OpenCheckpoint:
    uri: str
    folder: Path
    """Folder of the files, named as the checkpoint."""
    state: TrainState
    groups: list[dict[str, Any]]
    """Optimizer groups (groups.json)."""
    model: dict[str, Any]
    """Configuration and metadata of the model (model.json)."""
    scratch: Path | None = None
    """Folder that `close` removes."""

    def shards(self) -> SavedShards:
        trained = [name for group in self.groups for name in group["parameter_names"]]
        return SavedShards(self.folder, zero_stage=self.state.zero_stage, trained=trained)

    def close(self) -> None:
        if self.scratch is not None:
            shutil.rmtree(self.scratch, ignore_errors=True)


@contextlib.contextmanager
def open_checkpoint(uri: str) -> Iterator[OpenCheckpoint]:
    """Opens a checkpoint in one process. Raises ValueError or DamagedCheckpointError."""
    documents = _read_documents(uri)
    names = [name for name in documents.files if name.endswith("_states.pt")]
    scratch = None if storage.is_local(uri) else Path(tempfile.mkdtemp(prefix="timeviper-checkpoint-"))
    try:
        folder = _folder(uri, scratch)
        _check_space(uri, names, documents.files, folder)
        for name in names:
            _fetch(uri, name, documents.files[name], folder)
        yield documents.opened(folder, scratch)
    finally:
        if scratch is not None:
            shutil.rmtree(scratch, ignore_errors=True)


def open_for_resume(candidates: Callable[[], list[str]], *, zero_stage: int, dtype: Dtype) -> OpenCheckpoint:
    """Opens the first intact candidate; collective. Damaged ones before it are set aside.

    Args:
        candidates: URIs on rank 0, newest first.

    Raises:
        ValueError: if every candidate is damaged.
        RuntimeError: if storage fails.
    """
    faults: dict[str, str] = {}
    for uri in from_rank_0(candidates):
        opened = _open_on_all_ranks(uri, zero_stage, dtype)
        if isinstance(opened, OpenCheckpoint):
            if faults:
                from_rank_0(partial(_set_damaged_aside, faults, uri))
            return opened
        faults[uri] = opened
    raise ValueError(
        f"damaged checkpoint: {'; '.join(faults.values())}; restore the files from a copy, resume from another one, or"
        " choose another name to start again"
    )


def _set_damaged_aside(faults: Mapping[str, str], uri: str) -> None:
    for fault in faults.values():
        logger.warning("damaged checkpoint: %s; resuming from the older %s", fault, uri)
    try:
        set_aside(list(faults), "damaged")
    except (OSError, RuntimeError) as error:
        logger.warning("the damaged checkpoints stay as they are: %s", error)


def files_of_rank(names: Collection[str], rank: int, *, is_native: bool) -> set[str]:
    """Returns the files that a rank reads; DeepSpeed reads no other rank's shards."""
    generators = {name for name in names if name == f"rng-{rank:05d}.pt"}
    states = {name for name in names if name.endswith("_states.pt")}
    if is_native:
        of_others = re.compile(rf"(bf16_)?zero_pp_rank_(?!{rank}_)\d+_")
        states = {name for name in states if not of_others.match(name)}
    return states | generators


class _Documents(NamedTuple):
    uri: str
    files: dict[str, FileFacts]
    state: TrainState
    groups: list[dict[str, Any]]
    model: dict[str, Any]

    def opened(self, folder: Path, scratch: Path | None) -> OpenCheckpoint:
        return OpenCheckpoint(
            uri=self.uri, folder=folder, state=self.state, groups=self.groups, model=self.model, scratch=scratch
        )


def _read_documents(uri: str) -> _Documents:
    files = check_sizes(uri)
    state, groups, model = (read_document(uri, name, files[name]) for name in (STATE_FILE, GROUPS_FILE, MODEL_FILE))
    return _Documents(uri, files, TrainState.from_json(state, source=uri), groups, model)


def _open_on_all_ranks(uri: str, zero_stage: int, dtype: Dtype) -> OpenCheckpoint | str:
    """Returns what is damaged, if anything is."""
    documents = from_rank_0(lambda: _or_fault(lambda: _read_documents(uri)))
    if isinstance(documents, str):
        return documents
    is_native = documents.state.layout == (dist.get_world_size(), zero_stage, dtype)
    local = ranks_of_machine()
    wanted = {rank: files_of_rank(documents.files, rank, is_native=is_native) for rank in local}
    own = _own_share(wanted, dist.get_rank())
    scratch = _shared_scratch(local) if not storage.is_local(uri) else None
    folder = _folder(uri, scratch)
    opened = documents.opened(folder, scratch if dist.get_rank() == local[0] else None)
    of_machine = set().union(*wanted.values())
    try:
        raise_on_all_ranks(lambda: _check_space(uri, of_machine, documents.files, folder))
        faults = raise_on_all_ranks(lambda: _fetch_all(uri, own, documents.files, folder))
    except RuntimeError:
        opened.close()
        raise
    damaged = sorted({fault for of_rank in faults for fault in of_rank})
    if damaged:
        opened.close()
        return "; ".join(damaged)
    return opened


def _own_share(wanted: Mapping[int, Collection[str]], rank: int) -> list[str]:
    """Divides the files among the ranks that read them: those of a single reader first, then evenly."""
    readers = {name: [r for r, names in wanted.items() if name in names] for name in set().union(*wanted.values())}
    shares: dict[int, list[str]] = {reader: [] for reader in wanted}
    for name in sorted(readers, key=lambda name: (len(readers[name]), name)):
        shares[min(readers[name], key=lambda reader: (len(shares[reader]), reader))].append(name)
    return shares[rank]


def _shared_scratch(local: Sequence[int]) -> Path:
    """Creates one folder per machine, named by its first rank."""
    is_first = dist.get_rank() == local[0]
    made = tempfile.mkdtemp(prefix="timeviper-checkpoint-") if is_first else None
    folders: list[str | None] = [None] * dist.get_world_size()
    dist.all_gather_object(folders, made)
    folder = folders[local[0]]
    assert folder is not None
    return Path(folder)


def _folder(uri: str, scratch: Path | None) -> Path:
    path = storage.split_uri(uri)[1]
    return Path(path) if scratch is None else scratch / PurePosixPath(path).name


def _fetch_all(uri: str, names: Sequence[str], files: Mapping[str, FileFacts], folder: Path) -> list[str]:
    """Returns faults."""
    faults = (_or_fault(partial(_fetch, uri, name, files[name], folder)) for name in names)
    return [fault for fault in faults if fault is not None]


def _check_space(uri: str, names: Collection[str], files: Mapping[str, FileFacts], folder: Path) -> None:
    """Raises RuntimeError if the files of a remote checkpoint do not fit on this machine."""
    if not storage.is_local(uri):
        num_bytes = sum(files[name].num_bytes for name in names)
        check_free_space(folder, num_bytes, f"this node's share of {uri}", "set TMPDIR to a larger disk")


def _fetch(uri: str, name: str, facts: FileFacts, folder: Path) -> None:
    if not storage.is_local(uri):
        folder.mkdir(parents=True, exist_ok=True)
        with contextlib.suppress(FileNotFoundError):  # reported below
            storage.download(storage.join_uri(uri, name), folder / name)
    check_file(uri, name, facts, folder / name)


def _or_fault(act: Callable[[], Any]) -> Any:
    try:
        return act()
    except DamagedCheckpointError as error:
        return str(error)

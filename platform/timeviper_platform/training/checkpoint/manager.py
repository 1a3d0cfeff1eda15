"""Committed checkpoints: written by threads while training continues, restored at any world size.

checkpoints/step-00000120/
    mp_rank_00_model_states.pt, zero_pp_rank_*_optim_states.pt   DeepSpeed's shards
    rng-00000.pt        random generators of each rank
    state.json          TrainState
    groups.json         optimizer groups
    model.json          config and metadata of the model
    COMMIT              sizes of all of the above, written last
"""

from __future__ import annotations

import contextlib
import logging
import re
import tempfile
import threading
from collections.abc import Callable, Iterator, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path, PurePosixPath
from typing import Any, Literal

import torch
import torch.distributed as dist
from torch import nn

from timeviper_platform.common import storage
from timeviper_platform.common.devices import Dtype
from timeviper_platform.training.checkpoint.deepspeed_files import reading_as_data, take_snapshot
from timeviper_platform.training.checkpoint.reshard import SavedShards, load_optimizer_from, load_weights_from
from timeviper_platform.training.checkpoint.state import TrainState
from timeviper_platform.training.optim.parameter_groups import ParameterGroup

logger = logging.getLogger(__name__)

COMMIT_FILE = "COMMIT"
STATE_FILE = "state.json"
GROUPS_FILE = "groups.json"
MODEL_FILE = "model.json"
TAG = re.compile(r"/step-\d{8,}$")


@dataclass(frozen=True, kw_only=True, slots=True)
class CheckpointConfig:
    every_steps: int = 500
    """Steps between checkpoints; 0 saves only at each phase's end."""
    keep: int = 2
    """Number of newest checkpoints to keep."""
    max_failed_saves: int = 3
    """Tolerated failed saves in a row. Training waits for the next save and ends if it fails too."""
    retry_wait_s: float = 5.0
    """Seconds before a phase's last save is retried; doubled each time."""

    def __post_init__(self) -> None:
        if self.every_steps < 0 or self.keep < 1:
            raise ValueError(f"{self.every_steps = } must be at least 0 and {self.keep = } at least 1")
        if self.max_failed_saves < 0 or self.retry_wait_s < 0:
            raise ValueError(f"{self.max_failed_saves = } and {self.retry_wait_s = } must be at least 0")


class SaveFailedError(RuntimeError):
    """A save failed; raised on every rank."""


@dataclass(frozen=True, kw_only=True, slots=True)
class Snapshot:
    """One rank's share of a checkpoint."""

    tag: str
    global_step: int
    files: dict[str, Any]
    """Contents for torch.save, by file name."""
    documents: dict[str, Any]
    """JSON contents of rank 0, by file name."""


class Checkpoints:
    """Checkpoints of one run. Snapshot, write and wait are collective."""

    def __init__(self, uri: str, *, keep: int = 2) -> None:
        self.uri = uri
        self._keep = keep
        self._group: Any = None
        self._thread: threading.Thread | None = None
        self._outcome: str | BaseException | None = None
        self.newest_written = 0

    def newest(self) -> str | None:
        return next((uri for uri in reversed(list_folders(self.uri)) if is_committed(uri)), None)

    def committed(self) -> list[str]:
        """Returns the URIs, oldest first."""
        return [uri for uri in list_folders(self.uri) if is_committed(uri)]

    def uri_of(self, state: TrainState) -> str:
        return storage.join_uri(self.uri, _tag(state.global_step))

    def snapshot(
        self, ds_engine: Any, state: TrainState, groups: Sequence[ParameterGroup], model: dict[str, Any]
    ) -> Snapshot:
        """Copies this rank's state."""
        return Snapshot(
            tag=_tag(state.global_step),
            global_step=state.global_step,
            files=take_snapshot(ds_engine) | {f"rng-{dist.get_rank():05d}.pt": _generator_states()},
            documents={
                STATE_FILE: state.to_json(),
                GROUPS_FILE: [asdict(group) for group in groups],
                MODEL_FILE: model,
            },
        )

    def write(self, snapshot: Snapshot, before_commit: Callable[[], None] | None = None) -> None:
        """Writes the snapshot in a thread; call `wait` before the next one. Rank 0 calls `before_commit`."""
        assert self._thread is None  # two at a time would hold two copies of the state
        if self._group is None:
            # the threads need their own group: training uses the default one
            self._group = dist.new_group(backend="gloo")
        self._thread = threading.Thread(
            target=self._run, args=(snapshot, before_commit), name="checkpoint", daemon=False
        )
        self._thread.start()

    def wait(self) -> str | None:
        """Returns the URI of the checkpoint being written, once committed.

        Raises:
            SaveFailedError: if a rank could not write its share.
            RuntimeError: if a rank is gone.
        """
        if self._thread is None:
            return None
        self._thread.join()
        self._thread = None
        outcome, self._outcome = self._outcome, None
        if isinstance(outcome, BaseException):
            kind = SaveFailedError if isinstance(outcome, SaveFailedError) else RuntimeError
            raise kind(f"a checkpoint in {self.uri} could not be written: {outcome}") from outcome
        return outcome

    def wait_quietly(self) -> str | None:
        """Waits and logs errors, for a run that is already failing."""
        try:
            return self.wait()
        except RuntimeError as error:
            logger.error("%s", error)
            return None

    def _run(self, snapshot: Snapshot, before_commit: Callable[[], None] | None) -> None:
        try:
            target = storage.join_uri(self.uri, snapshot.tag)
            rank = dist.get_rank()
            if rank == 0:
                self._on_all_ranks(lambda: storage.remove(target))  # left by a killed attempt
                self._on_all_ranks(lambda: _write_files(target, snapshot.files, snapshot.documents))
                self._on_all_ranks(lambda: self._commit(target, before_commit))
            else:
                self._on_all_ranks(lambda: None)
                self._on_all_ranks(lambda: _write_files(target, snapshot.files, {}))
                self._on_all_ranks(lambda: None)
            self._outcome = target
            self.newest_written = snapshot.global_step
            if rank == 0:
                self._prune()
        except Exception as error:  # noqa: BLE001 - handed to `wait`, which raises it
            self._outcome = error

    def _on_all_ranks(self, act: Callable[[], None]) -> None:
        failure = None
        try:
            act()
        except Exception as error:  # noqa: BLE001 - gathered, and raised on every rank
            failure = f"rank {dist.get_rank()}: {type(error).__name__}: {error}"
        failures: list[str | None] = [None] * dist.get_world_size()
        dist.all_gather_object(failures, failure, group=self._group)
        if any(failures):
            raise SaveFailedError("; ".join(text for text in failures if text))

    def _commit(self, target: str, before_commit: Callable[[], None] | None) -> None:
        if before_commit is not None:
            before_commit()
        storage.write_json(storage.join_uri(target, COMMIT_FILE), {"files": _sizes(target)})

    def _prune(self) -> None:
        try:
            committed = self.committed()
            for uri in list_folders(self.uri):
                mark = storage.join_uri(uri, COMMIT_FILE)
                is_remains = TAG.search(uri) and uri < committed[-1] and not storage.exists(mark)
                if is_remains or uri in committed[: -self._keep]:
                    storage.remove(mark)  # first: after a kill in between, half a folder must not look committed
                    storage.remove(uri)
        except Exception as error:  # noqa: BLE001 - the new checkpoint is committed in any case
            logger.warning("old checkpoints in %s cannot be removed and stay for now: %s", self.uri, error)


def resolve_resume(uri: str, resume: Literal["auto", "never"] | str) -> str | None:
    """Returns the checkpoint to start from; None for the initial weights.

    `auto` is the newest committed one; `never` requires that there is none; a URI may name another run's.

    Raises:
        ValueError: if the run would get two histories.
    """
    newest = Checkpoints(uri).newest()
    if resume == "auto":
        return newest
    if resume == "never":
        if newest is not None:
            raise ValueError(f"--resume never, but {newest} is committed; choose another name, or remove {uri}")
        return None
    read_state(resume)
    if newest is not None and storage.split_uri(newest)[1] != storage.split_uri(resume)[1]:
        raise ValueError(f"--resume {resume}, but this run's newest checkpoint is {newest}; choose another name")
    return resume


def restore_checkpoint(
    uri: str,
    model: nn.Module,
    groups: Sequence[ParameterGroup],
    build: Callable[[], Any],
    *,
    zero_stage: int,
    dtype: Dtype,
) -> Any:
    """Restores `build()`'s ds_engine to the checkpoint at `uri`.

    At equal world size, ZeRO stage and dtype the restored state is bit-identical; otherwise parameters are
    resharded.

    Raises:
        ValueError: if the checkpoint trained other parameters.
        RuntimeError: if files cannot be read, or hold more than data.
    """
    state = read_state(uri)
    saved_groups = storage.read_json(storage.join_uri(uri, GROUPS_FILE))
    _check_same_groups(saved_groups, groups, uri)
    layout = (dist.get_world_size(), zero_stage, dtype)
    saved_layout = (state.world_size, state.zero_stage, state.dtype)
    with local_copy(uri) as folder:
        if layout == saved_layout:
            ds_engine = build()
            _load_natively(ds_engine, folder, uri)
        else:
            logger.info("%s: (ranks, ZeRO stage, dtype) %s -> %s", uri, saved_layout, layout)
            shards = open_shards(folder, state, saved_groups)
            load_weights_from(shards, model)
            ds_engine = build()
            load_optimizer_from(shards, ds_engine, groups)
        _set_generator_states(folder / f"rng-{dist.get_rank():05d}.pt", state)
    return ds_engine


def is_committed(uri: str) -> bool:
    """Returns whether COMMIT exists and all files have their sizes."""
    mark = storage.join_uri(uri, COMMIT_FILE)
    if not storage.exists(mark):
        return False
    expected = storage.read_json(mark)["files"]
    found = _sizes(uri)
    wrong = [name for name, size in expected.items() if found.get(name) != size]
    if wrong:
        logger.warning("skipping %s: committed, but damaged in %s", uri, ", ".join(sorted(wrong)[:5]))
    return not wrong


def read_state(uri: str) -> TrainState:
    """Raises ValueError without a commit or for another format version."""
    if not is_committed(uri):
        raise ValueError(
            f"there is no committed checkpoint at {uri!r}; name a folder step-* that holds a {COMMIT_FILE}"
        )
    return TrainState.from_json(storage.read_json(storage.join_uri(uri, STATE_FILE)), source=uri)


def open_shards(folder: Path, state: TrainState, saved_groups: list[dict[str, Any]]) -> SavedShards:
    trained = [name for group in saved_groups for name in group["parameter_names"]]
    return SavedShards(folder, zero_stage=state.zero_stage, trained=trained)


@contextlib.contextmanager
def local_copy(uri: str) -> Iterator[Path]:
    """Yields the checkpoint's folder, downloaded if it is remote."""
    filesystem, path = storage.split_uri(uri)
    if storage.is_local(uri):
        yield Path(path)
        return
    with tempfile.TemporaryDirectory(prefix="timeviper-checkpoint-") as scratch:
        folder = Path(scratch) / PurePosixPath(path).name
        filesystem.get(path.rstrip("/") + "/", f"{folder}/", recursive=True)
        yield folder


def list_folders(uri: str) -> list[str]:
    filesystem, path = storage.split_uri(uri)
    filesystem.invalidate_cache()
    if not filesystem.isdir(path):
        return []
    names = [
        PurePosixPath(item["name"]).name for item in filesystem.ls(path, detail=True) if item["type"] == "directory"
    ]
    return [storage.join_uri(uri, name) for name in sorted(names)]


def _tag(global_step: int) -> str:
    return f"step-{global_step:08d}"


def _load_natively(ds_engine: Any, folder: Path, uri: str) -> None:
    with reading_as_data(ds_engine):
        loaded, _ = ds_engine.load_checkpoint(
            str(folder.parent), tag=folder.name, load_lr_scheduler_states=False, load_module_strict=True
        )
    if loaded is None:
        raise RuntimeError(f"DeepSpeed found no state in {uri}; resume from an earlier checkpoint")


def _generator_states() -> dict[str, torch.Tensor]:
    states = {"cpu": torch.get_rng_state()}
    return states | ({"cuda": torch.cuda.get_rng_state()} if torch.cuda.is_available() else {})


def _set_generator_states(file: Path, state: TrainState) -> None:
    if not file.exists():
        torch.manual_seed(state.global_step * 100_003 + dist.get_rank())
        return
    states = torch.load(file, weights_only=True)
    torch.set_rng_state(states["cpu"])
    if "cuda" in states and torch.cuda.is_available():
        torch.cuda.set_rng_state(states["cuda"])


def _check_same_groups(saved: list[dict[str, Any]], groups: Sequence[ParameterGroup], uri: str) -> None:
    if [item["parameter_names"] for item in saved] != [list(group.parameter_names) for group in groups]:
        raise ValueError(
            f"{uri} trained {[item['name'] for item in saved]}, this configuration {[group.name for group in groups]};"
            " a phase cannot change its trainable parameters half-way; restore phases.*.trainable"
        )
    for item, group in zip(saved, groups, strict=True):
        if (item["lr"], item["weight_decay"]) != (group.lr, group.weight_decay):
            logger.warning(
                "%s: lr %g -> %g, weight decay %g -> %g from here on, by the configuration",
                *(group.name, item["lr"], group.lr, item["weight_decay"], group.weight_decay),
            )


def _sizes(uri: str) -> dict[str, int]:
    filesystem, path = storage.split_uri(uri)
    filesystem.invalidate_cache()
    found = filesystem.ls(path, detail=True)
    sizes = {PurePosixPath(item["name"]).name: int(item["size"]) for item in found if item["type"] == "file"}
    sizes.pop(COMMIT_FILE, None)
    return sizes


def _write_files(target: str, files: dict[str, Any], documents: dict[str, Any]) -> None:
    for name, content in files.items():
        uri = storage.join_uri(target, name)
        storage.write_atomic(uri, lambda file, content=content: torch.save(content, file))  # type: ignore[misc]
    for name, content in documents.items():
        storage.write_json(storage.join_uri(target, name), content)

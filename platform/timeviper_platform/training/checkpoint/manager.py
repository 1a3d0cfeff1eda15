"""Resumable state: DeepSpeed's native shards, our state beside them, and a COMMIT mark that is written last.

    checkpoints/step-00000120/
        mp_rank_00_model_states.pt, zero_pp_rank_*_optim_states.pt   DeepSpeed's own
        rng-00000.pt        torch's generators of each rank
        state.json          where the run stands
        groups.json         learning rate and decay of every optimizer group
        model.json          the model's sizes, and what its weights folder will say of its making
        COMMIT              names and sizes of all of the above; without it the folder is no checkpoint

Knows files and ranks; does not know what a phase is or when to save. Training waits while its state is copied; a thread
of each rank writes the copy, on any fsspec file system. A checkpoint counts when it is COMMITTED, whatever a scheduler
believes: a worker that is killed while saving leaves a folder that the next attempt writes anew.
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
    """When to save, and how many to keep."""

    every_steps: int = 500
    """steps between checkpoints; 0 saves at the end of each phase alone"""
    keep: int = 2
    """newest committed checkpoints that are kept"""
    max_failed_saves: int = 3
    """saves in a row that may fail while training goes on; the next one is waited for, and ends the run if it fails
    too. 0 ends it with the first"""

    def __post_init__(self) -> None:
        if self.every_steps < 0 or self.keep < 1:
            raise ValueError(f"{self.every_steps = } must be at least 0 and {self.keep = } at least 1")
        if self.max_failed_saves < 0:
            raise ValueError(f"{self.max_failed_saves = } must be at least 0 (0 = the first failed save ends the run)")


class SaveFailedError(RuntimeError):
    """Every rank knows alike that a checkpoint could not be written."""


@dataclass(frozen=True, kw_only=True, slots=True)
class Snapshot:
    """One rank's part of a checkpoint, in memory."""

    tag: str
    global_step: int
    files: dict[str, Any]
    """content by name, for torch.save"""
    documents: dict[str, Any]
    """content by name, as JSON; rank 0's alone"""


class Checkpoints:
    """The checkpoints of one run. Every rank makes one; snapshot, write and wait are collective.

    Args:
        uri: the folder, on any fsspec file system.
        keep: newest committed checkpoints that are kept.
    """

    def __init__(self, uri: str, *, keep: int = 2) -> None:
        self.uri = uri
        self._keep = keep
        self._group: Any = None
        self._thread: threading.Thread | None = None
        self._outcome: str | BaseException | None = None
        self.newest_written = 0
        """global step of the newest checkpoint that is known to be committed, on this rank and without waiting"""

    def snapshot(
        self, ds_engine: Any, state: TrainState, groups: Sequence[ParameterGroup], model: dict[str, Any]
    ) -> Snapshot:
        """A copy of this rank's state, after which training may go on. `model` is what model.json will hold."""
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
        """Writes and commits the snapshot in a thread; call `wait` before the next one, and at the end.

        Args:
            snapshot: this rank's part.
            before_commit: called on rank 0 in the thread, for what must be stored before the checkpoint counts.
        """
        assert self._thread is None  # one at a time: two would hold two copies of the state
        if self._group is None:
            # the threads' own: the training's group is busy, and gloo needs no GPU
            self._group = dist.new_group(backend="gloo")
        self._thread = threading.Thread(
            target=self._run, args=(snapshot, before_commit), name="checkpoint", daemon=False
        )
        self._thread.start()

    def wait(self) -> str | None:
        """The URI of the checkpoint that was being written, once it is committed; None when there was none.

        Raises:
            SaveFailedError: when a rank could not write its part; the checkpoints before it are untouched.
            RuntimeError: when the ranks could not agree on that, as one is gone.
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
        """`wait` for a run that ends with another error: a checkpoint that fails is logged."""
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
                self._agreed(lambda: storage.remove(target))  # what a killed attempt left
                self._agreed(lambda: _write_files(target, snapshot.files, snapshot.documents))
                self._agreed(lambda: self._commit(target, before_commit))
            else:
                self._agreed(lambda: None)
                self._agreed(lambda: _write_files(target, snapshot.files, {}))
                self._agreed(lambda: None)
            self._outcome = target
            self.newest_written = snapshot.global_step
            if rank == 0:
                self._prune()
        except Exception as error:  # noqa: BLE001 - handed to `wait`, which raises it
            self._outcome = error

    def _agreed(self, act: Callable[[], None]) -> None:
        """Runs `act`; then every rank knows whether all of them could."""
        failure = None
        try:
            act()
        except Exception as error:  # noqa: BLE001 - told to every rank, and raised on each
            failure = f"rank {dist.get_rank()}: {type(error).__name__}: {error}"
        failures: list[str | None] = [None] * dist.get_world_size()
        dist.all_gather_object(failures, failure, group=self._group)
        if any(failures):
            raise SaveFailedError("; ".join(text for text in failures if text))

    def _commit(self, target: str, before_commit: Callable[[], None] | None) -> None:
        if before_commit is not None:
            before_commit()
        storage.write_json(storage.join_uri(target, COMMIT_FILE), {"files": _sizes(target)})

    def uri_of(self, state: TrainState) -> str:
        """Where the checkpoint of this state lies, or will."""
        return storage.join_uri(self.uri, _tag(state.global_step))

    def newest(self) -> str | None:
        """The committed checkpoint with the highest step, or None."""
        return next((uri for uri in reversed(list_folders(self.uri)) if is_committed(uri)), None)

    def committed(self) -> list[str]:
        """Every committed checkpoint, oldest first."""
        return [uri for uri in list_folders(self.uri) if is_committed(uri)]

    def _prune(self) -> None:
        """Removes checkpoints that are too many and what failed or killed saves left; what cannot be is for next time.

        Between the mark and the folder a kill may come: half a folder must not look whole.
        """
        try:
            committed = self.committed()
            for uri in list_folders(self.uri):
                mark = storage.join_uri(uri, COMMIT_FILE)
                is_rest = TAG.search(uri) and uri < committed[-1] and not storage.exists(mark)
                if is_rest or uri in committed[: -self._keep]:
                    storage.remove(mark)
                    storage.remove(uri)
        except Exception as error:  # noqa: BLE001 - the new checkpoint is committed, whatever becomes of old ones
            logger.warning("old checkpoints in %s stay, until one can be removed: %s", self.uri, error)


def _tag(global_step: int) -> str:
    return f"step-{global_step:08d}"


def is_committed(uri: str) -> bool:
    """True when the checkpoint at `uri` is whole: its COMMIT is there and every file it names has its size."""
    mark = storage.join_uri(uri, COMMIT_FILE)
    if not storage.exists(mark):
        return False
    expected = storage.read_json(mark)["files"]
    found = _sizes(uri)
    wrong = [name for name, size in expected.items() if found.get(name) != size]
    if wrong:
        logger.warning("%s is committed but damaged and passed over: %s", uri, ", ".join(sorted(wrong)[:5]))
    return not wrong


def read_state(uri: str) -> TrainState:
    """Where the run stood at the committed checkpoint `uri`.

    Raises:
        ValueError: when there is none.
    """
    if not is_committed(uri):
        raise ValueError(
            f"there is no committed checkpoint at {uri!r}; name a folder step-* that holds a {COMMIT_FILE}"
        )
    return TrainState.from_json(storage.read_json(storage.join_uri(uri, STATE_FILE)), source=uri)


def restore_checkpoint(
    uri: str,
    model: nn.Module,
    groups: Sequence[ParameterGroup],
    build: Callable[[], Any],
    *,
    zero_stage: int,
    dtype: Dtype,
) -> Any:
    """`build()`'s ds_engine with parameters, optimizer and generator as they were at `uri`.

    With the shape that saved it (world size, ZeRO stage, dtype) DeepSpeed loads its own files, bit for bit; with
    another one every parameter is put together from the shards of all ranks and cut anew.

    Raises:
        ValueError: when the trained parameters are not the checkpoint's.
        RuntimeError: when the files cannot be read, or hold more than data.
    """
    state = read_state(uri)
    saved_groups = storage.read_json(storage.join_uri(uri, GROUPS_FILE))
    _check_same_groups(saved_groups, groups, uri)
    shape, saved_shape = (dist.get_world_size(), zero_stage, dtype), _shape(state)
    with local_copy(uri) as folder:
        if shape == saved_shape:
            ds_engine = build()
            _load_natively(ds_engine, folder, uri)
        else:
            logger.info("%s: (ranks, ZeRO stage, dtype) %s -> %s", uri, saved_shape, shape)
            shards = open_shards(folder, state, saved_groups)
            load_weights_from(shards, model)
            ds_engine = build()
            load_optimizer_from(shards, ds_engine, groups)
        _set_generator_states(folder / f"rng-{dist.get_rank():05d}.pt", state)
    return ds_engine


def open_shards(folder: Path, state: TrainState, saved_groups: list[dict[str, Any]]) -> SavedShards:
    """The parameters of a checkpoint's local folder."""
    trained = [name for group in saved_groups for name in group["parameter_names"]]
    return SavedShards(folder, zero_stage=state.zero_stage, trained=trained)


@contextlib.contextmanager
def local_copy(uri: str) -> Iterator[Path]:
    """A local folder with the checkpoint's files: itself where it is local, else a download for the block's time."""
    filesystem, path = storage.split_uri(uri)
    if storage.is_local(uri):
        yield Path(path)
        return
    with tempfile.TemporaryDirectory(prefix="timeviper-checkpoint-") as scratch:
        folder = Path(scratch) / PurePosixPath(path).name
        filesystem.get(path.rstrip("/") + "/", f"{folder}/", recursive=True)
        yield folder


def list_folders(uri: str) -> list[str]:
    """The folders directly inside `uri`, in sorted order."""
    filesystem, path = storage.split_uri(uri)
    filesystem.invalidate_cache()
    if not filesystem.isdir(path):
        return []
    names = [
        PurePosixPath(item["name"]).name for item in filesystem.ls(path, detail=True) if item["type"] == "directory"
    ]
    return [storage.join_uri(uri, name) for name in sorted(names)]


def resolve_resume(uri: str, resume: Literal["auto", "never"] | str) -> str | None:
    """Which checkpoint a run whose checkpoints are in the folder `uri` starts from; None = from its first weights.

    `auto` takes the newest committed one. `never` insists that there is none. Anything else names a checkpoint:
    this run's newest, or one of another run.

    Raises:
        ValueError: when that would leave the run with two histories.
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


def _shape(state: TrainState) -> tuple[int, int, str]:
    return state.world_size, state.zero_stage, state.dtype


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
    """This rank's generators as they were; a rank that did not exist then gets a seed of its own."""
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
            " a phase cannot change its trainable parameters half-way"
        )
    for item, group in zip(saved, groups, strict=True):
        if (item["lr"], item["weight_decay"]) != (group.lr, group.weight_decay):
            logger.warning(
                "%s: lr %g -> %g, weight decay %g -> %g from here on, as the configuration says",
                *(group.name, item["lr"], group.lr, item["weight_decay"], group.weight_decay),
            )


def _sizes(uri: str) -> dict[str, int]:
    """Size of every file directly in `uri`, without the mark itself."""
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

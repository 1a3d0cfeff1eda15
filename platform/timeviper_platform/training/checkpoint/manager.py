"""Committed checkpoints: written by threads while training continues, restored at any world size.

checkpoints/step-00000120/
    mp_rank_00_model_states.pt, zero_pp_rank_*_optim_states.pt   DeepSpeed's shards
    rng-00000.pt        random generators of each rank
    state.json          TrainState
    groups.json         optimizer groups
    model.json          config and metadata of the model
    COMMIT              sizes and checksums of all of the above, written last
"""

from __future__ import annotations

import contextlib
import json
import logging
import re
import tempfile
import threading
from collections.abc import Callable, Sequence
from dataclasses import asdict, dataclass
from datetime import timedelta
from functools import partial
from pathlib import Path
from typing import Any, Literal, TypeVar

import torch
import torch.distributed as dist
from torch import nn

from timeviper_platform.common import storage
from timeviper_platform.common.devices import Dtype
from timeviper_platform.common.machine_cache import check_free_space
from timeviper_platform.training.checkpoint.commit import (
    COMMIT_FILE,
    DamagedCheckpointError,
    FileFacts,
    check_sizes,
    is_marked,
    read_document,
    set_aside,
    write_commit,
    write_hashed,
)
from timeviper_platform.training.checkpoint.deepspeed_files import num_tensor_bytes, reading_as_data, take_snapshot
from timeviper_platform.training.checkpoint.local_files import GROUPS_FILE, MODEL_FILE, STATE_FILE, OpenCheckpoint
from timeviper_platform.training.checkpoint.reshard import load_optimizer_from, load_weights_from
from timeviper_platform.training.checkpoint.state import TrainState
from timeviper_platform.training.optim.parameter_groups import ParameterGroup

logger = logging.getLogger(__name__)

T = TypeVar("T")

TAG = re.compile(r"/step-\d{8,}$")

SAVE_TIMEOUT = timedelta(days=1)
"""Maximum time for a rank to write its share while others wait in their threads. torch's default of 30 minutes would
end training; a rank that is gone is seen at once, and one that hangs by the watchdog."""


@dataclass(frozen=True, kw_only=True, slots=True)
class CheckpointConfig:
    every_steps: int = 500
    """Steps between checkpoints; 0 saves only at each phase's end."""
    interval_minutes: float = 0.0
    """Maximum minutes between checkpoints, in addition to `every_steps`; 0 = no time limit."""
    keep: int = 2
    """Number of newest checkpoints to keep."""
    max_failed_saves: int = 3
    """Tolerated failed saves in a row. Training waits for the next save and ends if it fails too."""
    retry_wait_s: float = 5.0
    """Seconds before a phase's last save is retried; doubled each time."""

    def __post_init__(self) -> None:
        if self.every_steps < 0 or self.keep < 1:
            raise ValueError(f"{self.every_steps = } must be at least 0 and {self.keep = } at least 1")
        for name in ("interval_minutes", "max_failed_saves", "retry_wait_s"):
            if getattr(self, name) < 0:
                raise ValueError(f"{name} = {getattr(self, name)} must be at least 0")


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
        return next((uri for uri in reversed(storage.folders_in(self.uri)) if is_committed(uri)), None)

    def committed(self) -> list[str]:
        """Returns the URIs, oldest first."""
        return [uri for uri in storage.folders_in(self.uri) if is_committed(uri)]

    def uri_of(self, state: TrainState) -> str:
        return storage.join_uri(self.uri, _tag(state.global_step))

    def snapshot(
        self, ds_engine: Any, state: TrainState, groups: Sequence[ParameterGroup], model: dict[str, Any]
    ) -> Snapshot:
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
            self._group = dist.new_group(backend="gloo", timeout=SAVE_TIMEOUT)
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
        target = storage.join_uri(self.uri, snapshot.tag)
        is_first = dist.get_rank() == 0
        try:
            num_bytes = self._on_all_ranks(lambda: _checked_upload_space(target, snapshot.files))
            self._on_all_ranks(lambda: _prepare(target, sum(num_bytes)) if is_first else None)
            documents = snapshot.documents if is_first else {}
            written = self._on_all_ranks(lambda: _write_files(target, snapshot.files, documents))
            files = {name: facts for of_rank in written for name, facts in of_rank.items()}
            self._on_all_ranks(lambda: _commit(target, files, before_commit) if is_first else None)
            self._outcome = target
            self.newest_written = snapshot.global_step
            if is_first:
                self._prune()
        except Exception as error:  # noqa: BLE001 - handed to `wait`, which raises it
            self._outcome = error
            if is_first and isinstance(error, SaveFailedError):  # no rank is writing any more
                _remove_quietly(target)

    def _on_all_ranks(self, act: Callable[[], T]) -> list[T]:
        """Returns the result of every rank, in order."""
        outcome: tuple[T | None, str | None] = (None, None)
        try:
            outcome = act(), None
        except Exception as error:  # noqa: BLE001 - gathered, and raised on every rank
            outcome = None, f"rank {dist.get_rank()}: {type(error).__name__}: {error}"
        outcomes: list[Any] = [None] * dist.get_world_size()
        dist.all_gather_object(outcomes, outcome, group=self._group)
        if failures := [failure for _, failure in outcomes if failure is not None]:
            raise SaveFailedError("; ".join(failures))
        return [result for result, _ in outcomes]

    def _prune(self) -> None:
        try:
            committed = self.committed()
            for uri in storage.folders_in(self.uri):
                mark = storage.join_uri(uri, COMMIT_FILE)
                is_remains = TAG.search(uri) and uri < committed[-1] and not storage.exists(mark)
                if is_remains or uri in committed[: -self._keep]:
                    storage.remove(mark)  # first: after a kill in between, half a folder must not look committed
                    storage.remove(uri)
        except Exception as error:  # noqa: BLE001 - the new checkpoint is committed in any case
            logger.warning("old checkpoints in %s cannot be removed and stay for now: %s", self.uri, error)


def resolve_resume(uri: str, resume: Literal["auto", "never"] | str) -> str | None:
    """Returns the checkpoint to start from; None for the initial weights.

    `auto` is the newest committed one; `never` requires that there is none; a URI may name another run's, or an older
    one of this run, whose newer ones are then set aside.

    Raises:
        ValueError: if the run would get two histories, or none of its checkpoints can be used.
    """
    checkpoints = Checkpoints(uri)
    committed = checkpoints.committed()
    newest = committed[-1] if committed else None
    if resume == "auto":
        if newest is None and (marked := [folder for folder in storage.folders_in(uri) if is_marked(folder)]):
            raise ValueError(
                f"every checkpoint in {uri} is damaged ({', '.join(marked)}); restore their files, or choose another"
                " name to start again"
            )
        return newest
    if resume == "never":
        if newest is not None:
            raise ValueError(f"--resume never, but {newest} is committed; choose another name, or remove {uri}")
        return None
    read_state(resume)
    own = {_path(folder): folder for folder in committed}
    if newest is not None and _path(resume) not in own:
        raise ValueError(f"--resume {resume}, but this run's newest checkpoint is {newest}; choose another name")
    if newest is not None:
        chosen = own[_path(resume)]
        set_aside([folder for folder in committed if folder > chosen], "superseded")
    return resume


def candidates(checkpoints: Checkpoints, uri: str) -> list[str]:
    """Returns `uri` and, if it is one of these checkpoints, the older ones, newest first."""
    committed = {_path(folder): folder for folder in checkpoints.committed()}
    if _path(uri) not in committed:
        return [uri]
    return [folder for folder in reversed(committed.values()) if folder <= committed[_path(uri)]]


def restore_checkpoint(
    saved: OpenCheckpoint,
    model: nn.Module,
    groups: Sequence[ParameterGroup],
    build: Callable[[], Any],
    *,
    zero_stage: int,
    dtype: Dtype,
) -> Any:
    """Restores `build()`'s ds_engine to the checkpoint; collective.

    At equal world size, ZeRO stage and dtype the restored state is bit-identical; otherwise parameters are
    resharded.

    Raises:
        ValueError: if the checkpoint trained other parameters.
        RuntimeError: if files cannot be read, or hold more than data.
    """
    _check_same_groups(saved.groups, groups, saved.uri)
    layout = (dist.get_world_size(), zero_stage, dtype)
    if saved.state.layout == layout:
        ds_engine = build()
        _load_natively(ds_engine, saved.folder, saved.uri)
    else:
        logger.info(
            "%s: (ranks, ZeRO stage, dtype) %s -> %s",
            *(saved.uri, saved.state.layout, layout),
        )
        shards = saved.shards()
        load_weights_from(shards, model)
        ds_engine = build()
        load_optimizer_from(shards, ds_engine, groups)
    _set_generator_states(saved.folder / f"rng-{dist.get_rank():05d}.pt", saved.state)
    dist.barrier()  # other ranks may read the same folder, which `close` removes
    return ds_engine


def is_committed(uri: str) -> bool:
    """Returns whether COMMIT exists and all files have their sizes; logs what is wrong."""
    if not is_marked(uri):
        return False
    try:
        check_sizes(uri)
    except DamagedCheckpointError as error:
        logger.warning("skipping a damaged checkpoint: %s", error)
        return False
    return True


def read_state(uri: str) -> TrainState:
    """Reads the progress of a checkpoint.

    Raises:
        ValueError: without a commit, or for another format version.
        DamagedCheckpointError: if a file is missing or state.json is damaged.
    """
    files = check_sizes(uri)
    return TrainState.from_json(read_document(uri, STATE_FILE, files[STATE_FILE]), source=uri)


def read_model(uri: str) -> dict[str, Any]:
    """Reads the model's configuration and metadata; raises as `read_state`."""
    model: dict[str, Any] = read_document(uri, MODEL_FILE, check_sizes(uri)[MODEL_FILE])
    return model


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


def _path(uri: str) -> str:
    return str(storage.split_uri(uri)[1]).rstrip("/")


def _checked_upload_space(target: str, files: dict[str, Any]) -> int:
    """Returns the bytes that this rank will write; a remote target needs local space for the largest file."""
    sizes = [num_tensor_bytes(content) for content in files.values()]
    if not storage.is_local(target):
        check_free_space(tempfile.gettempdir(), max(sizes), "the save", "uploads pass through TMPDIR: free space there")
    return sum(sizes)


def _prepare(target: str, num_bytes: int) -> None:
    storage.remove(target)  # left by a killed attempt
    if storage.is_local(target):
        check_free_space(storage.split_uri(target)[1], num_bytes, "the save", "free space, or lower checkpoint.keep")


def _write_files(target: str, files: dict[str, Any], documents: dict[str, Any]) -> dict[str, FileFacts]:
    written = {
        name: write_hashed(storage.join_uri(target, name), partial(torch.save, content))
        for name, content in files.items()
    }
    for name, content in documents.items():
        data = (json.dumps(content, indent=2) + "\n").encode()
        written[name] = write_hashed(storage.join_uri(target, name), lambda file, data=data: file.write(data))  # type: ignore[misc]
    return written


def _commit(target: str, files: dict[str, FileFacts], before_commit: Callable[[], None] | None) -> None:
    if before_commit is not None:
        before_commit()
    write_commit(target, files)


def _remove_quietly(target: str) -> None:
    with contextlib.suppress(Exception):  # the next save removes it
        storage.remove(target)

"""Resumable state: DeepSpeed's native shards, our state beside them, and a COMMIT mark that is written last.

    checkpoints/step-00000120/
        mp_rank_00_model_states.pt, zero_pp_rank_*_optim_states.pt   DeepSpeed's own
        rng-00000.pt        torch's generator of each rank
        state.json          where the run stands
        groups.json         learning rate and decay of every optimizer group
        model.json          the model's sizes, and what its weights folder will say of its making
        COMMIT              names and sizes of all of the above; without it the folder is no checkpoint

Knows files and ranks; does not know what a phase is or when to save. A checkpoint counts when it is COMMITTED, whatever
a scheduler believes: a worker that is killed while saving leaves a folder that the next attempt writes anew.
"""

from __future__ import annotations

import contextlib
import io
import logging
import tempfile
from collections.abc import Iterator, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path, PurePosixPath
from typing import Any, Literal

import torch
import torch.distributed as dist

from timeviper_platform import storage
from timeviper_platform.training.parameters import ParameterGroup
from timeviper_platform.training.plan import PlanPosition
from timeviper_platform.training.zero import import_deepspeed

logger = logging.getLogger(__name__)

COMMIT_FILE = "COMMIT"
STATE_FILE = "state.json"
GROUPS_FILE = "groups.json"
MODEL_FILE = "model.json"
STATE_VERSION = 1


@dataclass(frozen=True, kw_only=True, slots=True)
class CheckpointConfig:
    """When to save, and how many to keep."""

    every_steps: int = 500
    """steps between checkpoints; 0 saves at the end of each phase alone"""
    keep: int = 2
    """newest committed checkpoints that are kept"""

    def __post_init__(self) -> None:
        if self.every_steps < 0 or self.keep < 1:
            raise ValueError(f"{self.every_steps = } must be at least 0 and {self.keep = } at least 1")


@dataclass(frozen=True, kw_only=True, slots=True)
class TrainState:
    """Where a run stands after a step."""

    phase: str
    step: int
    """finished steps of the phase"""
    global_step: int
    """finished steps of all phases"""
    position: PlanPosition
    plan_hash: str
    world_size: int
    zero_stage: int
    precision: str

    def to_json(self) -> dict[str, Any]:
        """Plain values."""
        return {"version": STATE_VERSION, **asdict(self), "position": self.position._asdict()}

    @classmethod
    def from_json(cls, values: dict[str, Any], *, source: str) -> TrainState:
        """The inverse of `to_json`.

        Raises:
            ValueError: when it was written under another version.
        """
        values = dict(values)
        if (version := values.pop("version", None)) != STATE_VERSION:
            raise ValueError(f"{source}: state version {version}, this release reads {STATE_VERSION}")
        return cls(**{**values, "position": PlanPosition(**values["position"])})


class Checkpoints:
    """The checkpoints of one run. Every rank makes one; saving and loading are collective.

    Args:
        uri: the folder, on any fsspec file system.
        keep: newest committed checkpoints that are kept.
    """

    def __init__(self, uri: str, *, keep: int = 2) -> None:
        self.uri = uri
        self._keep = keep

    def save(self, ds_engine: Any, state: TrainState, groups: Sequence[ParameterGroup], model: dict[str, Any]) -> str:
        """Writes and commits a checkpoint; its URI. `model` is what model.json will hold."""
        tag = f"step-{state.global_step:08d}"
        target = storage.join_uri(self.uri, tag)
        rank = dist.get_rank()
        if rank == 0:
            storage.remove(target)  # what a killed attempt left
        dist.barrier()
        with tempfile.TemporaryDirectory(prefix="timeviper-checkpoint-") as scratch:
            # on an object store each rank writes into a folder of its own and uploads what it wrote
            folder = Path(storage.split_uri(self.uri)[1] if storage.is_local(self.uri) else scratch)
            (folder / tag).mkdir(parents=True, exist_ok=True)
            ds_engine.save_checkpoint(str(folder), tag=tag, save_latest=False)
            torch.save(torch.get_rng_state(), folder / tag / f"rng-{rank:05d}.pt")
            if not storage.is_local(self.uri):
                _upload(folder / tag, target)
            if rank == 0:
                storage.write_json(storage.join_uri(target, STATE_FILE), state.to_json())
                storage.write_json(storage.join_uri(target, GROUPS_FILE), [asdict(group) for group in groups])
                storage.write_json(storage.join_uri(target, MODEL_FILE), model)
            dist.barrier()
        if rank == 0:
            storage.write_json(storage.join_uri(target, COMMIT_FILE), {"files": _sizes(target)})
            self._prune()
        dist.barrier()
        return target

    def newest(self) -> str | None:
        """The committed checkpoint with the highest step, or None."""
        return next(iter(reversed(self.committed())), None)

    def committed(self) -> list[str]:
        """Every committed checkpoint, oldest first."""
        return [uri for uri in list_folders(self.uri) if is_committed(uri)]

    def _prune(self) -> None:
        for uri in self.committed()[: -self._keep]:
            storage.remove(storage.join_uri(uri, COMMIT_FILE))  # first: half a folder must not look whole
            storage.remove(uri)


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


def load_checkpoint(ds_engine: Any, uri: str, groups: Sequence[ParameterGroup]) -> None:
    """Puts parameters, optimizer and generator back as they were at `uri`, on the same number of ranks.

    Raises:
        ValueError: when world size, ZeRO stage or the trained parameters are not the checkpoint's.
        RuntimeError: when DeepSpeed cannot read it.
    """
    state = read_state(uri)
    _check_same_shape(ds_engine, state, uri)
    _check_same_groups(storage.read_json(storage.join_uri(uri, GROUPS_FILE)), groups, uri)
    with local_copy(uri) as folder:
        loaded, _ = ds_engine.load_checkpoint(
            str(folder.parent), tag=folder.name, load_lr_scheduler_states=False, load_module_strict=True
        )
        if loaded is None:
            raise RuntimeError(f"DeepSpeed found no state in {uri}; resume from an earlier checkpoint")
        torch.set_rng_state(torch.load(folder / f"rng-{dist.get_rank():05d}.pt", weights_only=True))


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


def consolidate(folder: Path, zero_stage: int) -> dict[str, torch.Tensor]:
    """The fp32 parameters of a checkpoint's local folder by name, put together from the shards of all ranks."""
    import_deepspeed()
    tensors: dict[str, torch.Tensor] = {}
    if zero_stage < 3:  # every rank has the whole module; what is frozen is nowhere else in stages 0 and 1
        file = folder / "mp_rank_00_model_states.pt"
        tensors = torch.load(file, map_location="cpu", weights_only=False)["module"]
    if zero_stage > 0:
        from deepspeed.utils.zero_to_fp32 import get_fp32_state_dict_from_zero_checkpoint

        with contextlib.redirect_stdout(io.StringIO()), contextlib.redirect_stderr(io.StringIO()):  # it prints a page
            masters = get_fp32_state_dict_from_zero_checkpoint(str(folder.parent), tag=folder.name)
        tensors = {**tensors, **masters}
    return {name: tensor.float() for name, tensor in tensors.items()}


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


def _check_same_shape(ds_engine: Any, state: TrainState, uri: str) -> None:
    world_size, stage = dist.get_world_size(), ds_engine.zero_optimization_stage()
    if (state.world_size, state.zero_stage) != (world_size, stage):
        raise ValueError(
            f"{uri} was saved by {state.world_size} ranks with ZeRO-{state.zero_stage}, this run has {world_size} with"
            f" ZeRO-{stage}; use the same, or export its weights and start a phase from them"
        )


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


def _upload(folder: Path, target: str) -> None:
    filesystem, path = storage.split_uri(target)
    for file in sorted(folder.iterdir()):
        filesystem.put_file(str(file), f"{path}/{file.name}")

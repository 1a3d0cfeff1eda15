"""What DeepSpeed would save, caught in memory: the one part of a checkpoint for which training has to stand still.

Knows how DeepSpeed hands its files to a writer; does not know where they go. Tensors are copied to the CPU, so that
the next step may change the originals while a thread writes.
"""

from __future__ import annotations

import contextlib
import pickle
import re
import tempfile
from collections import OrderedDict
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import torch

from timeviper_platform.training.optim.deepspeed_engine import import_deepspeed


def take_snapshot(ds_engine: Any) -> dict[str, Any]:
    """The content of the files that this rank would write, by name. Collective."""
    own = ds_engine.checkpoint_engine
    catcher = _Catcher(own)
    ds_engine.checkpoint_engine = catcher
    try:
        with tempfile.TemporaryDirectory(prefix="timeviper-snapshot-") as scratch:  # it puts a script of its own there
            ds_engine.save_checkpoint(scratch, tag="snapshot", save_latest=False)
    finally:
        ds_engine.checkpoint_engine = own
    return catcher.files


class _Catcher:
    """Stands where DeepSpeed's checkpoint engine stands, and keeps copies."""

    def __init__(self, own: Any) -> None:
        self._own = own
        self.files: dict[str, Any] = {}

    def save(self, state_dict: Any, path: str) -> None:
        self.files[Path(path).name] = _copied(state_dict)

    def preserves_storage_sharing(self) -> bool:
        return False  # copies share nothing: DeepSpeed need not clone beforehand

    def __getattr__(self, name: str) -> Any:
        return getattr(self._own, name)


def _copied(value: Any) -> Any:
    """`value` with every tensor in dicts, lists and tuples copied to the CPU; a view becomes as large as it looks."""
    if isinstance(value, torch.Tensor):
        return value.detach().to("cpu", copy=True, memory_format=torch.contiguous_format)
    if type(value) in (dict, OrderedDict):
        return type(value)((key, _copied(item)) for key, item in value.items())
    if type(value) in (list, tuple):  # torch.Size is a tuple too, and stays what it is
        return type(value)(_copied(item) for item in value)
    return value


def load_saved(file: Path, *, mmap: bool) -> dict[str, Any]:
    """What DeepSpeed saved in `file`, on the CPU.

    Args:
        file: local, written by torch.save.
        mmap: tensors stay in the file until they are used.

    Raises:
        RuntimeError: when the file names a class or function that no checkpoint needs.
    """
    try:
        with torch.serialization.safe_globals(_classes()):
            values: dict[str, Any] = torch.load(file, map_location="cpu", weights_only=True, mmap=mmap)
    except pickle.UnpicklingError as error:
        named = re.search(r"GLOBAL (\S+)", str(error))
        what = named[1] if named else "something that is no data"
        raise RuntimeError(
            f"{file} names {what}, which no checkpoint of this platform holds and which might run code: it is damaged,"
            " of another program or not to be trusted; resume from another checkpoint"
        ) from error
    return values


@contextlib.contextmanager
def reading_as_data(ds_engine: Any) -> Iterator[None]:
    """While this holds, `ds_engine.load_checkpoint` reads its files by `load_saved`."""
    own = ds_engine.checkpoint_engine
    ds_engine.checkpoint_engine = _Reader(own)
    try:
        yield
    finally:
        ds_engine.checkpoint_engine = own


class _Reader:
    """Stands where DeepSpeed's checkpoint engine stands, which would unpickle whatever there is."""

    def __init__(self, own: Any) -> None:
        self._own = own

    def load(self, path: str, map_location: Any = None) -> dict[str, Any]:
        # not mapped: the optimizer keeps some of these tensors, and must not keep the file with them
        return load_saved(Path(path), mmap=False)

    def __getattr__(self, name: str) -> Any:
        return getattr(self._own, name)


def _classes() -> list[Any]:
    """Beside tensors: a loss scale that is 1 here, the stage, and where a parameter lies in a flat tensor."""
    import_deepspeed()
    from deepspeed.runtime.fp16.loss_scaler import LossScaler
    from deepspeed.runtime.zero.config import ZeroStageEnum
    from deepspeed.utils.tensor_fragment import fragment_address

    def stage(of: Any, name: str) -> Any:
        """Python 3.11.0 to 3.11.3 saves a member of an enum as getattr(class, name); nothing else is looked up so."""
        if of is not ZeroStageEnum or name not in ZeroStageEnum.__members__:
            raise pickle.UnpicklingError(f"GLOBAL getattr of {of!r}, {name!r}")
        return ZeroStageEnum[name]

    return [LossScaler, ZeroStageEnum, fragment_address, (stage, "builtins.getattr")]

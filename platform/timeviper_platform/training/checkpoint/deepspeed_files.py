"""DeepSpeed's checkpoint files: captured in memory instead of written, and read as data instead of unpickled.

Both replace `ds_engine.checkpoint_engine`: its public save and load methods write to disk while training waits, and
unpickle any file. Checked with DeepSpeed 0.19.
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
    """Copies of the files that this rank would write, by name, on the CPU; collective."""
    own = ds_engine.checkpoint_engine
    capture = _Capture(own)
    ds_engine.checkpoint_engine = capture
    try:  # DeepSpeed also writes a script, into the scratch folder
        with tempfile.TemporaryDirectory(prefix="timeviper-snapshot-") as scratch:
            ds_engine.save_checkpoint(scratch, tag="snapshot", save_latest=False)
    finally:
        ds_engine.checkpoint_engine = own
    return capture.files


class _Capture:
    """A checkpoint engine that keeps copies."""

    def __init__(self, own: Any) -> None:
        self._own = own
        self.files: dict[str, Any] = {}

    def save(self, state_dict: Any, path: str) -> None:
        self.files[Path(path).name] = _copied(state_dict)

    def preserves_storage_sharing(self) -> bool:
        return False  # copies share nothing, so DeepSpeed need not clone

    def __getattr__(self, name: str) -> Any:
        return getattr(self._own, name)


def _copied(value: Any) -> Any:
    """`value` with every tensor in dicts, lists and tuples copied to the CPU, without the rest of its storage."""
    if isinstance(value, torch.Tensor):
        return value.detach().to("cpu", copy=True, memory_format=torch.contiguous_format)
    if type(value) in (dict, OrderedDict):
        return type(value)((key, _copied(item)) for key, item in value.items())
    if type(value) in (list, tuple):  # not torch.Size, a subclass of tuple
        return type(value)(_copied(item) for item in value)
    return value


def load_saved(file: Path, *, mmap: bool) -> dict[str, Any]:
    """The content of a file that DeepSpeed saved, on the CPU.

    Args:
        file: Local, written by torch.save.
        mmap: Read tensors from the file when they are used.

    Raises:
        RuntimeError: if the file refers to a class or function that no checkpoint needs.
    """
    try:
        with torch.serialization.safe_globals(_classes()):
            values: dict[str, Any] = torch.load(file, map_location="cpu", weights_only=True, mmap=mmap)
    except pickle.UnpicklingError as error:
        named = re.search(r"GLOBAL (\S+)", str(error))
        what = named[1] if named else "something other than data"
        raise RuntimeError(
            f"{file} names {what}, which no checkpoint of this platform holds and which might run code: it is damaged,"
            " from another program or malicious; resume from another checkpoint"
        ) from error
    return values


@contextlib.contextmanager
def reading_as_data(ds_engine: Any) -> Iterator[None]:
    """Inside the block, `ds_engine.load_checkpoint` reads its files with `load_saved`."""
    own = ds_engine.checkpoint_engine
    ds_engine.checkpoint_engine = _Reader(own)
    try:
        yield
    finally:
        ds_engine.checkpoint_engine = own


class _Reader:
    """A checkpoint engine that does not unpickle arbitrary objects."""

    def __init__(self, own: Any) -> None:
        self._own = own

    def load(self, path: str, map_location: Any = None) -> dict[str, Any]:
        # not mapped: the optimizer keeps some of these tensors, and would keep the file open
        return load_saved(Path(path), mmap=False)

    def __getattr__(self, name: str) -> Any:
        return getattr(self._own, name)


def _classes() -> list[Any]:
    """The classes that DeepSpeed saves: the loss scale, the ZeRO stage, and a parameter's address in a flat tensor."""
    import_deepspeed()
    from deepspeed.runtime.fp16.loss_scaler import LossScaler
    from deepspeed.runtime.zero.config import ZeroStageEnum
    from deepspeed.utils.tensor_fragment import fragment_address

    def stage(of: Any, name: str) -> Any:
        """Stands in for getattr, as which Python 3.11.0 to 3.11.3 pickles an enum member; refuses everything else."""
        if of is not ZeroStageEnum or name not in ZeroStageEnum.__members__:
            raise pickle.UnpicklingError(f"GLOBAL getattr of {of!r}, {name!r}")
        return ZeroStageEnum[name]

    return [LossScaler, ZeroStageEnum, fragment_address, (stage, "builtins.getattr")]

"""DeepSpeed's saved files as data: a checkpoint is read and never run, wherever it comes from.

A file of torch.save is a pickle, and a pickle may call anything. Here only tensors, containers, numbers, text and the
three classes that DeepSpeed puts among them are made; a file that names anything else is refused before it acts. Knows
the classes; does not know what the values mean (shards.py).
"""

from __future__ import annotations

import contextlib
import pickle
import re
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import torch

from timeviper_platform.training.zero import import_deepspeed


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

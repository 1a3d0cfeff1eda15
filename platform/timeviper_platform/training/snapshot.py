"""What DeepSpeed would save, caught in memory: the one part of a checkpoint for which training has to stand still.

Knows how DeepSpeed hands its files to a writer; does not know where they go. Tensors are copied to the CPU, so that
the next step may change the originals while a thread writes.
"""

from __future__ import annotations

import tempfile
from collections import OrderedDict
from pathlib import Path
from typing import Any

import torch


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

"""Handles DeepSpeed's checkpoint files in memory, and its layout of parameters.

DeepSpeed's public save and load block training and unpickle any file.
"""

from __future__ import annotations

import contextlib
import pickle
import re
import tempfile
from collections import OrderedDict
from collections.abc import Iterable, Iterator, Mapping, Sequence
from importlib.metadata import version
from pathlib import Path
from typing import Any, NamedTuple

import torch
import torch.distributed as dist
from torch import Tensor

from timeviper_platform.training.optim.deepspeed_engine import import_deepspeed

if not version("deepspeed").startswith("0.19."):
    raise ImportError(
        f"checkpoints need deepspeed 0.19, not {version('deepspeed')}; pip install 'deepspeed>=0.19,<0.20'"
    )

MOMENTS = ("exp_avg", "exp_avg_sq")
MASTER = "fp32"
FROZEN = "frozen_param_fragments"
"""Frozen parameters, which stage 3 does not save as part of the module."""


def take_snapshot(ds_engine: Any) -> dict[str, Any]:
    """Returns CPU copies of the files that this rank would write, by name; collective."""
    own = ds_engine.checkpoint_engine
    capture = _Capture(own, is_whole=ds_engine.zero_optimization_stage() < 3)
    ds_engine.checkpoint_engine = capture
    try:  # DeepSpeed also writes a script, into the scratch folder
        with tempfile.TemporaryDirectory(prefix="timeviper-snapshot-") as scratch:
            ds_engine.save_checkpoint(scratch, tag="snapshot", save_latest=False)
    finally:
        ds_engine.checkpoint_engine = own
    return capture.files


class _Capture:
    def __init__(self, own: Any, *, is_whole: bool) -> None:
        self._own, self._is_whole = own, is_whole
        self.files: dict[str, Any] = {}

    def save(self, state_dict: Any, path: str) -> None:
        if self._is_whole and FROZEN in state_dict:  # stage 2 repeats what `module` holds
            state_dict = {**state_dict, FROZEN: None}
        self.files[Path(path).name] = _copied(state_dict)

    def preserves_storage_sharing(self) -> bool:
        return False  # copies share nothing, so DeepSpeed need not clone

    def __getattr__(self, name: str) -> Any:
        return getattr(self._own, name)


def _copied(value: Any) -> Any:
    if isinstance(value, torch.Tensor):
        return value.detach().to("cpu", copy=True, memory_format=torch.contiguous_format)
    if type(value) in (dict, OrderedDict):
        return type(value)((key, _copied(item)) for key, item in value.items())
    if type(value) in (list, tuple):  # not torch.Size, a subclass of tuple
        return type(value)(_copied(item) for item in value)
    return value


def num_tensor_bytes(value: Any) -> int:
    """Returns the bytes of all tensors in nested containers."""
    if isinstance(value, torch.Tensor):
        return value.nbytes
    if isinstance(value, dict):
        return sum(map(num_tensor_bytes, value.values()))
    return sum(map(num_tensor_bytes, value)) if isinstance(value, list | tuple) else 0


def load_saved(file: Path, *, mmap: bool) -> dict[str, Any]:
    """Reads a file of DeepSpeed onto the CPU.

    Raises:
        RuntimeError: if the file refers to an unexpected class or function.
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
    own = ds_engine.checkpoint_engine
    ds_engine.checkpoint_engine = _Reader(own)
    try:
        yield
    finally:
        ds_engine.checkpoint_engine = own


class _Reader:
    def __init__(self, own: Any) -> None:
        self._own = own

    def load(self, path: str, map_location: Any = None) -> dict[str, Any]:
        # not mapped: the optimizer keeps some of these tensors, and would keep the file open
        return load_saved(Path(path), mmap=False)

    def __getattr__(self, name: str) -> Any:
        return getattr(self._own, name)


def _classes() -> list[Any]:
    import_deepspeed()
    from deepspeed.runtime.fp16.loss_scaler import LossScaler
    from deepspeed.runtime.zero.config import ZeroStageEnum
    from deepspeed.utils.tensor_fragment import fragment_address

    def stage(of: Any, name: str) -> Any:
        """Rebuilds an enum member pickled by Python 3.11.0 to 3.11.3; allows no other getattr."""
        if of is not ZeroStageEnum or name not in ZeroStageEnum.__members__:
            raise pickle.UnpicklingError(f"GLOBAL getattr of {of!r}, {name!r}")
        return ZeroStageEnum[name]

    return [LossScaler, ZeroStageEnum, fragment_address, (stage, "builtins.getattr")]


class Slice(NamedTuple):
    flat: int
    start: int
    numel: int


class RankShard(NamedTuple):
    flats: list[dict[str, Tensor]]
    slices: dict[str, Slice]
    steps: list[float]


class Fragment(NamedTuple):
    """The part of a parameter that this rank updates."""

    flat: Tensor
    """Optimizer tensor that holds the fragment."""
    start: int
    first: int
    """Offset in the flattened parameter."""
    numel: int


def own_fragments(ds_engine: Any, parameter: Any, group: int, index: int) -> Iterable[Fragment]:
    optimizer, stage = ds_engine.optimizer, ds_engine.zero_optimization_stage()
    if stage == 3:
        number, start, _ = optimizer.grad_position[optimizer.get_param_id(parameter)]
        size = parameter.ds_tensor.ds_numel
        first = size * dist.get_rank()
        numel = min(size, parameter.ds_numel - first)  # the last rank's partition is padded
        return [Fragment(optimizer.fp32_partitioned_groups_flat[number], int(start), first, numel)] if numel > 0 else []
    if stage > 0:
        mapping = parameter._hp_mapping
        if mapping is None:
            return []
        own, whole = mapping.hp_fragment_address, mapping.lp_fragment_address
        return [Fragment(optimizer.single_partition_of_fp32_groups[group], own.start, whole.start, own.numel)]
    flat = parameter if _steps_on_parameters(ds_engine) else optimizer.fp32_groups[group][index]
    return [Fragment(flat, 0, 0, flat.numel())]


def optimizer_states(ds_engine: Any) -> Any:
    return ds_engine.optimizer.state if _steps_on_parameters(ds_engine) else ds_engine.optimizer.optimizer.state


def _steps_on_parameters(ds_engine: Any) -> bool:
    """True at stage 0 in float32, where torch's optimizer is not wrapped."""
    return not ds_engine.zero_optimization() and not ds_engine.bfloat16_enabled()


def unsharded(model: Mapping[str, Any], trained: Sequence[str]) -> RankShard:
    """Stage 0: one tensor per parameter."""
    optimizer = model["optimizer"]
    masters = [model["module"][name] for name in trained]
    if "fp32_groups" in optimizer:
        masters = [tensor for group in optimizer["fp32_groups"] for tensor in group]
        optimizer = optimizer["optimizer_state_dict"]
    slices = {name: Slice(number, 0, masters[number].numel()) for number, name in enumerate(trained)}
    return _rank_shard(masters, optimizer["state"], slices)


def sharded_by_group(saved: Mapping[str, Any]) -> RankShard:
    """Stages 1 and 2: a group's parameters, concatenated, then divided among the ranks."""
    slices = {
        name: Slice(number, int(address.start), int(address.numel))
        for number, group in enumerate(saved["param_slice_mappings"])
        for name, address in group.items()
    }
    return _rank_shard(saved["single_partition_of_fp32_groups"], saved["base_optimizer_state"]["state"], slices)


def sharded_by_parameter(saved: Mapping[str, Any], shapes: Mapping[str, torch.Size], num_ranks: int) -> RankShard:
    """Stage 3: each parameter, divided into equal fragments, the last one padded."""
    flats = saved["fp32_flat_groups"]
    slices, number, start = {}, 0, 0
    for name, shape in shapes.items():
        numel = -(-shape.numel() // num_ranks)
        if start == flats[number].numel():
            number, start = number + 1, 0
        slices[name] = Slice(number, start, numel)
        start += numel
    return _rank_shard(flats, saved["optimizer_state_dict"]["state"], slices)


def _rank_shard(
    masters: Sequence[Tensor], states: Mapping[int, Mapping[str, Tensor]], slices: dict[str, Slice]
) -> RankShard:
    flats = [
        {MASTER: master} | {kind: states[number][kind] for kind in MOMENTS} for number, master in enumerate(masters)
    ]
    return RankShard(flats, slices, [float(states[number]["step"]) for number in range(len(masters))])

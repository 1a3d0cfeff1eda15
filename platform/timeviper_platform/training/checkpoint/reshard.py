"""Loads DeepSpeed's shards into an engine of any world size and ZeRO stage, one parameter in memory at a time.

    zero_pp_rank_0...   [ w1 w1 w1 w2 | ...]        parameter w2 = the fragments of all ranks, in rank order;
    zero_pp_rank_1...   [ w2 w2 w3 .. | ...]        the same for exp_avg and exp_avg_sq

DeepSpeed's universal checkpoints are not used: under ZeRO-3 (0.19.8) they load every group with the first group's
learning rate and decay, and with one shared step count.
"""

from __future__ import annotations

import re
from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path
from typing import Any, NamedTuple

import torch
import torch.distributed as dist
from torch import Tensor, nn

from timeviper_platform.training.checkpoint.deepspeed_files import load_saved
from timeviper_platform.training.optim.parameter_groups import ParameterGroup

MOMENTS = ("exp_avg", "exp_avg_sq")
"""AdamW's state of a parameter."""
MASTER = "fp32"


class _Slice(NamedTuple):
    """A fragment of a parameter in a rank's flat tensors."""

    flat: int
    start: int
    numel: int


class _RankShard(NamedTuple):
    """One rank's file: its flat tensors by kind, and the parameters' slices of them."""

    flats: list[dict[str, Tensor]]
    slices: dict[str, _Slice]
    steps: list[float]


class SavedShards:
    """Every parameter of a checkpoint, whole and in float32, saved by any number of ranks.

    Args:
        folder: Local folder with DeepSpeed's files.
        zero_stage: Of the run that saved them.
        trained: Names of the trained parameters, in the order of the optimizer's groups.
    """

    def __init__(self, folder: Path, *, zero_stage: int, trained: Sequence[str]) -> None:
        self._zero_stage = zero_stage
        self._models = [load_saved(file, mmap=True) for file in _by_rank(folder, "*mp_rank_00_model_states.pt")]
        optimizers = [
            load_saved(file, mmap=True)["optimizer_state_dict"] for file in _by_rank(folder, "*_optim_states.pt")
        ]
        if not self._models or (zero_stage > 0 and not optimizers):
            raise RuntimeError(f"{folder} lacks DeepSpeed's files of ZeRO-{zero_stage}; resume from another checkpoint")
        self._shapes: dict[str, torch.Size] = {
            name: shape for group in self._models[0].get("param_shapes") or [] for name, shape in group.items()
        }
        if zero_stage == 0:
            self._shapes = {name: self._models[0]["module"][name].shape for name in trained}
            self._ranks = [_whole(self._models[0], trained)]
        elif zero_stage < 3:
            self._ranks = [_sliced(saved) for saved in optimizers]
        else:
            self._ranks = [_partitioned(saved, self._shapes, len(optimizers)) for saved in optimizers]

    def parameter(self, name: str, kind: str = MASTER) -> Tensor:
        """A trained parameter's float32 value, or one of its MOMENTS, in its own shape."""
        fragments = []
        for rank in self._ranks:
            index = rank.slices.get(name)
            if index is not None:
                fragments.append(rank.flats[index.flat][kind].flatten().narrow(0, index.start, index.numel))
        shape = self._shapes[name]
        return torch.cat(fragments)[: shape.numel()].view(shape).float()

    def num_steps(self, name: str) -> float:
        """The number of updates of the parameter."""
        return next(rank.steps[rank.slices[name].flat] for rank in self._ranks if name in rank.slices)

    def tensors(self) -> dict[str, Tensor]:
        """Every parameter by name in float32, including frozen ones."""
        tensors = {name: tensor.float() for name, tensor in self._frozen().items()}
        return tensors | {name: self.parameter(name) for name in self._shapes}

    def _frozen(self) -> dict[str, Tensor]:
        """The module as every rank saved it; under ZeRO-3, the frozen parameters, assembled."""
        first = self._models[0]
        if self._zero_stage < 3:
            return dict(first["module"])
        return {
            name: torch.cat([model["frozen_param_fragments"][name].flatten() for model in self._models])[
                : shape.numel()
            ].view(shape)
            for name, shape in (first["frozen_param_shapes"] or {}).items()
        }


@torch.no_grad()
def load_weights_from(shards: SavedShards, model: nn.Module) -> None:
    """Copies the saved values into a model before its engine is built, which rounds them to its dtype."""
    tensors = shards.tensors()
    for name, parameter in model.named_parameters():
        parameter.copy_(tensors[name])


@torch.no_grad()
def load_optimizer_from(shards: SavedShards, ds_engine: Any, groups: Sequence[ParameterGroup]) -> None:
    """Loads float32 masters, moments and step counts into an engine whose weights `load_weights_from` has set.

    Creates the state that AdamW would create at its first step, for the fragments that this rank holds.
    """
    parameters = dict(ds_engine.module.named_parameters())
    states = ds_engine.optimizer.state if _steps_on_parameters(ds_engine) else ds_engine.optimizer.optimizer.state
    for number, group in enumerate(groups):
        for index, name in enumerate(group.parameter_names):
            for flat, start, first, numel in _own_fragment(ds_engine, parameters[name], number, index):
                if flat not in states:
                    states[flat] = {kind: torch.zeros_like(flat) for kind in MOMENTS}
                    states[flat]["step"] = torch.tensor(shards.num_steps(name), dtype=torch.float32)
                targets = {MASTER: flat} | {kind: states[flat][kind] for kind in MOMENTS}
                for kind, target in targets.items():
                    whole = shards.parameter(name, kind).flatten()
                    target.data.view(-1).narrow(0, start, numel).copy_(whole.narrow(0, first, numel))


class _Fragment(NamedTuple):
    """The part of a parameter that this rank's optimizer updates."""

    flat: Tensor
    """The optimizer's tensor."""
    start: int
    """Offset in `flat`."""
    first: int
    """Offset in the flattened parameter."""
    numel: int


def _own_fragment(ds_engine: Any, parameter: Any, group: int, index: int) -> Iterable[_Fragment]:
    """The fragment of a parameter that this rank holds, if any."""
    optimizer, stage = ds_engine.optimizer, ds_engine.zero_optimization_stage()
    if stage == 3:
        number, start, _ = optimizer.grad_position[optimizer.get_param_id(parameter)]
        size = parameter.ds_tensor.ds_numel
        first = size * dist.get_rank()
        numel = min(size, parameter.ds_numel - first)  # the last rank's partition is padded
        return (
            [_Fragment(optimizer.fp32_partitioned_groups_flat[number], int(start), first, numel)] if numel > 0 else []
        )
    if stage > 0:
        mapping = parameter._hp_mapping
        if mapping is None:
            return []
        own, whole = mapping.hp_fragment_address, mapping.lp_fragment_address
        return [_Fragment(optimizer.single_partition_of_fp32_groups[group], own.start, whole.start, own.numel)]
    flat = parameter if _steps_on_parameters(ds_engine) else optimizer.fp32_groups[group][index]
    return [_Fragment(flat, 0, 0, flat.numel())]


def _steps_on_parameters(ds_engine: Any) -> bool:
    """True at stage 0 in float32, where DeepSpeed does not wrap torch's optimizer."""
    return not ds_engine.zero_optimization() and not ds_engine.bfloat16_enabled()


def _whole(model: Mapping[str, Any], trained: Sequence[str]) -> _RankShard:
    """Stage 0: one tensor per parameter; in bfloat16 the masters are lists by group."""
    optimizer = model["optimizer"]
    masters = [model["module"][name] for name in trained]
    if "fp32_groups" in optimizer:
        masters = [tensor for group in optimizer["fp32_groups"] for tensor in group]
        optimizer = optimizer["optimizer_state_dict"]
    slices = {name: _Slice(number, 0, masters[number].numel()) for number, name in enumerate(trained)}
    return _rank_shard(masters, optimizer["state"], slices)


def _sliced(saved: Mapping[str, Any]) -> _RankShard:
    """Stages 1 and 2: a group's parameters are concatenated and divided among the ranks."""
    slices = {
        name: _Slice(number, int(address.start), int(address.numel))
        for number, group in enumerate(saved["param_slice_mappings"])
        for name, address in group.items()
    }
    return _rank_shard(saved["single_partition_of_fp32_groups"], saved["base_optimizer_state"]["state"], slices)


def _partitioned(saved: Mapping[str, Any], shapes: Mapping[str, torch.Size], num_ranks: int) -> _RankShard:
    """Stage 3: each parameter is divided into equal fragments, the last one padded."""
    flats = saved["fp32_flat_groups"]
    slices, number, start = {}, 0, 0
    for name, shape in shapes.items():
        numel = -(-shape.numel() // num_ranks)
        if start == flats[number].numel():
            number, start = number + 1, 0
        slices[name] = _Slice(number, start, numel)
        start += numel
    return _rank_shard(flats, saved["optimizer_state_dict"]["state"], slices)


def _rank_shard(
    masters: Sequence[Tensor], states: Mapping[int, Mapping[str, Tensor]], slices: dict[str, _Slice]
) -> _RankShard:
    flats = [
        {MASTER: master} | {kind: states[number][kind] for kind in MOMENTS} for number, master in enumerate(masters)
    ]
    return _RankShard(flats, slices, [float(states[number]["step"]) for number in range(len(masters))])


def _by_rank(folder: Path, pattern: str) -> list[Path]:
    """The files by rank; a name without `rank_N_` is rank 0's."""
    numbers = {path: re.search(r"zero_pp_rank_(\d+)_", path.name) for path in folder.glob(pattern)}
    return sorted(numbers, key=lambda path: int(found[1]) if (found := numbers[path]) else 0)

"""DeepSpeed's saved files to whole parameters, and those into an engine of any world size and ZeRO stage.

    zero_pp_rank_0...   [ w1 w1 w1 w2 | ...]        parameter w2 = the pieces of all ranks in their order;
    zero_pp_rank_1...   [ w2 w2 w3 .. | ...]        the same for exp_avg and exp_avg_sq

Knows the layouts of DeepSpeed's stages. Its own converter writes them all anew first, and loading what that wrote under
ZeRO-3 gives every group the first one's learning rate and decay, and one step count that all share. Knows no COMMIT and
no phases. Files are mapped, not read: memory holds one parameter at a time.
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
"""what AdamW keeps of a parameter"""
MASTER = "fp32"


class _Place(NamedTuple):
    """Where in a rank's file a piece of a parameter lies."""

    flat: int
    start: int
    numel: int


class _RankShard(NamedTuple):
    """What one rank saved: its flat tensors by kind, and the pieces in them by parameter."""

    flats: list[dict[str, Tensor]]
    places: dict[str, _Place]
    steps: list[float]


class SavedShards:
    """Every parameter of a checkpoint, whole and in fp32, whatever number of ranks saved it.

    Args:
        folder: local folder with DeepSpeed's files.
        zero_stage: of the run that saved them.
        trained: names of the trained parameters in the order of the optimizer's groups.
    """

    def __init__(self, folder: Path, *, zero_stage: int, trained: Sequence[str]) -> None:
        self._zero_stage = zero_stage
        self._models = [load_saved(file, mmap=True) for file in _by_rank(folder, "*mp_rank_00_model_states.pt")]
        optimizers = [
            load_saved(file, mmap=True)["optimizer_state_dict"] for file in _by_rank(folder, "*_optim_states.pt")
        ]
        if not self._models or (zero_stage > 0 and not optimizers):
            raise RuntimeError(f"{folder} holds no files of DeepSpeed for ZeRO-{zero_stage}; resume from another one")
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
        """A trained parameter's fp32 value, or one of its MOMENTS, in its own shape."""
        pieces = []
        for rank in self._ranks:
            place = rank.places.get(name)
            if place is not None:
                pieces.append(rank.flats[place.flat][kind].flatten().narrow(0, place.start, place.numel))
        shape = self._shapes[name]
        return torch.cat(pieces)[: shape.numel()].view(shape).float()

    def num_steps(self, name: str) -> float:
        """How often the optimizer has updated the parameter."""
        return next(rank.steps[rank.places[name].flat] for rank in self._ranks if name in rank.places)

    def tensors(self) -> dict[str, Tensor]:
        """Every parameter by name in fp32, frozen ones included."""
        tensors = {name: tensor.float() for name, tensor in self._frozen().items()}
        return tensors | {name: self.parameter(name) for name in self._shapes}

    def _frozen(self) -> dict[str, Tensor]:
        """What every rank has whole; under ZeRO-3 the frozen parameters, put together."""
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
    """Puts the saved values into a model that no engine has yet; rounding to bf16 is the engine's."""
    tensors = shards.tensors()
    for name, parameter in model.named_parameters():
        parameter.copy_(tensors[name])


@torch.no_grad()
def load_optimizer_from(shards: SavedShards, ds_engine: Any, groups: Sequence[ParameterGroup]) -> None:
    """Puts fp32 masters, moments and step counts into an engine whose weights `load_weights_from` has set.

    AdamW makes its state at the first step; here it is made before, piece by piece of what this rank holds.
    """
    parameters = dict(ds_engine.module.named_parameters())
    states = ds_engine.optimizer.state if _steps_on_parameters(ds_engine) else ds_engine.optimizer.optimizer.state
    for number, group in enumerate(groups):
        for place, name in enumerate(group.parameter_names):
            for flat, start, first, numel in _own_piece(ds_engine, parameters[name], number, place):
                if flat not in states:
                    states[flat] = {kind: torch.zeros_like(flat) for kind in MOMENTS}
                    states[flat]["step"] = torch.tensor(shards.num_steps(name), dtype=torch.float32)
                targets = {MASTER: flat} | {kind: states[flat][kind] for kind in MOMENTS}
                for kind, target in targets.items():
                    whole = shards.parameter(name, kind).flatten()
                    target.data.view(-1).narrow(0, start, numel).copy_(whole.narrow(0, first, numel))


class _Piece(NamedTuple):
    """A part of a parameter that this rank's optimizer updates."""

    flat: Tensor
    """the optimizer's tensor"""
    start: int
    """where in it"""
    first: int
    """first element of the parameter"""
    numel: int


def _own_piece(ds_engine: Any, parameter: Any, group: int, place: int) -> Iterable[_Piece]:
    """The piece of a parameter that this rank holds; none where it has no part of it."""
    optimizer, stage = ds_engine.optimizer, ds_engine.zero_optimization_stage()
    if stage == 3:
        number, start, _ = optimizer.grad_position[optimizer.get_param_id(parameter)]
        size = parameter.ds_tensor.ds_numel
        first = size * dist.get_rank()
        numel = min(size, parameter.ds_numel - first)  # the last rank's partition is padded
        return [_Piece(optimizer.fp32_partitioned_groups_flat[number], int(start), first, numel)] if numel > 0 else []
    if stage > 0:
        mapping = parameter._hp_mapping
        if mapping is None:
            return []
        own, whole = mapping.hp_fragment_address, mapping.lp_fragment_address
        return [_Piece(optimizer.single_partition_of_fp32_groups[group], own.start, whole.start, own.numel)]
    flat = parameter if _steps_on_parameters(ds_engine) else optimizer.fp32_groups[group][place]
    return [_Piece(flat, 0, 0, flat.numel())]


def _steps_on_parameters(ds_engine: Any) -> bool:
    """Stage 0 in fp32 has no DeepSpeed optimizer around torch's."""
    return not ds_engine.zero_optimization() and not ds_engine.bfloat16_enabled()


def _whole(model: Mapping[str, Any], trained: Sequence[str]) -> _RankShard:
    """Stage 0: a tensor a parameter; in bf16 the masters are lists by group."""
    optimizer = model["optimizer"]
    masters = [model["module"][name] for name in trained]
    if "fp32_groups" in optimizer:
        masters = [tensor for group in optimizer["fp32_groups"] for tensor in group]
        optimizer = optimizer["optimizer_state_dict"]
    places = {name: _Place(number, 0, masters[number].numel()) for number, name in enumerate(trained)}
    return _rank_shard(masters, optimizer["state"], places)


def _sliced(saved: Mapping[str, Any]) -> _RankShard:
    """Stages 1 and 2: a group is one line of parameters, cut into as many pieces as there are ranks."""
    places = {
        name: _Place(number, int(address.start), int(address.numel))
        for number, group in enumerate(saved["param_slice_mappings"])
        for name, address in group.items()
    }
    return _rank_shard(saved["single_partition_of_fp32_groups"], saved["base_optimizer_state"]["state"], places)


def _partitioned(saved: Mapping[str, Any], shapes: Mapping[str, torch.Size], num_ranks: int) -> _RankShard:
    """Stage 3: every parameter is cut into equal pieces, the last one padded; a flat tensor has whole parameters."""
    flats = saved["fp32_flat_groups"]
    places, number, start = {}, 0, 0
    for name, shape in shapes.items():
        numel = -(-shape.numel() // num_ranks)
        if start == flats[number].numel():
            number, start = number + 1, 0
        places[name] = _Place(number, start, numel)
        start += numel
    return _rank_shard(flats, saved["optimizer_state_dict"]["state"], places)


def _rank_shard(
    masters: Sequence[Tensor], states: Mapping[int, Mapping[str, Tensor]], places: dict[str, _Place]
) -> _RankShard:
    flats = [
        {MASTER: master} | {kind: states[number][kind] for kind in MOMENTS} for number, master in enumerate(masters)
    ]
    return _RankShard(flats, places, [float(states[number]["step"]) for number in range(len(masters))])


def _by_rank(folder: Path, pattern: str) -> list[Path]:
    """The files in the order of the ranks that wrote them; a name without `rank_N_` is rank 0's."""
    numbers = {path: re.search(r"zero_pp_rank_(\d+)_", path.name) for path in folder.glob(pattern)}
    return sorted(numbers, key=lambda path: int(found[1]) if (found := numbers[path]) else 0)

"""Loads DeepSpeed's shards at any world size and ZeRO stage, one parameter in memory at a time.

    zero_pp_rank_0...   [ w1 w1 w1 w2 | ...]        the same for exp_avg and exp_avg_sq
    zero_pp_rank_1...   [ w2 w2 w3 .. | ...]

DeepSpeed's universal checkpoints (0.19.8) give all ZeRO-3 groups the first one's learning rate.
"""

from __future__ import annotations

import re
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from timeviper_platform.training.checkpoint.deepspeed_files import (
    FROZEN,
    MASTER,
    MOMENTS,
    load_saved,
    optimizer_states,
    own_fragments,
    sharded_by_group,
    sharded_by_parameter,
    unsharded,
)
from timeviper_platform.training.optim.parameter_groups import ParameterGroup


class SavedShards:
    """Parameters of a checkpoint, whole and in float32.

    Args:
        trained: names in the optimizer's order.
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
            self._ranks = [unsharded(self._models[0], trained)]
        elif zero_stage < 3:
            self._ranks = [sharded_by_group(saved) for saved in optimizers]
        else:
            self._ranks = [sharded_by_parameter(saved, self._shapes, len(optimizers)) for saved in optimizers]

    def parameter(self, name: str, kind: str = MASTER) -> Tensor:
        """Returns a trained parameter, or one of its MOMENTS."""
        fragments = []
        for rank in self._ranks:
            index = rank.slices.get(name)
            if index is not None:
                fragments.append(rank.flats[index.flat][kind].flatten().narrow(0, index.start, index.numel))
        shape = self._shapes[name]
        return torch.cat(fragments)[: shape.numel()].view(shape).float()

    def num_steps(self, name: str) -> float:
        return next(rank.steps[rank.slices[name].flat] for rank in self._ranks if name in rank.slices)

    def tensors(self) -> dict[str, Tensor]:
        tensors = {name: tensor.float() for name, tensor in self._frozen().items()}
        return tensors | {name: self.parameter(name) for name in self._shapes}

    def _frozen(self) -> dict[str, Tensor]:
        first = self._models[0]
        if self._zero_stage < 3:
            return dict(first["module"])
        return {
            name: torch.cat([model[FROZEN][name].flatten() for model in self._models])[: shape.numel()].view(shape)
            for name, shape in (first["frozen_param_shapes"] or {}).items()
        }


@torch.no_grad()
def load_weights_from(shards: SavedShards, model: nn.Module) -> None:
    """Loads weights before the engine is built."""
    tensors = shards.tensors()
    for name, parameter in model.named_parameters():
        parameter.copy_(tensors[name])


@torch.no_grad()
def load_optimizer_from(shards: SavedShards, ds_engine: Any, groups: Sequence[ParameterGroup]) -> None:
    """Loads masters, moments and step counts."""
    parameters = dict(ds_engine.module.named_parameters())
    states = optimizer_states(ds_engine)
    for number, group in enumerate(groups):
        for index, name in enumerate(group.parameter_names):
            for flat, start, first, numel in own_fragments(ds_engine, parameters[name], number, index):
                if flat not in states:
                    states[flat] = {kind: torch.zeros_like(flat) for kind in MOMENTS}
                    states[flat]["step"] = torch.tensor(shards.num_steps(name), dtype=torch.float32)
                targets = {MASTER: flat} | {kind: states[flat][kind] for kind in MOMENTS}
                for kind, target in targets.items():
                    whole = shards.parameter(name, kind).flatten()
                    target.data.view(-1).narrow(0, start, numel).copy_(whole.narrow(0, first, numel))


@torch.no_grad()
def set_masters(ds_engine: Any, groups: Sequence[ParameterGroup], values: Mapping[str, Tensor]) -> None:
    """Replaces master weights, which DeepSpeed takes from the rounded parameters."""
    parameters = dict(ds_engine.module.named_parameters())
    for number, group in enumerate(groups):
        for index, name in enumerate(group.parameter_names):
            for flat, start, first, numel in own_fragments(ds_engine, parameters[name], number, index):
                flat.data.view(-1).narrow(0, start, numel).copy_(values[name].flatten().narrow(0, first, numel))


def _by_rank(folder: Path, pattern: str) -> list[Path]:
    numbers = {path: re.search(r"zero_pp_rank_(\d+)_", path.name) for path in folder.glob(pattern)}
    return sorted(numbers, key=lambda path: int(found[1]) if (found := numbers[path]) else 0)

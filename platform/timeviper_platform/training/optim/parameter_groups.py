"""Resolves regular expressions on parameter names to optimizer groups."""

from __future__ import annotations

import re
from collections.abc import Sequence
from dataclasses import dataclass

from torch import nn

from timeviper_model.layers.lora import LORA_A, LORA_B


@dataclass(frozen=True, kw_only=True, slots=True)
class ParameterRule:
    """One rule of a phase's `trainable`."""

    match: str
    """Regular expression for the whole parameter name, such as `projector\\..*`."""
    lr: float
    """Peak learning rate."""
    weight_decay: float = 0.01
    """Weight decay of matrices. Norms, biases and A_log never decay."""

    def __post_init__(self) -> None:
        try:
            re.compile(self.match)
        except re.error as error:
            raise ValueError(f"match: {self.match!r} is not a regular expression: {error}") from error
        if self.lr < 0 or self.weight_decay < 0:
            raise ValueError(f"{self.match}: {self.lr = } and {self.weight_decay = } must be at least 0")


@dataclass(frozen=True, kw_only=True, slots=True)
class ParameterGroup:
    name: str
    lr: float
    weight_decay: float
    parameter_names: tuple[str, ...]
    num_parameters: int


def resolve_groups(model: nn.Module, rules: Sequence[ParameterRule]) -> list[ParameterGroup]:
    """Resolves `rules`, splitting each into parameters with and without weight decay.

    Raises:
        ValueError: when a rule matches no parameter, or a parameter matches two rules.
    """
    shapes = dict(model.named_parameters())
    owners: dict[str, ParameterRule] = {}
    for rule in rules:
        matched = [name for name in shapes if re.fullmatch(rule.match, name)]
        if not matched:
            raise ValueError(f"trainable: {rule.match!r} matches no parameter; there are {_kinds(list(shapes))}")
        for name in matched:
            if name in owners:
                raise ValueError(f"trainable: {name} matches both {owners[name].match!r} and {rule.match!r}")
            owners[name] = rule
    groups = []
    for rule in rules:
        for decays in (True, False):
            names = tuple(n for n in shapes if owners.get(n) is rule and (shapes[n].ndim >= 2) is decays)
            if names:
                groups.append(
                    ParameterGroup(
                        name=f"{rule.match} {'decay' if decays else 'no decay'}",
                        lr=rule.lr,
                        weight_decay=rule.weight_decay if decays else 0.0,
                        parameter_names=names,
                        num_parameters=sum(shapes[name].numel() for name in names),
                    )
                )
    return groups


def freeze_others(model: nn.Module, groups: Sequence[ParameterGroup]) -> None:
    trained = {name for group in groups for name in group.parameter_names}
    for name, parameter in model.named_parameters():
        parameter.requires_grad_(name in trained)


def any_block_trained(groups: Sequence[ParameterGroup]) -> bool:
    """Returns whether any weight of the language model's blocks is trained."""
    return any("backbone.layers." in name for group in groups for name in group.parameter_names)


def trained_share(model: nn.Module, groups: Sequence[ParameterGroup]) -> float:
    """Returns trained elements, adapters included, over all elements without adapters, of blocks and output matrix."""
    trained = {name for group in groups for name in group.parameter_names}
    matrices = {
        name: parameter.numel()
        for name, parameter in model.named_parameters()
        if parameter.ndim >= 2 and ("backbone.layers." in name or name.startswith("lm_head."))
    }
    adapters = {name for name in matrices if name.endswith((LORA_A, LORA_B))}
    whole = sum(count for name, count in matrices.items() if name not in adapters)
    return sum(count for name, count in matrices.items() if name in trained) / whole


def describe_groups(groups: Sequence[ParameterGroup], num_parameters: int) -> str:
    trained = sum(group.num_parameters for group in groups)
    return "\n".join(
        [
            f"{trained:,} of {num_parameters:,} parameters are trained",
            *(
                f"    {group.name}: {len(group.parameter_names)} tensors, {group.num_parameters:,} parameters,"
                f" lr {group.lr:g}, weight decay {group.weight_decay:g}"
                for group in groups
            ),
        ]
    )


def _kinds(names: Sequence[str]) -> str:
    return ", ".join(sorted({re.sub(r"\.\d+\.", ".*.", name) for name in names}))

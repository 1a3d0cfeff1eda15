"""What recipes, stores and model configurations say of the vision towers, in the same words, so that they compare.

A recipe of one tower has its facts at the top and no width, which the index knows. One of two towers says both widths,
and has the second's facts under `second`:

    {encoder, preprocessing, merge, hidden_size, second: {encoder, preprocessing, merge, hidden_size}, ...}

Knows JSON and VisionConfig; encodes nothing.
"""

from __future__ import annotations

import hashlib
import json
from collections.abc import Mapping
from typing import Any

from timeviper_model.config import VisionConfig

Facts = dict[str, Any]
"""fields of VisionConfig by dotted name, the number of towers, and the width of a row"""


def tower_facts(part: Mapping[str, Any]) -> Facts:
    """The fields of a VisionTower that a recipe, or its `second`, states."""
    encoder, merge = part.get("encoder", {}), part.get("merge", {})
    found = {
        "hidden_size": part.get("hidden_size"),
        "num_tokens_per_frame": merge.get("num_tokens_per_frame"),
        "layer": encoder.get("layer"),
        "merge_heads": merge.get("heads"),
    }
    return {name: value for name, value in found.items() if value is not None}


def recipe_facts(recipe: Mapping[str, Any]) -> Facts:
    """All that a recipe states; one that names no second tower states that there is one."""
    if "second" not in recipe:
        return {"num_towers": 1, **tower_facts(recipe)}
    second = {f"second.{name}": value for name, value in tower_facts(recipe["second"]).items()}
    return {"num_towers": 2, **tower_facts(recipe), **second}


def vision_facts(vision: VisionConfig) -> Facts:
    """The same of what a model was made for."""
    facts: Facts = {"num_towers": 1 if vision.second is None else 2, "row_size": vision.row_size}
    for prefix, tower in (("", vision), ("second.", vision.second)):
        if tower is not None:
            names = ("hidden_size", "num_tokens_per_frame", "layer", "merge_heads")
            facts |= {prefix + name: getattr(tower, name) for name in names}
    return facts


def different_facts(one: Mapping[str, Any], other: Mapping[str, Any]) -> list[str]:
    """Lines for what both state and state differently."""
    return [f"{key}: {one[key]!r} and {other[key]!r}" for key in one if key in other and one[key] != other[key]]


def recipe_hash(recipe: Mapping[str, Any]) -> str:
    """sha256 of the recipe as canonical JSON (sorted keys, no spaces)."""
    text = json.dumps(recipe, sort_keys=True, separators=(",", ":"), ensure_ascii=True)
    return hashlib.sha256(text.encode()).hexdigest()


def differences(old: Any, new: Any, path: str = "") -> list[str]:
    """Lines that say, for each dotted path, what the store has and what this run asks for."""
    if isinstance(old, dict) and isinstance(new, dict):
        keys = sorted(old.keys() | new.keys())
        return [line for k in keys for line in differences(old.get(k), new.get(k), f"{path}.{k}" if path else k)]
    return [] if old == new else [f"{path}: the store has {old!r}, this run {new!r}"]

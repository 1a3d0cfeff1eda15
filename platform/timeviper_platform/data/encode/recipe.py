"""Compares recipes, stores and model configurations."""

from __future__ import annotations

import hashlib
import json
from collections.abc import Mapping
from typing import Any

from timeviper_model.config import VisionConfig

Facts = dict[str, Any]
"""Fields of VisionConfig by dotted name, number of towers, width of a row."""

RECIPE_CHANGES = {
    2: "videos are turned upright",
    3: "frames follow the medium's clock (late starts, joined recordings, exact ends) and the stream that players take",
}
"""Version -> what it changed: the same configuration gives other features for some media."""

RECIPE_VERSION = max(RECIPE_CHANGES)


def tower_facts(recipe: Mapping[str, Any]) -> Facts:
    """Fields of one tower in a recipe or its `second`."""
    encoder, merge = recipe.get("encoder", {}), recipe.get("merge", {})
    facts = {
        "hidden_size": recipe.get("hidden_size"),
        "num_tokens_per_frame": merge.get("num_tokens_per_frame"),
        "layer": encoder.get("layer"),
        "merge_heads": merge.get("heads"),
    }
    return {name: value for name, value in facts.items() if value is not None}


def recipe_facts(recipe: Mapping[str, Any]) -> Facts:
    if "second" not in recipe:
        return {"num_towers": 1, **tower_facts(recipe)}
    second = {f"second.{name}": value for name, value in tower_facts(recipe["second"]).items()}
    return {"num_towers": 2, **tower_facts(recipe), **second}


def vision_facts(vision: VisionConfig) -> Facts:
    facts: Facts = {"num_towers": 1 if vision.second is None else 2, "row_size": vision.row_size}
    for prefix, tower in (("", vision), ("second.", vision.second)):
        if tower is not None:
            names = ("hidden_size", "num_tokens_per_frame", "layer", "merge_heads")
            facts |= {prefix + name: getattr(tower, name) for name in names}
    return facts


def different_facts(one: Mapping[str, Any], other: Mapping[str, Any]) -> list[str]:
    return [f"{key}: {one[key]!r} and {other[key]!r}" for key in one if key in other and one[key] != other[key]]


def recipe_hash(recipe: Mapping[str, Any]) -> str:
    """sha256 of the recipe as canonical JSON (sorted keys, no spaces)."""
    text = json.dumps(recipe, sort_keys=True, separators=(",", ":"), ensure_ascii=True)
    return hashlib.sha256(text.encode()).hexdigest()


def older_recipe(recipe: Mapping[str, Any]) -> str | None:
    """Returns what a store of an earlier release lacks, and the fix; None for the current version."""
    version = recipe.get("recipe_version", 1)
    if version >= RECIPE_VERSION:
        return None
    changes = "; ".join(f"{number}: {text}" for number, text in RECIPE_CHANGES.items() if number > version)
    return (
        f"recipe_version {version} is older than this release's {RECIPE_VERSION} ({changes}): the store stays readable;"
        " to add media or get these frames, preprocess into a new feature_store"
    )


def differences(old: Any, new: Any, path: str = "") -> list[str]:
    if isinstance(old, dict) and isinstance(new, dict):
        keys = sorted(old.keys() | new.keys())
        return [line for k in keys for line in differences(old.get(k), new.get(k), f"{path}.{k}" if path else k)]
    return [] if old == new else [f"{path}: the store has {old!r}, this run {new!r}"]

"""Checks by recipe that weights, feature store and encoder fit together."""

from __future__ import annotations

from typing import Any

from timeviper_model.weights.metadata import load_metadata
from timeviper_model.weights.weights_folder import load_config
from timeviper_platform.common.machine_cache import CONFIG_FILES, local_copy
from timeviper_platform.data.encode.frame_encoder import FrameEncoder
from timeviper_platform.data.encode.recipe import Facts, different_facts, recipe_facts, vision_facts
from timeviper_platform.data.store.compatibility import store_facts
from timeviper_platform.data.store.reader import FeatureStore

VERSION_KEY = "recipe_version"
"""Key in a recipe: version of frame selection and rotation."""

RECIPE_HASH_KEY = "recipe_hash"
"""Key in the weights' metadata: recipe hash of their feature store."""


def check_features_fit(weights: str, *, store: FeatureStore | None, encoder: FrameEncoder | None) -> None:
    """Checks that store and encoder give the features that the weights were trained on.

    Raises:
        ValueError: with every difference.
    """
    store_name = "" if store is None else f"the feature store {store.uri!r}"
    encoder_name = "" if encoder is None else " with ".join(f"the encoder {t.model!r}" for t in encoder.config.towers)
    if store is not None and encoder is not None:
        lines = different_facts(_whole(encoder.recipe), _whole(store.recipe))
        fix = "configure the encoder as in the preprocessing job"
        if encoder.recipe.get(VERSION_KEY) != store.recipe.get(VERSION_KEY):  # no configuration can fix that
            fix = "another release wrote the store: preprocess into a new folder, or serve with that release"
        _require_none(lines, encoder_name, store_name, fix)
    expected = _expected_by(weights)
    fix = "export weights and preprocess media with one encoder configuration"
    weights_name = f"the weights {weights!r}"
    if encoder is not None:
        facts = {**recipe_facts(encoder.recipe), "row_size": encoder.dim}
        _require_none(different_facts(expected, facts), weights_name, encoder_name, fix)
    if store is not None:
        facts = {**store_facts(store), RECIPE_HASH_KEY: store.recipe_hash}
        _require_none(different_facts(expected, facts), weights_name, store_name, fix)


def _expected_by(weights: str) -> Facts:
    folder = local_copy(weights, CONFIG_FILES)
    metadata = load_metadata(folder)
    known = {RECIPE_HASH_KEY: metadata[RECIPE_HASH_KEY]} if RECIPE_HASH_KEY in metadata else {}
    return {**vision_facts(load_config(folder).vision), **known}


def _whole(recipe: dict[str, Any]) -> Facts:
    """Flattens a recipe to dotted names and adds defaults of optional keys."""
    return {"num_towers": recipe_facts(recipe)["num_towers"], "compiled": False, **_flat(recipe)}


def _flat(values: dict[str, Any], prefix: str = "") -> Facts:
    facts: Facts = {}
    for name, value in values.items():
        facts |= _flat(value, f"{prefix}{name}.") if isinstance(value, dict) else {prefix + name: value}
    return facts


def _require_none(lines: list[str], one: str, other: str, fix: str) -> None:
    if lines:
        raise ValueError(f"{one} and {other} do not fit:\n" + "\n".join(f"  {line}" for line in lines) + f"\n{fix}")

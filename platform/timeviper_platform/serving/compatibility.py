"""Do the features fit the weights? Compared once, when a replica starts, so that a wrong pair never answers nonsense.

Knows configurations and recipes; loads no weights and reads no features.
"""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

from timeviper_model.weights import load_config
from timeviper_platform.data.encode import FrameEncoder
from timeviper_platform.data.features import FeatureStore

RECIPE_HASH_KEY = "recipe_hash"
"""in the weights' metadata: recipe hash of the feature store they were trained on"""


def check_features_fit(weights: str, *, store: FeatureStore | None, encoder: FrameEncoder | None) -> None:
    """Passes when weights, store and encoder are made for one another.

    Raises:
        ValueError: naming both sides and every difference.
    """
    store_name = "" if store is None else f"the feature store {store.uri!r}"
    encoder_name = "" if encoder is None else f"the encoder {encoder.config.encoder!r}"
    if store is not None and encoder is not None:
        lines = _differences(encoder.recipe, store.recipe)
        _refuse(lines, encoder_name, store_name, "configure the encoder as the preprocessing job had it")
    expected = _expected_by(weights)
    way_out = "export weights and preprocess media with one encoder configuration"
    weights_name = f"the weights {weights!r}"
    if encoder is not None:
        _refuse(_differences(expected, _facts_of_encoder(encoder)), weights_name, encoder_name, way_out)
    if store is not None:
        _refuse(_differences(expected, _facts_of_store(store)), weights_name, store_name, way_out)


def _expected_by(weights: str) -> dict[str, Any]:
    vision = load_config(weights).vision
    metadata = json.loads((Path(weights) / "config.json").read_text()).get("timeviper_metadata", {})
    facts: dict[str, Any] = {
        "hidden_size": vision.row_size,
        "num_tokens_per_frame": vision.num_tokens_per_frame,
        "layer": vision.layer,
        "merge_heads": vision.merge_heads,
    }
    if RECIPE_HASH_KEY in metadata:
        facts[RECIPE_HASH_KEY] = metadata[RECIPE_HASH_KEY]
    return facts


def _facts_of_encoder(encoder: FrameEncoder) -> dict[str, Any]:
    return {**_facts_of_recipe(encoder.recipe), "hidden_size": encoder.dim}


def _facts_of_store(store: FeatureStore) -> dict[str, Any]:
    facts = {**_facts_of_recipe(store.recipe), RECIPE_HASH_KEY: store.recipe_hash}
    if store.media_ids:
        facts["hidden_size"] = store.info(store.media_ids[0]).dim
    return facts


def _facts_of_recipe(recipe: dict[str, Any]) -> dict[str, Any]:
    """What the weights' configuration also says, under its names."""
    encoder, merge = recipe.get("encoder", {}), recipe.get("merge", {})
    places = {
        "layer": (encoder, "layer"),
        "num_tokens_per_frame": (merge, "num_tokens_per_frame"),
        "merge_heads": (merge, "heads"),
    }
    return {name: part[key] for name, (part, key) in places.items() if key in part}


def _differences(one: dict[str, Any], other: dict[str, Any]) -> list[str]:
    """Lines for what both state and state differently."""
    return [f"{key}: {one[key]!r} and {other[key]!r}" for key in one if key in other and one[key] != other[key]]


def _refuse(lines: list[str], one: str, other: str, way_out: str) -> None:
    if lines:
        raise ValueError(f"{one} and {other} do not fit:\n" + "\n".join(f"  {line}" for line in lines) + f"\n{way_out}")

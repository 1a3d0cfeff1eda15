"""Compares a store's towers with a model's."""

from __future__ import annotations

from timeviper_model.config import VisionConfig
from timeviper_platform.data.encode.recipe import Facts, different_facts, recipe_facts, vision_facts
from timeviper_platform.data.store.reader import FeatureStore


def store_facts(store: FeatureStore) -> Facts:
    facts = recipe_facts(store.recipe)
    if store.media_ids:
        facts["row_size"] = store.info(store.media_ids[0]).dim
    return facts


def check_same_towers(vision: VisionConfig, store: FeatureStore, weights: str) -> None:
    """Raises ValueError with all differences between the vision towers of the store and of the weights."""
    wrong = different_facts(vision_facts(vision), store_facts(store))
    if wrong:
        raise ValueError(
            f"the weights {weights} and the feature store {store.uri} differ in {'; '.join(wrong)};"
            " use a store that the weights' own vision encoder filled"
        )

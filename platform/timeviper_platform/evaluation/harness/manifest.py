"""The entry point `lmms_eval.models`: names the models without importing PyTorch."""

from __future__ import annotations

from typing import Any

MODELS = "timeviper_platform.evaluation.harness.lmms_eval_models"


def lmms_eval_models() -> Any:
    """Returns the ModelManifest of `--model timeviper`."""
    from lmms_eval.models.registry_v2 import ModelManifest

    return ModelManifest(
        model_id="timeviper",
        simple_class_path=f"{MODELS}.TimeViperSimple",
        chat_class_path=f"{MODELS}.TimeViperChat",
    )

"""Weights of a tiny model."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path

import pytest
import torch

from reference.engine_service import TOKENIZER
from reference.tiny_serving import random_model
from timeviper_model.weights.weights_folder import save_pretrained


@pytest.fixture(scope="session")
def weights(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Path]:
    folder = tmp_path_factory.mktemp("engine") / "weights"
    save_pretrained(random_model(dtype=torch.float32), folder, tokenizer=TOKENIZER)
    return folder

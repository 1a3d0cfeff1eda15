from __future__ import annotations

import pytest
from pydantic import TypeAdapter

from timeviper_model.config import PRESETS
from timeviper_platform.training.config import InitConfig


@pytest.mark.parametrize("name", PRESETS)
def test_every_preset_can_be_configured(name: str) -> None:
    assert TypeAdapter(InitConfig).validate_python({"preset": name}).model_config() == PRESETS[name]

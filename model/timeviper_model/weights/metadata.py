"""A weights folder's metadata about its training."""

from __future__ import annotations

import json
from pathlib import Path

from timeviper_model.batching.prompt import TimeText

METADATA_KEY = "timeviper_metadata"
"""Key in config.json."""


def load_metadata(folder: str | Path) -> dict[str, str]:
    metadata: dict[str, str] = json.loads((Path(folder) / "config.json").read_text()).get(METADATA_KEY, {})
    return metadata


def trained_time_text(folder: str | Path) -> TimeText:
    """Returns which training prompts stated the length of their video.

    Raises:
        ValueError: for an unknown value.
    """
    value = load_metadata(folder).get("time_text", "never")
    known: dict[str, TimeText] = {
        "never": "never",
        "temporal": "temporal",
        "always": "always",
        "False": "never",
        "True": "always",
    }  # the last two by versions before `temporal`
    if value not in known:
        raise ValueError(f"{folder}: time_text is {value!r}, not one of {', '.join(known)}; fix it in config.json")
    return known[value]

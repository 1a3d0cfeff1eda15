from __future__ import annotations

import json
from pathlib import Path

import pytest

from timeviper_model.weights.metadata import METADATA_KEY, load_metadata, trained_time_text


def write_config(folder: Path, metadata: dict[str, str] | None) -> Path:
    config = {} if metadata is None else {METADATA_KEY: metadata}
    (folder / "config.json").write_text(json.dumps(config))
    return folder


@pytest.mark.parametrize(
    ("metadata", "expected"),
    [
        (None, "never"),
        ({"run": "x"}, "never"),
        ({"time_text": "temporal"}, "temporal"),
        ({"time_text": "always"}, "always"),
        ({"time_text": "True"}, "always"),  # exports of earlier versions
        ({"time_text": "False"}, "never"),
    ],
)
def test_weights_say_which_prompts_stated_the_length_of_their_video(
    tmp_path: Path, metadata: dict[str, str] | None, expected: str
) -> None:
    assert trained_time_text(write_config(tmp_path, metadata)) == expected
    assert load_metadata(tmp_path) == (metadata or {})


def test_an_unknown_value_names_the_folder(tmp_path: Path) -> None:
    with pytest.raises(ValueError, match=r"time_text is 'often', not one of never, temporal, always"):
        trained_time_text(write_config(tmp_path, {"time_text": "often"}))

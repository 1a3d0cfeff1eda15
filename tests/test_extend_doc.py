"""docs/extend.md: its code runs as it stands, in the order of the document."""

from __future__ import annotations

import re
from pathlib import Path

import pytest

DOCUMENT = Path(__file__).parent.parent / "docs" / "extend.md"
SECTIONS = re.split(r"^## ", DOCUMENT.read_text("utf-8"), flags=re.MULTILINE)[1:]


def test_every_extension_is_tried(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    names: dict[str, object] = {}
    for section in SECTIONS:
        title = section.splitlines()[0]
        (block,) = re.findall(r"^```python\n(.*?)^```", section, flags=re.MULTILINE | re.DOTALL)
        assert "assert " in block, title
        exec(compile(block, f"{DOCUMENT.name}: {title}", "exec"), names)
    assert [section.splitlines()[0].removeprefix("Your own ") for section in SECTIONS] == [
        "vision encoder",
        "language model",
        "annotations",
        "benchmark",
    ]

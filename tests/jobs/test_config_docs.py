from __future__ import annotations

import runpy
from pathlib import Path

ROOT = Path(__file__).resolve().parents[2]


def test_the_document_of_all_keys_is_up_to_date() -> None:
    job = runpy.run_path(str(ROOT / "jobs" / "config_docs.py"))
    assert (ROOT / "docs" / "config.md").read_text() == job["document"](), "run `python jobs/config_docs.py`"

"""Puts task files for lmms-eval into the folder of timeviper-synth."""

from __future__ import annotations

import shutil
from pathlib import Path

TASKS = Path(__file__).parent / "tasks"
FOLDER_NAME = "lmms_eval"


def write_task_files(benchmark: str) -> str:
    """Copies the task files into a local benchmark's folder; returns the folder for `--include_path`."""
    folder = Path(benchmark) / FOLDER_NAME
    shutil.copytree(TASKS, folder, dirs_exist_ok=True, ignore=shutil.ignore_patterns("__pycache__"))
    return str(folder)

"""Folders that generators clear: new or empty ones, and their own."""

from __future__ import annotations

from pathlib import Path


def is_generated(folder: Path, finished: str) -> bool:
    """Whether the generator wrote `folder`, perhaps not to its end.

    Args:
        finished: name of the file that ends its finished folders.
    """
    return _marker(folder, finished).is_file() or (folder / finished).is_file()


def refuse_other_files(folder: Path, finished: str) -> None:
    """Raises ValueError if `folder` holds files that the generator did not write."""
    if is_generated(folder, finished) or not folder.exists():
        return
    if not folder.is_dir() or any(folder.iterdir()):
        raise ValueError(f"{folder} holds files that were not generated, and could be deleted; name a new folder")


def mark_generated(folder: Path, finished: str) -> None:
    folder.mkdir(parents=True, exist_ok=True)
    _marker(folder, finished).touch()


def _marker(folder: Path, finished: str) -> Path:
    return folder / f".{finished}.begun"

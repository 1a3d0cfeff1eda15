"""One torch thread for every training test: results repeat, and small models do not wait for cores."""

from __future__ import annotations

from collections.abc import Iterator

import pytest
import torch

from timeviper_platform.training.local import process_group


@pytest.fixture(autouse=True, scope="package")
def _one_thread() -> Iterator[None]:
    before = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(before)


@pytest.fixture(scope="session")
def group_of_one() -> Iterator[None]:
    """torch.distributed with this process alone, for every run that a test makes in it."""
    with process_group(use_gpu=False):
        yield

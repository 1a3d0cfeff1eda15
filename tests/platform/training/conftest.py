"""One torch thread for every training test: reproducible results, and no competition for cores."""

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
    """torch.distributed with this process as its only rank."""
    with process_group(use_gpu=False):
        yield

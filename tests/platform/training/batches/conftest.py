from __future__ import annotations

import pytest

from reference.training_corpus import Corpus, make_corpus


@pytest.fixture(scope="package")
def corpus(tmp_path_factory: pytest.TempPathFactory) -> Corpus:
    """Read-only."""
    return make_corpus(tmp_path_factory.mktemp("corpus"))

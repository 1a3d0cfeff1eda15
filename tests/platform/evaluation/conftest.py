from __future__ import annotations

import pytest

from reference.known_answers import KnownAnswers, make_known_answers


@pytest.fixture(scope="session")
def known(tmp_path_factory: pytest.TempPathFactory) -> KnownAnswers:
    """Weights trained once per session; read-only."""
    return make_known_answers(tmp_path_factory.mktemp("known"))

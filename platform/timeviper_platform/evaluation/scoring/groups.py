"""Scores of VideoMME-v2's groups of four questions about a video."""

from __future__ import annotations

import ast
from collections.abc import Sequence

GROUP_SIZE = 4

_RELEVANCE = (0.0, 1 / 16, 4 / 16, 9 / 16, 1.0)
_LOGIC: dict[str, tuple[tuple[float, ...], int]] = {
    "[1, 2, 3, 4]": (_RELEVANCE, -1),
    "[1, [2, 3], 4]": ((0.0, 1 / 12, 4 / 12, 7 / 12, 1.0), 1),
    "[[1, 2], 3, 4]": ((0.0, 1 / 10, 2 / 10, 5 / 10, 1.0), 0),
}
"""Score by the number of right answers before the first wrong one, and the number at which the question after the wrong
one may replace it.
"""


def structure_of(text: str) -> str | None:
    """Returns the structure of a logic group as `logic_score` takes it; None if it is unknown."""
    try:
        found = str(ast.literal_eval(text))
    except (ValueError, SyntaxError):
        return None
    return found if found in _LOGIC else None


def relevance_score(right: Sequence[bool]) -> float:
    """The square of the share of right answers: 0, 1/16, 4/16, 9/16, 1."""
    return _RELEVANCE[sum(right)]


def logic_score(right: Sequence[bool], structure: str) -> float:
    """Score of the chain of right answers from the first; in '[1, [2, 3], 4]', 3 stands in for a wrong 2.

    Raises:
        ValueError: for an unknown structure.
    """
    if (known := structure_of(structure)) is None:
        raise ValueError(f"group_structure is {structure!r}, not one of {', '.join(_LOGIC)}")
    scores, replaceable = _LOGIC[known]
    length = next((index for index, is_right in enumerate(right) if not is_right), len(right))
    if length == replaceable and right[length + 1]:
        length += 1
    return scores[length]

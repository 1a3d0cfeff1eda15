"""Captions by their words."""

from __future__ import annotations

import re


def rouge_l(answer: str, reference: str) -> float:
    """F1 of the longest common subsequence of lower-case words and numbers (Lin 2004, ROUGE-L, beta = 1), 0 to 1."""
    own, expected = (re.findall(r"\w+", text.lower()) for text in (answer, reference))
    if not own or not expected:
        return float(own == expected)
    lengths = [0] * (len(expected) + 1)
    for word in own:
        diagonal = 0
        for index, other in enumerate(expected, start=1):
            above = lengths[index]
            lengths[index] = diagonal + 1 if word == other else max(above, lengths[index - 1])
            diagonal = above
    return 2 * lengths[-1] / (len(own) + len(expected))

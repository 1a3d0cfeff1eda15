"""Options that annotations keep inside the question's text."""

from __future__ import annotations

import re

from timeviper_platform.evaluation.scoring.letters import LETTERS

_OPTION = re.compile(r"^\s*(?:\((?P<round>[A-Z])\)|(?P<plain>[A-Z])[.):])\s*(?P<text>.*)$")


def split_options(text: str) -> tuple[str, tuple[str, ...]]:
    """Splits lines '(A) ..' or 'A. ..', in order from A, off a question; further lines belong to the option before.

    split_options("Which?\\n(A) a dog\\n(B) a cat") -> ("Which?", ("a dog", "a cat"))
    """
    question: list[str] = []
    options: list[str] = []
    for line in text.strip().splitlines():
        match = _OPTION.match(line)
        if match and (match["round"] or match["plain"]) == LETTERS[len(options)]:
            options.append(match["text"].strip())
        elif options:
            options[-1] += f"\n{line.strip()}"
        else:
            question.append(line)
    return "\n".join(question).strip(), tuple(option.strip() for option in options)

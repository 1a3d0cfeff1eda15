"""TempCompass: the owners' rules for its three kinds of questions, without their judge."""

from __future__ import annotations

import re
from collections.abc import Sequence

from timeviper_platform.evaluation.scoring.letters import LETTERS, find_letter


def official_label(task: str, answer: str, labels: Sequence[str], options: Sequence[str]) -> str | None:
    """Returns the label that the owners' script finds, None where it would ask a judge (0 with --disable_llm)."""
    if task == "yes_no":
        lower = answer.lower()
        return next((label for label in ("yes", "no") if lower.startswith(label)), None)
    lines = [f"{label}. {option}" for label, option in zip(labels, options, strict=True)]
    if task == "multi-choice":
        if answer in lines:
            return labels[lines.index(answer)]
        is_letter = answer[:1] in ("A", "B", "C", "D") and answer[1:2] in ("", ".", ")")
        return answer[0] if is_letter else None
    found = None
    for label, option in zip(labels, options, strict=True):
        if answer == f"{label}: {option}" or option in (answer, _after_bracket(answer)):
            found = label
    for label in labels:
        if {label, label.split()[-1]} & {answer, answer.replace(".", "")}:
            found = label
    return found


def _after_bracket(answer: str) -> str | None:
    return answer.split(") ")[1] if ") " in answer else None


def strict_label(task: str, answer: str, labels: Sequence[str], options: Sequence[str]) -> str | None:
    """Returns the one label that the answer names."""
    if task == "yes_no":
        words = re.findall(r"\b(yes|no)\b", answer.lower())
        stated = re.findall(r"\banswer(?:\s+is|\s*:)\s*\W*(yes|no)\b", answer.lower())
        if stated:
            return str(stated[-1])
        return str(words[0]) if len(set(words)) == 1 else None
    if task == "multi-choice":
        return find_letter("strict", answer, options)
    named = [label for label in labels if re.search(rf"\b{re.escape(label)}\b", answer)]
    if len(named) == 1:
        return named[0]
    if named:
        return None
    short = {label.split()[-1]: label for label in labels}
    if re.fullmatch(r"\W*(\w)\W*", answer.strip()):
        return short.get(re.sub(r"\W", "", answer))
    letter = find_letter("strict", answer, options)
    return None if letter is None else labels[LETTERS.index(letter)]

"""The ChatTemplate of a tokenizer's own Jinja template, found from what it renders."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

from timeviper_model.batching.prompt import SPECIAL_TOKEN, TEMPLATES, ChatTemplate

DIRECTIVES = ("/no_think", "/think")
"""Words of a user that Nemotron's template reads as commands."""

SYSTEM, FIRST, ANSWER, SECOND = "SYSTEMTEXT", "FIRSTTEXT", "ANSWERTEXT", "SECONDTEXT"


def chat_template(name: str, tokenizer: Any) -> ChatTemplate:
    """Returns the template of a model configuration's `chat_template`.

    Raises:
        ValueError: if it is "tokenizer", and the tokenizer's template is missing or has another structure.
    """
    return TEMPLATES[name] if name in TEMPLATES else tokenizer_template(tokenizer)


def tokenizer_template(tokenizer: Any) -> ChatTemplate:
    """Returns the tokenizer's template for answers without reasoning.

    Renders conversations of marked texts, and reads the template's parts between the marks:

        system[0] SYSTEM system[1] user[0] FIRST assistant[0] ANSWER assistant[1] after_answer user[0] SECOND
    """
    if not getattr(tokenizer, "chat_template", None):
        raise ValueError("the tokenizer has no chat template of its own; use chat_template: paper")
    whole = _render(tokenizer, [SYSTEM, FIRST, ANSWER, SECOND])
    before, opening, header, between, prompt = _split(whole, [SYSTEM, FIRST, ANSWER, SECOND])
    user = _common_end(opening, between)
    end_of_answer = SPECIAL_TOKEN.search(between)
    if end_of_answer is None:
        raise ValueError("the tokenizer's chat template has no special token after an answer; use chat_template: paper")
    between = between.removesuffix(user)
    plain, _ = _split(_render(tokenizer, ["", FIRST], has_system=False), [FIRST])
    without_system = plain.removeprefix(before)
    after_text = opening.removesuffix(without_system) if opening.endswith(without_system) else ""
    opening = opening.removeprefix(after_text)
    default = without_system.removesuffix(opening)
    found = ChatTemplate(
        system=(before, opening.removesuffix(user)),
        user=(user, ""),
        assistant=(prompt, between[: end_of_answer.end()]),
        after_system_text=after_text,
        after_answer=between[end_of_answer.end() :],
        default_system=default,
        directives=tuple(
            word for word in DIRECTIVES if f"{FIRST} {word}" not in _render(tokenizer, [SYSTEM, f"{FIRST} {word}"])
        ),
    )
    if plain != before + default + opening or not prompt.startswith(header):
        raise ValueError("the tokenizer's chat template has another structure than system, user and assistant turns")
    return found


def _render(tokenizer: Any, texts: Sequence[str], *, has_system: bool = True) -> str:
    roles = ["system", "user", "assistant", "user"]
    messages = [{"role": role, "content": text} for role, text in zip(roles, texts, strict=False)]
    return str(
        tokenizer.apply_chat_template(
            messages if has_system else messages[1:],
            tokenize=False,
            add_generation_prompt=True,
            enable_thinking=False,
        )
    )


def _common_end(one: str, other: str) -> str:
    length = 0
    while length < min(len(one), len(other)) and one[-1 - length] == other[-1 - length]:
        length += 1
    return one[len(one) - length :]


def _split(text: str, marks: Sequence[str]) -> list[str]:
    parts = []
    for mark in marks:
        part, found, text = text.partition(mark)
        if not found:
            raise ValueError(f"the tokenizer's chat template drops a turn's text ({mark}); use chat_template: paper")
        parts.append(part)
    return [*parts, text]

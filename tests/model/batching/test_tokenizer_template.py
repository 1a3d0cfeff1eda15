from __future__ import annotations

from typing import Any

import pytest

from reference.engine_requests import TOKENIZER
from timeviper_model.batching.prompt import CHATML, NEMOTRON, ChatTemplate, Turn, build_sample, jinja_template
from timeviper_model.batching.tokenizer_template import chat_template, tokenizer_template

REASONING = (
    "{%- set ns = namespace(think=enable_thinking is not defined or enable_thinking) -%}"
    "{%- macro clean(text) -%}{{ text.replace('/no_think', '').replace('/think', '').strip() }}{%- endmacro -%}"
    "{{- '<SPECIAL_10>System\n' -}}"
    "{%- if messages[0].role == 'system' -%}{{- clean(messages[0].content) -}}{%- endif -%}{{- '\n' -}}"
    "{%- for message in messages -%}"
    "{%- if message.role == 'user' -%}{{- '<SPECIAL_11>User\n' + clean(message.content) + '\n' -}}"
    "{%- elif message.role == 'assistant' -%}"
    "{{- '<SPECIAL_11>Assistant\n' + message.content + '\n<SPECIAL_12>\n' -}}"
    "{%- endif -%}{%- endfor -%}"
    "{%- if add_generation_prompt -%}{{- '<SPECIAL_11>Assistant\n' -}}"
    "{%- if ns.think -%}{{- '<think>\n' -}}{%- else -%}{{- '<think></think>' -}}{%- endif -%}{%- endif -%}"
)
"""In the structure of a reasoning model of NVIDIA's."""

CONVERSATION = [
    Turn(role="system", text="Be brief."),
    Turn(role="user", text="What? /no_think"),
    Turn(role="assistant", text="A cat."),
    Turn(role="user", text="Sure?"),
]


class Templated:
    """The test tokenizer with another chat template."""

    def __init__(self, template: str | None) -> None:
        self.chat_template = template

    def __getattr__(self, name: str) -> Any:
        return getattr(TOKENIZER, name)

    def __call__(self, *arguments: Any, **options: Any) -> Any:
        return TOKENIZER(*arguments, **options)

    def apply_chat_template(self, messages: Any, **options: Any) -> Any:
        return TOKENIZER.apply_chat_template(messages, chat_template=self.chat_template, **options)


def prompt_of(template: ChatTemplate, turns: list[Turn]) -> str:
    sample = build_sample(TOKENIZER, turns, template=template, add_generation_prompt=True)
    return str(TOKENIZER.decode(sample.input_ids))


@pytest.mark.parametrize("template", [NEMOTRON, CHATML], ids=["nemotron", "chatml"])
def test_the_papers_templates_are_found_again(template: ChatTemplate) -> None:
    found = tokenizer_template(Templated(jinja_template(template)))
    for turns in (CONVERSATION, CONVERSATION[1:2], CONVERSATION[1:]):
        assert prompt_of(found, turns) == prompt_of(template, turns)


def test_a_reasoning_models_template_is_read_without_reasoning() -> None:
    tokenizer = Templated(REASONING)
    found = chat_template("tokenizer", tokenizer)
    assert found.directives == ("/no_think", "/think")
    expected = tokenizer.apply_chat_template(
        [{"role": turn.role, "content": turn.text} for turn in CONVERSATION[:2]],
        tokenize=False,
        add_generation_prompt=True,
        enable_thinking=False,
    )
    assert prompt_of(found, CONVERSATION[:2]) == expected
    assert expected.endswith("What?\n<SPECIAL_11>Assistant\n<think></think>")
    assert chat_template("nemotron", tokenizer) == NEMOTRON
    assert "/no_think" in prompt_of(NEMOTRON, CONVERSATION[:2])  # the paper's template takes it as text


@pytest.mark.parametrize(
    ("template", "message"),
    [
        (None, "has no chat template of its own; use chat_template: paper"),
        ("{{- 'always the same' -}}", r"drops a turn's text \(SYSTEMTEXT\)"),
        (
            "{%- for m in messages -%}{{- m.role + ': ' + m.content -}}{%- endfor -%}",
            "no special token after an answer",
        ),
    ],
)
def test_other_templates_are_refused(template: str | None, message: str) -> None:
    with pytest.raises(ValueError, match=message):
        tokenizer_template(Templated(template))

"""A conversation about media, as token ids with kinds and labels. Knows chat templates; not features or files.

Nemotron's prompt, with vision tokens (v) standing for the media:

    <SPECIAL_10>System\\n{system}<SPECIAL_12>\\n<SPECIAL_11>User\\n     system (all that comes before vision)
    vvvvvvvv                                                         vision
    {question}\\n<SPECIAL_12><SPECIAL_11>Assistant\\n                instruction
    {answer}\\n<SPECIAL_12>                                          response
"""

from __future__ import annotations

import re
from collections.abc import Sequence
from dataclasses import dataclass
from threading import Lock
from typing import Any, Literal

from timeviper_model.batching.batch import IGNORE_INDEX, Sample, TokenKind

_ENCODING = Lock()
"""A tokenizer notes `split_special_tokens` in itself and then encodes: another thread's call in between would turn what
a user typed into special tokens."""

MEDIA_MARKER = "<media>"
"""Where media go in a user's text; without a marker they come first in the first user turn."""


@dataclass(frozen=True, kw_only=True, slots=True)
class Turn:
    """One message of a conversation."""

    role: Literal["system", "user", "assistant"]
    text: str


@dataclass(frozen=True, kw_only=True, slots=True)
class ChatTemplate:
    """The literal pieces around each turn; special tokens are written as their names."""

    system: tuple[str, str]
    user: tuple[str, str]
    assistant: tuple[str, str]
    """what opens the answer (instruction) and what ends it (response, its last token is the end token)"""
    after_system_text: str = ""
    """where there is such a text"""
    after_answer: str = ""
    """where another turn follows"""
    default_system: str = ""
    """the system's text where the conversation begins without a system turn"""


NEMOTRON = ChatTemplate(
    system=("<SPECIAL_10>System\n", "<SPECIAL_12>\n"),
    user=("<SPECIAL_11>User\n", "\n<SPECIAL_12>"),
    assistant=("<SPECIAL_11>Assistant\n", "\n<SPECIAL_12>"),
    after_system_text="\n",
)
"""NVIDIA Nemotron-Nano-v2 as TimeViper's public code fills it."""

CHATML = ChatTemplate(
    system=("<|im_start|>system\n", "<|im_end|>\n"),
    user=("<|im_start|>user\n", "<|im_end|>\n"),
    assistant=("<|im_start|>assistant\n", "<|im_end|>"),
    after_answer="\n",
    default_system="You are Qwen, created by Alibaba Cloud. You are a helpful assistant.",
)
"""Qwen2.5, as its tokenizer's own chat template writes it."""

TEMPLATES: dict[str, ChatTemplate] = {"nemotron": NEMOTRON, "chatml": CHATML}


def time_text(duration_seconds: float, num_frames: int) -> str:
    """The sentence of the paper's grounding data that tells the model how long the video is."""
    return (
        f"The video lasts for {duration_seconds:.2f} seconds, and {num_frames} frames are uniformly sampled from it.\n"
    )


def check_tokenizer(tokenizer: Any, template: ChatTemplate) -> None:
    """Passes when every special token of the template is one token of the tokenizer.

    Raises:
        ValueError: with the tokens it would cut into pieces.
    """
    pieces = "".join((*template.system, *template.user, *template.assistant))
    special = dict.fromkeys(re.findall(r"<[^<>\s]+>", pieces))
    cut = [name for name in special if len(encode_text(tokenizer, name, split_special_tokens=False)) != 1]
    if cut:
        raise ValueError(
            f"the tokenizer does not know {', '.join(cut)} of the model's chat template; use the tokenizer that came"
            " with the language model, or a model whose chat_template fits this tokenizer"
        )


def end_token_id(tokenizer: Any, template: ChatTemplate) -> int:
    """The id at which generation stops: the last token of what ends an answer.

    Raises:
        ValueError: when the tokenizer is not one for this template.
    """
    check_tokenizer(tokenizer, template)
    return int(encode_text(tokenizer, template.assistant[1], split_special_tokens=False)[-1])


def build_sample(
    tokenizer: Any,
    conversation: Sequence[Turn],
    media_num_tokens: Sequence[int] = (),
    *,
    template: ChatTemplate = NEMOTRON,
    add_generation_prompt: bool = False,
) -> Sample:
    """Token ids, vision places, kinds and shifted labels of a conversation.

    Args:
        tokenizer: a transformers fast tokenizer.
        conversation: an optional system turn, then user and assistant turns in alternation.
        media_num_tokens: vision tokens of each medium, in order. Each takes one `<media>` marker in the user
            texts; with no marker anywhere all of them come first in the first user turn.
        add_generation_prompt: end with the opening of an assistant turn, for inference.

    Raises:
        ValueError: for turns out of order, or markers and media that differ in number.
    """
    turns = list(conversation)
    system = turns.pop(0).text if turns and turns[0].role == "system" else template.default_system
    _check_turns(turns, add_generation_prompt)
    texts = _place_markers([turn.text if turn.role == "user" else None for turn in turns], len(media_num_tokens))
    writer = _Writer(tokenizer)
    writer.template(template.system[0])
    writer.text(f"{system}{template.after_system_text}" if system else "")
    writer.template(template.system[1])
    media = iter(media_num_tokens)
    for number, (turn, text) in enumerate(zip(turns, texts, strict=True)):
        if text is None:
            writer.template(template.assistant[0])
            writer.text(turn.text, response=True)
            writer.template(template.assistant[1], response=True)
            continue
        writer.template((template.after_answer if number else "") + template.user[0])
        first, *others = text.split(MEDIA_MARKER)
        writer.text(first)
        for piece in others:
            writer.vision(next(media))
            writer.text(piece)
        writer.template(template.user[1])
    if add_generation_prompt:
        writer.template(template.assistant[0])
    return writer.sample()


class _Writer:
    def __init__(self, tokenizer: Any) -> None:
        self._tokenizer = tokenizer
        self._pad_id = int(tokenizer.pad_token_id or 0)
        self._input_ids: list[int] = []
        self._vision_index: list[int] = []
        self._token_kind: list[int] = []
        self._targets: list[int] = []
        self._num_vision = 0

    def template(self, text: str, *, response: bool = False) -> None:
        self._extend(encode_text(self._tokenizer, text, split_special_tokens=False), response)

    def text(self, text: str, *, response: bool = False) -> None:
        # a user who types <SPECIAL_11> gets its letters, not a turn of the assistant
        self._extend(encode_text(self._tokenizer, text, split_special_tokens=True) if text else [], response)

    def vision(self, num_tokens: int) -> None:
        self._input_ids += [self._pad_id] * num_tokens
        self._vision_index += range(self._num_vision, self._num_vision + num_tokens)
        self._token_kind += [int(TokenKind.VISION)] * num_tokens
        self._targets += [IGNORE_INDEX] * num_tokens
        self._num_vision += num_tokens

    def sample(self) -> Sample:
        return Sample(
            input_ids=self._input_ids,
            vision_index=self._vision_index,
            token_kind=self._token_kind,
            labels=[*self._targets[1:], IGNORE_INDEX],
        )

    def _extend(self, ids: Sequence[int], response: bool) -> None:
        question = TokenKind.INSTRUCTION if self._num_vision else TokenKind.SYSTEM
        self._input_ids += ids
        self._vision_index += [-1] * len(ids)
        self._token_kind += [int(TokenKind.RESPONSE if response else question)] * len(ids)
        self._targets += ids if response else [IGNORE_INDEX] * len(ids)


def encode_text(tokenizer: Any, text: str, *, split_special_tokens: bool) -> list[int]:
    """Token ids of a text alone, nothing put before or behind it. Any thread may call it.

    Args:
        tokenizer: of Hugging Face's kind.
        text: not empty.
        split_special_tokens: a special token's name in it is so many letters.
    """
    with _ENCODING:
        return list(tokenizer(text, add_special_tokens=False, split_special_tokens=split_special_tokens)["input_ids"])


def _check_turns(turns: Sequence[Turn], add_generation_prompt: bool) -> None:
    expected = ["user" if number % 2 == 0 else "assistant" for number in range(len(turns))]
    roles = [turn.role for turn in turns]
    if roles != expected:
        raise ValueError(f"turns must alternate user, assistant, ... after an optional system turn, not {roles}")
    if add_generation_prompt and roles and roles[-1] != "user":
        raise ValueError("a prompt for generation must end with a user turn")


def _place_markers(texts: list[str | None], num_media: int) -> list[str | None]:
    num_markers = sum(text.count(MEDIA_MARKER) for text in texts if text is not None)
    if num_markers == 0 and num_media:
        first = next((number for number, text in enumerate(texts) if text is not None), None)
        if first is None:
            raise ValueError(f"{num_media} media but no user turn to hold them")
        texts[first] = MEDIA_MARKER * num_media + (texts[first] or "")
    elif num_markers != num_media:
        raise ValueError(f"{num_markers} {MEDIA_MARKER} markers in the text but {num_media} media")
    return texts

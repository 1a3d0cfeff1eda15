"""Chat templates. Nemotron's prompt with the kind of each part, v = vision token:

<SPECIAL_10>System\\n{system}<SPECIAL_12>\\n<SPECIAL_11>User\\n     system
vvvvvvvv                                                         vision
{question}\\n<SPECIAL_12><SPECIAL_11>Assistant\\n                instruction
{answer}\\n<SPECIAL_12>                                          response
"""

from __future__ import annotations

import json
import re
from collections.abc import Sequence
from dataclasses import asdict, dataclass
from threading import Lock
from typing import Any, Literal

from timeviper_model.batching.batch import IGNORE_INDEX, Sample, TokenKind
from timeviper_model.config import TextConfig, eos_token_ids

_ENCODING = Lock()
"""Prevents concurrent encoding: a tokenizer stores `split_special_tokens` on itself."""

PROMPT_VERSION = 2
"""Increased when the same conversation gives other tokens. 2: text is tokenised with the template around it."""

MEDIA_MARKER = "<media>"
"""Place of a medium in a user's text. Without markers, media come first."""


SPECIAL_TOKEN = re.compile(r"(<[^<>\s]+>)")


@dataclass(frozen=True, kw_only=True, slots=True)
class Turn:
    role: Literal["system", "user", "assistant"]
    text: str


@dataclass(frozen=True, kw_only=True, slots=True)
class ChatTemplate:
    """Text around each turn, with special tokens by name."""

    system: tuple[str, str]
    user: tuple[str, str]
    assistant: tuple[str, str]
    """Opening and end of an answer; the end's last token stops generation."""
    after_system_text: str = ""
    after_answer: str = ""
    default_system: str = ""
    other_ends: tuple[str, ...] = ()
    """Further tokens that stop generation, where the tokenizer has them."""
    directives: tuple[str, ...] = ()
    """Words that are left out of user and system texts."""


NEMOTRON = ChatTemplate(
    system=("<SPECIAL_10>System\n", "<SPECIAL_12>\n"),
    user=("<SPECIAL_11>User\n", "\n<SPECIAL_12>"),
    assistant=("<SPECIAL_11>Assistant\n", "\n<SPECIAL_12>"),
    after_system_text="\n",
    other_ends=("</s>",),
)

CHATML = ChatTemplate(
    system=("<|im_start|>system\n", "<|im_end|>\n"),
    user=("<|im_start|>user\n", "<|im_end|>\n"),
    assistant=("<|im_start|>assistant\n", "<|im_end|>"),
    after_answer="\n",
    default_system="You are Qwen, created by Alibaba Cloud. You are a helpful assistant.",
)

TEMPLATES: dict[str, ChatTemplate] = {"nemotron": NEMOTRON, "chatml": CHATML}


TimeText = Literal["never", "temporal", "always"]
"""Prompts that state how long a video is: none, those about times (as in the paper's data), or all."""


def jinja_template(template: ChatTemplate) -> str:
    """Returns the template for `tokenizer.apply_chat_template`; a medium becomes MEDIA_MARKER."""
    texts = {name: json.dumps(value) for name, value in asdict(template).items() if isinstance(value, str)}
    (system, system_end), (user, user_end), (answer, answer_end) = (
        map(json.dumps, part) for part in (template.system, template.user, template.assistant)
    )
    return "".join(
        [
            "{%- macro text(content) -%}{%- if content is string -%}{{ content }}{%- else -%}",
            "{%- for part in content -%}",
            f"{{%- if part.type == 'text' -%}}{{{{ part.text }}}}{{%- else -%}}{MEDIA_MARKER}{{%- endif -%}}",
            "{%- endfor -%}{%- endif -%}{%- endmacro -%}",
            "{%- if messages and messages[0].role == 'system' -%}",
            "{%- set system = text(messages[0].content) -%}{%- set turns = messages[1:] -%}{%- else -%}",
            f"{{%- set system = {texts['default_system']} -%}}{{%- set turns = messages -%}}{{%- endif -%}}",
            f"{{{{- {system} -}}}}",
            f"{{%- if system -%}}{{{{- system ~ {texts['after_system_text']} -}}}}{{%- endif -%}}",
            f"{{{{- {system_end} -}}}}",
            "{%- for turn in turns -%}{%- if turn.role == 'user' -%}",
            f"{{%- if not loop.first -%}}{{{{- {texts['after_answer']} -}}}}{{%- endif -%}}",
            f"{{{{- {user} ~ text(turn.content) ~ {user_end} -}}}}{{%- else -%}}",
            f"{{{{- {answer} ~ text(turn.content) ~ {answer_end} -}}}}{{%- endif -%}}{{%- endfor -%}}",
            f"{{%- if add_generation_prompt -%}}{{{{- {answer} -}}}}{{%- endif -%}}",
        ]
    )


def time_text(duration_seconds: float, num_frames: int) -> str:
    """Returns the sentence about the length of a video, or of its clip, in the paper's grounding data."""
    return (
        f"The video lasts for {duration_seconds:.2f} seconds, and {num_frames} frames are uniformly sampled from it.\n"
    )


def unused_marker(texts: Sequence[str]) -> str:
    """Returns a marker that no text contains, so that a typed "<media>" stays text."""
    marker, number = MEDIA_MARKER, 0
    while any(marker in text for text in texts):
        number += 1
        marker = f"<media {number}>"
    return marker


def add_time_texts(turns: Sequence[Turn], time_texts: Sequence[str], *, marker: str = MEDIA_MARKER) -> list[Turn]:
    """Puts each medium's sentence ("" = none) directly after its place, and on a line of its own.

    Raises:
        ValueError: for more or fewer markers than media.
    """
    texts = _place_markers([turn.text if turn.role == "user" else None for turn in turns], len(time_texts), marker)
    remaining, result = iter(time_texts), []
    for turn, text in zip(turns, texts, strict=True):
        if text is None:
            result.append(turn)
            continue
        first, *others = text.split(marker)
        for after in others:
            sentence = next(remaining)
            first += marker + sentence + (after.removeprefix("\n") if sentence else after)
        result.append(Turn(role=turn.role, text=first))
    return result


def check_tokenizer(tokenizer: Any, template: ChatTemplate) -> None:
    """Raises ValueError with special tokens that the tokenizer would split."""
    text = "".join((*template.system, *template.user, *template.assistant))
    special = dict.fromkeys(SPECIAL_TOKEN.findall(text))
    unknown = getattr(tokenizer, "unk_token_id", None)
    ids = {name: encode_text(tokenizer, name, split_special_tokens=False) for name in special}
    cut = [name for name, found in ids.items() if len(found) != 1 or found[0] == unknown]
    if cut:
        raise ValueError(
            f"the tokenizer does not know {', '.join(cut)} of the model's chat template; use the tokenizer that came"
            " with the language model, or a model whose chat_template fits this tokenizer"
        )


def end_token_id(tokenizer: Any, template: ChatTemplate) -> int:
    check_tokenizer(tokenizer, template)
    return int(encode_text(tokenizer, template.assistant[1], split_special_tokens=False)[-1])


def end_token_ids(tokenizer: Any, template: ChatTemplate, config: TextConfig) -> frozenset[int]:
    """Returns the tokens that stop generation: the answer's end and those of tokenizer and language model (as in the
    public code)."""
    vocabulary = tokenizer.get_vocab()
    others = [vocabulary[name] for name in template.other_ends if name in vocabulary]
    own = [] if tokenizer.eos_token_id is None else [int(tokenizer.eos_token_id)]
    return eos_token_ids(config).union([end_token_id(tokenizer, template)], own, others)


def build_sample(
    tokenizer: Any,
    conversation: Sequence[Turn],
    media_num_tokens: Sequence[int] = (),
    *,
    template: ChatTemplate = NEMOTRON,
    add_generation_prompt: bool = False,
    marker: str = MEDIA_MARKER,
    answer_prefix: str = "",
) -> Sample:
    """Tokenises a conversation: an optional system turn, then alternating user and assistant turns.

    Args:
        add_generation_prompt: whether to open an assistant turn at the end.
        marker: the place of a medium in a user's text.
        answer_prefix: start of the last answer, such as 'Best Option: (', that the model continues. Part of the prompt.

    Raises:
        ValueError: for turns out of order, or more or fewer markers than media.
    """
    turns = [_without(turn, template.directives) for turn in conversation]
    system = turns.pop(0).text if turns and turns[0].role == "system" else template.default_system
    _check_turns(turns, add_generation_prompt)
    user_texts = [turn.text if turn.role == "user" else None for turn in turns]
    texts = _place_markers(user_texts, len(media_num_tokens), marker)
    writer = _Writer(tokenizer)
    writer.template(template.system[0])
    writer.text(f"{system}{template.after_system_text}" if system else "")
    writer.template(template.system[1])
    media = iter(media_num_tokens)
    for index, (turn, text) in enumerate(zip(turns, texts, strict=True)):
        if text is None:
            writer.template(template.assistant[0])
            writer.text("" if add_generation_prompt or index < len(turns) - 1 else answer_prefix)
            writer.text(turn.text, response=True)
            writer.template(template.assistant[1], response=True)
            continue
        writer.template((template.after_answer if index else "") + template.user[0])
        first, *others = text.split(marker)
        writer.text(first)
        for text_after in others:
            writer.vision(next(media))
            writer.text(text_after)
        writer.template(template.user[1])
    if add_generation_prompt:
        writer.template(template.assistant[0])
        writer.text(answer_prefix)
    return writer.sample()


class _Writer:
    """Tokenises text between special tokens, media and answers in one piece, as the whole string would be."""

    def __init__(self, tokenizer: Any) -> None:
        self._tokenizer = tokenizer
        self._pad_id = int(tokenizer.pad_token_id or 0)
        self._input_ids: list[int] = []
        self._vision_index: list[int] = []
        self._token_kind: list[int] = []
        self._targets: list[int] = []
        self._num_vision = 0
        self._pending = ""
        self._is_response = False

    def template(self, text: str, *, response: bool = False) -> None:
        for index, piece in enumerate(SPECIAL_TOKEN.split(text)):
            if index % 2:
                self._begin(response)
                self._flush()
                self._extend(encode_text(self._tokenizer, piece, split_special_tokens=False))
            else:
                self.text(piece, response=response)

    def text(self, text: str, *, response: bool = False) -> None:
        self._begin(response)
        self._pending += text

    def vision(self, num_tokens: int) -> None:
        self._flush()
        self._input_ids += [self._pad_id] * num_tokens
        self._vision_index += range(self._num_vision, self._num_vision + num_tokens)
        self._token_kind += [int(TokenKind.VISION)] * num_tokens
        self._targets += [IGNORE_INDEX] * num_tokens
        self._num_vision += num_tokens

    def sample(self) -> Sample:
        self._flush()
        return Sample(
            input_ids=self._input_ids,
            vision_index=self._vision_index,
            token_kind=self._token_kind,
            labels=[*self._targets[1:], IGNORE_INDEX],
        )

    def _begin(self, response: bool) -> None:
        """An answer is tokenised separately from its header, which ends the prompt of a generation."""
        if response != self._is_response:
            self._flush()
            self._is_response = response

    def _flush(self) -> None:
        text, self._pending = self._pending, ""
        if text:  # a typed <SPECIAL_11> stays text and cannot open a turn
            self._extend(encode_text(self._tokenizer, text, split_special_tokens=True))

    def _extend(self, ids: Sequence[int]) -> None:
        question = TokenKind.INSTRUCTION if self._num_vision else TokenKind.SYSTEM
        self._input_ids += ids
        self._vision_index += [-1] * len(ids)
        self._token_kind += [int(TokenKind.RESPONSE if self._is_response else question)] * len(ids)
        self._targets += ids if self._is_response else [IGNORE_INDEX] * len(ids)


def encode_text(tokenizer: Any, text: str, *, split_special_tokens: bool) -> list[int]:
    """Encodes non-empty text; `split_special_tokens` makes their names ordinary text."""
    with _ENCODING:
        return list(tokenizer(text, add_special_tokens=False, split_special_tokens=split_special_tokens)["input_ids"])


def _without(turn: Turn, directives: Sequence[str]) -> Turn:
    if turn.role == "assistant" or not any(word in turn.text for word in directives):
        return turn
    text = turn.text
    for word in directives:
        text = text.replace(word, "")
    return Turn(role=turn.role, text=text.strip())


def _check_turns(turns: Sequence[Turn], add_generation_prompt: bool) -> None:
    expected = ["user" if index % 2 == 0 else "assistant" for index in range(len(turns))]
    roles = [turn.role for turn in turns]
    if roles != expected:
        raise ValueError(f"turns must alternate user, assistant, ... after an optional system turn, not {roles}")
    if add_generation_prompt and roles and roles[-1] != "user":
        raise ValueError("a prompt for generation must end with a user turn")


def _place_markers(texts: list[str | None], num_media: int, marker: str) -> list[str | None]:
    num_markers = sum(text.count(marker) for text in texts if text is not None)
    if num_markers == 0 and num_media:
        first = next((index for index, text in enumerate(texts) if text is not None), None)
        if first is None:
            raise ValueError(f"{num_media} media but no user turn to hold them")
        texts[first] = marker * num_media + (texts[first] or "")
    elif num_markers != num_media:
        raise ValueError(f"{num_markers} {marker} markers in the text but {num_media} media")
    return texts

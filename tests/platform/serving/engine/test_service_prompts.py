"""engine service: turns to prompts."""

from __future__ import annotations

from dataclasses import replace

import pytest

from reference.engine_service import (
    TOKENIZER,
    video,
)
from timeviper_model.batching.batch import TokenKind
from timeviper_model.batching.prompt import NEMOTRON, TEMPLATES, time_text
from timeviper_platform.serving.engine.service import build_prompt
from timeviper_platform.serving.messages import (
    ChatTurn,
)


def test_a_turns_media_come_before_its_text() -> None:
    turns = [
        ChatTurn(role="system", text="Be brief."),
        ChatTurn(role="user", text="First?", media=(video(1), video(2))),
        ChatTurn(role="assistant", text="Yes"),
        ChatTurn(role="user", text="Second?"),
    ]
    sample = build_prompt(TOKENIZER, turns, TEMPLATES["nemotron"])
    places = [place for place, row in enumerate(sample.vision_index) if row >= 0]
    assert len(places) == 12
    assert places == list(range(places[0], places[0] + 12))
    assert TOKENIZER.decode(sample.input_ids[places[-1] + 1 :]).startswith("First?\n<SPECIAL_12>")
    assert TOKENIZER.decode(sample.input_ids).endswith("<SPECIAL_11>Assistant\n")


def test_media_stand_where_the_turn_has_them_and_a_typed_marker_is_text() -> None:
    """Before, a text with <media> was refused."""
    typed = "Is <media> or <media 1> a tag?"
    turn = ChatTurn(role="user", text=f"A:B:{typed}", media=(video(1), video(2)), offsets=(2, 4))
    sample = build_prompt(TOKENIZER, [turn], NEMOTRON, with_time_text=True)
    shown = "".join(
        "*" if row >= 0 else TOKENIZER.decode([token])
        for token, row in zip(sample.input_ids, sample.vision_index, strict=True)
    )
    first, second = (f"{'*' * (4 * frames)}{time_text(frames, frames)}" for frames in (1, 2))
    assert f"A:{first}B:{second}{typed}" in shown
    with pytest.raises(ValueError, match="as many offsets"):
        ChatTurn(role="user", text="", media=(video(1),), offsets=())


def test_the_time_text_follows_each_video_when_it_is_on() -> None:
    picture = replace(video(1), modality="image", duration_seconds=0.0)
    turns = [ChatTurn(role="user", text="When?", media=(picture, video(2)))]
    sample = build_prompt(TOKENIZER, turns, NEMOTRON, with_time_text=True)
    text = TOKENIZER.decode([i for i, row in zip(sample.input_ids, sample.vision_index, strict=True) if row < 0])
    assert f"{time_text(2.0, 2)}When?" in text
    assert text.count("The video lasts") == 1


def test_a_prompt_may_open_its_answer() -> None:
    turns = [ChatTurn(role="user", text="Which?", media=(video(1),))]
    sample = build_prompt(TOKENIZER, turns, NEMOTRON, answer_prefix="Best Option: (")
    assert TOKENIZER.decode(sample.input_ids).endswith("<SPECIAL_11>Assistant\nBest Option: (")
    assert TokenKind.RESPONSE not in sample.token_kind

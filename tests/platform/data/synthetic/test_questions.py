from __future__ import annotations

from collections import Counter

import numpy as np

from timeviper_model.batching.prompt import NEMOTRON, Turn, build_sample, end_token_id
from timeviper_platform.data.synthetic.pictures import ALL_PICTURES, Picture
from timeviper_platform.data.synthetic.questions import (
    HOW_OFTEN,
    caption,
    conversations,
    count_question,
    listing,
    order_question,
    scene_questions,
    which_question,
)
from timeviper_platform.data.synthetic.scenes import Scene, draw_scenes
from timeviper_platform.data.synthetic.tokenizer import SPECIAL_TOKENS, train_tokenizer


def _scene(kind: str) -> Scene:
    (scene,) = draw_scenes("train", {kind: 1}, duration_seconds=24, seed=3)  # type: ignore[dict-item]
    return scene


def test_the_right_option_is_at_a_random_index() -> None:
    rng = np.random.default_rng(0)
    questions = [which_question(ALL_PICTURES[n % 32], rng) for n in range(2000)]
    positions = Counter(question.choices.index(question.answer) for question in questions)
    assert set(positions) == {0, 1, 2, 3}
    assert max(positions.values()) < 600


def test_which_options_are_two_colours_times_two_shapes() -> None:
    rng = np.random.default_rng(1)
    for picture in ALL_PICTURES:
        question = which_question(picture, rng)
        words = [choice.split() for choice in question.choices]
        assert Counter(Counter(color for color, _ in words).values()) == {2: 2}
        assert Counter(Counter(shape for _, shape in words).values()) == {2: 2}
        assert question.answer == str(picture)
        assert question.answer in question.choices
        assert question.text.endswith(f"Options: {', '.join(question.choices)}.")


def test_answers_match_the_scene() -> None:
    rng = np.random.default_rng(2)
    needle, order, count = (_scene(kind) for kind in ("needle", "order", "count"))
    only = needle.appearances[0]
    which, grounding, described = scene_questions(needle, rng)
    assert which.answer == str(only.picture)
    assert grounding.answer == f"From {only.start_seconds} to {only.end_seconds} seconds."
    assert (grounding.start_seconds, grounding.end_seconds) == (only.start_seconds, only.end_seconds)
    assert described.answer == caption(needle)
    more = list(scene_questions(needle, rng, num_which=3))
    assert [question.task for question in more] == ["choice"] * 3 + ["grounding", "caption"]
    assert len({question.text for question in more[:3]}) == 3
    first, last, _ = scene_questions(order, rng)
    assert first.answer == str(order.appearances[0].picture)
    assert last.answer == str(order.appearances[-1].picture)
    how_often, described = scene_questions(count, rng)
    assert how_often.answer == HOW_OFTEN[len(count.appearances) - 1]
    assert described.answer == f"A {count.appearances[0].picture} appears {how_often.answer}."


def test_order_and_count_choices_contain_the_answer_once() -> None:
    rng = np.random.default_rng(3)
    shown = list(ALL_PICTURES[4:8])
    order = order_question("last", shown[3], shown, rng)
    assert sorted(order.choices) == sorted(str(picture) for picture in shown)
    assert order.answer == str(shown[3])
    count = count_question(Picture("red", "circle"), 3, rng)
    assert sorted(count.choices) == ["four times", "once", "three times", "twice"]
    assert count.answer == "three times"


def test_a_listing_names_the_picture_of_each_second() -> None:
    scene = _scene("needle")
    only = scene.appearances[0]
    words = listing(scene).replace(str(only.picture), "X").split()
    shown = [second for second, word in enumerate(words) if word == "X"]
    assert len(words) == 24
    assert shown == list(range(only.start_seconds, only.end_seconds))


def test_the_tokenizer_round_trips_any_text_and_has_the_special_ids_of_nemotron() -> None:
    texts = [f"Which picture appears in the video? Options: {picture}" for picture in ALL_PICTURES] * 3
    tokenizer = train_tokenizer(texts, 320)
    for text in (*texts[:3], "Größe 12.5 °C\n\t日本 🙂  two  spaces", "<SPECIAL_11>User"):
        ids = tokenizer(text, add_special_tokens=False, split_special_tokens=True)["input_ids"]
        assert tokenizer.decode(ids) == text
        assert max(ids) < 320
    assert [tokenizer.convert_tokens_to_ids(f"<SPECIAL_{n}>") for n in (10, 11, 12)] == [10, 11, 12]
    assert (tokenizer.pad_token_id, tokenizer.bos_token_id, tokenizer.eos_token_id) == (0, 1, 12)
    assert len(SPECIAL_TOKENS) == 13


def test_a_prompt_ends_with_the_end_token() -> None:
    tokenizer = train_tokenizer(["Which picture appears?", "red circle"], 280)
    sample = build_sample(tokenizer, [Turn(role="user", text="Which?"), Turn(role="assistant", text="red")], [4])
    assert end_token_id(tokenizer, NEMOTRON) == 12
    assert sample.input_ids[-1] == 12
    assert sample.input_ids.count(10) == 1


def test_conversations_ask_every_question_and_none_after_its_answer() -> None:
    def tasks(kind: str, num_which: int) -> set[str]:
        """Of conversations with any seed: tasks joined by '>', conversations by ' '."""
        scene = _scene(kind)
        drawn = (conversations(scene, np.random.default_rng(seed), num_which=num_which) for seed in range(8))
        return {" ".join(">".join(question.task for question in turns) for turns in rows) for rows in drawn}

    assert tasks("needle", 0) == {"grounding caption", "caption grounding"}
    assert tasks("needle", 1) == {"choice>grounding caption", "choice>caption grounding"}
    assert tasks("needle", 2) == {"choice choice>grounding caption", "choice choice>caption grounding"}
    assert tasks("order", 1) == {"order>order caption"}
    assert tasks("count", 1) == {"count caption"}


def test_either_order_question_begins_some_conversations() -> None:
    scene = _scene("order")
    firsts = {conversations(scene, np.random.default_rng(seed))[0][0].answer for seed in range(8)}
    assert firsts == {str(scene.appearances[0].picture), str(scene.appearances[-1].picture)}

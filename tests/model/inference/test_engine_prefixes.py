"""engine: the video-prefix cache changes no answer."""

from __future__ import annotations

from dataclasses import replace

import pytest
import torch

from reference.engine_requests import (
    TOKENIZER,
    answers,
    ask,
    ids_of,
    vision,
)
from reference.tiny_serving import CONFIG_WITH_TRANSV, random_model
from timeviper_model.batching.prompt import Turn, build_sample
from timeviper_model.config import TransVSite
from timeviper_model.inference.memory import prefix_entry_bytes
from timeviper_model.inference.prefill import prefix_length
from timeviper_model.timeviper import TimeViper

BY_IMPORTANCE = (TransVSite(layer=CONFIG_WITH_TRANSV.transv[-1].layer, select="importance", keep=0.5, transfer="none"),)


@pytest.fixture(scope="module")
def model() -> TimeViper:
    return random_model()


@pytest.mark.parametrize("plan", [CONFIG_WITH_TRANSV.transv, CONFIG_WITH_TRANSV.transv[:1], BY_IMPORTANCE, ()])
def test_answers_are_the_same_from_host_memory(plan: tuple[TransVSite, ...]) -> None:
    """Three films in turn, with room for one on the device: before, each question read its film again."""
    model = random_model(replace(CONFIG_WITH_TRANSV, transv=plan))
    films = ["one", "two", "three"]
    requests = [ask(text, 60, prefix_key=film, max_new_tokens=6) for text in ("What?", "When?") for film in films]
    num_system = prefix_length(torch.tensor(requests[0].prompt.token_kind)) - 60
    entry_bytes = prefix_entry_bytes(model.config, num_system, 60, dtype=torch.float64)
    limits = {"num_slots": 1, "max_prefill_tokens": 24}
    plain, _, _ = answers(model, requests, **limits)
    tiers = {"prefix_cache_bytes": entry_bytes, "prefix_host_bytes": 2 * entry_bytes}
    kept, cached, stats = answers(model, requests, **limits, **tiers)
    assert [ids_of(answer) for answer in kept] == [ids_of(answer) for answer in plain]
    assert [answer[0].logprob for answer in kept] == [answer[0].logprob for answer in plain]  # to the last bit
    assert cached == [0] * 3 + [num_system + 60] * 3
    assert (stats.prefix_hits, stats.prefix_host_hits, stats.prefix_misses) == (3, 3, 3)
    assert (stats.prefix_entries, stats.prefix_bytes) == (1, entry_bytes)
    assert (stats.prefix_host_entries, stats.prefix_host_bytes) == (2, 2 * entry_bytes)


@pytest.mark.parametrize("plan", [CONFIG_WITH_TRANSV.transv, CONFIG_WITH_TRANSV.transv[:1], ()])
def test_answers_are_the_same_with_the_prefix_cache_and_without(plan: tuple[TransVSite, ...]) -> None:
    model = random_model(replace(CONFIG_WITH_TRANSV, transv=plan))
    questions = ["What?", "Which picture appears?", "When?"]
    options = {"prefix_key": "film", "max_new_tokens": 8}
    requests = [ask(question, 60, **options) for question in questions]
    limits = {"num_slots": 3, "max_prefill_tokens": 24}
    plain, none_cached, _ = answers(model, requests, **limits)
    kept, cached, stats = answers(model, requests, **limits, prefix_cache_bytes=2**30)
    assert [ids_of(answer) for answer in kept] == [ids_of(answer) for answer in plain]
    assert [answer[0].logprob for answer in kept] == [answer[0].logprob for answer in plain]  # to the last bit
    assert len({token.id for answer in plain for token in answer}) > 3
    prefix_tokens = prefix_length(torch.tensor(requests[0].prompt.token_kind))
    assert none_cached == [0, 0, 0]
    assert cached == [0, prefix_tokens, prefix_tokens]
    assert (stats.prefix_hits, stats.prefix_misses, stats.prefix_entries) == (2, 1, 1)
    expected_bytes = prefix_entry_bytes(model.config, prefix_tokens - 60, 60, dtype=torch.float64)
    assert stats.prefix_bytes == expected_bytes
    assert stats.prompt_tokens == sum(len(r.prompt) for r in requests) - 2 * prefix_tokens


@pytest.mark.parametrize("plan", [CONFIG_WITH_TRANSV.transv, CONFIG_WITH_TRANSV.transv[:1], ()])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_an_answer_from_the_cache_equals_one_without_to_the_last_bit(
    dtype: torch.dtype, plan: tuple[TransVSite, ...]
) -> None:
    model = random_model(replace(CONFIG_WITH_TRANSV, transv=plan), dtype=dtype)
    requests = [ask(question, 60, prefix_key="film", max_new_tokens=8) for question in ("What?", "When?", "What?")]
    limits = {"num_slots": 1, "max_prefill_tokens": 24}  # equal batches: others change the rounding
    plain, _, _ = answers(model, requests, **limits)
    kept, cached, _ = answers(model, requests, **limits, prefix_cache_bytes=2**30)
    assert cached[0] == 0 < cached[1] == cached[2]
    pairs = [[[(token.id, token.logprob) for token in answer] for answer in found] for found in (kept, plain)]
    assert pairs[0] == pairs[1]


def test_one_key_never_serves_another_number_of_tokens_or_system_text(model: TimeViper) -> None:
    other_system = build_sample(
        TOKENIZER,
        [Turn(role="system", text="Be brief."), Turn(role="user", text="What?")],
        [24],
        add_generation_prompt=True,
    )
    requests = [
        ask(num_vision=24, prefix_key="film", max_new_tokens=4),
        ask(num_vision=25, prefix_key="film", max_new_tokens=4),
        ask(prompt=other_system, vision_features=vision(24), prefix_key="film", max_new_tokens=4),
    ]
    expected, _, _ = answers(model, requests)
    found, cached, stats = answers(model, requests, prefix_cache_bytes=2**30)
    assert [ids_of(answer) for answer in found] == [ids_of(answer) for answer in expected]
    assert cached == [0, 0, 0]
    assert stats.prefix_misses == 3


def test_a_prompt_with_text_between_its_media_keeps_no_prefix(model: TimeViper) -> None:
    conversation = [Turn(role="user", text="<media>one<media>two")]
    sample = build_sample(TOKENIZER, conversation, [8, 8], add_generation_prompt=True)
    request = ask(prompt=sample, vision_features=vision(16), prefix_key="two", max_new_tokens=3)
    _, cached, stats = answers(model, [request, request], prefix_cache_bytes=2**30)
    assert cached == [0, 0]
    assert (stats.prefix_hits, stats.prefix_misses, stats.prefix_bytes) == (0, 0, 0)

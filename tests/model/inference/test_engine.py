"""engine: requests served together get the answers they get alone."""

from __future__ import annotations

from collections.abc import Iterable
from typing import Any

import pytest
import torch

from reference.engine_requests import (
    TOKENIZER,
    ask,
    engine_of,
    ids_of,
    run,
    text_of,
    vision,
)
from reference.tiny_serving import CONFIG_WITH_TRANSV, generate_alone, prompt, random_model
from timeviper_model.inference.answer import SamplingParams
from timeviper_model.inference.engine import InferenceEngine
from timeviper_model.inference.requests import EngineConfig, Event, Finished, QueueFull
from timeviper_model.timeviper import TimeViper

QUESTIONS = [("What?", 0), ("Which picture appears?", 24), ("When?", 9), ("How often does it appear?", 40), ("Why", 3)]


@pytest.fixture(scope="module")
def model() -> TimeViper:
    return random_model()


@pytest.mark.parametrize("dtype", [torch.float64, torch.float32])
def test_batched_greedy_tokens_equal_one_by_one(dtype: torch.dtype) -> None:
    model = random_model(dtype=dtype)
    engine = engine_of(model, num_slots=3)
    ids = [engine.submit(ask(q, n, max_new_tokens=12 + n % 5)) for q, n in QUESTIONS]
    events = run(engine)
    for request_id, (question, num_vision) in zip(ids, QUESTIONS, strict=True):
        expected = generate_alone(
            model,
            prompt(TOKENIZER, question, num_vision),
            vision(num_vision).to(dtype),
            num_tokens=12 + num_vision % 5,
            end_ids=engine.end_token_ids,
        )
        assert ids_of(events[request_id]) == expected
        assert len(set(expected)) > 2  # a constant answer would prove nothing


@pytest.mark.parametrize("dtype", [torch.float64, torch.float32])
def test_sampled_tokens_depend_on_the_seed_and_not_on_the_neighbours(dtype: torch.dtype) -> None:
    model = random_model(dtype=dtype)
    sampling = SamplingParams(temperature=1.0, top_p=0.95)

    def tokens(seeds: list[int], num_slots: int) -> dict[int, list[int]]:
        engine = engine_of(model, num_slots=num_slots)
        ids = {seed: engine.submit(ask(sampling=sampling, seed=seed, max_new_tokens=10)) for seed in seeds}
        events = run(engine)
        return {seed: ids_of(events[request_id]) for seed, request_id in ids.items()}

    together = tokens([1, 2, 3, 4], num_slots=4)
    assert tokens([3], num_slots=1)[3] == together[3]
    assert tokens([4, 2], num_slots=2) == {4: together[4], 2: together[2]}
    assert len({tuple(t) for t in together.values()}) > 1


@pytest.mark.parametrize(
    ("prompts_a_step", "expected"),
    [
        (1, [[2, 0, 0], [1, 2, 0], [1, 1, 2]]),
        (2.5, [[2, 2, 0], [1, 1, 2], [1, 1, 1]]),
        (3, [[2, 2, 2], [1] * 3, [1] * 3]),
    ],
)
def test_a_step_prefills_the_prompts_that_fit_while_others_decode(
    prompts_a_step: float, expected: list[list[int]], model: TimeViper
) -> None:
    max_tokens = int(prompts_a_step * len(ask(num_vision=0).prompt))
    engine = engine_of(model, num_slots=3, max_prefill_tokens=max_tokens)
    ids = [engine.submit(ask(num_vision=0, max_new_tokens=6)) for _ in range(3)]
    per_step = [[len([e for e in step if e.request_id == i]) for i in ids] for step in (engine.step() for _ in "123")]
    # a prompt's first token and its first decoded one come in the same step
    assert per_step == expected


def test_a_waiting_request_takes_the_slot_that_becomes_free(model: TimeViper) -> None:
    engine = engine_of(model, num_slots=1)
    short, long = engine.submit(ask(max_new_tokens=1)), engine.submit(ask(max_new_tokens=3))
    assert engine.stats().queued_requests == 2
    engine.step()
    assert (engine.stats().active_slots, engine.stats().queued_requests) == (0, 1)
    events = run(engine)
    assert short not in events
    assert len(ids_of(events[long])) == 3


def test_answers_are_counted_once_their_first_token_is_there(model: TimeViper) -> None:
    engine = engine_of(model, num_slots=1)
    for _ in range(2):
        engine.submit(ask(max_new_tokens=3))
    engine.step()
    assert engine.stats().answers == 1
    run(engine)
    assert (engine.stats().answers, engine.stats().completion_tokens) == (2, 6)


def test_a_full_queue_refuses_further_requests(model: TimeViper) -> None:
    engine = engine_of(model, num_slots=2, max_queued_requests=1)
    for _ in range(3):
        engine.submit(ask())
    with pytest.raises(QueueFull, match="limits 2 and 1"):
        engine.submit(ask())
    engine.step()
    with pytest.raises(QueueFull):  # one runs, two wait: still three
        engine.submit(ask())


def test_a_cancelled_request_frees_its_slot_at_once(model: TimeViper) -> None:
    engine = engine_of(model, num_slots=1)
    running, waiting, next_one = (engine.submit(ask(max_new_tokens=50)) for _ in range(3))
    engine.step()
    assert engine.cancel(running)
    assert engine.cancel(waiting)
    assert not engine.cancel(running)
    assert engine.stats().active_slots == 0
    events = engine.step()
    assert {e.request_id: e.reason for e in events if isinstance(e, Finished)} == {
        running: "cancelled",
        waiting: "cancelled",
    }
    assert ids_of(e for e in events if e.request_id == next_one)


def test_memory_of_keys_and_values_is_freed_after_the_last_request(model: TimeViper) -> None:
    engine = engine_of(model, num_slots=2, kept_cache_bytes=0)
    empty = engine.stats().cache_bytes
    engine.submit(ask(num_vision=40, max_new_tokens=4))
    engine.step()
    assert engine.stats().cache_bytes > empty
    run(engine)
    assert engine.stats().cache_bytes == empty


def test_a_stream_keeps_the_events_of_other_requests(model: TimeViper) -> None:
    engine = engine_of(model, num_slots=2)
    first, second = engine.submit(ask("a", max_new_tokens=9)), engine.submit(ask("b", max_new_tokens=4))
    streamed = {first: list(engine.stream(first)), second: list(engine.stream(second))}
    assert [len(ids_of(events)) for events in streamed.values()] == [9, 4]
    assert all(isinstance(events[-1], Finished) for events in streamed.values())
    assert list(engine.stream(first)) == []
    assert not engine.has_work


def test_an_answer_ends_at_the_end_token_without_its_text(model: TimeViper) -> None:
    end = next(iter(engine_of(model).end_token_ids))
    script = [*TOKENIZER("Yes\n")["input_ids"], end]
    events = run_script(script)
    assert text_of(events) == "Yes"
    assert ids_of(events) == script
    assert isinstance(events[-1], Finished)
    assert (events[-1].reason, events[-1].usage.completion_tokens) == ("stop", 5)


def test_an_answer_ends_at_stop_texts_and_stop_ids() -> None:
    script = TOKENIZER("one two three")["input_ids"]
    assert text_of(run_script(script, stop=("wo t",))) == "one t"
    assert text_of(run_script(script, stop=("w", "ne"))) == "o"
    assert text_of(run_script(script, stop=(TOKENIZER("h")["input_ids"][0],))) == "one two t"
    finished = run_script(script, stop=(" ",))[-1]
    assert isinstance(finished, Finished)
    assert finished.reason == "stop"


def test_an_answer_cut_by_length_keeps_the_start_of_a_stop_string() -> None:
    events = run_script(TOKENIZER("one two")["input_ids"], stop=("two!",))
    assert text_of(events) == "one two"
    assert isinstance(events[-1], Finished)
    assert events[-1].reason == "length"


class Scripted(TimeViper):
    """Writes a given answer: the logits of decode step k favour `script[k]`."""

    script: list[int]
    index: int = 0

    def logits(self, hidden_KD: torch.Tensor) -> torch.Tensor:
        logits = torch.zeros(1, self.config.text.vocab_size)
        logits[0, self.script[self.index]] = 10.0
        self.index += 1
        return logits


def run_script(script: list[int], **values: Any) -> list[Event]:
    model = Scripted(CONFIG_WITH_TRANSV)
    model.init_weights(torch.Generator().manual_seed(0))
    model.script = script
    engine = InferenceEngine(model.eval(), EngineConfig(num_slots=1), tokenizer=TOKENIZER)
    request_id = engine.submit(ask(max_new_tokens=len(script), **values))
    return list(engine.stream(request_id))


def test_usage_counts_vision_before_and_after_transv(model: TimeViper) -> None:
    engine = engine_of(model)
    events = list(engine.stream(engine.submit(ask(num_vision=41, max_new_tokens=2))))
    assert isinstance(events[-1], Finished)
    usage = events[-1].usage
    # keep 0.5 then 0.25 of 41, rounded half up: 21 and 10
    assert (usage.vision_tokens, usage.vision_tokens_kept, usage.cached_tokens) == (41, 10, 0)
    assert usage.prompt_tokens == len(prompt(TOKENIZER, "What?", 41))
    stats = engine.stats()
    assert (stats.prompt_tokens, stats.completion_tokens, stats.prefix_hits) == (usage.prompt_tokens, 2, 0)


def test_features_may_come_block_by_block_when_the_request_has_a_slot(model: TimeViper) -> None:
    calls = []

    def blocks() -> Iterable[torch.Tensor]:
        calls.append(1)
        return vision(24).split(10)

    engine = engine_of(model)
    whole = ids_of(list(engine.stream(engine.submit(ask(num_vision=24, max_new_tokens=5)))))
    request = ask(num_vision=24, vision_features=blocks, max_new_tokens=5)
    assert calls == []
    assert ids_of(list(engine.stream(engine.submit(request)))) == whole
    assert calls == [1]


def test_running_answers_wait_for_one_bounded_chunk_of_another_prompt(model: TimeViper) -> None:
    engine = engine_of(model, num_slots=2, max_prefill_tokens=16)
    short, long = engine.submit(ask("a", 0, max_new_tokens=8)), engine.submit(ask(num_vision=600, max_new_tokens=2))
    sizes: list[int] = []
    block = model.backbone.block(0)
    handle = block.register_forward_hook(lambda module, args, output: sizes.append(len(args[0])))
    steps = [engine.step() for _ in range(25)]
    handle.remove()
    assert max(sizes) == 16
    assert {event.request_id for events in steps for event in events} == {short}  # the other prompt is still in prefill
    tokens = [len(ids_of(events)) for events in steps]
    begun = tokens.index(2)
    assert tokens[begun : begun + 7] == [2, 1, 1, 1, 1, 1, 1]
    assert engine.cancel(long)


def test_a_short_prompt_does_not_wait_for_a_long_one(model: TimeViper) -> None:
    engine = engine_of(model, num_slots=2, max_prefill_tokens=64)
    long, short = engine.submit(ask(num_vision=2000, max_new_tokens=1)), engine.submit(ask("a", 0, max_new_tokens=1))
    finished = [event.request_id for _ in range(5) for event in engine.step() if isinstance(event, Finished)]
    assert finished == [short]
    assert engine.cancel(long)


def test_cancelling_during_prefill_frees_the_slot(model: TimeViper) -> None:
    engine = engine_of(model, num_slots=1, max_prefill_tokens=16, prefix_cache_bytes=2**30, kept_cache_bytes=0)
    empty = engine.stats().cache_bytes
    first = engine.submit(ask(num_vision=200, prefix_key="film"))
    second = engine.submit(ask(num_vision=200, prefix_key="film", max_new_tokens=3))
    engine.step()
    engine.step()
    assert engine.stats().active_slots == 1
    assert engine.cancel(first)
    assert (engine.stats().active_slots, engine.stats().cache_bytes) == (0, empty)
    events = run(engine)
    assert len(ids_of(events[second])) == 3
    assert engine.stats().prefix_misses == 2  # the second computes the unfinished prefix


def test_late_features_delay_no_other_request(model: TimeViper) -> None:
    engine = engine_of(model, num_slots=2)
    is_there = False

    def blocks() -> Iterable[torch.Tensor]:
        while not is_there:
            yield vision(0)
        yield vision(24)

    late = engine.submit(ask(num_vision=24, vision_features=blocks, max_new_tokens=2))
    other = engine.submit(ask(max_new_tokens=4))
    steps = [engine.step() for _ in range(6)]
    assert [len(ids_of(events)) for events in steps] == [2, 1, 1, 0, 0, 0]
    assert {event.request_id for events in steps for event in events} == {other}
    is_there = True
    assert len(ids_of(run(engine)[late])) == 2

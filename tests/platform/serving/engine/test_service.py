"""engine service: conversations through a tiny engine, without Ray."""

from __future__ import annotations

import asyncio
import json
import tempfile
from collections.abc import AsyncGenerator
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch

from reference.counted_files import LOG_VARIABLE, reads
from reference.engine_service import (
    DIM,
    TOKENIZER,
    bits,
    collect,
    read,
    refusal_of,
    request,
    run,
    streamed,
    text_of,
    usages,
    video,
)
from reference.tiny_serving import generate_alone, prompt
from timeviper_model.inference.engine import InferenceEngine
from timeviper_model.inference.requests import EngineConfig
from timeviper_model.weights.weights_folder import from_pretrained
from timeviper_platform.serving.answer_schemas import segments_schema
from timeviper_platform.serving.engine import service as service_module
from timeviper_platform.serving.engine.service import EngineService, EngineServiceConfig, coalesce_seconds
from timeviper_platform.serving.messages import (
    AnswerDelta,
    ChatTurn,
    Refusal,
)


def test_answers_of_many_callers_equal_plain_generation(weights: Path) -> None:
    sizes = [0, 3, 6, 2]

    async def scenario(service: EngineService) -> list[str]:
        submitted = [request(f"Question {size}", media=(video(size),) if size else ()) for size in sizes]
        return [text_of(items) for items in await asyncio.gather(*(collect(service, one) for one in submitted))]

    answers = run(weights, scenario, engine=EngineConfig(num_slots=2))
    model = from_pretrained(weights)
    end_ids = frozenset({TOKENIZER.convert_tokens_to_ids("<SPECIAL_12>")})
    for size, answer in zip(sizes, answers, strict=True):
        rows = torch.from_numpy(bits(size)).view(torch.bfloat16).flatten(0, 1).float() if size else torch.zeros(0, DIM)
        sample = prompt(TOKENIZER, f"Question {size}", size * 4)
        ids = generate_alone(model, sample, rows, num_tokens=8, end_ids=end_ids)
        expected = TOKENIZER.decode([i for i in ids if i not in end_ids], skip_special_tokens=True)
        assert answer == expected


def test_weights_may_be_remote(weights: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv(LOG_VARIABLE, str(tmp_path / "log"))
    monkeypatch.setattr(tempfile, "tempdir", str(tmp_path))

    async def scenario(service: EngineService) -> str:
        return text_of(await collect(service, request()))

    assert run(f"counted://{weights}", scenario) == run(weights, scenario)
    assert [path.endswith(".safetensors") for path, _ in reads(tmp_path / "log")].count(True) == 1


def test_an_engine_that_could_not_fit_once_full_is_refused_before_its_weights_are_read(
    weights: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Before, it ran out of memory under load."""
    monkeypatch.setenv(LOG_VARIABLE, str(tmp_path / "log"))
    monkeypatch.setattr(tempfile, "tempdir", str(tmp_path))
    monkeypatch.setattr(service_module, "free_bytes", lambda device: 100_000_000)

    async def scenario(service: EngineService) -> None:
        """Not reached."""

    engine = EngineConfig(num_slots=512, max_prompt_tokens=100_000)
    with pytest.raises(ValueError, match=r"full engine takes \d+\.\d+ GB \(weights 0\.\d+, .* 0.10 GB free; lower"):
        run(f"counted://{weights}", scenario, engine=engine)
    assert [Path(path).name for path, _ in reads(tmp_path / "log")] == ["config.json"]


def test_deltas_have_index_reason_usage_and_log_probabilities(weights: Path) -> None:
    submitted = request(media=(video(6),), n=2, temperature=1.0, seed=5, num_logprobs=2)
    items = run(weights, lambda service: collect(service, submitted))
    last = {item.index: item for item in items if isinstance(item, AnswerDelta) and item.finish_reason}
    assert set(last) == {0, 1}
    assert last[0].usage is not None
    assert (last[0].usage.vision_tokens, last[0].usage.vision_tokens_kept) == (24, 6)
    logprobs = [entry for item in items if isinstance(item, AnswerDelta) and item.index == 0 for entry in item.logprobs]
    assert len(logprobs) == last[0].usage.completion_tokens
    assert all(len(entry.top) == 2 for entry in logprobs)
    alone = run(
        weights, lambda service: collect(service, replace(submitted, n=1, sampling=replace(submitted.sampling, seed=6)))
    )
    assert text_of(alone) == text_of(items, index=1)


def test_a_second_question_prefills_only_its_own_text_and_gets_the_same_answer(weights: Path) -> None:
    questions = [request(text, media=(video(),)) for text in ("What?", "When is it?")]
    follow_up = replace(
        questions[0],
        turns=(*questions[0].turns, ChatTurn(role="assistant", text="A"), ChatTurn(role="user", text="Why?")),
    )
    submitted = [*questions, follow_up]

    async def scenario(service: EngineService) -> list[list[AnswerDelta | Refusal]]:
        return [await collect(service, one) for one in submitted]

    engine = EngineConfig(prefix_cache_bytes=2**24)
    cached, plain = run(weights, scenario, engine=engine), run(weights, scenario)
    assert [text_of(items) for items in cached] == [text_of(items) for items in plain]
    assert [usages(items)[0][1] for items in plain] == [0, 0, 0]
    prefix = usages(cached[1])[0][1]
    assert prefix > 24  # six frames of four tokens, and the system tokens
    assert [usages(items)[0][1] for items in cached] == [0, prefix, prefix]


def test_no_prefix_is_shared_across_tenants_videos_or_system_texts(weights: Path) -> None:
    first = request(media=(video(),))
    system = (ChatTurn(role="system", text="Be brief."), *first.turns)
    other_video = replace(video(), key="other")
    others = [replace(first, tenant="b"), request(media=(other_video,)), replace(first, turns=system)]

    async def scenario(service: EngineService) -> list[int]:
        return [usages(await collect(service, one))[0][1] for one in [first, *others, first]]

    *misses, hit = run(weights, scenario, engine=EngineConfig(prefix_cache_bytes=2**24))
    assert misses == [0, 0, 0, 0]
    assert hit > 24


def test_many_first_questions_at_once_compute_a_prefix_once(weights: Path) -> None:
    async def scenario(service: EngineService) -> tuple[int, int, list[str]]:
        submitted = [request(f"Question {number}", media=(video(),)) for number in range(4)]
        answers = await asyncio.gather(*(collect(service, one) for one in [*submitted, replace(submitted[0], n=2)]))
        stats = await service.stats()
        return stats.prefix_misses, stats.prefix_hits, [text_of(answers[0]), *map(text_of, (answers[-1],))]

    misses, hits, same = run(weights, scenario, engine=EngineConfig(prefix_cache_bytes=2**24))
    assert (misses, hits) == (1, 5)
    assert same[0] == same[1]


def test_the_first_token_is_sent_at_once_and_the_rest_is_gathered(weights: Path) -> None:
    submitted = request(max_new_tokens=64, temperature=1.0, num_logprobs=0)
    items = run(weights, lambda service: collect(service, submitted), coalesce_ms=100.0)
    sizes = [len(item.logprobs) for item in items if isinstance(item, AnswerDelta)]
    assert sizes[0] <= 3
    assert len(sizes) < sum(sizes) / 2


def test_the_end_of_an_answer_waits_for_no_more_tokens(weights: Path) -> None:
    """Before, it waited for `coalesce_ms` after the delta before it."""
    items = run(weights, lambda service: collect(service, request(max_new_tokens=8)), coalesce_ms=600_000.0)
    assert isinstance(items[-1], AnswerDelta)
    assert items[-1].finish_reason is not None
    assert len(items) <= 2


def test_many_streams_send_fewer_deltas_each() -> None:
    """Before, 16 streams had a quarter of the engine's tokens a second: their deltas took the processors."""
    assert [coalesce_seconds(30.0, streams) for streams in (1, 3, 16, 32)] == [0.03, 0.03, 0.16, 0.25]
    assert coalesce_seconds(500.0, 32) == 0.5
    assert coalesce_seconds(0.0, 32) == 0.0


def test_every_answers_first_token_is_observed_with_the_time_spent_waiting(weights: Path) -> None:
    async def late() -> AsyncGenerator[Any]:
        yield bits(6)[:2]
        await asyncio.sleep(0.2)
        yield bits(6)[2:]

    async def scenario(service: EngineService) -> list[float]:
        seconds: list[float] = []
        service._on_first_token = seconds.append
        await collect(service, request(media=(streamed(late),), n=2))
        await collect(service, request())
        return seconds

    first, second, third = run(weights, scenario)
    assert min(first, second) >= 0.2
    assert third > 0


def test_a_caller_that_disconnects_frees_its_slots(weights: Path) -> None:
    async def scenario(service: EngineService) -> tuple[int, int]:
        items = service.generate(request(max_new_tokens=1000, temperature=1.0, n=3))
        await anext(items)
        before = (await service.stats()).active_slots
        await items.aclose()
        return before, (await service.stats()).active_slots

    before, after = run(weights, scenario)
    assert before > 0
    assert after == 0


def test_beyond_slots_and_queue_callers_get_429(weights: Path) -> None:
    async def scenario(service: EngineService) -> tuple[list[Any], list[Any]]:
        busy = service.generate(request(max_new_tokens=500, temperature=1.0, n=2))
        await anext(busy)
        refused = await collect(service, request())
        await busy.aclose()
        return refused, await collect(service, request())

    refused, served = run(weights, scenario, engine=EngineConfig(num_slots=1, max_queued_requests=1))
    refusal = refusal_of(refused)
    assert (refusal.status, refusal.retry_after_s) == (429, 1.0)
    assert text_of(served)


def test_another_queue_counts_for_the_next_caller(weights: Path) -> None:
    limits = EngineConfig(num_slots=1, max_queued_requests=0)

    async def scenario(service: EngineService) -> list[list[Any]]:
        busy = service.generate(request(max_new_tokens=500, temperature=1.0))
        await anext(busy)
        answers = [await collect(service, request())]
        service.set_limits(EngineServiceConfig(engine=replace(limits, max_queued_requests=1)))
        waiting = asyncio.create_task(collect(service, request()))
        await asyncio.sleep(0.1)
        answers.append(await collect(service, request()))
        await busy.aclose()
        return [*answers, await waiting]

    refused, also_refused, served = run(weights, scenario, engine=limits)
    assert [refusal_of(items).status for items in (refused, also_refused)] == [429, 429]
    assert text_of(served)


def test_impossible_requests_are_refused(weights: Path) -> None:
    lost, unreadable = replace(video(), ref=None), replace(video(), ref="no array")

    async def scenario(service: EngineService) -> list[Refusal]:
        two_users = (ChatTurn(role="user", text="a"), ChatTurn(role="user", text="b"))
        submitted = [
            request("x" * 200),
            request(turns=two_users),
            request(media=(lost,)),
            request(media=(unreadable,)),
        ]
        return [refusal_of(await collect(service, one)) for one in submitted]

    refusals = run(weights, scenario, engine=EngineConfig(max_prompt_tokens=100))
    assert [(refusal.status, refusal.code) for refusal in refusals] == [
        (400, "context_length_exceeded"),
        (400, "invalid_value"),
        (503, "features_lost"),
        (500, "internal_error"),
    ]


def test_a_failed_engine_refuses_every_request_and_is_unhealthy(weights: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    async def scenario(service: EngineService) -> tuple[Any, Any, bool]:
        items = service.generate(request(max_new_tokens=1000, temperature=1.0))
        await anext(items)
        monkeypatch.setattr(InferenceEngine, "step", lambda engine: 1 / 0)
        *_, broken = [item async for item in items]
        later = refusal_of(await collect(service, request()))
        with pytest.raises(RuntimeError, match="ZeroDivisionError"):
            service.check_health()
        return broken, later, await service.is_ready()

    broken, later, is_ready = run(weights, scenario)
    assert isinstance(broken, Refusal)
    assert (broken.status, later.status, is_ready) == (503, 503, False)


def test_unusable_kernels_stop_the_replica_with_a_reason(weights: Path) -> None:
    with pytest.raises(RuntimeError, match=r"backend = kernels cannot be used .*need CUDA, not cpu"):
        EngineService(str(weights), EngineServiceConfig(backend="kernels"), read)


def test_time_spans_follow_the_built_in_schema_within_the_video(weights: Path) -> None:
    media = (video(6),)
    asked = request(
        "When?", media=media, json_schema=segments_schema(media), max_new_tokens=400, temperature=1.0, seed=1
    )
    beside = request("What?", media=media)

    async def scenario(service: EngineService) -> list[str]:
        answers = await asyncio.gather(*(collect(service, one) for one in (asked, beside)))
        return [text_of(items) for items in [*answers, await collect(service, beside)]]

    spans, plain, plain_alone = run(weights, scenario, engine=EngineConfig(num_slots=2))
    assert plain == plain_alone
    whole = spans[: spans.rindex("}, {")] + "}]}"  # random weights are cut before they end
    (segments,) = json.loads(whole).values()
    assert segments
    for segment in segments:
        assert set(segment) - {"label"} == {"start_seconds", "end_seconds"}
        assert 0 <= segment["start_seconds"] <= 6.0
        assert 0 <= segment["end_seconds"] <= 6.0


def test_a_schema_that_is_not_supported_is_the_clients_mistake(weights: Path) -> None:
    asked = request(json_schema='{"type": "array", "uniqueItems": true}')
    refusal = refusal_of(run(weights, lambda service: collect(service, asked)))
    assert (refusal.status, refusal.code, refusal.param) == (400, "invalid_schema", "response_format")
    assert "uniqueItems" in refusal.message

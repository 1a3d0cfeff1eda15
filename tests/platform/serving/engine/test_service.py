"""engine service: conversations through a tiny engine, without Ray."""

from __future__ import annotations

import asyncio
import json
import tempfile
from collections.abc import AsyncGenerator, Awaitable, Callable, Iterator
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

from reference.counted_files import LOG_VARIABLE, reads
from reference.tiny_serving import CONFIG_WITH_TRANSV, byte_tokenizer, generate_alone, prompt, random_model
from timeviper_model.batching.batch import TokenKind
from timeviper_model.batching.prompt import NEMOTRON, TEMPLATES, time_text
from timeviper_model.inference.answer import SamplingParams
from timeviper_model.inference.engine import InferenceEngine
from timeviper_model.inference.requests import EngineConfig
from timeviper_model.weights.weights_folder import from_pretrained, save_pretrained
from timeviper_platform.serving.answer_schemas import segments_schema
from timeviper_platform.serving.engine import service as service_module
from timeviper_platform.serving.engine.service import EngineService, EngineServiceConfig, build_prompt
from timeviper_platform.serving.messages import (
    AnswerDelta,
    ChatTurn,
    FeatureReference,
    FeatureStream,
    GenerateRequest,
    Refusal,
)

TOKENIZER = byte_tokenizer()
DIM = CONFIG_WITH_TRANSV.vision.hidden_size
Scenario = Callable[[EngineService], Awaitable[Any]]


@pytest.fixture(scope="module")
def weights(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Path]:
    folder = tmp_path_factory.mktemp("engine") / "weights"
    save_pretrained(random_model(dtype=torch.float32), folder, tokenizer=TOKENIZER)
    return folder


def bits(num_frames: int) -> np.ndarray:
    generator = torch.Generator().manual_seed(num_frames)
    features = torch.randn(num_frames, 4, DIM, generator=generator).to(torch.bfloat16)
    return features.view(torch.int16).numpy()


def video(num_frames: int = 6) -> FeatureReference:
    return FeatureReference(
        key="k",
        ref=bits(num_frames),
        num_frames=num_frames,
        num_tokens_per_frame=4,
        modality="video",
        duration_seconds=float(num_frames),
    )


def request(text: str = "What?", *, media: tuple[FeatureReference, ...] = (), **values: Any) -> GenerateRequest:
    turns = (ChatTurn(role="user", text=text, media=media),)
    options = {name: values.pop(name) for name in SamplingParams.__dataclass_fields__ if name in values}
    sampling = SamplingParams(**{"max_new_tokens": 8, **options})
    return GenerateRequest(**{"tenant": "a", "turns": turns, "sampling": sampling, **values})


async def read(reference: FeatureReference) -> AsyncGenerator[np.ndarray | Refusal]:
    """Yields a whole array, or the items of an iterator that stands for a stream."""
    if reference.stream is not None:
        async for item in reference.stream.board():
            yield item
        return
    if reference.ref is None:
        raise RuntimeError("its owner has died")
    yield reference.ref


def run(weights: Path | str, scenario: Scenario, **config: Any) -> Any:
    async def main() -> Any:
        service = EngineService(str(weights), EngineServiceConfig(**config), read)
        try:
            return await asyncio.wait_for(scenario(service), 60)
        finally:
            service.stop()

    return asyncio.run(main())


async def collect(service: EngineService, submitted: GenerateRequest) -> list[AnswerDelta | Refusal]:
    return [item async for item in service.generate(submitted)]


def text_of(items: list[AnswerDelta | Refusal], index: int = 0) -> str:
    return "".join(item.text for item in items if isinstance(item, AnswerDelta) and item.index == index)


def refusal_of(items: list[AnswerDelta | Refusal]) -> Refusal:
    (item,) = items
    assert isinstance(item, Refusal)
    return item


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


def usages(items: list[AnswerDelta | Refusal]) -> list[tuple[int, int]]:
    """(prompt tokens, cached tokens) of every answer."""
    found = [item.usage for item in items if isinstance(item, AnswerDelta) and item.usage is not None]
    return [(usage.prompt_tokens, usage.cached_tokens) for usage in found]


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


def streamed(items: Callable[[], AsyncGenerator[Any]], num_frames: int = 6) -> FeatureReference:
    stream = FeatureStream(board=items, stream_id="s", param="messages.0.content.0")
    return replace(video(num_frames), ref=None, stream=stream)


TWO_FRAMES = EngineConfig(num_slots=2, max_prefill_tokens=8, prefix_cache_bytes=2**24)
"""Chunks of two frames."""


def test_a_video_is_read_while_its_later_frames_are_still_decoded_and_answered_alike(weights: Path) -> None:
    """Before, the first question about an upload waited for its last frame."""
    read_early: list[int] = []

    async def scenario(service: EngineService) -> list[list[AnswerDelta | Refusal]]:
        async def items() -> AsyncGenerator[Any]:
            yield bits(6)[:3]
            yield bits(6)[3:5]
            while not read_early or read_early[-1] < 16:
                await asyncio.sleep(0.001)
                prefills = [active.prefill for active in service._engine._requests.values()]
                read_early.extend(prefill.num_read for prefill in prefills if prefill is not None)
            yield bits(6)[5:]

        return [await collect(service, request(media=(medium,), n=2)) for medium in (streamed(items), video(6))]

    stream, hit = run(weights, scenario, engine=TWO_FRAMES)
    plain = run(weights, lambda service: collect(service, request(media=(video(6),), n=2)), engine=TWO_FRAMES)
    assert max(read_early) >= 16  # four of six frames
    assert text_of(plain)
    for items in (stream, hit):
        assert [text_of(items, index) for index in (0, 1)] == [text_of(plain, index) for index in (0, 1)]
    assert sorted(usages(stream)) == sorted(usages(plain))
    assert all(cached > 24 for _, cached in usages(hit))


def test_missing_frames_and_several_media_are_answered_as_if_known_before(weights: Path) -> None:
    """Damaged frames are known only once the video is decoded; the prompt has as many tokens as frames."""

    async def scenario(service: EngineService) -> list[list[AnswerDelta | Refusal]]:
        async def five() -> AsyncGenerator[Any]:
            yield bits(5)[:3]
            await asyncio.sleep(0.02)
            yield bits(5)[3:]

        media = [(streamed(five), replace(video(3), key="other")), (video(5), replace(video(3), key="other"))]
        answers = [await collect(service, request(media=own)) for own in media]
        stats = await service.stats()
        assert (stats.active_slots, stats.queued_requests) == (0, 0)
        return answers

    stream, plain = run(weights, scenario, engine=TWO_FRAMES)
    assert text_of(stream) == text_of(plain)
    assert usages(stream)[0][0] == usages(plain)[0][0]


def test_a_video_that_breaks_in_the_middle_is_refused_and_leaves_nothing_behind(weights: Path) -> None:
    refused = Refusal(status=422, message="the medium cannot be decoded", code="corrupt_file")

    async def scenario(service: EngineService) -> tuple[Any, Any, str]:
        async def broken() -> AsyncGenerator[Any]:
            yield bits(6)[:4]
            await asyncio.sleep(0.02)
            yield refused

        async def lost() -> AsyncGenerator[Any]:
            yield bits(6)[:4]
            raise RuntimeError("its replica has died")

        first, second = [refusal_of(await collect(service, request(media=(streamed(own),)))) for own in (broken, lost)]
        stats = await service.stats()
        assert (stats.active_slots, stats.prefix_entries) == (0, 0)
        return first, second, text_of(await collect(service, request(media=(video(6),))))

    first, second, answer = run(weights, scenario, engine=TWO_FRAMES)
    plain = run(weights, lambda service: collect(service, request(media=(video(6),))), engine=TWO_FRAMES)
    assert first == refused
    assert (second.status, second.code) == (503, "features_lost")
    assert answer == text_of(plain)


def test_others_are_answered_while_a_video_waits_for_frames_and_the_thread_rests(weights: Path) -> None:
    async def scenario(service: EngineService) -> tuple[str, int, int]:
        started, steps = asyncio.Event(), 0
        step = service._engine.step

        def counted() -> Any:
            nonlocal steps
            steps += 1
            return step()

        service._engine.step = counted  # type: ignore[method-assign]

        async def endless() -> AsyncGenerator[Any]:
            yield bits(6)[:4]
            started.set()
            await asyncio.sleep(60)

        waiting = asyncio.create_task(collect(service, request(media=(streamed(endless),))))
        await started.wait()
        answer = text_of(await collect(service, request("Who?")))
        await asyncio.sleep(0.05)
        before = steps
        await asyncio.sleep(0.3)
        rested = steps - before
        waiting.cancel()
        await asyncio.wait({waiting})
        return answer, rested, (await service.stats()).active_slots

    answer, rested, active = run(weights, scenario, engine=TWO_FRAMES)
    assert answer == text_of(run(weights, lambda service: collect(service, request("Who?")), engine=TWO_FRAMES))
    assert rested == 0
    assert active == 0


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

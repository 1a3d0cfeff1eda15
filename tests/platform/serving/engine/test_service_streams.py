"""engine service: videos whose features come block by block."""

from __future__ import annotations

import asyncio
from collections.abc import AsyncGenerator
from dataclasses import replace
from pathlib import Path
from typing import Any

from reference.engine_service import (
    TWO_FRAMES,
    bits,
    collect,
    refusal_of,
    request,
    run,
    streamed,
    text_of,
    usages,
    video,
)
from timeviper_platform.serving.engine.service import EngineService
from timeviper_platform.serving.messages import (
    AnswerDelta,
    Refusal,
)


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

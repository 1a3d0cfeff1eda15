"""blocks: readers of a board, without services."""

from __future__ import annotations

import asyncio
from typing import Any

import pytest

from timeviper_platform.serving.features import blocks as module
from timeviper_platform.serving.features.blocks import MAX_ENDED, BlockBoard
from timeviper_platform.serving.messages import Refusal

GONE = Refusal(status=422, message="damaged", code="corrupt_file")


def test_readers_wait_for_blocks_in_order_and_see_the_end(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(module, "POLL_S", 0.05)
    monkeypatch.setattr(module, "UNKNOWN_S", 0.05)

    async def scenario() -> list[Any]:
        board = BlockBoard()
        assert await board.read("b", 0) is None
        early = asyncio.create_task(board.read("a", 1))  # overtakes the first block
        await asyncio.sleep(0)
        await board.append("a", 1, ["second"])
        assert await early == ["second"]
        waiting = asyncio.create_task(board.read("a", 0))
        nothing = await board.read("a", 2)
        await board.append("a", 0, ["first"])
        both = [await board.read("a", 0), await board.read("a", 1)]
        later = asyncio.create_task(board.read("a", 2))
        await asyncio.sleep(0)
        await board.end("a", GONE)
        return [await waiting, nothing, *both, await later, await board.read("a", 0)]

    waited, nothing, both, second, end, late = asyncio.run(scenario())
    assert waited == []  # the wrong block came meanwhile, and then nothing for too long
    assert (nothing, both, second) == ([], ["first", "second"], ["second"])
    assert end == late == GONE


def test_the_oldest_ended_streams_are_dropped(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(module, "UNKNOWN_S", 0.05)

    async def scenario() -> tuple[Any, Any, Any]:
        board = BlockBoard()
        await board.append("running", 0, ["block"])
        for number in range(MAX_ENDED + 1):
            await board.end(f"stream {number}", GONE)
        return await board.read("running", 0), await board.read("stream 0", 0), await board.read("stream 1", 0)

    assert asyncio.run(scenario()) == (["block"], None, GONE)

"""Row groups `first` and `second`: time to first token of the first question about an upload, and of the second.

`first` compares with the parts alone, which share this machine's cores: their CPU time divided by the cores is a lower
bound.
"""

from __future__ import annotations

import os
import statistics
import tempfile
import time
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import replace
from fractions import Fraction
from pathlib import Path
from typing import Any, NamedTuple

import aiohttp
import torch

from timeviper_model.config import TINY
from timeviper_platform.benchmarks.measure import Row
from timeviper_platform.benchmarks.serving.endpoint import (
    Endpoint,
    ServingFolders,
    make_folders,
    serve_values,
    serving_endpoint,
)
from timeviper_platform.benchmarks.serving.load import HttpAnswer, ask, question, upload, with_session
from timeviper_platform.benchmarks.video.clips import ClipSpec, make_clip
from timeviper_platform.data.encode.frame_encoder import FrameEncoder
from timeviper_platform.data.video.reader import read_frames

NUM_TOKENS = 8
STORED = "film"
WARM = "warm"
"""Medium of the warm-up, so that no measured one is in the cache."""
TEXTS = "What happens?", "When does it rain?"


class Parts(NamedTuple):
    """Seconds of one video's work, each part alone on one thread."""

    decode: float
    encode: float
    prefill: float
    """Time to first token of a video with stored features."""


def first_rows(*, num_frames: int = 1024, repeats: int = 5) -> list[Row]:
    command = "python jobs/benchmark.py serving --only first"
    with _endpoint(num_frames) as (folders, endpoint, clip):
        parts = [_parts(folders, clip, endpoint, num_frames, number) for number in range(repeats)]
        cold, cpu = [], []
        for number in range(repeats):
            before = endpoint.cpu_seconds()
            cold.append(_cold(endpoint, clip, number).first_seconds)
            cpu.append(endpoint.cpu_seconds() - before)
    longest = statistics.median(max(part) for part in parts)
    first = statistics.median(cold)
    floor = statistics.median(cpu) / (os.cpu_count() or 1)
    shares = ", ".join(
        f"{name} {statistics.median(getattr(part, name) for part in parts):.2f} s" for name in Parts._fields
    )
    return [
        Row(
            name=f"first token of a cold upload of {num_frames} frames over its longest part alone ({shares})",
            value=first / longest,
            unit="",
            bar="<= 1.15",
            command=command,
        ),
        Row(
            name="the same over the sum of its parts",
            value=first / statistics.median(sum(part) for part in parts),
            unit="",
            command=command,
        ),
        Row(
            name=f"the same over its CPU seconds on {os.cpu_count()} cores, the least it can take",
            value=first / floor,
            unit="",
            command=command,
        ),
    ]


def second_rows(*, num_frames: int = 1024, repeats: int = 5) -> list[Row]:
    """Raises RuntimeError if an answer from the cache differs from that of a cold start."""
    command = "python jobs/benchmark.py serving --only second"
    uploads, stored = [], []
    with _endpoint(num_frames, [f"{STORED}-{number}" for number in range(repeats)]) as (_, at, clip):
        for number in range(repeats):
            # the cold answer to the second question is that of another file with the same frames
            uploads.append(_pair(at, _new_file(clip, 2 * number), _new_file(clip, 2 * number + 1)))
            stored.append(_pair(at, f"feature://{STORED}-{number}", None))
    return [
        Row(
            name=f"second question's first token over HTTP, times sooner than the first's, {name}, {num_frames} frames"
            f" ({min(ratios):.3g} to {max(ratios):.3g})",
            value=statistics.median(ratios),
            unit="x",
            bar=bar,
            command=command,
        )
        for name, ratios, bar in (("a cold upload", uploads, ">= 20"), ("features stored", stored, ">= 10"))
    ]


@contextmanager
def _endpoint(num_frames: int, media: Sequence[str] = (STORED,)) -> Iterator[tuple[ServingFolders, Endpoint, Path]]:
    config = replace(TINY, vision=replace(TINY.vision, num_tokens_per_frame=16))
    with tempfile.TemporaryDirectory(prefix="timeviper-serving-") as folder:
        folders = make_folders(Path(folder), config, media=dict.fromkeys([WARM, *media], num_frames))
        clip = Path(folder, "clip.mp4")
        make_clip(clip, ClipSpec(seconds=num_frames, fps=4, width=320, height=180, gop=8))
        values = serve_values(folders, engine={"engine": {"prefix_cache_bytes": 2**31}})
        with serving_endpoint(values) as endpoint:
            _asked(endpoint, f"feature://{WARM}", text="Warm?")
            _asked(endpoint, _new_file(clip, 10**6), text="Warm?")
            yield folders, endpoint, clip


def _parts(folders: ServingFolders, clip: Path, endpoint: Endpoint, num_frames: int, number: int) -> Parts:
    encoder = FrameEncoder(folders.encoder)
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    try:
        start = time.perf_counter()
        frames = read_frames(str(clip), encoder.image_size, fps=Fraction(1), max_frames=num_frames).frames
        decoded = time.perf_counter()
        encoder.encode(frames)
        encoded = time.perf_counter()
    finally:
        torch.set_num_threads(threads)
    # another system text has no prefix in the cache
    stored = _asked(endpoint, f"feature://{STORED}", text=TEXTS[0], system=f"Cold {number}")
    return Parts(decoded - start, encoded - decoded, stored.first_seconds)


def _cold(endpoint: Endpoint, clip: Path, number: int) -> HttpAnswer:
    return _asked(endpoint, _new_file(clip, number), text=TEXTS[0])


def _pair(endpoint: Endpoint, medium: Path | str, twin: Path | str | None) -> float:
    first = _asked(endpoint, medium, text=TEXTS[0])
    second = _asked(endpoint, medium, text=TEXTS[1])
    if twin is not None:
        plain = _asked(endpoint, twin, text=TEXTS[1])
        if (second.tokens, first.cached_tokens, plain.cached_tokens) != (plain.tokens, 0, 0):
            raise RuntimeError(f"from the cache the tokens are {second.tokens}, else {plain.tokens}")
    if first.cached_tokens:
        raise RuntimeError("the first question was answered from the cache")
    if not second.cached_tokens:
        raise RuntimeError("the second question was not answered from the cache")
    return first.first_seconds / second.first_seconds


_files: dict[tuple[str, Path | str], str] = {}


def _asked(endpoint: Endpoint, medium: Path | str, *, text: str, system: str | None = None) -> HttpAnswer:
    """Uploads a path once, and sends a question about it."""

    async def run(session: aiohttp.ClientSession) -> HttpAnswer:
        url = medium if isinstance(medium, str) else _files.get((endpoint.url, medium))
        if url is None:
            assert isinstance(medium, Path)
            url = _files[endpoint.url, medium] = await upload(session, endpoint, medium)
        body: dict[str, Any] = question(text, url, max_tokens=NUM_TOKENS, max_frames=16_384)
        if system is not None:
            body["messages"].insert(0, {"role": "system", "content": system})
        return await ask(session, endpoint, body)

    answer = with_session(run)
    if not answer.is_whole:
        raise RuntimeError(f"the question about {medium} ended with {answer.status} {answer.error}")
    return answer


def _new_file(clip: Path, number: int) -> Path:
    path = clip.with_name(f"{number}-{clip.name}")
    if not path.exists():
        # an empty box at the end (ISO 14496-12, 8.1.2)
        data = str(number).encode()
        path.write_bytes(clip.read_bytes() + (8 + len(data)).to_bytes(4, "big") + b"free" + data)
    return path

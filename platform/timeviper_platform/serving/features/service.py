"""The feature service: turns a medium into a reference to its vision features. Does not import Ray.

Media in the feature store, by id or SHA-256, are read. Others are decoded in a sandbox and encoded as in preprocessing,
block by block, so that an engine can read the first frames while later ones are still being decoded.
"""

from __future__ import annotations

import asyncio
import hashlib
import json
import logging
import time
import uuid
from bisect import bisect_left, bisect_right
from collections import OrderedDict
from collections.abc import AsyncGenerator, Awaitable, Callable, Sequence
from contextlib import aclosing
from dataclasses import dataclass, field, replace
from functools import partial
from typing import Any, Literal, NamedTuple

import numpy as np
import torch
from opentelemetry.trace import INVALID_SPAN, Span
from torch import Tensor

from timeviper_platform.common.metrics import NO_METRICS, MetricsSink
from timeviper_platform.data.encode.frame_encoder import FrameEncoder, VisionTowerConfig
from timeviper_platform.data.store.reader import FeatureStore, MediaInfo
from timeviper_platform.data.video.sampling import FrameSelection
from timeviper_platform.serving import tracing
from timeviper_platform.serving.features.blocks import BlockWriter
from timeviper_platform.serving.features.compatibility import check_features_fit
from timeviper_platform.serving.features.encode_queue import EncodeQueue
from timeviper_platform.serving.features.sandbox import DecodedBlock, DecodeSandbox, MediumHead, SandboxConfig
from timeviper_platform.serving.messages import (
    FeatureProgress,
    FeatureReference,
    FeatureStream,
    MediaAddress,
    MediaBytes,
    MediaFile,
    MediaFrames,
    MediaPage,
    MediaSource,
    Modality,
    Refusal,
    StoredFeatures,
    StoredMedium,
)

logger = logging.getLogger(__name__)

PROGRESS_S = 0.3
ENCODE_BATCHES = 2
"""Maximum encoder batches between two progress reports. Together they are a block of a stream."""


@dataclass(frozen=True, kw_only=True, slots=True)
class FeatureServiceConfig:
    feature_store: str | None = None
    """URI of the feature store; None = no feature:// ids."""
    encoder: VisionTowerConfig | None = None
    """Encoder with the feature store's recipe; None = no uploads."""
    fps: float = 1.0
    """Sampling rate of uploads. Requests can only lower it."""
    max_frames: int = 256
    """Maximum frames per medium. Requests can only lower it."""
    frame_selection: FrameSelection = "uniform"
    """Frames to keep of a longer medium."""
    store_refresh_s: float = 60.0
    """Seconds between checks for media that preprocessing has added to the store; 0 = only at the start."""
    cache_bytes: int = 512 * 2**20
    """Maximum bytes of cached features per replica; a larger upload stays until the next."""
    cache_max_age_s: float = 3600.0
    """Seconds since their last use after which cached features are dropped."""
    num_threads: int = 0
    """PyTorch's CPU threads; 0 = its default."""
    sandbox: SandboxConfig = field(default_factory=SandboxConfig)

    def __post_init__(self) -> None:
        if self.feature_store is None and self.encoder is None:
            raise ValueError("a feature service needs a feature_store, an encoder, or both")
        if self.fps <= 0 or self.max_frames < 1:
            raise ValueError(f"{self.fps = } must be above 0 and {self.max_frames = } at least 1")
        if self.store_refresh_s < 0:
            raise ValueError(f"{self.store_refresh_s = } must be at least 0 (0 = only at the start)")


class _Kept(NamedTuple):
    reference: FeatureReference
    num_bytes: int
    used_at: float
    stream_id: str | None
    """Stream that ended with it, for requests that have yet to read."""


class _EncodedBlock(NamedTuple):
    features: Tensor
    """(F, N, dim) bfloat16."""
    pts: np.ndarray
    """(F,) seconds."""


@dataclass(slots=True)
class _Work:
    """A computation of features that requests wait for."""

    announced: asyncio.Future[FeatureReference]
    """The stream, once its first block exists; never set for features of a single block."""
    stream_id: str = field(default_factory=lambda: uuid.uuid4().hex)
    task: asyncio.Task[FeatureReference | Refusal] | None = None
    num_waiting: int = 0
    """Requests that wait for its end, or its announcement. When all leave before that, it is cancelled."""


class FeatureService:
    def __init__(
        self,
        weights: str,
        config: FeatureServiceConfig,
        put: Callable[[np.ndarray], Any],
        board: BlockWriter | None = None,
        metrics: MetricsSink = NO_METRICS,
    ) -> None:
        """Opens the store and the encoder. `put` stores an array and returns a reference to it. Without a `board`, all
        references are whole.

        Raises:
            ValueError: when the features do not fit the weights.
        """
        if config.num_threads:
            torch.set_num_threads(config.num_threads)
        self._config = config
        self._put = put
        self._board = board
        self._metrics = metrics
        self.store = None if config.feature_store is None else FeatureStore.open(config.feature_store)
        self._encoder = None if config.encoder is None else FrameEncoder(config.encoder)
        check_features_fit(weights, store=self.store, encoder=self._encoder)
        self.recipe = None if self._encoder is None else json.dumps(self._encoder.recipe, sort_keys=True)
        """The encoder's recipe as JSON."""
        self._sandbox = None
        if self._encoder is not None:
            self._sandbox = DecodeSandbox(config.sandbox, self._encoder.image_size, self._encoder.resample)
        self._encode_queue = None if self._encoder is None else EncodeQueue(self._encoder)
        self._kept: OrderedDict[str, _Kept] = OrderedDict()
        """Least recently used first."""
        self._kept_bytes = 0
        self._encoding: dict[str, FeatureProgress] = {}
        """By the medium's SHA-256."""
        self._ongoing: dict[str, _Work] = {}
        self._refreshing: asyncio.Task[None] | None = None
        logger.info("features of %d stored media, uploads %s", self._num_stored, "on" if self._encoder else "off")

    async def start(self) -> None:
        if self.store is not None and self._config.store_refresh_s:
            self._refreshing = asyncio.create_task(self._refresh(self._config.store_refresh_s))
        if self._sandbox is not None:
            await self._sandbox.start()

    async def _refresh(self, interval_s: float) -> None:
        """Reads the store again whenever preprocessing has written to it, until cancelled."""
        while True:
            await asyncio.sleep(interval_s)
            before = self.store
            assert before is not None
            try:
                self.store = await asyncio.to_thread(before.refreshed)
            except (OSError, RuntimeError, ValueError) as error:
                logger.error("the feature store stays as it was: %s", error)
            if self.store is not before:
                logger.info("features of %d stored media", self._num_stored)

    @property
    def _num_stored(self) -> int:
        return 0 if self.store is None else len(self.store.media_ids)

    def set_limits(self, config: FeatureServiceConfig) -> None:
        """Applies other limits to later requests. Other values must not have changed."""
        self._config = config

    async def features(
        self,
        source: MediaSource,
        *,
        tenant: str = "",
        fps: float | None = None,
        max_frames: int | None = None,
        whole: bool = True,
    ) -> FeatureReference | Refusal:
        """See `FeatureClient.features`. Tenants share no features of uploads, whose timing would reveal them."""
        fps = min(fps or self._config.fps, self._config.fps)
        max_frames = min(max_frames or self._config.max_frames, self._config.max_frames)
        if isinstance(source, MediaFrames) and len(source.frames) > self._config.max_frames:
            return Refusal(
                status=400,
                message=f"{len(source.frames)} pictures in a row are one video of more than the limit of"
                f" {self._config.max_frames} frames; send fewer",
                code="too_many_frames",
            )
        if isinstance(source, StoredFeatures):
            media_id: str | None = source.media_id
        elif isinstance(source, MediaAddress):
            media_id = None if self.store is None else _find_address(self.store, source)
        else:
            media_id = None if self.store is None else self.store.find(source.sha256)
        if media_id is None and not isinstance(source, StoredFeatures | MediaAddress):
            # decoding is deterministic: content and limits determine the frames
            key = _key("upload", tenant, source.sha256, self.recipe, fps, max_frames, self._config.frame_selection)
            make = partial(self._encode, source, key, fps, max_frames)
            return await self._once(key, "upload", make, whole=whole)
        store = self.store  # `_refresh` may replace it
        if store is None or media_id is None or media_id not in store:
            return _no_such_medium()
        info = store.info(media_id)
        frames = info.select(max_frames=max_frames, frame_selection=self._config.frame_selection, fps=fps)
        content = info.sha256 or (store.uri, media_id, store.version_of(media_id))  # a store may hold no hashes
        key = _key("store", content, store.recipe_hash, info.times_seconds[frames].tobytes())
        return await self._once(key, "store", lambda _: self._read(store, info, key, frames))

    async def watch(
        self, source: MediaSource, *, tenant: str = "", fps: float | None = None, max_frames: int | None = None
    ) -> AsyncGenerator[FeatureProgress | FeatureReference | Refusal]:
        """See `FeatureClient.watch`."""
        task = asyncio.ensure_future(self.features(source, tenant=tenant, fps=fps, max_frames=max_frames))
        waiting = FeatureProgress(stage="decoding", frames_done=0, frames_total=None)
        try:
            while not (await asyncio.wait({task}, timeout=PROGRESS_S))[0]:
                yield self._encoding.get(getattr(source, "sha256", ""), waiting)
            yield task.result()
        finally:
            task.cancel()

    async def list_media(self, *, after: str, prefix: str, limit: int) -> MediaPage | Refusal:
        """See `FeatureClient.list_media`."""
        return await asyncio.to_thread(self._list_media, after, prefix, limit)

    def _list_media(self, after: str, prefix: str, limit: int) -> MediaPage:
        store = self.store
        if store is None:
            return MediaPage(media=(), has_more=False)
        ids = store.media_ids
        start = max(bisect_left(ids, prefix), bisect_right(ids, after) if after else 0)
        found = [media_id for media_id in ids[start : start + limit + 1] if media_id.startswith(prefix)]
        media = tuple(_stored_medium(store.info(media_id)) for media_id in found[:limit])
        return MediaPage(media=media, has_more=len(found) > limit)

    async def medium(self, media_id: str) -> StoredMedium | Refusal:
        """See `FeatureClient.medium`."""
        store = self.store
        if store is None or media_id not in store:
            return _no_such_medium()
        info = await asyncio.to_thread(store.info, media_id)
        limits = self._config
        selected = info.select(max_frames=limits.max_frames, frame_selection=limits.frame_selection, fps=limits.fps)
        times = tuple(info.pts_seconds.tolist())
        return replace(_stored_medium(info), pts_seconds=times, selected=tuple(selected))

    async def is_ready(self) -> bool:
        return True

    def gauges(self) -> dict[str, float]:
        return {"stored_media": self._num_stored, "ongoing": len(self._ongoing), "cache_bytes": self._kept_bytes}

    async def close(self) -> None:
        if self._refreshing is not None:
            self._refreshing.cancel()
        if self._sandbox is not None:
            await self._sandbox.close()

    async def _once(
        self,
        key: str,
        origin: Literal["store", "upload"],
        make: Callable[[_Work], Awaitable[FeatureReference | Refusal]],
        *,
        whole: bool = True,
    ) -> FeatureReference | Refusal:
        """Returns the cached reference, or calls `make` once for all concurrent requests."""
        self._drop_old()
        if key in self._kept:
            self._kept.move_to_end(key)
            kept = self._kept[key] = self._kept[key]._replace(used_at=time.monotonic())
            self._metrics.add("requests", 1, origin="cache", status="ok")
            return kept.reference
        work = self._ongoing.get(key)
        if work is None:
            work = self._ongoing[key] = _Work(asyncio.get_running_loop().create_future())
            work.task = asyncio.ensure_future(self._guarded(make, work, origin))
            work.task.add_done_callback(partial(self._forget, key, work))
        assert work.task is not None
        work.num_waiting += 1
        try:
            if not whole:
                waiting: set[asyncio.Future[Any]] = {work.task, work.announced}
                await asyncio.wait(waiting, return_when=asyncio.FIRST_COMPLETED)
                if not work.task.done():
                    return work.announced.result()
            return await asyncio.shield(work.task)  # the first caller may disconnect while others wait
        finally:
            work.num_waiting -= 1
            if not (work.num_waiting or work.announced.done() or work.task.done()):  # all have gone
                self._forget(key, work)
                work.task.cancel()

    def _forget(self, key: str, work: _Work, _: object = None) -> None:
        if self._ongoing.get(key) is work:
            del self._ongoing[key]

    async def _guarded(
        self, make: Callable[[_Work], Awaitable[FeatureReference | Refusal]], work: _Work, origin: str
    ) -> FeatureReference | Refusal:
        began = time.monotonic()
        try:
            answer = await make(work)
        except (RuntimeError, OSError) as error:  # the store's disk or the encoder's device, not the client
            logger.error("computing features failed: %s", type(error).__name__, exc_info=True)
            message = "computing the features failed, try again"
            answer = Refusal(status=503, message=message, code="features_failed", retry_after_s=5.0)
        if self._board is not None and work.announced.done():
            self._board.end(work.stream_id, answer)
        self._metrics.add("requests", 1, origin=origin, status=answer.code if isinstance(answer, Refusal) else "ok")
        self._metrics.observe("seconds", time.monotonic() - began, origin=origin)
        return answer

    async def _read(self, store: FeatureStore, info: MediaInfo, key: str, frames: list[int]) -> FeatureReference:
        with tracing.span("fetch") as fetch:
            fetch.set_attribute(tracing.FRAMES, len(frames))
            medium = await asyncio.to_thread(store.read, info.media_id, frames)
            return await self._keep(key, medium.features, info.modality, info.duration_seconds, medium.pts_seconds)

    async def _encode(
        self, source: MediaFile | MediaBytes | MediaFrames, key: str, fps: float, max_frames: int, work: _Work
    ) -> FeatureReference | Refusal:
        if self._sandbox is None or self._encode_queue is None:
            message = "this server accepts no uploads; use a stored medium, feature://ID"
            return Refusal(status=400, message=message, code="uploads_disabled")
        head, parts = None, list[_EncodedBlock]()
        async with aclosing(self._encoded(self._sandbox, self._encode_queue, source, fps, max_frames)) as items:
            async for item in items:
                if isinstance(item, Refusal):
                    return item
                if isinstance(item, MediumHead):
                    head = item
                    continue
                parts.append(item)
                if self._board is not None and head is not None:
                    await self._publish(parts, head, key, work, self._board)
        assert head is not None
        features, times = torch.cat([part.features for part in parts]), np.concatenate([part.pts for part in parts])
        stream_id = work.stream_id if work.announced.done() else None
        return await self._keep(key, features, head.modality, head.end_seconds, times, stream_id)

    async def _publish(
        self, parts: Sequence[_EncodedBlock], head: MediumHead, key: str, work: _Work, board: BlockWriter
    ) -> None:
        """Adds the last of `parts` to the stream. The first part announces the stream, unless it has all frames."""
        if not work.announced.done():
            if len(parts[0].features) >= head.num_frames:
                return
            reference = FeatureReference(
                key=key,
                ref=None,
                stream=FeatureStream(board=board.address(), stream_id=work.stream_id),
                num_frames=head.num_frames,
                num_tokens_per_frame=parts[0].features.shape[1],
                modality=head.modality,
                duration_seconds=head.end_seconds,
            )
        ref = await asyncio.to_thread(self._put, _bits(parts[-1].features))
        board.append(work.stream_id, len(parts) - 1, ref)
        if not work.announced.done():
            work.announced.set_result(reference)

    async def _encoded(
        self,
        sandbox: DecodeSandbox,
        queue: EncodeQueue,
        source: MediaFile | MediaBytes | MediaFrames,
        fps: float,
        max_frames: int,
    ) -> AsyncGenerator[MediumHead | _EncodedBlock | Refusal]:
        """Encodes whole batches while later frames are decoded; other media take turns between blocks."""
        batch, size, total, done = queue.encoder.config.encode_batch_frames, queue.encoder.image_size, 0, 0
        frames = np.empty((0, size, size, 3), np.uint8)
        pts = np.empty(0)
        decode_span = tracing.start_span("decode")
        encode_span: Span = INVALID_SPAN

        async def encode(size: int) -> _EncodedBlock:
            nonlocal frames, pts, done, encode_span
            if done == 0:
                encode_span = tracing.start_span("encode")
            progress = FeatureProgress(stage="encoding", frames_done=done, frames_total=total)
            self._encoding[source.sha256] = progress
            features = await queue.encode(frames[:size])
            self._metrics.add("frames", size)
            block = _EncodedBlock(features, pts[:size])
            frames, pts, done = frames[size:], pts[size:], done + size
            return block

        blocks = sandbox.blocks(source, fps=fps, max_frames=max_frames, frame_selection=self._config.frame_selection)
        try:
            async with aclosing(blocks):
                async for item in blocks:
                    if not isinstance(item, DecodedBlock):
                        total = item.num_frames if isinstance(item, MediumHead) else total
                        if isinstance(item, Refusal):
                            tracing.fail(decode_span, item.code)
                        yield item
                        continue
                    frames = np.concatenate([frames, item.frames]) if len(frames) else item.frames
                    pts = np.concatenate([pts, item.pts_seconds])
                    while len(frames) >= batch:
                        yield await encode(min(len(frames) // batch, ENCODE_BATCHES) * batch)
            tracing.end_span(decode_span, done + len(frames))
            if len(frames):
                yield await encode(len(frames))
        finally:
            tracing.end_span(decode_span, done)
            tracing.end_span(encode_span, done)
            self._encoding.pop(source.sha256, None)

    async def _keep(
        self,
        key: str,
        features: Tensor,
        modality: Modality,
        duration_seconds: float,
        pts_seconds: np.ndarray,
        stream_id: str | None = None,
    ) -> FeatureReference:
        """Stores (F, N, dim) bfloat16 features; evicts the least recently used."""
        bits = _bits(features)
        reference = FeatureReference(
            key=key,
            ref=await asyncio.to_thread(self._put, bits),
            num_frames=bits.shape[0],
            num_tokens_per_frame=bits.shape[1],
            modality=modality,
            duration_seconds=duration_seconds,
            times_seconds=tuple(np.round(pts_seconds, 6).tolist()),
        )
        self._kept[key] = _Kept(reference, bits.nbytes, time.monotonic(), stream_id)
        self._kept_bytes += bits.nbytes
        num_readable = 0 if stream_id is None else 1  # its requests may have yet to read the end of the stream
        while self._kept_bytes > self._config.cache_bytes and len(self._kept) > num_readable:
            self._drop_oldest()
        return reference

    def _drop_old(self) -> None:
        before = time.monotonic() - self._config.cache_max_age_s
        while self._kept and next(iter(self._kept.values())).used_at < before:
            self._drop_oldest()

    def _drop_oldest(self) -> None:
        kept = self._kept.popitem(last=False)[1]
        self._kept_bytes -= kept.num_bytes
        if kept.stream_id is not None and self._board is not None:
            self._board.forget(kept.stream_id)


def _find_address(store: FeatureStore, address: MediaAddress) -> str | None:
    found = (store.find_uri(uri) for uri in (address.uri, *address.aliases))
    return next((media_id for media_id in found if media_id is not None), None)


def _bits(features: Tensor) -> np.ndarray:
    """bfloat16 as int16, since NumPy has no bfloat16."""
    return features.cpu().contiguous().view(torch.int16).numpy()


def _stored_medium(info: MediaInfo) -> StoredMedium:
    return StoredMedium(
        media_id=info.media_id,
        uri=info.uri,
        modality=info.modality,
        duration_seconds=info.duration_seconds,
        num_frames=info.num_frames,
        num_tokens_per_frame=info.num_tokens_per_frame,
    )


def _no_such_medium() -> Refusal:
    message = "the feature store has no such medium; GET /v1/videos lists them, GET /v1/files uploads"
    return Refusal(status=404, message=message, code="media_not_found")


def _key(*parts: object) -> str:
    return hashlib.sha256(repr(parts).encode()).hexdigest()

"""FeatureService: a stored id, an upload or bytes in, a reference to vision features out.

Looks in the feature store first (by id, or by the content's SHA-256), else has the medium decoded in a sandbox and
encodes the frames with the encoder of the preprocessing job, so that both ways give the same features. Keeps what it
made, up to a number of bytes, and makes it once however many ask at the same time. Knows media and features; nothing of
HTTP, prompts or the language model, and Ray only as a function that stores an array.
"""

from __future__ import annotations

import asyncio
import hashlib
import json
import logging
from collections import OrderedDict
from collections.abc import Awaitable, Callable
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, field
from typing import Any, Literal

import numpy as np
import torch
from torch import Tensor

from timeviper_platform.data.encode.frame_encoder import FrameEncoder, VisionTowerConfig
from timeviper_platform.data.store.reader import FeatureStore, MediaInfo
from timeviper_platform.serving.features.compatibility import check_features_fit
from timeviper_platform.serving.features.sandbox import DecodeSandbox, SandboxConfig
from timeviper_platform.serving.messages import (
    FeatureReference,
    FeatureRequest,
    MediaBytes,
    MediaFile,
    Modality,
    Refusal,
    StoredFeatures,
)

logger = logging.getLogger(__name__)


@dataclass(frozen=True, kw_only=True, slots=True)
class FeatureServiceConfig:
    """Where features come from, and how many frames a request may have."""

    feature_store: str | None = None
    """feature store of the preprocessing job; None = no feature:// ids"""
    encoder: VisionTowerConfig | None = None
    """the encoder that made the store's features; None = no uploads"""
    fps: float = 1.0
    """at which uploads are sampled; the ceiling of what a request may ask for"""
    max_frames: int = 256
    """frames a medium is thinned to; the ceiling of what a request may ask for"""
    select: Literal["uniform", "first"] = "uniform"
    """which frames stay"""
    cache_bytes: int = 512 * 2**20
    """features kept for the next question, per replica"""
    num_threads: int = 0
    """of PyTorch on the CPU; 0 = its own choice"""
    sandbox: SandboxConfig = field(default_factory=SandboxConfig)

    def __post_init__(self) -> None:
        if self.feature_store is None and self.encoder is None:
            raise ValueError("a feature service needs a store, an encoder, or both")
        if self.fps <= 0 or self.max_frames < 1:
            raise ValueError(f"{self.fps = } must be above 0 and {self.max_frames = } at least 1")


class FeatureService:
    """One replica: store, encoder and sandbox."""

    def __init__(self, weights: str, config: FeatureServiceConfig, put: Callable[[np.ndarray], Any]) -> None:
        """Args:
        weights: folder of the model that will read the features; only its configuration is looked at.
        put: stores an array and gives the reference that others fetch it by.

        Raises:
            ValueError: when the store's or the encoder's features are not what the weights were trained on.
        """
        if config.num_threads:
            torch.set_num_threads(config.num_threads)
        self._config = config
        self._put = put
        self._store = None if config.feature_store is None else FeatureStore.open(config.feature_store)
        self._encoder = None if config.encoder is None else FrameEncoder(config.encoder)
        check_features_fit(weights, store=self._store, encoder=self._encoder)
        self._recipe = None if self._encoder is None else json.dumps(self._encoder.recipe, sort_keys=True)
        self._sandbox = None if self._encoder is None else DecodeSandbox(config.sandbox, self._encoder.image_size)
        self._encode_thread = ThreadPoolExecutor(max_workers=1, thread_name_prefix="encode")
        self._kept: OrderedDict[str, tuple[FeatureReference, int]] = OrderedDict()
        self._kept_bytes = 0
        self._in_work: dict[str, asyncio.Task[FeatureReference | Refusal]] = {}
        num_stored = 0 if self._store is None else len(self._store.media_ids)
        logger.info("features of %d stored media, uploads %s", num_stored, "on" if self._encoder else "off")

    async def start(self) -> None:
        """Has a decode worker ready before the first upload."""
        if self._sandbox is not None:
            await self._sandbox.start()

    async def features(self, request: FeatureRequest) -> FeatureReference | Refusal:
        """The medium's features, or why there are none."""
        fps = min(request.fps or self._config.fps, self._config.fps)
        max_frames = min(request.max_frames or self._config.max_frames, self._config.max_frames)
        source = request.source
        if isinstance(source, StoredFeatures):
            media_id: str | None = source.media_id
        else:
            media_id = None if self._store is None else self._store.find(source.sha256)
        if media_id is None:
            assert not isinstance(source, StoredFeatures)
            # decoding is deterministic: the content and these limits say which frames
            key = _key("upload", source.sha256, self._recipe, fps, max_frames, self._config.select)
            return await self._once(key, lambda: self._encode(source, key, fps, max_frames))
        if self._store is None or media_id not in self._store:
            return Refusal(
                status=404,
                message="there is no such medium in the feature store; GET /v1/files lists uploads",
                code="media_not_found",
            )
        info = self._store.info(media_id)
        frames = info.select(max_frames=max_frames, frame_selection=self._config.select, fps=fps)
        content = info.sha256 or (self._store.uri, media_id)  # a store may have been made without hashing
        key = _key("store", content, self._store.recipe_hash, info.times_seconds[frames].tobytes())
        return await self._once(key, lambda: self._read(info, key, frames))

    async def is_ready(self) -> bool:
        """True once constructed."""
        return True

    async def close(self) -> None:
        """Ends the decode worker in reserve."""
        if self._sandbox is not None:
            await self._sandbox.close()

    async def _once(
        self, key: str, make: Callable[[], Awaitable[FeatureReference | Refusal]]
    ) -> FeatureReference | Refusal:
        """What is kept under `key`, else what `make` gives, called once for all who ask meanwhile."""
        if key in self._kept:
            self._kept.move_to_end(key)
            return self._kept[key][0]
        task = self._in_work.get(key)
        if task is None:
            task = asyncio.ensure_future(_guarded(make))
            self._in_work[key] = task
            task.add_done_callback(lambda _: self._in_work.pop(key))
        return await asyncio.shield(task)  # whoever asked first may go; the others still wait

    async def _read(self, info: MediaInfo, key: str, frames: list[int]) -> FeatureReference:
        assert self._store is not None
        medium = await asyncio.to_thread(self._store.read, info.media_id, frames)
        return await self._keep(key, medium.features, info.modality, info.duration_seconds)

    async def _encode(
        self, source: MediaFile | MediaBytes, key: str, fps: float, max_frames: int
    ) -> FeatureReference | Refusal:
        if self._sandbox is None or self._encoder is None:
            message = "this server reads no uploads; ask about a stored medium, feature://ID"
            return Refusal(status=400, message=message, code="uploads_disabled")
        decoded = await self._sandbox.decode(source, fps=fps, max_frames=max_frames)
        if isinstance(decoded, Refusal):
            return decoded
        loop = asyncio.get_running_loop()
        features = await loop.run_in_executor(self._encode_thread, self._encoder.encode, decoded.frames)
        return await self._keep(key, features, source.modality, decoded.end_seconds)

    async def _keep(self, key: str, features: Tensor, modality: Modality, duration_seconds: float) -> FeatureReference:
        """Stores (F, N, dim) bfloat16 features and remembers the reference, least recently used out first."""
        bits = features.cpu().contiguous().view(torch.int16).numpy()
        reference = FeatureReference(
            key=key,
            ref=await asyncio.to_thread(self._put, bits),
            num_frames=bits.shape[0],
            num_tokens_per_frame=bits.shape[1],
            modality=modality,
            duration_seconds=duration_seconds,
        )
        self._kept[key] = reference, bits.nbytes
        self._kept_bytes += bits.nbytes
        while self._kept_bytes > self._config.cache_bytes:
            self._kept_bytes -= self._kept.popitem(last=False)[1][1]
        return reference


async def _guarded(make: Callable[[], Awaitable[FeatureReference | Refusal]]) -> FeatureReference | Refusal:
    try:
        return await make()
    except (RuntimeError, OSError) as error:  # the store's disk, the encoder's device: the world, not the client
        logger.error("features could not be made: %s", type(error).__name__, exc_info=True)
        return Refusal(status=503, message="the features could not be made", code="features_failed", retry_after_s=5.0)


def _key(*parts: object) -> str:
    return hashlib.sha256(repr(parts).encode()).hexdigest()

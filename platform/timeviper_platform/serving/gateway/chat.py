"""A chat request as a client wrote it to what the engine is asked: text within limits, and every medium as features.

Knows the three ways to name a medium (data: URI, uploaded file, stored features) and fetches no remote address. Does
not know HTTP, nor what becomes of the answer.
"""

from __future__ import annotations

import asyncio
import secrets
from dataclasses import dataclass, field
from typing import Any

from timeviper_model.inference.answer import SamplingParams
from timeviper_platform.serving.gateway.config import GatewayConfig
from timeviper_platform.serving.gateway.openai_protocol import (
    ApiError,
    ChatCompletionRequest,
    ChatMessage,
    ImagePart,
    MediaLimits,
    TextPart,
)
from timeviper_platform.serving.gateway.uploads import MediaStore, no_such_file, parse_data_uri
from timeviper_platform.serving.messages import (
    ChatTurn,
    FeatureClient,
    FeatureReference,
    FeatureRequest,
    GenerateRequest,
    MediaFile,
    MediaSource,
    Modality,
    Refusal,
    StoredFeatures,
)

FEATURE_SCHEME = "feature://"


class ChatPreparation:
    """Checks conversations and has their media turned into features."""

    def __init__(self, config: GatewayConfig, features: FeatureClient, store: MediaStore) -> None:
        """`store` holds the uploads that conversations may name."""
        self._config = config
        self._features = features
        self._store = store

    async def prepare(self, chat: ChatCompletionRequest, tenant: str) -> GenerateRequest:
        """Checks the conversation and has all of its media turned into features, at the same time."""
        max_new_tokens = chat.max_completion_tokens or chat.max_tokens or self._config.default_max_tokens
        if max_new_tokens > self._config.max_tokens:
            raise ApiError(
                400, f"max_tokens is {max_new_tokens}, the limit {self._config.max_tokens}", code="invalid_value",
                param="max_tokens",
            )  # fmt: skip
        turns = [await self._turn(number, message, tenant) for number, message in enumerate(chat.messages)]
        if sum(len(turn.text) for turn in turns) > self._config.max_text_characters:
            limit = self._config.max_text_characters
            raise ApiError(413, f"the messages have more than {limit} characters", code="too_large", param="messages")
        num_media = sum(len(turn.media) for turn in turns)
        if num_media > self._config.max_media_per_request:
            limit = self._config.max_media_per_request
            raise ApiError(400, f"{num_media} media, the limit is {limit}", code="too_many_media", param="messages")
        limits = chat.mm_processor_kwargs or MediaLimits()
        references = await asyncio.gather(
            *(self._feature(source, param, limits) for turn in turns for source, param in turn.media)
        )
        found = iter(references)
        return GenerateRequest(
            tenant=tenant,
            turns=tuple(
                ChatTurn(role=turn.role, text=turn.text, media=tuple(next(found) for _ in turn.media)) for turn in turns
            ),
            sampling=SamplingParams(
                max_new_tokens=max_new_tokens,
                temperature=self._config.default_temperature if chat.temperature is None else chat.temperature,
                top_p=1.0 if chat.top_p is None else chat.top_p,
                top_k=chat.top_k or 0,
                seed=secrets.randbits(32) if chat.seed is None else chat.seed % 2**63,
                stop=chat.stop_texts(),
                num_logprobs=(chat.top_logprobs or 0) if chat.logprobs else None,
            ),
            n=chat.n or 1,
        )

    async def _turn(self, number: int, message: ChatMessage, tenant: str) -> _SourceTurn:
        role: Any = "system" if message.role == "developer" else message.role
        if isinstance(message.content, str):
            return _SourceTurn(role=role, text=message.content)
        texts: list[str] = []
        media: list[tuple[MediaSource, str]] = []
        for place, part in enumerate(message.content):
            param = f"messages.{number}.content.{place}"
            if isinstance(part, TextPart):
                texts.append(part.text)
                continue
            if role != "user":
                raise ApiError(400, f"a {role} message may hold text alone", code="invalid_value", param=param)
            modality: Modality = "image" if isinstance(part, ImagePart) else "video"
            value = getattr(part, part.type)
            url = value if isinstance(value, str) else value.url
            media.append((await self._source(url, modality, tenant, param), param))
        return _SourceTurn(role=role, text="\n".join(texts), media=media)

    async def _source(self, url: str, modality: Modality, tenant: str, param: str) -> MediaSource:
        if url.startswith(FEATURE_SCHEME):
            return StoredFeatures(media_id=url.removeprefix(FEATURE_SCHEME))
        if url.startswith("data:"):
            return await asyncio.to_thread(parse_data_uri, url, expected=modality, param=param)
        if url.startswith("file-"):
            record = await asyncio.to_thread(self._store.get, tenant, url)
            if record is None:
                raise no_such_file(param)
            if record.modality != modality:
                message = f"the file is a {record.modality}, not a {modality}"
                raise ApiError(415, message, code="unsupported_media_type", param=param)
            return MediaFile(uri=self._store.uri(tenant, record), sha256=record.sha256, modality=modality)
        raise ApiError(
            400,
            "media must be a data: URI, a file id (file-...) or a stored medium (feature://ID); this server does not"
            " fetch remote addresses, upload the file to /v1/files",
            code="remote_media_disabled",
            param=param,
        )

    async def _feature(self, source: MediaSource, param: str, limits: MediaLimits) -> FeatureReference:
        answer = await self._features.features(
            FeatureRequest(source=source, max_frames=limits.max_frames, fps=limits.fps)
        )
        if isinstance(answer, Refusal):
            raise ApiError.from_refusal(answer, param=param)
        return answer


@dataclass(frozen=True, kw_only=True, slots=True)
class _SourceTurn:
    """A message whose media are not features yet; each has the place in the request that it came from."""

    role: Any
    text: str
    media: list[tuple[MediaSource, str]] = field(default_factory=list)

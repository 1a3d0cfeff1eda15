"""Converts chat requests: checks limits and replaces media by features. Never fetches remote addresses."""

from __future__ import annotations

import asyncio
import secrets

from timeviper_model.inference.answer import SamplingParams
from timeviper_platform.serving.gateway.config import GatewayConfig
from timeviper_platform.serving.gateway.openai_protocol import (
    ApiError,
    ChatCompletionRequest,
    ChatMessage,
    ImagePart,
    MediaLimits,
    MediaPart,
    TextPart,
)
from timeviper_platform.serving.gateway.uploads import MediaStore, no_such_file, parse_data_uri
from timeviper_platform.serving.messages import (
    ChatTurn,
    FeatureClient,
    FeatureReference,
    GenerateRequest,
    MediaFile,
    MediaSource,
    Modality,
    Refusal,
    StoredFeatures,
)

FEATURE_SCHEME = "feature://"


class ChatPreparation:
    def __init__(self, config: GatewayConfig, features: FeatureClient, store: MediaStore) -> None:
        self._config = config
        self._features = features
        self._store = store

    async def prepare(self, chat: ChatCompletionRequest, tenant: str) -> GenerateRequest:
        """Returns the engine's request, with all features computed concurrently.

        Raises:
            ApiError: for exceeded limits, unknown media, or a refusal by the feature service.
        """
        max_new_tokens = self._check_limits(chat)
        media = [
            (await self._source(part, message.role, tenant, param), param)
            for index, message in enumerate(chat.messages)
            for part, param in _media_parts(index, message)
        ]
        limits = chat.mm_processor_kwargs or MediaLimits()
        references = iter(await asyncio.gather(*(self._feature(source, param, limits) for source, param in media)))
        return GenerateRequest(
            tenant=tenant,
            turns=tuple(
                ChatTurn(
                    role="system" if message.role == "developer" else message.role,
                    text=_text(message),
                    media=tuple(next(references) for _ in _media_parts(index, message)),
                )
                for index, message in enumerate(chat.messages)
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
            time_text=limits.time_text,
        )

    def _check_limits(self, chat: ChatCompletionRequest) -> int:
        """Returns the maximum number of new tokens."""
        max_new_tokens = chat.max_completion_tokens or chat.max_tokens or self._config.default_max_tokens
        if max_new_tokens > (limit := self._config.max_tokens):
            message = f"max_tokens is {max_new_tokens}, the limit is {limit}"
            raise ApiError(400, message, code="invalid_value", param="max_tokens")
        if sum(len(_text(message)) for message in chat.messages) > (limit := self._config.max_text_characters):
            raise ApiError(413, f"the messages have more than {limit} characters", code="too_large", param="messages")
        num_media = sum(len(_media_parts(index, message)) for index, message in enumerate(chat.messages))
        if num_media > (limit := self._config.max_media_per_request):
            message = f"the messages have {num_media} media, the limit is {limit}"
            raise ApiError(400, message, code="too_many_media", param="messages")
        return max_new_tokens

    async def _source(self, part: MediaPart, role: str, tenant: str, param: str) -> MediaSource:
        if role != "user":
            raise ApiError(400, f"a {role} message may contain only text", code="invalid_value", param=param)
        modality: Modality = "image" if isinstance(part, ImagePart) else "video"
        value = getattr(part, part.type)
        url: str = value if isinstance(value, str) else value.url
        if url.startswith(FEATURE_SCHEME):
            return StoredFeatures(media_id=url.removeprefix(FEATURE_SCHEME))
        if url.startswith("data:"):
            return await asyncio.to_thread(parse_data_uri, url, expected=modality, param=param)
        if url.startswith("file-"):
            record = await asyncio.to_thread(self._store.get, tenant, url)
            if record is None:
                raise no_such_file(param)
            if record.modality != modality and not record.may_be_animation:
                message = f"the file is a {record.modality}, not a {modality}"
                raise ApiError(415, message, code="unsupported_media_type", param=param)
            return MediaFile(uri=self._store.uri(tenant, record), sha256=record.sha256, modality=modality)
        raise ApiError(
            400,
            "media must be a data: URI, a file id (file-...) or a stored medium (feature://ID); this server does not"
            " fetch remote addresses; upload the file to /v1/files",
            code="remote_media_disabled",
            param=param,
        )

    async def _feature(self, source: MediaSource, param: str, limits: MediaLimits) -> FeatureReference:
        answer = await self._features.features(source, fps=limits.fps, max_frames=limits.max_frames)
        if isinstance(answer, Refusal):
            raise ApiError.from_refusal(answer, param=param)
        return answer


def _text(message: ChatMessage) -> str:
    if isinstance(message.content, str):
        return message.content
    return "\n".join(part.text for part in message.content if isinstance(part, TextPart))


def _media_parts(index: int, message: ChatMessage) -> list[tuple[MediaPart, str]]:
    """Returns the media parts, each with its dotted path in the request."""
    if isinstance(message.content, str):
        return []
    return [
        (part, f"messages.{index}.content.{number}")
        for number, part in enumerate(message.content)
        if not isinstance(part, TextPart)
    ]

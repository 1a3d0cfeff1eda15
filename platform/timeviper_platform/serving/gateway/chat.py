"""Converts chat requests: checks limits and replaces media by features."""

from __future__ import annotations

import asyncio
import secrets
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field, replace
from functools import partial
from itertools import groupby
from typing import Any

from timeviper_model.inference.answer import SamplingParams
from timeviper_platform.data.media.signatures import HEAD_BYTES, may_be_animation
from timeviper_platform.serving import tracing
from timeviper_platform.serving.answer_schemas import segments_schema
from timeviper_platform.serving.gateway.chat_request import (
    ChatCompletionRequest,
    ChatMessage,
    FilePart,
    ImagePart,
    MediaLimits,
    MediaPart,
    MediaUrl,
    RefusalPart,
    ResponseFormat,
    TextPart,
)
from timeviper_platform.serving.gateway.config import CurrentConfig, GatewayConfig
from timeviper_platform.serving.gateway.media.remote import FILE, HTTPS, Addresses
from timeviper_platform.serving.gateway.media.uploads import DATA_SCHEME, MediaStore, no_such_file, parse_data_uri
from timeviper_platform.serving.gateway.openai_protocol import ApiError
from timeviper_platform.serving.gateway.schema_checks import SchemaChecks
from timeviper_platform.serving.messages import (
    FEATURE_SCHEME,
    ChatTurn,
    FeatureClient,
    FeatureProgress,
    FeatureReference,
    GenerateRequest,
    MediaAddress,
    MediaBytes,
    MediaFile,
    MediaFrames,
    MediaSource,
    Modality,
    Refusal,
    StoredFeatures,
)

MIN_TOP_P = 1e-6
"""Replaces 0, which clients send to get only the most likely token."""
PARAGRAPH = "\n\n"
"""Joins consecutive messages of one role, because the model's prompt alternates roles."""


@dataclass(frozen=True, kw_only=True, slots=True)
class _Medium:
    source: MediaSource
    offset: int
    """Characters of the message's text before it."""
    limits: MediaLimits
    param: str
    """Dotted path in the request."""
    is_picture: bool
    """By the part's type."""


@dataclass(slots=True)
class _Message:
    """Consecutive messages of one role."""

    role: str
    text: str = ""
    media: list[_Medium] = field(default_factory=list)


class ChatPreparation:
    def __init__(self, current: CurrentConfig, features: FeatureClient, store: MediaStore) -> None:
        self._current = current
        self._features = features
        self._store = store
        self._addresses = Addresses(current.config, store)
        self._schemas = SchemaChecks()

    @property
    def _config(self) -> GatewayConfig:
        return self._current.config

    async def prepare(
        self,
        chat: ChatCompletionRequest,
        tenant: str,
        *,
        note: Callable[[FeatureProgress], None] | None = None,
        whole: bool = False,
    ) -> GenerateRequest:
        """Returns the engine's request, with all features computed concurrently.

        Args:
            note: receives the progress of the features; then waits until all frames are decoded.
            whole: waits for them too. Requests for time spans always wait, because their answers contain the times.

        Raises:
            ApiError: for exceeded limits, unknown media, or a refusal by the feature service.
        """
        answer_format = chat.response_format or ResponseFormat(type="text")
        if (schema := answer_format.schema_text()) is not None:
            await self._schemas.check(schema)
        messages = await self._messages(chat, tenant)
        self._check_limits(messages)
        limits = chat.media_limits()
        media = [medium for message in messages for medium in message.media]
        whole = whole or answer_format.is_segments
        features = await asyncio.gather(*(self._feature(medium, tenant, limits, note, whole) for medium in media))
        references = iter(features)
        wanted = chat.max_completion_tokens or chat.max_tokens or self._config.default_max_tokens
        schema = segments_schema(features) if answer_format.is_segments else schema
        return GenerateRequest(
            tenant=tenant,
            turns=tuple(
                ChatTurn(
                    role=message.role,  # type: ignore[arg-type]  # checked when the request was parsed
                    text=message.text,
                    media=tuple(next(references) for _ in message.media),
                    offsets=tuple(medium.offset for medium in message.media),
                )
                for message in messages
            ),
            sampling=SamplingParams(
                max_new_tokens=min(wanted, self._config.max_tokens),
                temperature=self._config.default_temperature if chat.temperature is None else chat.temperature,
                top_p=1.0 if chat.top_p is None else max(chat.top_p, MIN_TOP_P),
                top_k=max(chat.top_k or 0, 0),
                seed=secrets.randbits(32) if chat.seed is None else chat.seed % 2**63,
                stop=chat.stop_texts(),
                num_logprobs=(chat.top_logprobs or 0) if chat.logprobs else None,
                json_schema=schema,
            ),
            n=chat.n or 1,
            time_text=limits.time_text,
            is_temporal=answer_format.is_segments,
        )

    def _check_limits(self, messages: Sequence[_Message]) -> None:
        if sum(len(message.text) for message in messages) > (limit := self._config.max_text_characters):
            raise ApiError(413, f"the messages have more than {limit} characters", code="too_large", param="messages")
        num_media = sum(len(message.media) for message in messages)
        if num_media > (limit := self._config.max_media_per_request):
            message = f"the messages have {num_media} media, the limit is {limit}"
            raise ApiError(400, message, code="too_many_media", param="messages")

    async def _messages(self, chat: ChatCompletionRequest, tenant: str) -> list[_Message]:
        """Returns messages as in training: an optional system message, then user and assistant in turn.

        Joins consecutive messages of one role. A later system message becomes the user's text; an assistant's first
        message answers an empty question.

        Raises:
            ApiError: 400 if the last message is the assistant's.
        """
        if chat.messages[-1].role == "assistant":
            text = "the last message must not be the assistant's; this server does not continue answers"
            raise ApiError(400, text, code="invalid_value", param=f"messages.{len(chat.messages) - 1}.role")
        messages: list[_Message] = []
        for index, given in enumerate(chat.messages):
            role = "system" if given.role == "developer" else given.role
            own = await self._message(given, role, f"messages.{index}", tenant)
            if role == "system" and any(message.role != "system" for message in messages):
                role = own.role = "user"
            if role == "assistant" and all(message.role == "system" for message in messages):
                messages.append(_Message("user"))
            if not messages or messages[-1].role != role:
                messages.append(own)
                continue
            start = len(messages[-1].text) + len(PARAGRAPH)
            messages[-1].text += PARAGRAPH + own.text
            messages[-1].media += [replace(medium, offset=start + medium.offset) for medium in own.media]
        return messages

    async def _message(self, message: ChatMessage, role: str, path: str, tenant: str) -> _Message:
        if isinstance(message.content, str):
            return _Message(role, message.content)
        result = _Message(role)
        run: list[_Medium] = []
        after_text = False
        for number, part in enumerate(message.content):
            if isinstance(part, TextPart | RefusalPart):
                result.media += await self._joined(run, tenant)
                run = []
                result.text += ("\n" if after_text else "") + part.text
                after_text = True
                continue
            after_text = False
            param = f"{path}.content.{number}"
            if role != "user":
                raise ApiError(400, f"a {role} message may contain only text", code="invalid_value", param=param)
            source = await self._source(part, tenant, param)
            limits, is_picture = _own_limits(part), isinstance(part, ImagePart)
            run.append(
                _Medium(source=source, offset=len(result.text), limits=limits, param=param, is_picture=is_picture)
            )
        result.media += await self._joined(run, tenant)
        return result

    async def _joined(self, run: Sequence[_Medium], tenant: str) -> list[_Medium]:
        """Joins consecutive pictures as the frames of one video."""
        result: list[_Medium] = []
        for are_pictures, group in groupby(run, lambda medium: medium.is_picture):
            media = list(group)
            if are_pictures and len(media) > 1:  # at an address, only the content shows whether it is a still picture
                media = await asyncio.gather(*(self._loaded(medium, tenant) for medium in media))
            result += media
        return _with_frames(result)

    async def _loaded(self, medium: _Medium, tenant: str) -> _Medium:
        if not isinstance(medium.source, MediaAddress):
            return medium
        return replace(medium, source=await self._addresses.load(medium.source, tenant, medium.param))

    async def _source(self, part: MediaPart, tenant: str, param: str) -> MediaSource:
        modality: Modality | None = (
            None if isinstance(part, FilePart) else "image" if isinstance(part, ImagePart) else "video"
        )
        url = part.value.url if isinstance(part.value, MediaUrl) else part.value
        if url is None:
            raise ApiError(400, "the part names no medium", code="missing_required_parameter", param=param)
        scheme = url[: len(FEATURE_SCHEME)].lower()
        if scheme == FEATURE_SCHEME:
            return StoredFeatures(media_id=url[len(FEATURE_SCHEME) :])
        if scheme.startswith(DATA_SCHEME):
            parse = partial(parse_data_uri, max_frames=self._config.max_parts_per_request)
            return await asyncio.to_thread(parse, url, expected=modality, param=param)
        if scheme.startswith("file-"):
            record = await asyncio.to_thread(self._store.get, tenant, url)
            if record is None:
                raise no_such_file(param)
            if modality not in (None, record.modality) and not record.may_be_animation:
                message = f"the file is a {record.modality}, not a {modality}"
                raise ApiError(415, message, code="unsupported_media_type", param=param)
            uri = self._store.uri(tenant, record)
            is_animation = record.may_be_animation
            return MediaFile(uri=uri, sha256=record.sha256, modality="video" if is_animation else record.modality)
        if scheme.startswith((HTTPS, FILE)):
            return await self._addresses.check(url, param)
        raise ApiError(
            400,
            "media must be a data: URI, a file id (file-...), a stored medium (feature://ID), or an https:// or file://"
            " address that this server may read",
            code="invalid_url",
            param=param,
        )

    async def _feature(
        self,
        medium: _Medium,
        tenant: str,
        limits: MediaLimits,
        note: Callable[[FeatureProgress], None] | None,
        whole: bool,
    ) -> FeatureReference:
        lowest = limits.lower_of(medium.limits)
        get = partial(self._features.features, tenant=tenant, fps=lowest.fps, max_frames=lowest.max_frames, whole=whole)
        if note is not None:
            get = partial(self._watched, note=note, tenant=tenant, fps=lowest.fps, max_frames=lowest.max_frames)
        answer = await get(medium.source)
        if (
            isinstance(medium.source, MediaAddress)
            and isinstance(answer, Refusal)
            and answer.code == "media_not_found"  # the store does not have the address, but perhaps the content
        ):
            with tracing.span("fetch"):
                file = await self._addresses.load(medium.source, tenant, medium.param)
            answer = await get(file)
        if isinstance(answer, Refusal):
            raise ApiError.from_refusal(answer, param=medium.param)
        if answer.stream is not None:
            answer = replace(answer, stream=replace(answer.stream, param=medium.param))
        return answer

    async def _watched(
        self,
        source: MediaSource,
        *,
        note: Callable[[FeatureProgress], None],
        **options: Any,
    ) -> FeatureReference | Refusal:
        async for item in self._features.watch(source, **options):
            if not isinstance(item, FeatureProgress):
                return item
            note(item)
        message = "the feature service ended without an answer, try again"
        return Refusal(status=503, message=message, code="unavailable")


def _own_limits(part: MediaPart) -> MediaLimits:
    value = part.value
    return MediaLimits(fps=value.fps, max_frames=value.max_frames) if isinstance(value, MediaUrl) else MediaLimits()


def _with_frames(run: Sequence[_Medium]) -> list[_Medium]:
    result: list[_Medium] = []
    for are_frames, group in groupby(run, lambda medium: _is_still(medium.source)):
        media = list(group)
        if are_frames and len(media) > 1:
            frames = [medium.source for medium in media if isinstance(medium.source, MediaFile | MediaBytes)]
            media = [replace(media[0], source=MediaFrames.of(frames))]
        result += media
    return result


def _is_still(source: MediaSource) -> bool:
    if not isinstance(source, MediaFile | MediaBytes) or source.modality != "image":
        return False
    return isinstance(source, MediaFile) or not may_be_animation(source.data[:HEAD_BYTES])

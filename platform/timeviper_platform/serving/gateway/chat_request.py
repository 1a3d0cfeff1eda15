"""The body of POST /v1/chat/completions: bounded before it is parsed, in the forms that clients send.

Nulls and fields without effect on the answer are left out; unsupported fields with an effect are errors by name.
"""

from __future__ import annotations

import json
import re
from collections.abc import Iterator, Mapping
from typing import Annotated, Any, Literal, TypeVar

from pydantic import BaseModel, ConfigDict, Field, ValidationError

from timeviper_platform.serving.answer_schemas import SEGMENTS
from timeviper_platform.serving.gateway.openai_protocol import ApiError

MAX_MESSAGES = 256
MAX_STOPS = 4
MAX_SCHEMA_CHARACTERS = 65_536
MAX_MESSAGE_CHARACTERS = 500
MAX_FIELD_CHARACTERS = 64
"""Longest name of an unknown field that an error repeats."""

IGNORED = frozenset(
    [
        "user",
        "metadata",
        "store",
        "service_tier",
        "prompt_cache_key",
        "prompt_cache_retention",
        "safety_identifier",
        "parallel_tool_calls",
        "reasoning_effort",
        "verbosity",
        "prediction",
        "priority",
        "request_id",
        "cache_salt",
        "include_reasoning",
    ]
)
"""Fields without effect on the answer's text."""

NEUTRAL: dict[str, tuple[Any, ...]] = {
    "tools": ([],),
    "functions": ([],),
    "tool_choice": ("auto", "none"),
    "function_call": ("auto", "none"),
    "logit_bias": ({},),
    "presence_penalty": (0,),
    "frequency_penalty": (0,),
    "repetition_penalty": (1,),
    "length_penalty": (1,),
    "min_p": (0,),
    "min_tokens": (0,),
    "best_of": (1,),
    "modalities": (["text"],),
    "stop_token_ids": ([],),
    "chat_template_kwargs": ({}, {"enable_thinking": False}),
    "use_beam_search": (False,),
    "ignore_eos": (False,),
    "echo": (False,),
    "include_stop_str_in_output": (False,),
    "continue_final_message": (False,),
    "add_generation_prompt": (True,),
    "skip_special_tokens": (True,),
    "spaces_between_special_tokens": (True,),
}
"""Fields that the server does not support, with the values that request nothing."""

UNSUPPORTED = frozenset(
    [
        "audio",
        "web_search_options",
        "guided_json",
        "guided_regex",
        "guided_choice",
        "guided_grammar",
        "structured_outputs",
        "documents",
        "chat_template",
        "logits_processors",
        "bad_words",
        "prompt_logprobs",
        "truncate_prompt_tokens",
    ]
)

MESSAGE_FIELDS = frozenset(("role", "content"))
IGNORED_IN_MESSAGE = frozenset(
    [
        "name",
        "refusal",
        "annotations",
        "reasoning",
        "reasoning_content",
        "provider_specific_fields",
        "id",
        "type",
        "status",
        "cache_control",
    ]
)
NEUTRAL_IN_MESSAGE: dict[str, tuple[Any, ...]] = {"tool_calls": ([],), "prefix": (False,), "partial": (False,)}
UNSUPPORTED_IN_MESSAGE = frozenset(("tool_call_id", "function_call", "audio"))

PIXEL_LIMITS = frozenset(
    ["min_pixels", "max_pixels", "total_pixels", "resized_height", "resized_width", "size", "do_resize"]
)
"""Image sizes of other models, ignored: this model's vision tower has a fixed one."""
LIMIT_NAMES = {"num_frames": "max_frames", "nframes": "max_frames"}
"""Other servers' names of limits."""

Model = TypeVar("Model", bound=BaseModel)

_SURROGATE = re.compile(rb"\\u[dD][89a-fA-F]")


class _Lenient(BaseModel):
    """Clients add fields of their own to parts."""

    model_config = ConfigDict(extra="ignore", frozen=True)


class MediaLimits(BaseModel):
    """Frame sampling, and how prompts name videos. Values above the server's limits have no effect."""

    model_config = ConfigDict(extra="forbid", frozen=True)

    fps: float | None = Field(default=None, gt=0, allow_inf_nan=False)
    max_frames: int | None = Field(default=None, ge=1)
    """Also called `num_frames` and `nframes`."""
    time_text: bool | None = None
    """Whether to state each video's length, as training does for questions about times; None = as trained."""

    def lower_of(self, other: MediaLimits) -> MediaLimits:
        return MediaLimits(
            fps=min(filter(None, (self.fps, other.fps)), default=None),
            max_frames=min(filter(None, (self.max_frames, other.max_frames)), default=None),
            time_text=self.time_text if other.time_text is None else other.time_text,
        )


class MediaUrl(_Lenient):
    url: str
    """data: URI, id of an upload (file-...), feature://ID, or an address that the server may read."""
    fps: float | None = Field(default=None, gt=0, allow_inf_nan=False)
    max_frames: int | None = Field(default=None, ge=1)


class TextPart(_Lenient):
    type: Literal["text", "input_text", "output_text"]
    text: str


class RefusalPart(_Lenient):
    """Part of an assistant's message that is sent back."""

    type: Literal["refusal"]
    refusal: str

    @property
    def text(self) -> str:
        return self.refusal


class ImagePart(_Lenient):
    type: Literal["image_url", "input_image"]
    image_url: MediaUrl | str | None = None
    file_id: str | None = None

    @property
    def value(self) -> MediaUrl | str | None:
        return self.image_url if self.file_id is None else self.file_id


class VideoPart(_Lenient):
    type: Literal["video_url"]
    video_url: MediaUrl | str

    @property
    def value(self) -> MediaUrl | str | None:
        return self.video_url


class InputVideoPart(_Lenient):
    """Other servers' name for `video_url`."""

    type: Literal["input_video"]
    input_video: MediaUrl | str

    @property
    def value(self) -> MediaUrl | str | None:
        return self.input_video


class FileContent(_Lenient):
    file_id: str | None = None
    file_data: str | None = None
    """data: URI, or an address that the server may read."""


class FilePart(_Lenient):
    """A video or a picture, whichever the file is."""

    type: Literal["file"]
    file: FileContent

    @property
    def value(self) -> MediaUrl | str | None:
        return self.file.file_id or self.file.file_data


MediaPart = ImagePart | VideoPart | InputVideoPart | FilePart
ContentPart = Annotated[TextPart | RefusalPart | MediaPart, Field(discriminator="type")]


class ChatMessage(_Lenient):
    role: Literal["system", "developer", "user", "assistant"]
    content: str | Annotated[list[ContentPart], Field(fail_fast=True)] = ""


class StreamOptions(_Lenient):
    include_usage: bool = False


class JsonSchema(_Lenient):
    name: str = ""
    """`segments` without a schema is the built-in schema of time spans."""
    json_schema: dict[str, Any] | None = Field(default=None, alias="schema")


class ResponseFormat(_Lenient):
    type: Literal["text", "json_object", "json_schema"]
    json_schema: JsonSchema | None = None

    @property
    def is_segments(self) -> bool:
        own = self.json_schema
        return self.type == "json_schema" and own is not None and own.json_schema is None and own.name == SEGMENTS

    def schema_text(self) -> str | None:
        """Returns the client's JSON schema; None for text and the built-in schema."""
        if self.type == "text" or self.is_segments:
            return None
        own = None if self.json_schema is None else self.json_schema.json_schema
        return json.dumps({"type": "object"} if self.type == "json_object" else own)


class MediaIo(_Lenient):
    """vLLM's name of frame sampling."""

    video: MediaLimits | None = None


class ChatCompletionRequest(BaseModel):
    """Fields that have no effect on the answer are ignored; unknown ones are errors."""

    model_config = ConfigDict(extra="forbid", frozen=True)

    model: str
    messages: list[ChatMessage] = Field(min_length=1, max_length=MAX_MESSAGES, fail_fast=True)
    stream: bool = False
    stream_options: StreamOptions | None = None
    max_tokens: int | None = Field(default=None, ge=1)
    """Values above the server's limit are lowered to it."""
    max_completion_tokens: int | None = Field(default=None, ge=1)
    temperature: float | None = Field(default=None, ge=0, le=2, allow_inf_nan=False)
    top_p: float | None = Field(default=None, ge=0, le=1, allow_inf_nan=False)
    top_k: int | None = Field(default=None, ge=-1)
    n: int | None = Field(default=None, ge=1, le=4)
    stop: str | Annotated[list[str], Field(max_length=MAX_STOPS, fail_fast=True)] | None = None
    seed: int | None = Field(default=None, ge=-(2**63), lt=2**63)
    logprobs: bool | None = None
    top_logprobs: int | None = Field(default=None, ge=0, le=20)
    mm_processor_kwargs: MediaLimits | None = None
    media_io_kwargs: MediaIo | None = None
    fps: float | None = Field(default=None, gt=0, allow_inf_nan=False)
    max_frames: int | None = Field(default=None, ge=1)
    response_format: ResponseFormat | None = None

    @property
    def has_media(self) -> bool:
        lists = (message.content for message in self.messages if not isinstance(message.content, str))
        return any(not isinstance(part, TextPart | RefusalPart) for parts in lists for part in parts)

    def stop_texts(self) -> tuple[str, ...]:
        return (self.stop,) if isinstance(self.stop, str) else tuple(self.stop or ())

    def media_limits(self) -> MediaLimits:
        """Returns the lowest limits, wherever the client has put them."""
        limits = MediaLimits(fps=self.fps, max_frames=self.max_frames)
        video = None if self.media_io_kwargs is None else self.media_io_kwargs.video
        for other in (self.mm_processor_kwargs, video):
            limits = limits if other is None else limits.lower_of(other)
        return limits


def count_values(body: bytes) -> int:
    """Bounds the number of JSON values before parsing, by commas and brackets, in texts too.

    An empty list takes 3 bytes in JSON and 56 in Python.
    """
    return sum(body.count(mark) for mark in (b",", b"[", b"{"))


def parse_chat_request(body: bytes, *, max_parts: int = 2048) -> ChatCompletionRequest:
    """Parses and checks a request, whose values were counted.

    Raises:
        ApiError: 400 with the name of the invalid field.
    """
    return chat_request(parse_object(body), max_parts=max_parts)


def chat_request(values: dict[str, Any], *, max_parts: int = 2048) -> ChatCompletionRequest:
    """Checks a parsed body.

    Raises:
        ApiError: 400 with the name of the invalid field.
    """
    values = _without_neutral(values, IGNORED, NEUTRAL, UNSUPPORTED)
    messages = values.get("messages")
    if isinstance(messages, list):
        _check_counts(messages, max_parts)
        values["messages"] = [_plain_message(message, f"messages.{index}.") for index, message in enumerate(messages)]
    for name in ("mm_processor_kwargs", "media_io_kwargs"):
        if isinstance(values.get(name), dict):
            values[name] = _plain_limits(values[name])
    values = _plain_limits(values)
    if values.get("response_format") == {}:
        del values["response_format"]
    request = validated(ChatCompletionRequest, values)
    if request.top_logprobs and not request.logprobs:
        raise ApiError(400, "top_logprobs needs logprobs: true", code="invalid_value", param="top_logprobs")
    _check_format(request.response_format)
    if "" in request.stop_texts():
        raise ApiError(400, "an empty stop would end every answer at once", code="invalid_value", param="stop")
    return request


def _check_format(given: ResponseFormat | None) -> None:
    if given is None or given.type != "json_schema" or given.is_segments:
        return
    if given.json_schema is None or given.json_schema.json_schema is None:
        text = f"a json_schema needs its schema, or the name {SEGMENTS!r} of the built-in one"
        raise ApiError(400, text, code="missing_required_parameter", param="response_format.json_schema.schema")
    if len(given.schema_text() or "") > MAX_SCHEMA_CHARACTERS:
        text = f"the schema has more than {MAX_SCHEMA_CHARACTERS} characters"
        raise ApiError(400, text, code="invalid_value", param="response_format.json_schema.schema")


def parse_object(body: bytes) -> dict[str, Any]:
    """Parses a JSON object.

    Raises:
        ApiError: 400 for anything else.
    """
    try:
        values = json.loads(body)
        if _SURROGATE.search(body):  # half of a pair is not text
            json.dumps(values, ensure_ascii=False).encode()
    except (ValueError, RecursionError) as error:  # ValueError also for integers of thousands of digits
        where = f" at character {error.pos}" if isinstance(error, json.JSONDecodeError) else ""
        raise ApiError(400, f"the body is not valid JSON{where}", code="invalid_json") from None
    if not isinstance(values, dict):
        raise ApiError(400, "the body must be a JSON object", code="invalid_json")
    return values


def validated(model: type[Model], values: object) -> Model:
    """Raises ApiError 400 with the field's dotted path."""
    try:
        return model.model_validate(values)
    except ValidationError as error:
        errors = error.errors(include_url=False, include_input=False, include_context=False)
        deepest = max(errors, key=lambda item: len(item["loc"]))  # the error of the union's intended branch
        param = ".".join(str(part)[:MAX_FIELD_CHARACTERS] for part in deepest["loc"])
        codes = {"missing": "missing_required_parameter", "extra_forbidden": "unknown_parameter"}
        code = codes.get(deepest["type"], "invalid_value")
        message = f"{param}: {deepest['msg']}"  # which repeats an unknown type, of any length
        raise ApiError(400, message[:MAX_MESSAGE_CHARACTERS], code=code, param=param) from None


def _check_counts(messages: list[Any], max_parts: int) -> None:
    if len(messages) > MAX_MESSAGES:
        text = f"{len(messages)} messages, the limit is {MAX_MESSAGES}"
        raise ApiError(400, text, code="invalid_value", param="messages")
    num_parts = sum(len(content) for content in _lists_of_parts(messages))
    if num_parts > max_parts:
        text = f"the messages have {num_parts} content parts, the limit is {max_parts}"
        raise ApiError(400, text, code="too_many_parts", param="messages")


def _lists_of_parts(messages: list[Any]) -> Iterator[list[Any]]:
    for message in messages:
        if isinstance(message, dict) and isinstance(message.get("content"), list):
            yield message["content"]


def _plain_message(message: Any, path: str) -> Any:
    if not isinstance(message, dict):
        return message
    role = message.get("role")
    if role in ("tool", "function"):
        raise _unsupported("tool calls", f"{path}role")
    if message.get("content") is None and isinstance(message.get("refusal"), str):
        message = {**message, "content": message["refusal"]}
    plain = _without_neutral(message, IGNORED_IN_MESSAGE, NEUTRAL_IN_MESSAGE, UNSUPPORTED_IN_MESSAGE, path)
    unknown = next((name for name in plain if name not in MESSAGE_FIELDS), None)
    if unknown is not None:
        param = path + unknown[:MAX_FIELD_CHARACTERS]
        raise ApiError(400, f"{param}: Extra inputs are not permitted", code="unknown_parameter", param=param)
    if isinstance(plain.get("content"), list):
        plain["content"] = [_plain_part(part) for part in plain["content"]]
    return plain


def _plain_part(part: Any) -> Any:
    """Leaves out nulls, also of the medium's address."""
    if not isinstance(part, dict):
        return part
    return {
        name: _plain_limits(value) if isinstance(value, dict) else value
        for name, value in part.items()
        if value is not None
    }


def _plain_limits(values: Mapping[str, Any]) -> dict[str, Any]:
    """Renames other servers' limits; leaves out nulls, sizes in pixels, and -1, which means no limit."""
    plain: dict[str, Any] = {}
    for name, value in values.items():
        name = LIMIT_NAMES.get(name, name)
        is_limit = name in ("max_frames", "fps")
        if value is None or name in PIXEL_LIMITS or (is_limit and value == -1):
            continue
        if is_limit and name in plain and type(value) in (int, float) and type(plain[name]) in (int, float):
            value = min(value, plain[name])
        plain[name] = _plain_limits(value) if name == "video" and isinstance(value, dict) else value
    return plain


def _without_neutral(
    values: Mapping[str, Any],
    ignored: frozenset[str],
    neutral: Mapping[str, tuple[Any, ...]],
    unsupported: frozenset[str],
    path: str = "",
) -> dict[str, Any]:
    plain = {}
    for name, value in values.items():
        if value is None or name in ignored or (name in neutral and value in neutral[name]):
            continue
        if name in neutral or name in unsupported:
            raise _unsupported(name, path + name)
        plain[name] = value
    return plain


def _unsupported(name: str, param: str) -> ApiError:
    return ApiError(
        400, f"this server does not support {name}; leave it out", code="unsupported_parameter", param=param
    )

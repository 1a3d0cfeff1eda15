"""OpenAI's chat-completions format: requests, answers, streamed chunks and errors."""

from __future__ import annotations

import json
import time
import uuid
from collections.abc import Mapping, Sequence
from typing import Annotated, Any, Literal

from pydantic import BaseModel, ConfigDict, Field, ValidationError

from timeviper_model.inference.answer import Usage
from timeviper_platform.serving.messages import AnswerDelta, Refusal, TokenLogprob

ERROR_TYPES: dict[int, str] = {
    401: "authentication_error",
    404: "not_found_error",
    408: "timeout_error",
    429: "rate_limit_error",
    500: "server_error",
    503: "server_error",
}
"""OpenAI's `type` of an error; all other statuses are invalid_request_error."""


class ApiError(Exception):
    """An error response in OpenAI's format. `message` must not quote the client's content."""

    def __init__(
        self, status: int, message: str, *, code: str, param: str | None = None, retry_after_s: float | None = None
    ) -> None:
        super().__init__(message)
        self.status = status
        self.message = message
        self.code = code
        self.param = param
        self.retry_after_s = retry_after_s

    @classmethod
    def from_refusal(cls, refusal: Refusal, *, param: str | None = None) -> ApiError:
        """Converts a service's refusal. `param` is the field at fault where the refusal names none."""
        return cls(
            refusal.status,
            refusal.message,
            code=refusal.code,
            param=refusal.param or param,
            retry_after_s=refusal.retry_after_s,
        )

    def body(self) -> dict[str, Any]:
        kind = ERROR_TYPES.get(self.status, "invalid_request_error")
        return {"error": {"message": self.message, "type": kind, "param": self.param, "code": self.code}}

    def headers(self) -> dict[str, str]:
        return {} if self.retry_after_s is None else {"Retry-After": str(max(1, round(self.retry_after_s)))}


class _Strict(BaseModel):
    model_config = ConfigDict(extra="forbid", frozen=True)


class _Url(_Strict):
    url: str
    detail: Literal["auto", "low", "high"] | None = None


class TextPart(_Strict):
    type: Literal["text", "input_text"]
    text: str


class ImagePart(_Strict):
    type: Literal["image_url"]
    image_url: _Url | str


class VideoPart(_Strict):
    type: Literal["video_url"]
    video_url: _Url | str


class InputVideoPart(_Strict):
    """Other servers' name for `video_url`."""

    type: Literal["input_video"]
    input_video: _Url | str


MediaPart = ImagePart | VideoPart | InputVideoPart
ContentPart = Annotated[TextPart | MediaPart, Field(discriminator="type")]


class ChatMessage(_Strict):
    role: Literal["system", "developer", "user", "assistant"]
    content: str | list[ContentPart]
    name: str | None = None


class StreamOptions(_Strict):
    include_usage: bool = False
    include_obfuscation: bool = False


class MediaLimits(_Strict):
    """Frame sampling, and how prompts name videos. Values above the server's limits have no effect."""

    fps: float | None = Field(default=None, gt=0, allow_inf_nan=False)
    max_frames: int | None = Field(default=None, ge=1)
    time_text: bool | None = None
    """Whether to state each video's length, as training does for questions about times; None = as trained."""


class ResponseFormat(_Strict):
    """Only plain text is supported."""

    type: Literal["text"]


class ChatCompletionRequest(_Strict):
    """The body of POST /v1/chat/completions. Unknown fields are errors."""

    model: str
    messages: list[ChatMessage] = Field(min_length=1, max_length=256)
    stream: bool = False
    stream_options: StreamOptions | None = None
    max_tokens: int | None = Field(default=None, ge=1)
    max_completion_tokens: int | None = Field(default=None, ge=1)
    temperature: float | None = Field(default=None, ge=0, le=2, allow_inf_nan=False)
    top_p: float | None = Field(default=None, gt=0, le=1, allow_inf_nan=False)
    top_k: int | None = Field(default=None, ge=0)
    n: int | None = Field(default=None, ge=1, le=4)
    stop: str | list[str] | None = None
    seed: int | None = Field(default=None, ge=-(2**63), lt=2**63)
    logprobs: bool | None = None
    top_logprobs: int | None = Field(default=None, ge=0, le=20)
    mm_processor_kwargs: MediaLimits | None = None
    response_format: ResponseFormat | None = None
    presence_penalty: Literal[0] | None = None
    frequency_penalty: Literal[0] | None = None
    user: str | None = None
    metadata: dict[str, str] | None = None
    store: Literal[False] | None = None

    def stop_texts(self) -> tuple[str, ...]:
        stop = (self.stop,) if isinstance(self.stop, str) else tuple(self.stop or ())
        if len(stop) > 4 or "" in stop:
            raise ApiError(400, "stop takes up to 4 non-empty strings", code="invalid_value", param="stop")
        return stop


def parse_chat_request(body: bytes) -> ChatCompletionRequest:
    """Parses and checks a request.

    Raises:
        ApiError: 400 with the name of the invalid field.
    """
    values = _parse_object(body)
    try:
        request = ChatCompletionRequest.model_validate(values)
    except ValidationError as error:
        errors = error.errors(include_url=False, include_input=False, include_context=False)
        deepest = max(errors, key=lambda item: len(item["loc"]))  # the error of the union's intended branch
        param = ".".join(str(part) for part in deepest["loc"])
        raise ApiError(400, f"{param}: {deepest['msg']}", code=_error_code(deepest["type"]), param=param) from None
    if request.top_logprobs and not request.logprobs:
        raise ApiError(400, "top_logprobs needs logprobs: true", code="invalid_value", param="top_logprobs")
    if request.stream_options is not None and not request.stream:
        raise ApiError(400, "stream_options needs stream: true", code="invalid_value", param="stream_options")
    return request


def _parse_object(body: bytes) -> dict[str, Any]:
    try:
        values = json.loads(body)
        if b"\\u" in body:  # an escape can be half a surrogate pair, which is not text
            json.dumps(values, ensure_ascii=False).encode()
    except (ValueError, RecursionError) as error:  # ValueError also for integers of thousands of digits
        where = f" at character {error.pos}" if isinstance(error, json.JSONDecodeError) else ""
        raise ApiError(400, f"the body is not valid JSON{where}", code="invalid_json") from None
    if not isinstance(values, dict):
        raise ApiError(400, "the body must be a JSON object", code="invalid_json")
    return values


def _error_code(kind: str) -> str:
    return {"missing": "missing_required_parameter", "extra_forbidden": "unknown_parameter"}.get(kind, "invalid_value")


class Completion:
    """JSON of the answers to one request, whole or in chunks."""

    def __init__(self, model: str, *, num_choices: int, with_logprobs: bool) -> None:
        self.id = f"chatcmpl-{uuid.uuid4().hex}"
        self._created = int(time.time())
        self._model = model
        self._with_logprobs = with_logprobs
        self._deltas: list[list[AnswerDelta]] = [[] for _ in range(num_choices)]

    def add(self, delta: AnswerDelta) -> None:
        self._deltas[delta.index].append(delta)

    def response(self) -> dict[str, Any]:
        """Returns a chat.completion."""
        choices = []
        for index, deltas in enumerate(self._deltas):
            logprobs = [entry for delta in deltas for entry in delta.logprobs]
            choices.append(
                {
                    "index": index,
                    "message": {
                        "role": "assistant",
                        "content": "".join(delta.text for delta in deltas),
                        "refusal": None,
                    },
                    "logprobs": {"content": _logprobs_json(logprobs)} if self._with_logprobs else None,
                    "finish_reason": deltas[-1].finish_reason,
                }
            )
        return {**self._head("chat.completion"), "choices": choices, "usage": self.usage()}

    def opening(self, index: int) -> dict[str, Any]:
        """Returns the first chunk of a choice."""
        return self._chunk({"index": index, "delta": {"role": "assistant", "content": ""}, "finish_reason": None})

    def chunks(self, delta: AnswerDelta) -> list[dict[str, Any]]:
        """Returns a chunk for the text, if any, and one for the end of the answer."""
        chunks = []
        if delta.text or delta.logprobs:
            choice: dict[str, Any] = {"index": delta.index, "delta": {"content": delta.text}, "finish_reason": None}
            if self._with_logprobs:
                choice["logprobs"] = {"content": _logprobs_json(delta.logprobs)}
            chunks.append(self._chunk(choice))
        if delta.finish_reason is not None:
            chunks.append(self._chunk({"index": delta.index, "delta": {}, "finish_reason": delta.finish_reason}))
        return chunks

    def usage_chunk(self) -> dict[str, Any]:
        """Returns the last chunk of a stream with `include_usage`."""
        return {**self._head("chat.completion.chunk"), "choices": [], "usage": self.usage()}

    def usage(self) -> dict[str, Any]:
        """Counts the prompt once for all answers, as in OpenAI's API."""
        usages = [delta.usage for deltas in self._deltas for delta in deltas if delta.usage is not None]
        first = usages[0] if usages else Usage()
        completion_tokens = sum(usage.completion_tokens for usage in usages)
        return {
            "prompt_tokens": first.prompt_tokens,
            "completion_tokens": completion_tokens,
            "total_tokens": first.prompt_tokens + completion_tokens,
            "prompt_tokens_details": {
                "cached_tokens": first.cached_tokens,
                "vision_tokens": first.vision_tokens,
                "vision_tokens_after_transv": first.vision_tokens_kept,
            },
        }

    def _chunk(self, choice: Mapping[str, Any]) -> dict[str, Any]:
        return {**self._head("chat.completion.chunk"), "choices": [choice]}

    def _head(self, kind: str) -> dict[str, Any]:
        return {"id": self.id, "object": kind, "created": self._created, "model": self._model}


def _logprobs_json(entries: Sequence[TokenLogprob]) -> list[dict[str, Any]]:
    return [
        {**_logprob_json(entry.token, entry.logprob), "top_logprobs": [_logprob_json(*pair) for pair in entry.top]}
        for entry in entries
    ]


def _logprob_json(token: str, logprob: float) -> dict[str, Any]:
    return {"token": token, "logprob": logprob, "bytes": list(token.encode())}


def sse(value: dict[str, Any] | str) -> bytes:
    """Formats a server-sent event; JSON contains no raw line break."""
    text = value if isinstance(value, str) else json.dumps(value, ensure_ascii=False, separators=(",", ":"))
    return f"data: {text}\n\n".encode()

"""OpenAI's chat-completions format: answers, streamed chunks and errors."""

from __future__ import annotations

import json
import time
import uuid
from collections.abc import Mapping, Sequence
from typing import Any

from timeviper_model.inference.answer import Usage
from timeviper_platform.serving.messages import AnswerDelta, FeatureReference, Refusal, TokenLogprob

ERROR_TYPES: dict[int, str] = {
    401: "authentication_error",
    403: "permission_error",
    404: "not_found_error",
    408: "timeout_error",
    429: "rate_limit_error",
    500: "server_error",
    503: "server_error",
}
"""OpenAI's `type` of an error; all other statuses are invalid_request_error."""


FUTILE = ("timeout", "decode_timeout", "insufficient_quota")
"""Codes of 408 and 429, which OpenAI's packages would otherwise send again at once, twice."""


class ApiError(Exception):
    """An error response in OpenAI's format. `message` must not quote the client's content."""

    def __init__(
        self,
        status: int,
        message: str,
        *,
        code: str,
        param: str | None = None,
        retry_after_s: float | None = None,
        closes: bool = False,
    ) -> None:
        """`closes` ends the connection after the answer."""
        super().__init__(message)
        self.status = status
        self.message = message
        self.code = code
        self.param = param
        self.retry_after_s = retry_after_s
        self.closes = closes

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
        retry = {} if self.retry_after_s is None else {"Retry-After": str(max(1, round(self.retry_after_s)))}
        if self.code in FUTILE:
            retry["x-should-retry"] = "false"
        return retry | ({"Connection": "close"} if self.closes else {})


class Completion:
    """JSON of the answers to one request, whole or in chunks."""

    def __init__(self, model: str, *, num_choices: int, with_logprobs: bool) -> None:
        self.id = f"chatcmpl-{uuid.uuid4().hex}"
        self._created = int(time.time())
        self._model = model
        self._with_logprobs = with_logprobs
        self._media: list[dict[str, Any]] = []
        self._deltas: list[list[AnswerDelta]] = [[] for _ in range(num_choices)]

    def show_media(self, media: Sequence[FeatureReference]) -> None:
        """Adds the media that define the clock of the answers' times."""
        self._media = [
            {"duration_seconds": medium.duration_seconds, "frame_times_seconds": list(medium.times_seconds)}
            for medium in media
        ]

    def add(self, delta: AnswerDelta) -> None:
        self._deltas[delta.index].append(delta)

    @property
    def is_finished(self) -> bool:
        return all(deltas and deltas[-1].finish_reason is not None for deltas in self._deltas)

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
        own = {"media": self._media} if self._media else {}
        return {**self._head("chat.completion"), "choices": choices, "usage": self.usage(), **own}

    def opening(self, index: int) -> dict[str, Any]:
        """Returns the first chunk of a choice."""
        chunk = self._chunk({"index": index, "delta": {"role": "assistant", "content": ""}, "finish_reason": None})
        return {**chunk, "media": self._media} if self._media and index == 0 else chunk

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


class ChatStream:
    """Server-sent events of a chat completion."""

    def __init__(self, completion: Completion, *, include_usage: bool) -> None:
        self._completion = completion
        self._include_usage = include_usage
        self._opened: set[int] = set()

    def opening(self) -> bytes:
        return b""

    def delta(self, delta: AnswerDelta) -> bytes:
        chunks = self._completion.chunks(delta)
        if delta.index not in self._opened:
            self._opened.add(delta.index)
            chunks.insert(0, self._completion.opening(delta.index))
        return b"".join(sse({**chunk, "usage": None} if self._include_usage else chunk) for chunk in chunks)

    def end(self) -> bytes:
        usage = sse(self._completion.usage_chunk()) if self._include_usage else b""
        return usage + sse("[DONE]")

    def error(self, error: ApiError) -> bytes:
        return sse(error.body())


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

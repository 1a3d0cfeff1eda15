"""OpenAI's Responses API as chat completions: requests, whole answers and streamed events. Nothing is stored."""

from __future__ import annotations

import json
import time
import uuid
from collections.abc import Mapping
from typing import Any

from timeviper_platform.serving.gateway.openai_protocol import ApiError, Completion
from timeviper_platform.serving.messages import AnswerDelta

RENAMED = {"max_output_tokens": "max_completion_tokens"}
SHARED = frozenset(
    {
        "model",
        "temperature",
        "top_p",
        "stream",
        "seed",
        "top_k",
        "mm_processor_kwargs",
        "media_io_kwargs",
        "nframes",
        "fps",
        "max_frames",
        "stop",
        "tools",
        "tool_choice",
    }
)
"""Fields with the same meaning in chat completions; others of the Responses API are ignored or unsupported."""
IGNORED = frozenset(
    {
        "metadata",
        "store",
        "user",
        "service_tier",
        "prompt_cache_key",
        "prompt_cache_retention",
        "safety_identifier",
        "parallel_tool_calls",
        "reasoning",
        "truncation",
        "include",
        "stream_options",
        "max_tool_calls",
    }
)


def chat_values(values: Mapping[str, Any]) -> dict[str, Any]:
    """Returns the fields of the chat completion that answers a response request.

    Raises:
        ApiError: 400 for an input that is not text, parts or messages, and for unsupported fields by name.
    """
    chat: dict[str, Any] = {"messages": _messages(values)}
    for name, value in values.items():
        if value is None or name in IGNORED or name in ("input", "instructions"):
            continue
        if name == "background" and value is False:
            continue
        if name == "text":
            chat["response_format"] = _response_format(value)
        elif name in SHARED or name in RENAMED:
            chat[RENAMED.get(name, name)] = value
        else:
            text = f"this server does not support {name[:64]}; leave it out"
            raise ApiError(400, text, code="unsupported_parameter", param=name[:64])
    return chat


def _messages(values: Mapping[str, Any]) -> list[Any]:
    given, instructions = values.get("input"), values.get("instructions")
    messages: list[Any] = [] if instructions is None else [{"role": "system", "content": instructions}]
    if isinstance(given, str):
        return [*messages, {"role": "user", "content": given}]
    if not isinstance(given, list):
        raise ApiError(400, "input must be a text or a list", code="invalid_value", param="input")
    for index, item in enumerate(given):
        kind = item.get("type", "message") if isinstance(item, dict) else None
        if kind == "reasoning":  # of another model's answer
            continue
        if kind != "message":
            text = "items of input must be messages"
            raise ApiError(400, text, code="unsupported_parameter", param=f"input.{index}")
        content = item.get("content")
        if isinstance(content, list):
            content = [_part(part) for part in content]
        messages.append({**item, "content": content})
    return messages


def _part(part: Any) -> Any:
    """Converts a part of type input_file, whose fields are one level higher than in chat completions."""
    if not isinstance(part, dict) or part.get("type") != "input_file":
        return part
    data = part.get("file_data") or part.get("file_url")
    return {"type": "file", "file": {"file_id": part.get("file_id"), "file_data": data}}


def _response_format(text: Any) -> Any:
    """Converts text.format, whose JSON schema is one level higher than in chat completions."""
    given = text.get("format") if isinstance(text, dict) else None
    if not isinstance(given, dict) or given.get("type") != "json_schema":
        return given
    return {"type": "json_schema", "json_schema": {name: value for name, value in given.items() if name != "type"}}


class ResponseAnswer:
    """JSON of a response, whole or in events."""

    def __init__(self, completion: Completion, request: Mapping[str, Any]) -> None:
        self._completion = completion
        self._request = request
        self._id, self._item_id = f"resp_{uuid.uuid4().hex}", f"msg_{uuid.uuid4().hex}"
        self._created = int(time.time())
        self._number = 0

    def response(self) -> dict[str, Any]:
        (choice,) = self._completion.response()["choices"]
        is_cut = choice["finish_reason"] == "length"
        item = self._item(choice["message"]["content"], "incomplete" if is_cut else "completed")
        return self._object("incomplete" if is_cut else "completed", [item])

    def opening(self) -> bytes:
        part = {"output_index": 0, "item_id": self._item_id, "content_index": 0, "part": _text_part("")}
        return b"".join(
            [
                self._event("response.created", {"response": self._object("in_progress", [])}),
                self._event("response.in_progress", {"response": self._object("in_progress", [])}),
                self._event("response.output_item.added", {"output_index": 0, "item": self._item(None, "in_progress")}),
                self._event("response.content_part.added", part),
            ]
        )

    def delta(self, delta: AnswerDelta) -> bytes:
        if not delta.text:
            return b""
        place = {"output_index": 0, "item_id": self._item_id, "content_index": 0}
        return self._event("response.output_text.delta", {**place, "delta": delta.text, "logprobs": []})

    def end(self) -> bytes:
        whole = self.response()
        (item,) = whole["output"]
        text = item["content"][0]["text"]
        place = {"output_index": 0, "item_id": self._item_id, "content_index": 0}
        return b"".join(
            [
                self._event("response.output_text.done", {**place, "text": text, "logprobs": []}),
                self._event("response.content_part.done", {**place, "part": _text_part(text)}),
                self._event("response.output_item.done", {"output_index": 0, "item": item}),
                self._event(f"response.{whole['status']}", {"response": whole}),
            ]
        )

    def error(self, error: ApiError) -> bytes:
        return self._event("error", {"code": error.code, "message": error.message, "param": error.param})

    def _event(self, kind: str, values: Mapping[str, Any]) -> bytes:
        event = {"type": kind, "sequence_number": self._number, **values}
        self._number += 1
        return f"event: {kind}\ndata: {json.dumps(event, ensure_ascii=False, separators=(',', ':'))}\n\n".encode()

    def _item(self, text: str | None, status: str) -> dict[str, Any]:
        content = [] if text is None else [_text_part(text)]
        return {"type": "message", "id": self._item_id, "status": status, "role": "assistant", "content": content}

    def _object(self, status: str, output: list[dict[str, Any]]) -> dict[str, Any]:
        request = self._request
        return {
            "id": self._id,
            "object": "response",
            "created_at": self._created,
            "status": status,
            "error": None,
            "incomplete_details": {"reason": "max_output_tokens"} if status == "incomplete" else None,
            "instructions": request.get("instructions"),
            "max_output_tokens": request.get("max_output_tokens"),
            "metadata": request.get("metadata") or {},
            "model": request["model"],
            "output": output,
            "parallel_tool_calls": True,
            "previous_response_id": None,
            "store": False,
            "temperature": request.get("temperature"),
            "text": request.get("text") or {"format": {"type": "text"}},
            "tool_choice": "auto",
            "tools": [],
            "top_p": request.get("top_p"),
            "truncation": "disabled",
            "usage": None if status == "in_progress" else _usage(self._completion.usage()),
        }


def _text_part(text: str) -> dict[str, Any]:
    return {"type": "output_text", "text": text, "annotations": [], "logprobs": []}


def _usage(usage: Mapping[str, Any]) -> dict[str, Any]:
    return {
        "input_tokens": usage["prompt_tokens"],
        "input_tokens_details": usage["prompt_tokens_details"],
        "output_tokens": usage["completion_tokens"],
        "output_tokens_details": {"reasoning_tokens": 0},
        "total_tokens": usage["total_tokens"],
    }

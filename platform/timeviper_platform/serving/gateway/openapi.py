"""The OpenAPI document: bodies, answers, errors and keys of every route.

FastAPI cannot know them, because the routes read their bodies only after checking lengths.
"""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Any, Literal

from fastapi import FastAPI
from fastapi.openapi.utils import get_openapi
from pydantic import BaseModel
from pydantic.json_schema import models_json_schema

from timeviper_platform.serving.gateway.chat_request import ChatCompletionRequest
from timeviper_platform.serving.gateway.job_routes import NewJob
from timeviper_platform.serving.gateway.media.chunked_uploads import CompleteRequest, UploadRequest

FASTAPIS_422 = "Validation Error"
"""Description of the answer that FastAPI documents for every route with a parameter."""
_REF = "#/components/schemas/{model}"


class ErrorContent(BaseModel):
    message: str
    type: str
    param: str | None
    code: str


class ErrorBody(BaseModel):
    error: ErrorContent


class Model(BaseModel):
    id: str
    object: Literal["model"]
    created: int
    owned_by: str


class ModelList(BaseModel):
    object: Literal["list"]
    data: list[Model]


class FileObject(BaseModel):
    id: str
    object: Literal["file"]
    bytes: int
    created_at: int
    filename: str
    purpose: str
    status: Literal["processed"]
    expires_at: int | None


class Upload(BaseModel):
    id: str
    object: Literal["upload"]
    bytes: int
    created_at: int
    filename: str
    purpose: str
    status: Literal["pending", "completed", "cancelled"]
    expires_at: int
    file: FileObject | None


class UploadPart(BaseModel):
    id: str
    object: Literal["upload.part"]
    created_at: int
    upload_id: str


class FileList(BaseModel):
    object: Literal["list"]
    data: list[FileObject]
    first_id: str | None
    last_id: str | None
    has_more: bool


class StoredVideo(BaseModel):
    id: str
    object: Literal["video"]
    url: str
    modality: Literal["video", "image"]
    duration_seconds: float
    num_frames: int
    num_tokens_per_frame: int


class VideoWithTimes(StoredVideo):
    frame_seconds: list[float]
    selected_frames: list[int]


class VideoList(BaseModel):
    object: Literal["list"]
    data: list[StoredVideo]
    first_id: str | None
    last_id: str | None
    has_more: bool


class DeletedFile(BaseModel):
    id: str
    object: Literal["file"]
    deleted: bool


class AnswerMessage(BaseModel):
    role: Literal["assistant"]
    content: str
    refusal: str | None


class Choice(BaseModel):
    index: int
    message: AnswerMessage
    logprobs: dict[str, Any] | None
    finish_reason: Literal["stop", "length"]


class PromptTokens(BaseModel):
    cached_tokens: int
    vision_tokens: int
    vision_tokens_after_transv: int


class UsageObject(BaseModel):
    prompt_tokens: int
    completion_tokens: int
    total_tokens: int
    prompt_tokens_details: PromptTokens


class MediaTimes(BaseModel):
    duration_seconds: float
    frame_times_seconds: list[float]
    """Presentation times of the frames that the model saw."""


class ChatCompletion(BaseModel):
    id: str
    object: Literal["chat.completion"]
    created: int
    model: str
    choices: list[Choice]
    usage: UsageObject
    media: list[MediaTimes] | None = None
    """With the built-in schema of time spans: the clock of its seconds."""


class JobProgress(BaseModel):
    stage: Literal["waiting", "decoding", "encoding", "answering", "ended"]
    frames_done: int
    frames_total: int | None
    questions_done: int
    questions_total: int


class JobObject(BaseModel):
    id: str
    object: Literal["job"]
    created_at: int
    finished_at: int | None
    status: Literal["queued", "running", "completed", "failed", "cancelled"]
    model: str
    video: str
    questions: list[str]
    progress: JobProgress
    answers: list[ChatCompletion] | None
    error: ErrorContent | None


class JobList(BaseModel):
    object: Literal["list"]
    data: list[JobObject]
    first_id: str | None
    last_id: str | None
    has_more: bool


class ResponseRequest(BaseModel):
    """Other fields of OpenAI's Responses API are ignored or a 400 by name."""

    model: str
    input: str | list[dict[str, Any]]
    instructions: str | None = None
    max_output_tokens: int | None = None
    temperature: float | None = None
    top_p: float | None = None
    stream: bool | None = None


class ResponseObject(BaseModel):
    id: str
    object: Literal["response"]
    created_at: int
    status: Literal["completed", "incomplete"]
    model: str
    output: list[dict[str, Any]]
    usage: dict[str, Any]


class Live(BaseModel):
    status: Literal["live"]


class Ready(BaseModel):
    status: Literal["ready", "not ready"]
    features: bool
    engine: bool


_ERRORS = {
    400: "Invalid request; `param` names the field.",
    401: "No valid API key.",
    403: "The client, web page or host name may not use this server.",
    404: "Unknown model, file, stored medium or path.",
    408: "The body arrived too slowly, or the answer took too long.",
    413: "The body is too large.",
    415: "Unsupported content type or medium.",
    416: "The file has no byte in this range.",
    422: "The medium cannot be decoded.",
    429: "The server, or the key's quota, is full; see Retry-After.",
    500: "A fault of the server.",
    503: "A service is not available; see Retry-After.",
}
_ALWAYS = (400, 401, 403, 408, 413, 429, 500, 503)
_MODELS: tuple[type[BaseModel], ...] = (
    ErrorBody,
    ModelList,
    FileList,
    Upload,
    UploadPart,
    UploadRequest,
    CompleteRequest,
    DeletedFile,
    VideoList,
    NewJob,
    JobObject,
    JobList,
    VideoWithTimes,
    ChatCompletion,
    ResponseRequest,
    ResponseObject,
    Live,
    Ready,
    ChatCompletionRequest,
)


@dataclass(frozen=True, kw_only=True, slots=True)
class RouteDocument:
    summary: str
    answer: type[BaseModel] | None = None
    """JSON of the answer; None = `media_type`."""
    media_type: str = "application/json"
    errors: tuple[int, ...] = ()
    """Statuses besides those of every route."""
    body: dict[str, Any] | None = None
    """OpenAPI's requestBody."""
    query: dict[str, dict[str, Any]] = field(default_factory=dict)
    """Schema of each parameter of the query."""
    is_open: bool = False
    """Whether the route needs no key."""
    also_streams: bool = False
    status: int = 200
    """Status of a successful answer."""
    has_ranges: bool = False

    def options(self) -> dict[str, Any]:
        content: dict[str, Any] = {self.media_type: {"schema": _schema(self.answer)}}
        if self.also_streams:
            content["text/event-stream"] = {"schema": {"type": "string"}}
        error = {"application/json": {"schema": _schema(ErrorBody)}}
        statuses = sorted({*(_ALWAYS if not self.is_open else (408, 413, 429, 500, 503)), *self.errors})
        responses: dict[int, Any] = {status: {"description": _ERRORS[status], "content": error} for status in statuses}
        if self.answer is Ready:
            responses[503] = {
                "description": "A service is not ready.",
                "content": {"application/json": {"schema": {"anyOf": [_schema(Ready), _schema(ErrorBody)]}}},
            }
        extra: dict[str, Any] = {"responses": {str(self.status): {"description": "OK", "content": content}}}
        if self.has_ranges:
            extra["responses"]["206"] = {"description": "The range.", "content": content}
        if self.body is not None:
            extra["requestBody"] = {"required": True, "content": self.body}
        if self.query:
            extra["parameters"] = [
                {"name": name, "in": "query", "required": False, "schema": schema}
                for name, schema in self.query.items()
            ]
        if self.is_open:
            extra["security"] = []
        return {"summary": self.summary, "status_code": self.status, "responses": responses, "openapi_extra": extra}


def _schema(model: type[BaseModel] | None) -> dict[str, Any]:
    return {"type": "string"} if model is None else {"$ref": _REF.format(model=model.__name__)}


def document(api: FastAPI) -> dict[str, Any]:
    if api.openapi_schema is None:
        schema = get_openapi(title=api.title, version="1", routes=api.routes)
        _, models = models_json_schema([(model, "validation") for model in _MODELS], ref_template=_REF)
        components = schema.setdefault("components", {})
        components["schemas"] = models["$defs"]
        components["securitySchemes"] = {"key": {"type": "http", "scheme": "bearer"}}
        schema["security"] = [{"key": []}]
        for methods in schema["paths"].values():
            for operation in methods.values():
                if operation["responses"].get("422", {}).get("description") == FASTAPIS_422:
                    del operation["responses"]["422"]
        api.openapi_schema = schema
    return api.openapi_schema


_UPLOAD_FORM = {
    "type": "object",
    "required": ["file"],
    "properties": {
        "file": {"type": "string", "format": "binary"},
        "purpose": {"type": "string"},
        "expires_after[anchor]": {"type": "string", "enum": ["created_at"]},
        "expires_after[seconds]": {"type": "integer", "minimum": 3600, "maximum": 2_592_000},
    },
}
CHAT = RouteDocument(
    summary="Answers a conversation, whole or streamed.",
    answer=ChatCompletion,
    errors=(404, 415, 422),
    body={"application/json": {"schema": _schema(ChatCompletionRequest)}},
    also_streams=True,
)
RESPONSE = RouteDocument(
    summary="Answers in the Responses API, whole or streamed.",
    answer=ResponseObject,
    errors=(404, 415, 422),
    body={"application/json": {"schema": _schema(ResponseRequest)}},
    also_streams=True,
)
MODELS = RouteDocument(summary="Lists the model.", answer=ModelList)
MODEL = RouteDocument(summary="Returns the model.", answer=Model, errors=(404,))
UPLOAD = RouteDocument(
    summary="Stores a video or picture.",
    answer=FileObject,
    errors=(415,),
    body={"multipart/form-data": {"schema": _UPLOAD_FORM}},
)
NEW_UPLOAD = RouteDocument(
    summary="Begins an upload in parts.",
    answer=Upload,
    errors=(415,),
    body={"application/json": {"schema": _schema(UploadRequest)}},
)
PART = RouteDocument(
    summary="Adds a part to an upload.",
    answer=UploadPart,
    errors=(404, 415),
    body={
        "multipart/form-data": {
            "schema": {
                "type": "object",
                "required": ["data"],
                "properties": {"data": {"type": "string", "format": "binary"}},
            }
        }
    },
)
COMPLETED = RouteDocument(
    summary="Joins the parts to a file.",
    answer=Upload,
    errors=(404, 415),
    body={"application/json": {"schema": _schema(CompleteRequest)}},
)
CANCELLED = RouteDocument(summary="Ends an upload without a file.", answer=Upload, errors=(404,))
FILES = RouteDocument(
    summary="Lists uploads.",
    answer=FileList,
    query={
        "purpose": {"type": "string"},
        "after": {"type": "string"},
        "limit": {"type": "integer", "minimum": 1, "maximum": 10_000},
        "order": {"type": "string", "enum": ["asc", "desc"]},
    },
)
FILE = RouteDocument(summary="Returns an upload's record.", answer=FileObject, errors=(404,))
DELETED = RouteDocument(summary="Deletes an upload.", answer=DeletedFile, errors=(404,))
NEW_JOB = RouteDocument(
    summary="Answers questions about a video in the background.",
    answer=JobObject,
    status=202,
    errors=(404, 415),
    body={"application/json": {"schema": _schema(NewJob)}},
)
JOBS = RouteDocument(
    summary="Lists jobs without their answers.",
    answer=JobList,
    query={"after": {"type": "string"}, "limit": {"type": "integer", "minimum": 1, "maximum": 100}},
)
JOB = RouteDocument(summary="Returns a job with its progress and answers.", answer=JobObject, errors=(404,))
VIDEOS = RouteDocument(
    summary="Lists media of the feature store.",
    answer=VideoList,
    query={
        "prefix": {"type": "string"},
        "after": {"type": "string"},
        "limit": {"type": "integer", "minimum": 1, "maximum": 1000},
    },
)
VIDEO = RouteDocument(
    summary="Returns a stored medium with the times of its frames.", answer=VideoWithTimes, errors=(404,)
)
CONTENT = RouteDocument(
    summary="Returns a file's bytes, or a range of them.",
    media_type="application/octet-stream",
    errors=(404, 416),
    has_ranges=True,
)
LIVE = RouteDocument(summary="Whether the gateway runs.", answer=Live, is_open=True)
READY = RouteDocument(
    summary="Whether both services are ready. With deep=1, which asks a replica of each, it needs a key.",
    answer=Ready,
    errors=(401, 403),
    query={"deep": {"type": "string", "enum": ["0", "1"]}},
    is_open=True,
)
METRICS = RouteDocument(summary="Prometheus metrics of this gateway.", media_type="text/plain")

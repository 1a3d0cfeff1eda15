"""The gateway over ASGI with synthetic services, and readers of its answers."""

from __future__ import annotations

import asyncio
import hashlib
import json
from collections.abc import AsyncGenerator, Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import httpx2
import openai
from starlette.testclient import TestClient

from timeviper_model.inference.answer import Usage
from timeviper_platform.serving.gateway.config import ApiKey, GatewayConfig
from timeviper_platform.serving.gateway.routes import create_app
from timeviper_platform.serving.messages import (
    AnswerDelta,
    FeatureProgress,
    FeatureReference,
    GenerateRequest,
    MediaAddress,
    MediaPage,
    MediaSource,
    Refusal,
    StoredFeatures,
    StoredMedium,
    TokenLogprob,
)

MP4 = b"\x00\x00\x00\x20ftypisom" + bytes(100)
PNG = b"\x89PNG\r\n\x1a\n" + bytes(50)
USAGE = Usage(prompt_tokens=9, completion_tokens=3, vision_tokens=8, vision_tokens_kept=2, cached_tokens=0)


def stored_medium(media_id: str, uri: str = "/films/a.mp4") -> StoredMedium:
    return StoredMedium(
        media_id=media_id, uri=uri, modality="video", duration_seconds=2.0, num_frames=2, num_tokens_per_frame=4
    )


class Features:
    """Has one stored medium and accepts any upload."""

    def __init__(self) -> None:
        self.sources: list[MediaSource] = []
        self.limits: list[tuple[float | None, int | None]] = []
        self.whole: list[bool] = []
        self.tenants: list[str] = []
        self.ready = True
        self.deep = False
        self.stored = [stored_medium(media_id) for media_id in ("films/a", "films/b", "known")]
        self.known_addresses: set[str] = set()
        self.num_frames = 2

    async def features(
        self,
        source: MediaSource,
        *,
        tenant: str = "",
        fps: float | None = None,
        max_frames: int | None = None,
        whole: bool = True,
    ) -> FeatureReference | Refusal:
        self.sources.append(source)
        self.tenants.append(tenant)
        self.limits.append((fps, max_frames))
        self.whole.append(whole)
        is_known = not isinstance(source, MediaAddress) or source.uri in self.known_addresses
        if not is_known or (isinstance(source, StoredFeatures) and source.media_id != "known"):
            return Refusal(status=404, message="no such medium", code="media_not_found")
        return FeatureReference(
            key="k",
            ref=None,
            num_frames=self.num_frames,
            num_tokens_per_frame=4,
            modality="video",
            duration_seconds=2.0,
            times_seconds=(0.0, 1.04),
        )

    async def watch(
        self, source: MediaSource, *, tenant: str = "", fps: float | None = None, max_frames: int | None = None
    ) -> AsyncGenerator[FeatureProgress | FeatureReference | Refusal]:
        yield FeatureProgress(stage="encoding", frames_done=1, frames_total=2)
        yield await self.features(source, tenant=tenant, fps=fps, max_frames=max_frames)

    async def list_media(self, *, after: str, prefix: str, limit: int) -> MediaPage | Refusal:
        found = [medium for medium in self.stored if medium.media_id.startswith(prefix) and medium.media_id > after]
        return MediaPage(media=tuple(found[:limit]), has_more=len(found) > limit)

    async def medium(self, media_id: str) -> StoredMedium | Refusal:
        found = [medium for medium in self.stored if medium.media_id == media_id]
        if not found:
            return Refusal(status=404, message="no such medium", code="media_not_found")
        return replace(found[0], pts_seconds=(0.0, 1.5), selected=(0,))

    async def is_ready(self, *, deep: bool) -> bool:
        self.deep = deep
        return self.ready


class Engine:
    """Answers 'hello world' in two deltas; `refusal` replaces delta number `refuse_at`."""

    def __init__(self) -> None:
        self.requests: list[GenerateRequest] = []
        self.closed = 0
        self.delay_s = 0.0
        self.refusal: Refusal | None = None
        self.refuse_at = 0
        self.bug = False
        self.during: Callable[[], object] | None = None
        """Called while a request runs."""
        self.usage = USAGE
        self.texts: tuple[str, ...] = ("hello", " world")
        self.delay_after_s = 0.0

    async def generate(self, request: GenerateRequest) -> AsyncGenerator[AnswerDelta | Refusal]:
        self.requests.append(request)
        try:
            if self.bug:
                raise KeyError(request.turns[0].text)
            if self.during is not None:
                await asyncio.to_thread(self.during)
            logprobs = (TokenLogprob(token="hello", logprob=-0.1),) if request.sampling.num_logprobs is not None else ()
            for number, text in enumerate(self.texts):
                for index in range(request.n):
                    if self.refusal is not None and number == self.refuse_at:
                        yield self.refusal
                        return
                    last = number == 1
                    yield AnswerDelta(
                        index=index,
                        text=text,
                        logprobs=() if last else logprobs,
                        finish_reason="stop" if last else None,
                        usage=self.usage if last else None,
                    )
                await asyncio.sleep(self.delay_after_s if number == 1 else self.delay_s)
        finally:
            self.closed += 1

    async def is_ready(self, *, deep: bool) -> bool:
        return True


class Server:
    """The gateway with synthetic services and a client."""

    def __init__(self, folder: Path, **config: Any) -> None:
        self.features = Features()
        self.engine = Engine()
        app = create_app(GatewayConfig(media_root=str(folder / "media"), **config), self.features, self.engine)
        self.http = TestClient(
            app, base_url="http://localhost", client=("127.0.0.1", 50000), raise_server_exceptions=True
        )

    def chat(self, content: Any = "hi", *, key: str | None = None, **values: Any) -> Any:
        body = {"model": "timeviper", "messages": [{"role": "user", "content": content}], **values}
        headers = {"Authorization": f"Bearer {key}"} if key else {}
        return self.http.post("/v1/chat/completions", json=body, headers=headers)

    def openai(self) -> openai.OpenAI:
        """The openai package over ASGI."""

        def send(request: httpx2.Request) -> httpx2.Response:
            path, headers = request.url.raw_path.decode(), dict(request.headers)
            answer = self.http.request(request.method, path, content=request.read(), headers=headers)
            return httpx2.Response(answer.status_code, headers=dict(answer.headers), content=answer.content)

        http = httpx2.Client(transport=httpx2.MockTransport(send))
        return openai.OpenAI(base_url="http://localhost/v1", api_key="none", max_retries=0, http_client=http)

    def upload(self, data: bytes = MP4, *, key: str | None = None) -> Any:
        headers = {"Authorization": f"Bearer {key}"} if key else {}
        files = {"file": ("cat.mp4", data, "video/mp4")}
        return self.http.post("/v1/files", files=files, data={"purpose": "vision"}, headers=headers)


def check_error(response: Any, status: int, code: str) -> dict[str, Any]:
    assert response.status_code == status, response.text
    error = response.json()["error"]
    assert set(error) == {"message", "type", "param", "code"}
    assert error["code"] == code
    return dict(error)


def video(url: str) -> list[dict[str, Any]]:
    return [{"type": "text", "text": "what?"}, {"type": "video_url", "video_url": {"url": url}}]


def events(response: Any) -> list[Any]:
    lines = [line for line in response.text.split("\n\n") if line and not line.startswith(":")]
    assert all(line.startswith("data: ") for line in lines)
    return [line[6:] if line == "data: [DONE]" else json.loads(line[6:]) for line in lines]


def keys(*names: str) -> tuple[ApiKey, ...]:
    return tuple(ApiKey(tenant=name, sha256=hashlib.sha256(f"key-{name}".encode()).hexdigest()) for name in names)

"""tracing: the spans of a request, with OpenTelemetry's SDK and its exporter in memory."""

from __future__ import annotations

import asyncio
import base64
import sys
import threading
from collections.abc import AsyncGenerator, Iterator
from http.server import BaseHTTPRequestHandler, HTTPServer
from pathlib import Path
from typing import Any

import httpx2
import numpy as np
import pytest
from opentelemetry import trace
from opentelemetry.context import Context
from opentelemetry.sdk.trace import ReadableSpan, TracerProvider
from opentelemetry.sdk.trace.export import SimpleSpanProcessor
from opentelemetry.sdk.trace.export.in_memory_span_exporter import InMemorySpanExporter
from opentelemetry.trace import StatusCode

from reference.synthetic_gateway import Server
from reference.tiny_serving import make_serving_folders, write_video
from timeviper_platform.serving import tracing
from timeviper_platform.serving.engine.service import EngineService, EngineServiceConfig
from timeviper_platform.serving.features.service import FeatureService, FeatureServiceConfig
from timeviper_platform.serving.gateway.config import GatewayConfig
from timeviper_platform.serving.gateway.routes import create_app
from timeviper_platform.serving.messages import FeatureReference, Refusal

TRACE, PARENT = "4bf92f3577b34da6a3ce929d0e0e4736", "00f067aa0ba902b7"
HEADERS = {"traceparent": f"00-{TRACE}-{PARENT}-01"}
QUESTION = "Where is the secret?"


@pytest.fixture
def exporter() -> Iterator[InMemorySpanExporter]:
    if not isinstance(trace.get_tracer_provider(), TracerProvider):
        trace.set_tracer_provider(TracerProvider())  # once for a process
    provider = trace.get_tracer_provider()
    assert isinstance(provider, TracerProvider)
    found = InMemorySpanExporter()
    provider.add_span_processor(SimpleSpanProcessor(found))
    yield found
    found.shutdown()  # the provider keeps it


def parent_of(span: ReadableSpan) -> str:
    return "" if span.parent is None else f"{span.parent.span_id:016x}"


async def read(reference: FeatureReference) -> AsyncGenerator[np.ndarray | Refusal]:
    yield reference.ref


def test_a_request_has_a_span_below_the_clients_with_one_for_each_stage(
    exporter: InMemorySpanExporter, tmp_path: Path
) -> None:
    folders = make_serving_folders(tmp_path)
    video = base64.b64encode(write_video(tmp_path / "a.mp4", seconds=6).read_bytes()).decode()

    async def ask(client: httpx2.AsyncClient, url: str) -> None:
        content = [{"type": "video_url", "video_url": {"url": url}}, {"type": "text", "text": QUESTION}]
        body = {"model": "timeviper", "messages": [{"role": "user", "content": content}], "max_tokens": 4}
        answer = await client.post("/v1/chat/completions", json=body, headers=HEADERS)
        assert answer.status_code == 200, answer.text

    async def main() -> None:
        features = FeatureService(
            folders.weights,
            FeatureServiceConfig(feature_store=folders.store, encoder=folders.encoder),
            lambda array: array,
        )
        await features.start()
        engine = EngineService(folders.weights, EngineServiceConfig(), read)
        config = GatewayConfig(media_root=str(tmp_path / "media"), default_temperature=0.0)  # drawn ones may be shorter
        app = create_app(config, features, engine)  # type: ignore[arg-type]
        transport = httpx2.ASGITransport(app=app, client=("127.0.0.1", 1))
        try:
            async with httpx2.AsyncClient(transport=transport, base_url="http://localhost") as client:
                await ask(client, f"data:video/mp4;base64,{video}")
                await ask(client, "feature://film")
        finally:
            engine.stop()
            await features.close()

    asyncio.run(main())
    spans = exporter.get_finished_spans()
    requests = [span for span in spans if span.name == "POST /v1/chat/completions"]
    assert [parent_of(span) for span in requests] == [PARENT, PARENT]
    stages: list[list[str]] = []
    for request in requests:
        assert request.context is not None
        own = [span for span in spans if parent_of(span) == f"{request.context.span_id:016x}"]
        stages.append([span.name for span in sorted(own, key=lambda span: span.start_time or 0)])
        assert dict(request.attributes or {}) == {
            "http.request.method": "POST",
            "http.route": "/v1/chat/completions",
            "http.response.status_code": 200,
        }
    assert stages == [["decode", "encode", "prefill", "answer"], ["fetch", "prefill", "answer"]]
    assert {f"{span.context.trace_id:032x}" for span in spans if span.context} == {TRACE}
    assert len(spans) == 9
    by_name = {span.name: dict(span.attributes or {}) for span in spans}
    assert by_name["decode"] == by_name["encode"] == {"timeviper.frames": 6}
    assert by_name["fetch"] == {"timeviper.frames": 40}
    assert by_name["answer"]["timeviper.vision_tokens"] == 160
    assert by_name["answer"]["gen_ai.usage.output_tokens"] == 4
    assert not any(word in span.to_json() for span in spans for word in (QUESTION, "film", video[:20]))


@pytest.mark.parametrize("headers", [{}, {"traceparent": f"00-{TRACE}-{PARENT}-00"}, {"traceparent": "nonsense"}])
def test_a_request_that_is_not_traced_has_no_span(
    exporter: InMemorySpanExporter, tmp_path: Path, headers: dict[str, str]
) -> None:
    server = Server(tmp_path)
    server.http.headers.update(headers)
    assert server.chat(QUESTION).status_code == 200
    assert exporter.get_finished_spans() == ()


def test_the_clients_trace_goes_on_below_ray_serves_span_of_it_or_of_another(exporter: InMemorySpanExporter) -> None:
    tracer = trace.get_tracer("ray")
    of_client = tracing.request_context(HEADERS)
    for parent, is_of_client in ((of_client, True), (Context(), False)):
        with tracer.start_as_current_span("replica_handle_request", context=parent):
            assert (tracing.request_context(HEADERS) is None) is is_of_client
            assert tracing.request_context({}) is None


def test_failures_are_named_without_their_message(exporter: InMemorySpanExporter, tmp_path: Path) -> None:
    server = Server(tmp_path)
    server.http.headers.update(HEADERS)
    server.engine.bug = True  # raises a KeyError with the question
    assert server.chat(QUESTION).status_code == 500
    assert server.http.get("/v1/files/none").status_code == 404
    server.engine.bug, server.engine.refusal = False, Refusal(status=503, message=QUESTION, code="unavailable")
    assert server.chat(QUESTION).status_code == 503
    bug, missing, away = exporter.get_finished_spans()
    assert [(span.attributes or {}).get("error.type") for span in (bug, missing, away)] == ["KeyError", None, "503"]
    assert [span.status.status_code for span in (bug, missing, away)] == [
        StatusCode.ERROR,
        StatusCode.UNSET,
        StatusCode.ERROR,
    ]
    assert QUESTION not in "".join(span.to_json() for span in (bug, missing, away))


def test_spans_leave_by_otlp_to_the_address_of_the_environment(monkeypatch: pytest.MonkeyPatch) -> None:
    received: list[tuple[str, bytes]] = []

    class Collector(BaseHTTPRequestHandler):
        def do_POST(self) -> None:
            received.append((self.path, self.rfile.read(int(self.headers["Content-Length"]))))
            self.send_response(200)
            self.end_headers()

        def log_message(self, *_: Any) -> None: ...

    with HTTPServer(("127.0.0.1", 0), Collector) as collector:
        threading.Thread(target=collector.serve_forever, daemon=True).start()
        monkeypatch.setenv("OTEL_EXPORTER_OTLP_ENDPOINT", f"http://127.0.0.1:{collector.server_port}")
        monkeypatch.setenv("OTEL_EXPORTER_OTLP_COMPRESSION", "none")
        provider = TracerProvider()
        for processor in tracing.otlp():
            provider.add_span_processor(processor)
        provider.get_tracer("test").start_span("decode").end()
        provider.shutdown()
        collector.shutdown()
    ((path, body),) = received
    assert (path, b"decode" in body) == ("/v1/traces", True)


def test_a_missing_exporter_is_named_with_its_extra(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "opentelemetry.exporter.otlp.proto.http.trace_exporter", None)
    with pytest.raises(ImportError, match=r"timeviper-platform\[tracing\]"):
        tracing.otlp()

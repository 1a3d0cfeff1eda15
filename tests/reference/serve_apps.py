"""What Ray Serve imports in tests of deployments: an application that is slow, and an exporter of spans to files."""

from __future__ import annotations

import asyncio
import os
from pathlib import Path

from opentelemetry.sdk.trace import SpanProcessor
from opentelemetry.sdk.trace.export import ConsoleSpanExporter, SimpleSpanProcessor
from ray import serve
from starlette.requests import Request

SPANS_VARIABLE = "TIMEVIPER_TEST_SPANS"
"""The folder of the spans' files."""


@serve.deployment(
    max_ongoing_requests=1,
    max_queued_requests=1,
    backpressure_config={"status_code": 429, "retry_after_s": 1.0},
    ray_actor_options={"num_cpus": 0},
)
class Slow:
    async def __call__(self, request: Request) -> str:
        await asyncio.sleep(float(request.query_params["seconds"]))
        return "done"


slow = Slow.bind()  # type: ignore[attr-defined]  # a deployment


def span_files() -> list[SpanProcessor]:
    """Writes a line of JSON for each span."""
    file = (Path(os.environ[SPANS_VARIABLE]) / f"{os.getpid()}.jsonl").open("a")
    return [SimpleSpanProcessor(ConsoleSpanExporter(out=file, formatter=lambda span: f"{span.to_json(indent=None)}\n"))]

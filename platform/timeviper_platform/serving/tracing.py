"""OpenTelemetry spans of a request, below those of Ray Serve, whose `tracing_config` turns both on.

A request that Ray Serve does not trace has none. Attributes are names and numbers, never contents.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from contextlib import contextmanager

from opentelemetry import trace
from opentelemetry.context import Context
from opentelemetry.sdk.trace import SpanProcessor
from opentelemetry.sdk.trace.export import BatchSpanProcessor
from opentelemetry.trace import INVALID_SPAN, Span, Status, StatusCode
from opentelemetry.trace.propagation.tracecontext import TraceContextTextMapPropagator

from timeviper_model.inference.answer import Usage

_TRACER = trace.get_tracer("timeviper")
ERROR_TYPE = "error.type"
FRAMES = "timeviper.frames"


def otlp() -> list[SpanProcessor]:
    """Exporter for Ray Serve's `exporter_import_path`: OTLP over HTTP, set up by the OTEL_EXPORTER_OTLP_* variables."""
    try:
        from opentelemetry.exporter.otlp.proto.http.trace_exporter import OTLPSpanExporter
    except ImportError:
        raise ImportError(
            "tracing needs opentelemetry-exporter-otlp-proto-http: pip install 'timeviper-platform[tracing]'"
        ) from None
    return [BatchSpanProcessor(OTLPSpanExporter())]


def request_context(headers: Mapping[str, str]) -> Context | None:
    """Returns the parent of a request's span if it is that of the W3C header `traceparent`; None = the current span.

    The current one is Ray Serve's, in the header's trace if the proxy traces, which it does not after `serve deploy`.
    """
    given = TraceContextTextMapPropagator().extract(headers)
    header = trace.get_current_span(given).get_span_context()
    current = trace.get_current_span().get_span_context()
    return given if header.is_valid and header.trace_id != current.trace_id else None


def start_span(name: str, parent: Context | None = None) -> Span:
    """Starts a child of `parent` or the current span, which the caller ends; without either, nothing is recorded."""
    if not trace.get_current_span(parent).get_span_context().is_valid:
        return INVALID_SPAN
    return _TRACER.start_span(name, parent)


@contextmanager
def span(name: str, parent: Context | None = None) -> Iterator[Span]:
    """Runs a block inside a span. Not for generators, whose steps may run in other contexts."""
    started = start_span(name, parent)
    try:
        with trace.use_span(started, record_exception=False, set_status_on_exception=False):
            yield started
    except BaseException as error:
        fail(started, type(error).__name__)  # its message may quote the request
        raise
    finally:
        started.end()


def end_span(ended: Span, num_frames: int) -> None:
    """Ends a span that has not ended."""
    if ended.is_recording():
        ended.set_attribute(FRAMES, num_frames)
        ended.end()


def fail(failed: Span, error_type: str) -> None:
    failed.set_attribute(ERROR_TYPE, error_type)
    failed.set_status(Status(StatusCode.ERROR))


class AnswerSpans:
    """`prefill`, from the engine's queue to a first token, then `answer`."""

    def __init__(self) -> None:
        self._is_prefill = True
        self._span = start_span("prefill")

    def first_token(self) -> None:
        if self._is_prefill:
            self._is_prefill = False
            self._span.end()
            self._span = start_span("answer")

    def finished(self, usage: Usage) -> None:
        """Adds the counts of an answer; of several, those of the last remain."""
        self._span.set_attributes(
            {
                "gen_ai.usage.input_tokens": usage.prompt_tokens,
                "gen_ai.usage.output_tokens": usage.completion_tokens,
                "timeviper.cached_tokens": usage.cached_tokens,
                "timeviper.vision_tokens": usage.vision_tokens,
                "timeviper.vision_tokens_kept": usage.vision_tokens_kept,
            }
        )

    def refused(self, code: str) -> None:
        fail(self._span, code)

    def end(self) -> None:
        self._span.end()

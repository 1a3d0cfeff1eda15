"""Prometheus metrics of the platform."""

from __future__ import annotations

import importlib
from collections.abc import Mapping
from typing import TYPE_CHECKING, Any, Literal, NamedTuple, Protocol

if TYPE_CHECKING:
    from prometheus_client import CollectorRegistry


class Metric(NamedTuple):
    name: str
    """Name without Prometheus' suffix `_total` and Ray's prefix `ray_`."""
    kind: Literal["counter", "gauge", "histogram"]
    description: str
    tags: tuple[str, ...] = ()
    boundaries: tuple[float, ...] = ()
    """Upper bounds of a histogram's buckets."""


FIRST_TOKEN_S = (0.05, 0.1, 0.2, 0.5, 1.0, 2.0, 5.0, 10.0, 20.0, 50.0, 100.0, 200.0, 500.0)


METRICS: tuple[Metric, ...] = (
    Metric("timeviper_gateway_requests", "counter", "HTTP requests, by route and status", ("route", "status")),
    Metric(
        "timeviper_gateway_request_seconds",
        "histogram",
        "Seconds from requests to the ends of their answers, by route",
        ("route",),
        boundaries=FIRST_TOKEN_S,
    ),
    Metric(
        "timeviper_gateway_first_text_seconds",
        "histogram",
        "Seconds from questions to their first text, decoding, encoding and queues included",
        boundaries=FIRST_TOKEN_S,
    ),
    Metric("timeviper_gateway_ongoing_requests", "gauge", "HTTP requests in progress"),
    Metric("timeviper_gateway_prompt_tokens", "counter", "Prompt tokens of answered requests"),
    Metric("timeviper_gateway_cached_prompt_tokens", "counter", "Prompt tokens taken from the video-prefix cache"),
    Metric("timeviper_gateway_completion_tokens", "counter", "Generated tokens of answered requests"),
    Metric(
        "timeviper_features_requests",
        "counter",
        "Media that requests named, by origin of their features (cache, store, upload) and outcome",
        ("origin", "status"),
    ),
    Metric(
        "timeviper_features_seconds",
        "histogram",
        "Seconds to read a stored medium, or to decode and encode an upload",
        ("origin",),
        boundaries=FIRST_TOKEN_S,
    ),
    Metric("timeviper_features_frames", "counter", "Frames of uploads encoded"),
    Metric("timeviper_features_ongoing", "gauge", "Media being read, or decoded and encoded"),
    Metric("timeviper_features_cache_bytes", "gauge", "Bytes of cached features"),
    Metric("timeviper_features_stored_media", "gauge", "Media of the feature store"),
    Metric("timeviper_engine_num_slots", "gauge", "Requests that can be decoded together"),
    Metric("timeviper_engine_active_slots", "gauge", "Requests being prefilled or decoded"),
    Metric("timeviper_engine_queued_requests", "gauge", "Requests waiting for a slot"),
    Metric("timeviper_engine_cache_bytes", "gauge", "Bytes of the cache of states, keys and values"),
    Metric("timeviper_engine_kv_bytes", "gauge", "Bytes of keys and values, idle ones included"),
    Metric("timeviper_engine_reserved_kv_bytes", "gauge", "Bytes of keys and values reserved by requests"),
    Metric("timeviper_engine_prompt_tokens", "counter", "Prompt tokens prefilled, without those of cached prefixes"),
    Metric("timeviper_engine_completion_tokens", "counter", "Tokens generated"),
    Metric("timeviper_engine_vision_tokens", "counter", "Vision tokens of prompts, those of cached prefixes included"),
    Metric("timeviper_engine_kept_vision_tokens", "counter", "Vision tokens left after the last TransV site"),
    Metric("timeviper_engine_answers", "counter", "Answers that have produced a token"),
    Metric(
        "timeviper_engine_first_token_seconds",
        "histogram",
        "Seconds from request to first token, including the wait for frames still being decoded",
        boundaries=FIRST_TOKEN_S,
    ),
    Metric("timeviper_engine_prefix_hits", "counter", "Hits in the video-prefix cache"),
    Metric("timeviper_engine_prefix_misses", "counter", "Misses in the video-prefix cache"),
    Metric("timeviper_engine_prefix_evictions", "counter", "Entries evicted from the video-prefix cache"),
    Metric("timeviper_engine_prefix_entries", "gauge", "Entries in the video-prefix cache"),
    Metric("timeviper_engine_prefix_bytes", "gauge", "Bytes of the video-prefix cache"),
    Metric("timeviper_engine_prefix_host_hits", "counter", "Hits restored from host memory"),
    Metric("timeviper_engine_prefix_host_entries", "gauge", "Entries of the video-prefix cache in host memory"),
    Metric("timeviper_engine_prefix_host_bytes", "gauge", "Bytes of the video-prefix cache in host memory"),
    Metric(
        "timeviper_plan_rejected_media", "counter", "Media rejected by their headers, once per run", ("store", "type")
    ),
    Metric("timeviper_preprocess_frames", "counter", "Frames encoded and committed", ("store",)),
    Metric("timeviper_preprocess_feature_bytes", "counter", "Bytes of features committed", ("store",)),
    Metric(
        "timeviper_preprocess_segments", "counter", "Segments committed: ok, partial or rejected", ("store", "status")
    ),
    Metric("timeviper_preprocess_errors", "counter", "Partial and rejected segments, by error type", ("store", "type")),
    Metric(
        "timeviper_preprocess_stage_seconds", "counter", "Seconds that workers were busy, by stage", ("store", "stage")
    ),
    Metric(
        "timeviper_preprocess_retries", "counter", "Storage requests that failed for a transient reason", ("store",)
    ),
)


def metrics_of(prefix: str) -> dict[str, Metric]:
    """Returns the metrics with this prefix, by the rest of their names."""
    return {metric.name.removeprefix(prefix): metric for metric in METRICS if metric.name.startswith(prefix)}


class MetricsSink(Protocol):
    """Receives a service's metrics; see RayMetrics."""

    def add(self, name: str, amount: float, **tags: str) -> None: ...

    def observe(self, name: str, value: float, **tags: str) -> None: ...

    def report(self, values: Mapping[str, float]) -> None: ...


class _NoMetrics:
    def add(self, name: str, amount: float, **tags: str) -> None:
        pass

    def observe(self, name: str, value: float, **tags: str) -> None:
        pass

    def report(self, values: Mapping[str, float]) -> None:
        pass


NO_METRICS = _NoMetrics()


class RayMetrics:
    def __init__(self, prefix: str, *, module: Any = None) -> None:
        """`module` is `ray.util.metrics` or `ray.serve.metrics`, which adds deployment and replica as tags."""
        module = module or importlib.import_module("ray.util.metrics")
        kinds = {"counter": module.Counter, "gauge": module.Gauge}

        def made(metric: Metric) -> Any:
            options = {"description": metric.description, "tag_keys": metric.tags}
            if metric.kind == "histogram":
                return module.Histogram(metric.name, boundaries=list(metric.boundaries), **options)
            return kinds[metric.kind](metric.name, **options)

        self._metrics = {name: made(metric) for name, metric in metrics_of(prefix).items()}
        self._kinds = {name: metric.kind for name, metric in metrics_of(prefix).items()}
        self._totals: dict[str, float] = {}

    def add(self, name: str, amount: float, **tags: str) -> None:
        """Increases a counter; 0 is allowed."""
        if amount > 0:  # Ray raises for 0
            self._metrics[name].inc(amount, tags=tags)

    def observe(self, name: str, value: float, **tags: str) -> None:
        self._metrics[name].observe(value, tags=tags)

    def report(self, values: Mapping[str, float]) -> None:
        """Sets gauges to values and raises counters to totals."""
        for name, value in values.items():
            if self._kinds[name] == "gauge":
                self._metrics[name].set(value)
            else:
                self.add(name, value - self._totals.get(name, 0))
                self._totals[name] = value


def prometheus_metrics(prefix: str, registry: CollectorRegistry) -> dict[str, Any]:
    """Returns prometheus_client objects, as in `metrics_of`."""
    import prometheus_client

    kinds = {"counter": prometheus_client.Counter, "gauge": prometheus_client.Gauge}

    def made(metric: Metric) -> Any:
        options: dict[str, Any] = {"labelnames": metric.tags, "registry": registry}
        if metric.kind == "histogram":
            return prometheus_client.Histogram(metric.name, metric.description, buckets=metric.boundaries, **options)
        return kinds[metric.kind](metric.name, metric.description, **options)

    return {name: made(metric) for name, metric in metrics_of(prefix).items()}

"""Prometheus' scrape configuration and Grafana's dashboards."""

from __future__ import annotations

from typing import Any, NamedTuple

RAY_PREFIX = "ray_"
"""Ray's exporter puts it before the names of all metrics."""
DISCOVERY_FILE = "/tmp/ray/prom_metrics_service_discovery.json"
"""The head writes the addresses of all nodes there."""
WINDOW = "5m"
PANEL_WIDTH, PANEL_HEIGHT, COLUMNS = 12, 8, 24


class Panel(NamedTuple):
    title: str
    queries: tuple[tuple[str, str], ...]
    """PromQL and legend of each line."""
    unit: str = "short"
    """Grafana's name of the unit."""


def _rate(metric: str, by: str = "") -> str:
    return f"sum{f' by ({by})' if by else ''} (rate({metric}[{WINDOW}]))"


_OR_0 = "or vector(0)"
"""Shows 0 instead of 'No data' for metrics that are exported only after an event, or only with GPUs."""
_FRAMES = "ray_timeviper_preprocess_frames_total"
_SECONDS = "ray_timeviper_preprocess_stage_seconds_total"
_ENCODING = f'sum (rate({_SECONDS}{{stage="encode"}}[{WINDOW}]))'
_TRAIN = "ray_timeviper_train_"
_ENGINE = "ray_timeviper_engine_"
_GATEWAY = "ray_timeviper_gateway_"
_FEATURES = "ray_timeviper_features_"


def _quantiles(metric: str, what: str) -> tuple[tuple[str, str], ...]:
    return tuple(
        (f"histogram_quantile({share}, {_rate(f'{metric}_bucket', 'le')})", f"{what}, {legend}")
        for share, legend in ((0.5, "median"), (0.99, "99th percentile"))
    )


DASHBOARDS: dict[str, tuple[Panel, ...]] = {
    "preprocess": (
        Panel("Frames per second", ((_rate(_FRAMES, "store"), "{{store}}"),)),
        Panel(
            "Share of the ideal: GPUs that encode",
            ((f'{_ENCODING} / clamp_min(sum (ray_resources{{Name="GPU", State="USED"}}) {_OR_0}, 1)', "share"),),
            "percentunit",
        ),
        Panel(
            "Busy seconds per frame, by stage",
            ((f"{_rate(_SECONDS, 'stage')} / scalar({_rate(_FRAMES)})", "{{stage}}"),),
            "s",
        ),
        Panel(
            "Segments per second, by outcome",
            ((_rate("ray_timeviper_preprocess_segments_total", "status"), "{{status}}"),),
        ),
        Panel(
            "Media rejected by headers",
            (("max by (store, type) (ray_timeviper_plan_rejected_media_total)", "{{type}}"),),
        ),
        Panel("Rejects by reason", ((_rate("ray_timeviper_preprocess_errors_total", "type"), "{{type}}"),)),
        Panel(
            "Storage retries per second", ((f"{_rate('ray_timeviper_preprocess_retries_total')} {_OR_0}", "retries/s"),)
        ),
        Panel("Features written", ((_rate("ray_timeviper_preprocess_feature_bytes_total"), "bytes/s"),), "Bps"),
    ),
    "training": (
        Panel(
            "Loss",
            ((f"{_TRAIN}loss", "{{run}} {{phase}}"), (f"{_TRAIN}validation_loss", "{{run}} {{phase}} validation")),
        ),
        Panel("Tokens per second", ((f"{_TRAIN}tokens_per_second", "{{run}} {{phase}}"),)),
        Panel("MFU", ((f"{_TRAIN}mfu", "{{run}} {{phase}}"),), "percentunit"),
        Panel(
            "Share of a step that waits for data", ((f"{_TRAIN}data_wait_share", "{{run}} {{phase}}"),), "percentunit"
        ),
        Panel(
            "Stall by checkpoints, and failed saves",
            (
                (f"{_TRAIN}checkpoint_stall_s", "{{run}} {{phase}} stall"),
                (f"{_TRAIN}num_failed_saves", "{{run}} {{phase}} failed saves"),
            ),
            "s",
        ),
        Panel("Seconds per step", ((f"{_TRAIN}seconds", "{{run}} {{phase}}"),), "s"),
        Panel("Restarts that lost steps, in 6 h", ((f"resets({_TRAIN}global_step[6h])", "{{run}}"),)),
        Panel("Attempts: starts of the run", ((f"max by (run) ({_TRAIN}attempt)", "{{run}}"),)),
        Panel("Gradient norm", ((f"{_TRAIN}grad_norm", "{{run}} {{phase}}"),)),
        Panel("Fill of packs", ((f"{_TRAIN}fill", "{{run}} {{phase}}"),), "percentunit"),
        Panel("Peak memory of a rank", ((f"{_TRAIN}peak_memory_bytes", "{{run}} {{phase}}"),), "bytes"),
    ),
    "serving": (
        Panel(
            "Seconds to the first text at the gateway, and to the first token in the engine",
            (
                *_quantiles(f"{_GATEWAY}first_text_seconds", "text"),
                *_quantiles(f"{_ENGINE}first_token_seconds", "token"),
            ),
            "s",
        ),
        Panel(
            "Seconds of a request, 99th percentile, by route",
            ((f"histogram_quantile(0.99, {_rate(f'{_GATEWAY}request_seconds_bucket', 'le, route')})", "{{route}}"),),
            "s",
        ),
        Panel(
            "Tokens per second",
            (
                (_rate(f"{_ENGINE}completion_tokens_total"), "generated"),
                (_rate(f"{_ENGINE}prompt_tokens_total"), "prefilled"),
                (_rate(f"{_GATEWAY}prompt_tokens_total"), "prompts, cached included"),
            ),
        ),
        Panel(
            "Slots",
            (
                (f"sum ({_ENGINE}num_slots)", "slots"),
                (f"sum ({_ENGINE}active_slots)", "taken"),
                (f"sum ({_ENGINE}queued_requests)", "waiting"),
            ),
        ),
        Panel("Answers started per second", ((_rate(f"{_ENGINE}answers_total"), "answers"),)),
        Panel("Requests per second, by status", ((_rate(f"{_GATEWAY}requests_total", "status"), "{{status}}"),)),
        Panel(
            "Refused as full (429) per second",
            ((f'sum (rate({_GATEWAY}requests_total{{status="429"}}[{WINDOW}])) {_OR_0}', "429"),),
        ),
        Panel("Requests in progress", ((f"sum ({_GATEWAY}ongoing_requests)", "requests"),)),
        Panel(
            "Video-prefix cache: share of hits",
            (
                (
                    f"{_rate(_ENGINE + 'prefix_hits_total')} / ({_rate(_ENGINE + 'prefix_hits_total')}"
                    f" + {_rate(_ENGINE + 'prefix_misses_total')})",
                    "hits",
                ),
                (
                    f"{_rate(_ENGINE + 'prefix_host_hits_total')} / ({_rate(_ENGINE + 'prefix_hits_total')}"
                    f" + {_rate(_ENGINE + 'prefix_misses_total')})",
                    "from host memory",
                ),
            ),
            "percentunit",
        ),
        Panel(
            "Memory of keys, values and cached prefixes",
            (
                (f"sum ({_ENGINE}reserved_kv_bytes)", "reserved by requests"),
                (f"sum ({_ENGINE}kv_bytes)", "keys and values"),
                (f"sum ({_ENGINE}cache_bytes)", "with Mamba states"),
                (f"sum ({_ENGINE}prefix_bytes)", "cached prefixes"),
                (f"sum ({_ENGINE}prefix_host_bytes)", "prefixes in host memory"),
            ),
            "bytes",
        ),
        Panel(
            "Vision tokens per second, before and after TransV",
            (
                (_rate(f"{_ENGINE}vision_tokens_total"), "of prompts"),
                (_rate(f"{_ENGINE}kept_vision_tokens_total"), "kept"),
            ),
        ),
        Panel(
            "Media per second, by origin of their features and outcome",
            ((_rate(f"{_FEATURES}requests_total", "origin, status"), "{{origin}} {{status}}"),),
        ),
        Panel("Seconds to read, or to decode and encode, a medium", _quantiles(f"{_FEATURES}seconds", "medium"), "s"),
        Panel(
            "The feature service",
            (
                (_rate(f"{_FEATURES}frames_total"), "frames of uploads per second"),
                (f"sum ({_FEATURES}ongoing)", "media in progress"),
                (f"max ({_FEATURES}stored_media)", "media of the store"),
            ),
        ),
        Panel("Cached features", ((f"sum ({_FEATURES}cache_bytes)", "bytes"),), "bytes"),
        Panel(
            "Cached prefixes",
            (
                (f"sum ({_ENGINE}prefix_entries)", "entries"),
                (f"sum ({_ENGINE}prefix_host_entries)", "in host memory"),
                (f"sum (increase({_ENGINE}prefix_evictions_total[{WINDOW}]))", "evicted in 5 min"),
            ),
        ),
        Panel(
            "Answered tokens per second at the gateway",
            (
                (_rate(f"{_GATEWAY}completion_tokens_total"), "generated"),
                (_rate(f"{_GATEWAY}cached_prompt_tokens_total"), "cached prompt tokens"),
            ),
        ),
    ),
}


def grafana_dashboard(name: str) -> dict[str, Any]:
    """Returns a dashboard in Grafana's JSON model; it asks for the data source when it is imported."""
    source = {"type": "prometheus", "uid": "${datasource}"}
    panels = []
    for index, panel in enumerate(DASHBOARDS[name]):
        row, column = divmod(index * PANEL_WIDTH, COLUMNS)
        targets = [
            {"refId": chr(ord("A") + number), "expr": expression, "legendFormat": legend, "datasource": source}
            for number, (expression, legend) in enumerate(panel.queries)
        ]
        place = {"x": column, "y": row * PANEL_HEIGHT, "w": PANEL_WIDTH, "h": PANEL_HEIGHT}
        panels.append(
            {
                "id": index + 1,
                "type": "timeseries",
                "title": panel.title,
                "datasource": source,
                "gridPos": place,
                "fieldConfig": {"defaults": {"unit": panel.unit, "min": 0}, "overrides": []},
                "targets": targets,
            }
        )
    variable = {"name": "datasource", "type": "datasource", "query": "prometheus", "label": "Data source"}
    return {
        "uid": f"timeviper-{name}",
        "title": f"TimeViper {name}",
        "tags": ["timeviper"],
        "schemaVersion": 39,
        "editable": True,
        "refresh": "30s",
        "time": {"from": "now-3h", "to": "now"},
        "templating": {"list": [variable]},
        "panels": panels,
    }


def prometheus_config() -> dict[str, Any]:
    """Returns a configuration for a Prometheus on the head."""
    return {
        "global": {"scrape_interval": "15s"},
        "scrape_configs": [
            {"job_name": "ray", "file_sd_configs": [{"files": [DISCOVERY_FILE]}]},
        ],
    }


def pod_monitor(name: str, namespace: str, labels: dict[str, str]) -> dict[str, Any]:
    """Returns a PodMonitor of Prometheus' operator for the pods of all clusters."""
    return {
        "apiVersion": "monitoring.coreos.com/v1",
        "kind": "PodMonitor",
        "metadata": {"name": name, "namespace": namespace},
        "spec": {
            "selector": {"matchLabels": labels},
            "podMetricsEndpoints": [{"port": "metrics", "interval": "15s"}],
        },
    }

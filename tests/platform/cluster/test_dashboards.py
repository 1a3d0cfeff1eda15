"""Dashboards ask for metrics that exist, and show every metric that is exported."""

from __future__ import annotations

import ast
import json
import re
from pathlib import Path

import pytest
import ray

from timeviper_platform.cluster.dashboards import (
    DASHBOARDS,
    DISCOVERY_FILE,
    RAY_PREFIX,
    grafana_dashboard,
    prometheus_config,
)
from timeviper_platform.common.metrics import METRICS

ROOT = Path(__file__).resolve().parents[3]
TRAINING = ROOT / "platform" / "timeviper_platform" / "training"
NOT_SHOWN = {
    "epoch", "lr", "num_targets", "num_samples", "num_damaged_samples", "num_vision_tokens", "num_tokens",
    "padding_share", "tflops_per_second", "phase", "step",
}  # fmt: skip
"""Keys of a training step's row that other panels imply, or that TensorBoard shows better."""


ONCE = {"ray_timeviper_plan_rejected_media_total"}
"""Counters that rise once, with their first sample, where a rate would be 0."""


def queries() -> str:
    return "\n".join(
        expression for panels in DASHBOARDS.values() for panel in panels for expression, _ in panel.queries
    )


def named(prefix: str) -> set[str]:
    return set(re.findall(rf"\b{prefix}\w+", queries()))


def training_keys() -> set[str]:
    """Keys of the dictionaries that become a step's row, from the source."""
    keys = set()
    metrics = TRAINING / "metrics"
    for file in (metrics / "step_log.py", metrics / "writer.py", TRAINING / "phase_trainer.py"):
        for node in ast.walk(ast.parse(file.read_text())):
            if isinstance(node, ast.Dict):
                keys |= {key.value for key in node.keys if isinstance(key, ast.Constant) and isinstance(key.value, str)}
    return keys


def test_every_exported_metric_is_shown_and_every_shown_one_exported() -> None:
    shown = {name for name in named("(?:ray_)?timeviper_") if not name.startswith("ray_timeviper_train_")}
    suffixes = {"counter": "_total", "gauge": "", "histogram": "_bucket"}
    assert shown == {RAY_PREFIX + metric.name + suffixes[metric.kind] for metric in METRICS}


def test_training_panels_show_the_keys_of_a_step() -> None:
    shown = {name.removeprefix("ray_timeviper_train_") for name in named("ray_timeviper_train_")}
    keys = training_keys()
    assert shown - {"validation_loss"} <= keys
    step_keys = {"loss", "grad_norm", "tokens_per_second", "mfu", "fill", "seconds", "data_wait_share"}
    assert (
        step_keys | {"peak_memory_bytes", "global_step", "checkpoint_stall_s", "num_failed_saves", "attempt"} <= shown
    )
    row = next(
        node
        for node in ast.walk(ast.parse((TRAINING / "metrics" / "step_log.py").read_text()))
        if isinstance(node, ast.Dict) and any(getattr(key, "value", None) == "grad_norm" for key in node.keys)
    )
    names = {key.value for key in row.keys if isinstance(key, ast.Constant)}
    assert names - shown == NOT_SHOWN


def test_metrics_of_ray_itself_are_those_that_its_own_dashboards_use() -> None:
    own = {name for name in named("ray_") if not name.startswith("ray_timeviper_")}
    assert own
    folder = Path(ray.__file__).parent / "dashboard" / "modules" / "metrics" / "dashboards"
    text = "\n".join(file.read_text() for file in folder.glob("*.py"))
    assert [name for name in own if not re.search(rf"\b{name}\b", text)] == []


def test_labels_in_queries_are_tags_of_their_metrics() -> None:
    tags = {metric.name: set(metric.tags) for metric in METRICS}
    for panels in DASHBOARDS.values():
        for panel in panels:
            for expression, legend in panel.queries:
                for name, label in re.findall(r'(timeviper_\w+?)(?:_total)?\{(\w+)="', expression):
                    assert label in tags[name]
                for label, name in re.findall(r"by \((\w+)\) \(rate\((?:ray_)?(timeviper_\w+?)_total\[", expression):
                    assert label in tags[name]
                    assert legend == f"{{{{{label}}}}}"


def test_what_has_not_happened_yet_is_0_and_not_missing() -> None:
    for metric in ("preprocess_retries_total", 'gateway_requests_total{status="429"', 'ray_resources{Name="GPU"'):
        (line,) = (line for line in queries().splitlines() if metric in line)
        assert "or vector(0)" in line


def test_queries_are_balanced_and_names_end_as_their_kind() -> None:
    for line in queries().splitlines():
        assert all(line.count(left) == line.count(right) for left, right in ("()", "[]", "{}"))
        for counter in re.findall(r"(?:rate|increase)\((\w+)", line):
            assert counter.endswith(("_total", "_bucket"))
        for name in set(re.findall(r"\b\w+_total\b", line)) - ONCE:
            assert re.search(rf"(?:rate|increase)\({name}[\[{{]", line), f"{name} is a counter"


@pytest.mark.parametrize("name", DASHBOARDS)
def test_a_dashboard_is_grafanas_json(name: str) -> None:
    board = json.loads(json.dumps(grafana_dashboard(name)))
    assert len({panel["id"] for panel in board["panels"]}) == len(board["panels"]) == len(DASHBOARDS[name])
    places = [(panel["gridPos"]["x"], panel["gridPos"]["y"]) for panel in board["panels"]]
    assert len(set(places)) == len(places)
    assert all(x + panel["gridPos"]["w"] <= 24 for (x, _), panel in zip(places, board["panels"], strict=True))
    for panel in board["panels"]:
        assert [target["refId"] for target in panel["targets"]] == list("ABCDEF")[: len(panel["targets"])]
    (variable,) = board["templating"]["list"]
    assert variable["name"] == "datasource"


def test_prometheus_reads_rays_discovery_file() -> None:
    from ray._private.ray_constants import PROMETHEUS_SERVICE_DISCOVERY_FILE

    assert Path(DISCOVERY_FILE).name == PROMETHEUS_SERVICE_DISCOVERY_FILE
    jobs = {job["job_name"] for job in prometheus_config()["scrape_configs"]}
    assert jobs == {"ray"}

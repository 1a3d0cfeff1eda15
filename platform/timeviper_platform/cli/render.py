"""Writes the files of a deployment: `timeviper render --config ray_configs/cluster/values.yaml [key=value ...]`.

    kubectl apply -f deploy/configs.yaml -f deploy/rayjob-preprocess.yaml      # one run on its own cluster
    kubectl apply -f deploy/raycluster.yaml                                    # a cluster for `ray job submit`
    kubectl apply -f deploy/rayservice.yaml                                    # the endpoint
    ray up deploy/launcher.yaml                                                # on AWS without Kubernetes

Every resource is checked against the fields of KubeRay's release; docs/operate.md lists what must exist before.
"""

from __future__ import annotations

import argparse
import json
from collections.abc import Sequence
from pathlib import Path

import yaml

from timeviper_platform.cluster.dashboards import DASHBOARDS, grafana_dashboard, pod_monitor, prometheus_config
from timeviper_platform.cluster.kuberay import API_VERSION, kuberay_fields, problems
from timeviper_platform.cluster.launcher import launcher_file
from timeviper_platform.cluster.manifests import Deployment
from timeviper_platform.cluster.values import ClusterValues
from timeviper_platform.common.config import load_config
from timeviper_platform.common.job import JobParser, JobResult, run_job


def main(arguments: Sequence[str] | None = None) -> int:
    parser = JobParser(
        __doc__,
        config_class=ClusterValues,
        config_file="ray_configs/cluster/values.yaml",
        override="bucket=s3://mine gpu_workers.max_nodes=2",
    )
    parser.add_argument("--output", type=Path, default=Path("deploy"), help="folder of the files (default: deploy)")
    return run_job(parser, render, arguments)


def render(options: argparse.Namespace) -> JobResult:
    """Raises ValueError for values that yield an invalid resource."""
    values = load_config(ClusterValues, options.config, options.overrides)
    resources = Deployment(values).resources()
    wrong = [
        f"{name}: {problem}"
        for name, items in resources.items()
        for item in items
        if item["apiVersion"] == API_VERSION
        for problem in problems(item)
    ]
    if wrong:
        raise ValueError(f"{options.config}: KubeRay {kuberay_fields()['version']} would refuse {'; '.join(wrong)}")
    files = {f"{name}.yaml": _dump(items) for name, items in resources.items()}
    files["launcher.yaml"] = _dump([launcher_file(values)])
    labels = {"app.kubernetes.io/part-of": values.name}
    files["podmonitor.yaml"] = _dump([pod_monitor(values.name, values.namespace, labels)])
    files["prometheus.yaml"] = _dump([prometheus_config()])
    files |= {f"dashboard-{name}.json": json.dumps(grafana_dashboard(name), indent=2) + "\n" for name in DASHBOARDS}
    options.output.mkdir(parents=True, exist_ok=True)
    for name, text in files.items():
        (options.output / name).write_text(text, encoding="utf-8")
    return JobResult([f"written    {options.output / name}" for name in files])


class _Dumper(yaml.SafeDumper):
    """Writes text of several lines as blocks, and shared values twice instead of as anchors."""

    def ignore_aliases(self, data: object) -> bool:
        return True


def _block(dumper: yaml.SafeDumper, text: str) -> yaml.ScalarNode:
    return dumper.represent_scalar("tag:yaml.org,2002:str", text, style="|" if "\n" in text else None)


_Dumper.add_representer(str, _block)


def _dump(documents: Sequence[object]) -> str:
    return yaml.dump_all(documents, Dumper=_Dumper, sort_keys=False, width=120)

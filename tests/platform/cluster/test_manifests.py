"""What `timeviper render` writes, as KubeRay, Kubernetes, Ray's autoscalers and Ray Serve read it."""

from __future__ import annotations

import copy
import importlib
import json
import re
from collections.abc import Callable, Iterator
from dataclasses import asdict
from pathlib import Path
from typing import Any

import pytest
import yaml
from ray.autoscaler._private.kuberay.autoscaling_config import _derive_autoscaling_config_from_ray_cr
from ray.autoscaler._private.util import prepare_config, validate_config
from ray.serve.schema import ServeDeploySchema

from timeviper_platform.cli.__main__ import COMMANDS
from timeviper_platform.cli.render import main
from timeviper_platform.cluster.kuberay import kuberay_fields, problems
from timeviper_platform.cluster.launcher import launcher_file
from timeviper_platform.cluster.manifests import CONFIG_MOUNT, Deployment
from timeviper_platform.cluster.values import ClusterValues
from timeviper_platform.common.config import load_config
from timeviper_platform.serving.gateway.config import ConnectionLimits
from timeviper_platform.serving.gateway.connections import CALLBACK_VARIABLE, LIMITS_VARIABLE

ROOT = Path(__file__).resolve().parents[3]
VALUES = ROOT / "ray_configs" / "cluster" / "values.yaml"
BUCKET = "s3://films-of-mine/timeviper"


def make_deployment(*overrides: str) -> Deployment:
    return Deployment(load_config(ClusterValues, VALUES, [f"bucket={BUCKET}", *overrides]))


@pytest.fixture(scope="module")
def deployment() -> Deployment:
    return make_deployment()


@pytest.fixture
def resources(deployment: Deployment) -> dict[str, Any]:
    return {name: copy.deepcopy(item) for name, (item,) in deployment.resources().items()}


def clusters(resources: dict[str, Any]) -> dict[str, Any]:
    """The spec of each RayCluster by the file it is in."""
    found = {}
    for name, resource in resources.items():
        spec = resource.get("spec", {})
        cluster = spec.get("rayClusterSpec") or spec.get("rayClusterConfig") or spec
        if cluster:
            found[name] = cluster
    return found


def pods(resources: dict[str, Any]) -> Iterator[tuple[str, str, dict[str, Any]]]:
    for name, cluster in clusters(resources).items():
        yield name, "head", cluster["headGroupSpec"]["template"]
        for group in cluster["workerGroupSpecs"]:
            yield name, group["groupName"], group["template"]


def test_every_resource_has_fields_that_kuberay_accepts(resources: dict[str, Any]) -> None:
    custom = [resource for resource in resources.values() if resource["kind"] != "ConfigMap"]
    assert [resource["kind"] for resource in custom] == ["RayCluster", "RayJob", "RayJob", "RayJob", "RayService"]
    assert [problem for resource in custom for problem in problems(resource)] == []


def _set(path: str, value: object) -> Callable[[dict[str, Any]], None]:
    def change(resource: dict[str, Any]) -> None:
        *parents, last = path.split(".")
        node: Any = resource
        for parent in parents:
            node = node[int(parent)] if parent.isdigit() else node[parent]
        if value is None:
            del node[last]
        else:
            node[last] = value

    return change


@pytest.mark.parametrize(
    ("change", "problem"),
    [
        (_set("spec.backOffLimit", 0), "spec.backOffLimit: unknown field; there are "),
        (_set("spec.rayClusterSpec.headGroupSpec", None), "spec.rayClusterSpec.headGroupSpec: required"),
        (_set("spec.rayClusterSpec.workerGroupSpecs.0.maxReplicas", None), "workerGroupSpecs[0].maxReplicas: required"),
        (_set("spec.rayClusterSpec.autoscalerOptions.version", "v3"), "version: 'v3' is not one of v1, v2"),
        (_set("spec.submissionMode", "Kubernetes"), "'Kubernetes' is not one of K8sJobMode, "),
        (_set("spec.backoffLimit", "0"), "spec.backoffLimit: '0' is not of type integer"),
        (_set("spec.backoffLimit", True), "spec.backoffLimit: True is not of type integer"),
        (_set("metadata.name", "a" * 48), "has 48 characters, at most 47"),
        (_set("apiVersion", "ray.io/v1alpha1"), "not a resource of ray.io/v1"),
    ],
)
def test_a_wrong_field_is_named(
    change: Callable[[dict[str, Any]], None], problem: str, resources: dict[str, Any]
) -> None:
    job = resources["rayjob-train"]
    change(job)
    (found,) = problems(job)
    assert problem in found


def test_built_in_kinds_are_valid_for_kubernetes(resources: dict[str, Any]) -> None:
    validator = pytest.importorskip("kubernetes_validate")
    validator.validate(resources["configs"], "1.31", strict=True)
    for name, group, template in pods(resources):
        pod = {"apiVersion": "v1", "kind": "Pod", **copy.deepcopy(template)}
        pod["metadata"]["name"] = f"{name}-{group}"
        validator.validate(pod, "1.31", strict=True)


def test_a_silent_node_is_given_up_within_15_seconds_everywhere(resources: dict[str, Any]) -> None:
    values = load_config(ClusterValues, VALUES, [f"bucket={BUCKET}"])
    options = [option.removeprefix("--env=") for option in launcher_file(values)["docker"]["run_options"]]
    environments = [dict(option.split("=", 1) for option in options)]
    containers = [item for _, _, template in pods(resources) for item in template["spec"]["containers"]]
    environments += [{item["name"]: item.get("value") for item in container["env"]} for container in containers]
    for environment in environments:
        period, timeout = (int(environment[f"RAY_health_check_{name}_ms"]) for name in ("period", "timeout"))
        assert int(environment["RAY_health_check_failure_threshold"]) * (period + timeout) <= 15_000


def test_ray_reads_the_resources_of_each_group(resources: dict[str, Any]) -> None:
    for name, cluster in clusters(resources).items():
        metadata = resources[name]["metadata"]
        config = _derive_autoscaling_config_from_ray_cr({"metadata": metadata, "spec": cluster})
        types = config["available_node_types"]
        head = types.pop(config["head_node_type"])
        assert head["resources"]["CPU"] == 0
        assert {group: node["resources"].get("GPU", 0) for group, node in types.items()} == (
            {"cpu": 0, "gpu": 8} if name in {"raycluster", "rayjob-preprocess"} else {"gpu": 8}
        )
        assert types["gpu"]["resources"]["CPU"] == 96
        assert types["gpu"]["max_workers"] == 4


def test_ray_accepts_the_launcher_file(deployment: Deployment) -> None:
    file = yaml.safe_load(yaml.safe_dump(launcher_file(deployment.values)))
    validate_config(prepare_config(file))
    types = file["available_node_types"]
    markets = {name: "InstanceMarketOptions" in node["node_config"] for name, node in types.items()}
    assert markets == {"head": False, "cpu-spot": True, "gpu-spot": True, "gpu-on-demand": False}
    assert types["gpu-spot"]["priority"] > types["gpu-on-demand"].get("priority", 0)
    assert "--num-cpus=0" in file["head_start_ray_commands"][-1]


def test_the_ray_version_is_the_tested_one(resources: dict[str, Any]) -> None:
    pinned = re.search(r"^ray==(.+)$", (ROOT / "constraints.txt").read_text(), flags=re.MULTILINE)
    assert pinned is not None
    assert {cluster["rayVersion"] for cluster in clusters(resources).values()} == {pinned[1]}
    assert kuberay_fields()["version"] == "v1.7.0"


def test_every_command_file_and_import_path_exists(resources: dict[str, Any]) -> None:
    for job in ("preprocess", "train", "evaluate"):
        program, command, option, file = resources[f"rayjob-{job}"]["spec"]["entrypoint"].split()
        assert (program, command, option) == ("timeviper", job, "--config")
        assert command in COMMANDS
        assert file.removeprefix(f"{CONFIG_MOUNT}/") in resources["configs"]["data"]
    assert all("your-bucket" not in text for text in resources["configs"]["data"].values())
    serve = yaml.safe_load(resources["rayservice"]["spec"]["serveConfigV2"])
    (application,) = ServeDeploySchema.model_validate(serve).applications
    assert application.import_path is not None
    module, _, name = application.import_path.partition(":")
    assert callable(getattr(importlib.import_module(module), name))
    mounts = {group: pod["spec"]["containers"][0]["volumeMounts"] for _, group, pod in pods(resources)}
    assert CONFIG_MOUNT in {mount["mountPath"] for mount in mounts["head"]}  # where the driver runs


def test_all_files_have_one_place_in_the_bucket(deployment: Deployment) -> None:
    preprocess, train, evaluate, serve = deployment.preprocess, deployment.train, deployment.evaluate, deployment.serve
    store = f"{BUCKET}/features/siglip-so400m-16"
    assert {preprocess.feature_store, train.feature_store, evaluate.feature_store, serve.features.feature_store} == {
        store
    }
    weights = f"{train.runs}/{train.name}/weights/{list(train.phases)[-1]}"
    assert {evaluate.weights, serve.weights} == {weights}
    named = re.findall(
        r"s3://[^\s,}\]]+", "\n".join(path.read_text() for path in (ROOT / "ray_configs").glob("*.yaml"))
    )
    layout = re.findall(r"^s3://your-bucket/(\w+)/", (ROOT / "docs" / "operate.md").read_text(), flags=re.MULTILINE)
    assert {uri.removeprefix("s3://your-bucket/").partition("/")[0].rstrip(")") for uri in named} <= set(layout)


def test_pods_run_where_they_may_be_lost_without_harm(resources: dict[str, Any]) -> None:
    label = "karpenter.sh/capacity-type"
    required, preferred = (f"{word}DuringSchedulingIgnoredDuringExecution" for word in ("required", "preferred"))
    for name, group, template in pods(resources):
        affinity = template["spec"]["affinity"]["nodeAffinity"]
        if group == "head" or name == "rayservice":
            (term,) = affinity[required]["nodeSelectorTerms"]
            assert term["matchExpressions"] == [{"key": label, "operator": "NotIn", "values": ["spot"]}]
        elif group == "gpu":  # on demand where there is no spot machine
            assert list(affinity) == [preferred]
        else:
            (term,) = affinity[required]["nodeSelectorTerms"]
            assert term["matchExpressions"] == [{"key": label, "operator": "In", "values": ["spot"]}]


def test_grace_covers_what_a_node_must_finish(resources: dict[str, Any]) -> None:
    grace = {name: {pod["spec"]["terminationGracePeriodSeconds"]} for name, _, pod in pods(resources)}
    # training: 300 s to save + 30; the endpoint: answers of 600 s + 30 + 30
    assert grace == {
        "raycluster": {330},
        "rayjob-preprocess": {60},
        "rayjob-train": {330},
        "rayjob-evaluate": {60},
        "rayservice": {660},
    }


def test_every_container_is_bounded_and_probed(resources: dict[str, Any]) -> None:
    for _, group, template in pods(resources):
        (container,) = template["spec"]["containers"]
        requests, limits = container["resources"]["requests"], container["resources"]["limits"]
        assert {"cpu", "memory", "ephemeral-storage"} <= set(requests)
        assert requests["memory"] == limits["memory"]
        assert container["startupProbe"]["failureThreshold"] * container["startupProbe"]["periodSeconds"] == 900
        assert container["livenessProbe"]["httpGet"]["path"] == "/api/healthz"
        shm = next(volume for volume in template["spec"]["volumes"] if volume["name"] == "shm")
        assert shm["emptyDir"]["medium"] == "Memory"
        assert ("nvidia.com/gpu" in limits) == (group == "gpu")


def test_jobs_are_not_run_twice_and_the_endpoint_survives_its_head(resources: dict[str, Any]) -> None:
    for job in ("preprocess", "train", "evaluate"):
        spec = resources[f"rayjob-{job}"]["spec"]
        assert (spec["backoffLimit"], spec["submitterConfig"]["backoffLimit"]) == (0, 0)
    assert all(cluster["authOptions"]["mode"] == "token" for cluster in clusters(resources).values())
    options = clusters(resources)["rayservice"]["gcsFaultToleranceOptions"]
    assert options["redisPassword"]["valueFrom"]["secretKeyRef"]["name"] == "timeviper-redis"


def test_the_endpoint_alone_has_its_keys_and_the_limits_of_its_http_servers(resources: dict[str, Any]) -> None:
    gateway = yaml.safe_load(resources["rayservice"]["spec"]["serveConfigV2"])["applications"][0]["args"]["gateway"]
    for name, _, template in pods(resources):
        (container,) = template["spec"]["containers"]
        environment = {entry["name"]: entry["value"] for entry in container["env"]}
        mounts = {mount["name"]: mount["mountPath"] for mount in container["volumeMounts"]}
        volumes = {volume["name"]: volume for volume in template["spec"]["volumes"]}
        if name != "rayservice":
            assert CALLBACK_VARIABLE not in environment
            assert "keys" not in mounts
            continue
        module, _, function = environment[CALLBACK_VARIABLE].partition(":")
        assert callable(getattr(importlib.import_module(module), function))
        assert json.loads(environment[LIMITS_VARIABLE]) == asdict(ConnectionLimits())
        assert gateway["api_keys_file"] == f"{mounts['keys']}/keys.yaml"
        assert volumes["keys"]["secret"] == {"secretName": "timeviper-keys"}


@pytest.mark.parametrize(
    ("override", "message"),
    [
        ("keys_secret=null", "no API keys are configured in ray_configs/serve.yaml, nor a keys_secret; set"),
        (
            "gpu_workers.gpus=2",
            "train needs 8 workers of 8 CPUs and 1 GPUs, and gpu_workers holds 2 per node on at most",
        ),
        ("gpu_workers.gpus=0", "self.gpu_workers.gpus = 0 must be at least 1"),
        ("configs.train=ray_configs/none.yaml", "no configuration file at 'ray_configs/none.yaml'"),
        ("gpu_workers.max_nodes=0", "self.min_nodes = 0 must be between 0 and self.max_nodes = 0"),
        ("name=" + "a" * 60, "has 60 characters, at most 53"),
    ],
)
def test_values_that_cannot_work_are_one_line(
    override: str, message: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    overrides = [override, "gpu_workers.max_nodes=3"] if "gpus=2" in override else [override]
    assert main(["--config", str(VALUES), "--output", str(tmp_path / "deploy"), *overrides]) == 1
    (line,) = capsys.readouterr().err.splitlines()
    assert message in line
    assert not (tmp_path / "deploy").exists()


def test_use_gpu_is_a_gpu_per_worker(tmp_path: Path) -> None:
    """As in training, where resources_per_worker need not name it."""
    train = (ROOT / "ray_configs" / "train.yaml").read_text()
    assert "{CPU: 8, GPU: 1}" in train
    (tmp_path / "train.yaml").write_text(train.replace("{CPU: 8, GPU: 1}", "{CPU: 1}"))
    with pytest.raises(ValueError, match="train needs 8 workers of 1 CPUs and 1 GPUs, and gpu_workers holds 2 per"):
        make_deployment(f"configs.train={tmp_path}/train.yaml", "gpu_workers.gpus=2", "gpu_workers.max_nodes=3")


def test_files_are_written_and_read_back(
    tmp_path: Path, resources: dict[str, Any], capsys: pytest.CaptureFixture[str]
) -> None:
    assert main(["--config", str(VALUES), "--output", str(tmp_path), f"bucket={BUCKET}"]) == 0
    capsys.readouterr()
    for name, resource in resources.items():
        assert yaml.safe_load((tmp_path / f"{name}.yaml").read_text()) == resource

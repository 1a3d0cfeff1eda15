"""Kubernetes resources of a deployment: a cluster, its jobs and its endpoint, for KubeRay."""

from __future__ import annotations

from importlib.metadata import version
from pathlib import Path
from typing import Any

import yaml

from timeviper_platform.cluster.kuberay import API_VERSION
from timeviper_platform.cluster.values import BUCKET, NODE_ENVIRONMENT, ClusterValues, NodeSize, WorkerSize
from timeviper_platform.common.config import parse_config
from timeviper_platform.common.job import config_folder, find_config
from timeviper_platform.data.preprocess.config import PreprocessConfig
from timeviper_platform.evaluation.run import EvaluateConfig
from timeviper_platform.serving.app import ServeConfig
from timeviper_platform.serving.gateway import connections
from timeviper_platform.serving.limits import IN_PLACE
from timeviper_platform.training.config import TrainConfig

Resource = dict[str, Any]

CONFIG_MOUNT = "/etc/timeviper"
"""Folder of the jobs' configurations on the head."""
HEALTH_PATH, HEALTH_PORT = "/api/healthz", 52365
"""Ray's agent answers here on every node, without a token."""
PROBE_PERIOD_S = 10
MARGIN_S = 30
"""Seconds for Ray itself to end, on top of the work's."""
JOB_TTL_S = 3600
"""Seconds that a finished job's head stays, for its logs."""
GPU_RESOURCE = "nvidia.com/gpu"
KEYS_MOUNT = "/etc/timeviper/keys"
KEYS_FILE = "keys.yaml"


class Deployment:
    """Reads the jobs' configurations once, with `bucket` filled in; renders every resource.

    Raises:
        ValueError: for a wrong key in a configuration, or a configuration that the nodes can never run.
    """

    def __init__(self, values: ClusterValues) -> None:
        self.values = values
        files = values.configs
        self.texts = {
            name: _read(getattr(files, name), values.bucket) for name in ("preprocess", "train", "evaluate", "serve")
        }
        keys = {name: yaml.safe_load(text) for name, text in self.texts.items()}
        self.preprocess = parse_config(PreprocessConfig, keys["preprocess"], source=files.preprocess)
        self.train = parse_config(TrainConfig, keys["train"], source=files.train)
        self.evaluate = parse_config(EvaluateConfig, keys["evaluate"], source=files.evaluate)
        self.serve_file = keys["serve"]
        (application,) = self.serve_file["applications"]
        if values.keys_secret is not None:
            application["args"].setdefault("gateway", {})["api_keys_file"] = f"{KEYS_MOUNT}/{KEYS_FILE}"
        self.serve = parse_config(ServeConfig, application["args"], source=f"{files.serve}: args")
        self.serve.gateway.require_keys(f"in {files.serve}, nor a keys_secret")
        self._check_sizes()

    def resources(self) -> dict[str, list[Resource]]:
        """Returns the resources by the name of their file."""
        return {
            "configs": [self.config_map()],
            "raycluster": [self.ray_cluster()],
            "rayjob-preprocess": [self.ray_job("preprocess")],
            "rayjob-train": [self.ray_job("train")],
            "rayjob-evaluate": [self.ray_job("evaluate")],
            "rayservice": [self.ray_service()],
        }

    def config_map(self) -> Resource:
        data = {f"{name}.yaml": self.texts[name] for name in ("preprocess", "train", "evaluate")}
        return {"apiVersion": "v1", "kind": "ConfigMap", "metadata": self._metadata("configs"), "data": data}

    def ray_cluster(self) -> Resource:
        """A cluster for `ray job submit` that grows and shrinks with the work."""
        grace = max(self.grace_seconds(job) for job in ("preprocess", "train", "evaluate"))
        return self._resource("RayCluster", None, self._cluster(grace, with_cpu_workers=True))

    def ray_job(self, job: str) -> Resource:
        """A cluster for one run alone. A failed run is not submitted again: jobs retry transient errors themselves."""
        cluster = self._cluster(self.grace_seconds(job), with_cpu_workers=job == "preprocess")
        spec = {
            "entrypoint": f"timeviper {job} --config {CONFIG_MOUNT}/{job}.yaml",
            "submissionMode": "K8sJobMode",
            "backoffLimit": 0,
            "submitterConfig": {"backoffLimit": 0},
            "shutdownAfterJobFinishes": True,
            "ttlSecondsAfterFinished": JOB_TTL_S,
            "runtimeEnvYAML": yaml.safe_dump({"env_vars": _job_environment()}),
            "rayClusterSpec": cluster,
        }
        return self._resource("RayJob", job, spec)

    def ray_service(self) -> Resource:
        """The endpoint. Its nodes are never spot machines, and its state outlives the head."""
        password = {"valueFrom": {"secretKeyRef": {"name": self.values.redis_secret, "key": "password"}}}
        cluster = self._cluster(self.grace_seconds("serve"), with_cpu_workers=False, on_spot=False, min_gpu_nodes=1)
        for group in (cluster["headGroupSpec"], *cluster["workerGroupSpecs"]):
            self._add_serving(group["template"]["spec"])
        cluster["gcsFaultToleranceOptions"] = {"redisAddress": self.values.redis_address, "redisPassword": password}
        spec = {
            "serveConfigV2": yaml.safe_dump(self.serve_file, sort_keys=False),
            "excludeHeadPodFromServeSvc": True,
            "upgradeStrategy": {"type": "NewCluster"},
            "rayClusterDeletionDelaySeconds": self.grace_seconds("serve"),
            "rayClusterConfig": cluster,
        }
        return self._resource("RayService", None, spec)

    def grace_seconds(self, job: str) -> int:
        """Seconds between SIGTERM and SIGKILL of a node.

        Training: the time in which a checkpoint is saved (RAY_JOB_STOP_WAIT_TIME_S of ray_configs/runtime_env.yaml).
        The endpoint: the longest shutdown of a deployment. Others lose only the file being written. Each + MARGIN_S.
        """
        if job == "train":
            return int(_job_environment()["RAY_JOB_STOP_WAIT_TIME_S"]) + MARGIN_S
        if job == "serve":
            return int(max(self.serve.shutdown_timeout_s(name) for name in IN_PLACE)) + MARGIN_S
        return 2 * MARGIN_S

    def _add_serving(self, pod: Resource) -> None:
        """API keys as a file that follows its Secret, and the limits of Ray Serve's HTTP servers."""
        (container,) = pod["containers"]
        limits = connections.environment(self.serve.gateway.connections)
        container["env"] += [{"name": key, "value": value} for key, value in limits.items()]
        if self.values.keys_secret is not None:
            pod["volumes"].append({"name": "keys", "secret": {"secretName": self.values.keys_secret}})
            container["volumeMounts"].append({"name": "keys", "mountPath": KEYS_MOUNT, "readOnly": True})

    def _check_sizes(self) -> None:
        gpu_workers = self.values.gpu_workers
        training, scoring = self.train.workers, self.evaluate.workers
        deployments = self.serve.deployments
        wanted = {
            "train": (training.min_workers, {"GPU": float(training.use_gpu), **training.resources_per_worker}),
            "evaluate": (scoring.num_workers, {"CPU": scoring.cpus_per_worker, "GPU": scoring.gpus_per_worker}),
            **{
                f"serve: {name}": (item.autoscaling.min_replicas, {"CPU": item.num_cpus, "GPU": item.num_gpus})
                for name, item in (
                    ("gateway", deployments.gateway),
                    ("features", deployments.features),
                    ("engine", deployments.engine),
                )
            },
        }
        for name, (count, resources) in wanted.items():
            cpus, gpus = resources.get("CPU", 0.0), resources.get("GPU", 0.0)
            fits = int(min(gpu_workers.cpus / cpus if cpus else 1e9, gpu_workers.gpus / gpus if gpus else 1e9))
            if count > fits * gpu_workers.max_nodes:
                raise ValueError(
                    f"{name} needs {count} workers of {cpus:g} CPUs and {gpus:g} GPUs, and gpu_workers holds"
                    f" {fits} per node on at most {gpu_workers.max_nodes} nodes; raise max_nodes, or lower the workers"
                )

    def _cluster(
        self, grace_seconds: int, *, with_cpu_workers: bool, on_spot: bool = True, min_gpu_nodes: int = 0
    ) -> Resource:
        values = self.values
        groups = [self._group("gpu", values.gpu_workers, grace_seconds, on_spot=on_spot, min_nodes=min_gpu_nodes)]
        if with_cpu_workers:
            groups.insert(0, self._group("cpu", values.cpu_workers, grace_seconds, on_spot=True, min_nodes=0))
        return {
            "rayVersion": version("ray"),
            "authOptions": {"mode": "token", "secretName": values.token_secret},
            "enableInTreeAutoscaling": True,
            "autoscalerOptions": {
                "version": "v2",
                "idleTimeoutSeconds": values.idle_seconds,
                "resources": {
                    "requests": {"cpu": "500m", "memory": "1Gi"},
                    "limits": {"cpu": "1", "memory": "1Gi"},
                },
            },
            "headGroupSpec": {
                "rayStartParams": {"num-cpus": "0", "dashboard-host": "0.0.0.0"},
                "template": self._head_pod(grace_seconds),
            },
            "workerGroupSpecs": groups,
        }

    def _group(self, name: str, size: WorkerSize, grace_seconds: int, *, on_spot: bool, min_nodes: int) -> Resource:
        params = {"num-cpus": str(size.cpus)} | ({"num-gpus": str(size.gpus)} if size.gpus else {})
        least = max(size.min_nodes, min_nodes)
        return {
            "groupName": name,
            "replicas": least,
            "minReplicas": least,
            "maxReplicas": size.max_nodes,
            "rayStartParams": params,
            "template": self._worker_pod(size, grace_seconds, on_spot=on_spot),
        }

    def _head_pod(self, grace_seconds: int) -> Resource:
        ports = {"gcs": 6379, "dashboard": 8265, "client": 10001, "metrics": 8080, "serve": 8000}
        container = self._container("ray-head", self.values.cpu_image, self.values.head)
        container["ports"] = [{"name": name, "containerPort": port} for name, port in ports.items()]
        container["volumeMounts"].append({"name": "configs", "mountPath": CONFIG_MOUNT, "readOnly": True})
        pod = self._pod(container, self.values.head, grace_seconds)
        pod["spec"]["volumes"].append({"name": "configs", "configMap": {"name": self._name("configs")}})
        pod["spec"]["affinity"] = _node_affinity(required=_terms(self.values.spot.labels, "NotIn"))
        return pod

    def _worker_pod(self, size: WorkerSize, grace_seconds: int, *, on_spot: bool) -> Resource:
        container = self._container("ray-worker", self.values.image if size.gpus else self.values.cpu_image, size)
        container["ports"] = [{"name": "metrics", "containerPort": 8080}, {"name": "serve", "containerPort": 8000}]
        if size.gpus:
            for kind in ("requests", "limits"):
                container["resources"][kind][GPU_RESOURCE] = str(size.gpus)
        pod = self._pod(container, size, grace_seconds)
        spec, spot = pod["spec"], self.values.spot
        if size.node_selector:
            spec["nodeSelector"] = dict(size.node_selector)
        tolerations = [{"key": GPU_RESOURCE, "operator": "Exists", "effect": "NoSchedule"}] if size.gpus else []
        if not on_spot:
            spec["affinity"] = _node_affinity(required=_terms(spot.labels, "NotIn"))
        elif size.gpus:  # on demand where no spot machine is available
            spec["affinity"] = _node_affinity(preferred=_terms(spot.labels, "In"))
        else:
            spec["affinity"] = _node_affinity(required=_terms(spot.labels, "In"))
        if tolerations := tolerations + (list(spot.tolerations) if on_spot else []):
            spec["tolerations"] = tolerations
        return pod

    def _pod(self, container: Resource, size: NodeSize, grace_seconds: int) -> Resource:
        values = self.values
        spec: Resource = {
            "restartPolicy": "Never",  # autoscaler v2 requires it: a new pod replaces a failed one
            "terminationGracePeriodSeconds": grace_seconds,
            "containers": [container],
            "volumes": [
                {"name": "shm", "emptyDir": {"medium": "Memory", "sizeLimit": f"{size.shm_gib}Gi"}},
                {"name": "ray", "emptyDir": {"sizeLimit": f"{size.disk_gib}Gi"}},
            ],
        }
        if values.service_account is not None:
            spec["serviceAccountName"] = values.service_account
        if values.image_pull_secret is not None:
            spec["imagePullSecrets"] = [{"name": values.image_pull_secret}]
        return {"metadata": {"labels": {"app.kubernetes.io/part-of": values.name}}, "spec": spec}

    def _container(self, name: str, image: str, size: NodeSize) -> Resource:
        probe = {"httpGet": {"path": HEALTH_PATH, "port": HEALTH_PORT}, "periodSeconds": PROBE_PERIOD_S}
        memory, disk = f"{size.memory_gib}Gi", f"{size.disk_gib}Gi"
        environment = {**NODE_ENVIRONMENT, **self.values.environment}
        container: Resource = {
            "name": name,
            "image": image,
            "env": [{"name": key, "value": value} for key, value in environment.items()],
            "resources": {
                "requests": {"cpu": str(size.cpus), "memory": memory, "ephemeral-storage": disk},
                "limits": {"memory": memory, "ephemeral-storage": disk},
            },
            "volumeMounts": [{"name": "shm", "mountPath": "/dev/shm"}, {"name": "ray", "mountPath": "/tmp"}],
            # the operator checks readiness, that of the endpoint's proxy included
            "startupProbe": {**probe, "failureThreshold": self.values.start_seconds // PROBE_PERIOD_S},
            "livenessProbe": {**probe, "timeoutSeconds": 5, "failureThreshold": 12},
        }
        if self.values.storage_secret is not None:
            container["envFrom"] = [{"secretRef": {"name": self.values.storage_secret}}]
        return container

    def _resource(self, kind: str, name: str | None, spec: Resource) -> Resource:
        return {"apiVersion": API_VERSION, "kind": kind, "metadata": self._metadata(name), "spec": spec}

    def _metadata(self, name: str | None) -> Resource:
        labels = {"app.kubernetes.io/part-of": self.values.name}
        return {"name": self._name(name), "namespace": self.values.namespace, "labels": labels}

    def _name(self, name: str | None) -> str:
        return self.values.name if name is None else f"{self.values.name}-{name}"


def _read(file: str, bucket: str) -> str:
    path = Path(find_config(file))
    if not path.is_file():
        raise ValueError(f"no configuration file at {file!r}; correct `configs`")
    return path.read_text(encoding="utf-8").replace(BUCKET, bucket.rstrip("/"))


def _job_environment() -> dict[str, str]:
    """The environment variables of submitted jobs; the code itself is in the image."""
    variables: dict[str, str] = yaml.safe_load((config_folder() / "runtime_env.yaml").read_text())["env_vars"]
    return variables


def _terms(labels: dict[str, str], operator: str) -> list[Resource]:
    return [{"key": key, "operator": operator, "values": [value]} for key, value in labels.items()]


def _node_affinity(*, required: list[Resource] | None = None, preferred: list[Resource] | None = None) -> Resource:
    affinity: Resource = {}
    if required:
        terms = [{"matchExpressions": required}]
        affinity["requiredDuringSchedulingIgnoredDuringExecution"] = {"nodeSelectorTerms": terms}
    if preferred:
        term = {"weight": 100, "preference": {"matchExpressions": preferred}}
        affinity["preferredDuringSchedulingIgnoredDuringExecution"] = [term]
    return {"nodeAffinity": affinity}

"""The values of a deployment, from which all of its files are rendered."""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Any

BUCKET = "s3://your-bucket"
"""Stands for the bucket in ray_configs."""
SHM_SHARE = 0.3
"""Share of a pod's memory for Ray's objects: Ray's own default."""

NODE_ENVIRONMENT = {
    "RAY_USAGE_STATS_ENABLED": "0",
    "RAY_health_check_initial_delay_ms": "1000",
    "RAY_health_check_period_ms": "1000",
    "RAY_health_check_timeout_ms": "3000",
    "RAY_health_check_failure_threshold": "3",
}
"""Of all nodes. Ray gives up a node 3 s after its process ended (default 15) and after 12 s of silence (default 65)."""


@dataclass(frozen=True, kw_only=True, slots=True)
class NodeSize:
    cpus: int
    """CPU cores that a pod requests and Ray schedules."""
    memory_gib: int
    """GiB of memory a pod requests and may use, /dev/shm included."""
    disk_gib: int
    """GiB of ephemeral storage: Ray's logs and spilled objects, cached weights, checkpoints being uploaded."""

    def __post_init__(self) -> None:
        for name in ("cpus", "memory_gib", "disk_gib"):
            if getattr(self, name) < 1:
                raise ValueError(f"{name} = {getattr(self, name)} must be at least 1")

    @property
    def shm_gib(self) -> int:
        return max(1, int(SHM_SHARE * self.memory_gib))


@dataclass(frozen=True, kw_only=True, slots=True)
class WorkerSize(NodeSize):
    gpus: int = 0
    """GPUs of a node."""
    min_nodes: int = 0
    """Nodes kept while nothing runs."""
    max_nodes: int = 4
    """Maximum nodes."""
    node_selector: dict[str, str] = field(default_factory=dict)
    """Labels of the machines, such as their type of GPU."""

    def __post_init__(self) -> None:
        NodeSize.__post_init__(self)
        if not 0 <= self.min_nodes <= self.max_nodes or self.max_nodes < 1:
            raise ValueError(f"{self.min_nodes = } must be between 0 and {self.max_nodes = }")


@dataclass(frozen=True, kw_only=True, slots=True)
class SpotValues:
    labels: dict[str, str] = field(default_factory=lambda: {"karpenter.sh/capacity-type": "spot"})
    """Labels of spot machines; GKE: {cloud.google.com/gke-spot: "true"}."""
    tolerations: list[dict[str, Any]] = field(default_factory=list)
    """Tolerations of their taints."""
    notice_seconds: int = 120
    """Seconds between the cloud's notice and the end of a spot machine."""


@dataclass(frozen=True, kw_only=True, slots=True)
class LauncherValues:
    """Values of the file for `ray up`, which needs no Kubernetes."""

    region: str = "us-west-2"
    """AWS region."""
    head: str = "m7i.2xlarge"
    """Machine type of the head."""
    cpu: str = "c7i.8xlarge"
    """Machine type that decodes; its cores are cpu_workers.cpus."""
    gpu: str = "p5.48xlarge"
    """Machine type with GPUs; its cores and GPUs are those of gpu_workers."""
    instance_profile: str = "ray-autoscaler-v1"
    """Name of the instance profile whose role reads and writes the bucket."""
    token_file: str = "~/.ray/auth_token"
    """Local file with the token; it is copied to the nodes."""


@dataclass(frozen=True, kw_only=True, slots=True)
class ConfigFiles:
    """Configurations of the jobs; `s3://your-bucket` in them becomes `bucket`."""

    preprocess: str = "ray_configs/preprocess.yaml"
    """Configuration of preprocessing."""
    train: str = "ray_configs/train.yaml"
    """Configuration of training."""
    evaluate: str = "ray_configs/evaluate.yaml"
    """Configuration of evaluation."""
    serve: str = "ray_configs/serve.yaml"
    """Ray Serve file of the endpoint."""


@dataclass(frozen=True, kw_only=True, slots=True)
class ClusterValues:
    bucket: str
    """Root of all files: a bucket, or a prefix in one."""
    image: str
    """Image with CUDA, for nodes with GPUs."""
    cpu_image: str
    """Image of the head and of nodes that decode."""
    name: str = "timeviper"
    """Start of the names of all resources."""
    namespace: str = "timeviper"
    """Kubernetes namespace."""
    token_secret: str = "timeviper-token"
    """Secret with Ray's token under `auth_token`."""
    keys_secret: str | None = "timeviper-keys"
    """Secret with the API keys of the endpoint under `keys.yaml` (docs/serve.md); null = those of its configuration."""
    storage_secret: str | None = None
    """Secret whose keys become environment variables (AWS_ACCESS_KEY_ID ...); null = the service account's role."""
    service_account: str | None = None
    """Service account of the pods, with a role that reads and writes the bucket; null = the namespace's default."""
    image_pull_secret: str | None = None
    """Secret for the registry of the images."""
    redis_address: str = "redis:6379"
    """Redis that keeps the endpoint's cluster state, so that answers continue while its head restarts."""
    redis_secret: str = "timeviper-redis"
    """Secret with the password of Redis under `password`."""
    environment: dict[str, str] = field(default_factory=dict)
    """More environment variables of all nodes, such as AWS_REGION or RAY_health_check_timeout_ms."""
    configs: ConfigFiles = field(default_factory=ConfigFiles)
    head: NodeSize
    """Runs the driver and Ray's services, no tasks. Never on a spot machine."""
    cpu_workers: WorkerSize
    """Decoding, on spot machines."""
    gpu_workers: WorkerSize
    """Encoding, training and evaluation, on spot machines where available; the endpoint, never on spot machines."""
    spot: SpotValues = field(default_factory=SpotValues)
    launcher: LauncherValues = field(default_factory=LauncherValues)
    idle_seconds: int = 300
    """Seconds after which an idle node is removed."""
    start_seconds: int = 900
    """Seconds a pod may take to start Ray, not counting the download of its image."""

    def __post_init__(self) -> None:
        if self.gpu_workers.gpus < 1:
            raise ValueError(f"{self.gpu_workers.gpus = } must be at least 1; cpu_workers has no GPUs")
        if self.cpu_workers.gpus:
            raise ValueError(f"{self.cpu_workers.gpus = } must be 0; gpu_workers has the GPUs")

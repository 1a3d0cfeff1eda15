"""The file of Ray's cloud launcher (`ray up`): the same cluster on AWS without Kubernetes."""

from __future__ import annotations

import shlex
from typing import Any

from timeviper_platform.cluster.values import NODE_ENVIRONMENT, ClusterValues, NodeSize, WorkerSize

TOKEN_FILE = "/home/ray/.ray/auth_token"
"""Where the images' user finds the token."""


def launcher_file(values: ClusterValues) -> dict[str, Any]:
    """Returns the keys of the file. GPU machines are spot machines where available, else on demand."""
    launcher, cpu, gpu = values.launcher, values.cpu_workers, values.gpu_workers
    spot = {"InstanceMarketOptions": {"MarketType": "spot"}}
    types = {
        "head": {**_node(values, values.head, launcher.head), "resources": {"CPU": 0}},
        "cpu-spot": {**_node(values, cpu, launcher.cpu, spot), **_counts(cpu)},
        "gpu-spot": {**_node(values, gpu, launcher.gpu, spot), **_counts(gpu), "priority": 1},
        "gpu-on-demand": {**_node(values, gpu, launcher.gpu), **_counts(gpu)},
    }
    environment = {
        "RAY_AUTH_MODE": "token",
        "RAY_AUTH_TOKEN_PATH": TOKEN_FILE,
        "RAY_enable_autoscaler_v2": "1",
        **NODE_ENVIRONMENT,
        **values.environment,
    }
    start = "ulimit -n 65536; ray start"
    return {
        "cluster_name": values.name,
        "max_workers": cpu.max_nodes + gpu.max_nodes,
        "idle_timeout_minutes": max(1, values.idle_seconds // 60),
        "provider": {"type": "aws", "region": launcher.region, "cache_stopped_nodes": False},
        "auth": {"ssh_user": "ubuntu"},
        "docker": {
            "image": values.image,
            "container_name": values.name,
            "run_options": [f"--env={shlex.quote(f'{key}={value}')}" for key, value in environment.items()],
            "head_image": values.cpu_image,
        },
        "file_mounts": {TOKEN_FILE: launcher.token_file},
        "head_node_type": "head",
        "available_node_types": types,
        "head_start_ray_commands": [
            "ray stop",
            f"{start} --head --port=6379 --num-cpus=0 --autoscaling-config=~/ray_bootstrap_config.yaml",
        ],
        "worker_start_ray_commands": ["ray stop", f"{start} --address=$RAY_HEAD_IP:6379"],
    }


def _node(values: ClusterValues, size: NodeSize, machine: str, options: dict[str, Any] | None = None) -> dict[str, Any]:
    disk = {"DeviceName": "/dev/sda1", "Ebs": {"VolumeSize": size.disk_gib, "VolumeType": "gp3"}}
    node: dict[str, Any] = {"InstanceType": machine, "BlockDeviceMappings": [disk], **(options or {})}
    node["IamInstanceProfile"] = {"Name": values.launcher.instance_profile}
    return {"node_config": node}


def _counts(size: WorkerSize) -> dict[str, Any]:
    resources = {"CPU": size.cpus} | ({"GPU": size.gpus} if size.gpus else {})
    return {"resources": resources, "min_workers": size.min_nodes, "max_workers": size.max_nodes}

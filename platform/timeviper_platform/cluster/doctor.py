"""Checks a machine for what the jobs need; every fault comes with a remedy."""

from __future__ import annotations

import json
import os
import platform
import resource
import shutil
import socket
import stat
import urllib.error
import urllib.request
from collections.abc import Callable, Iterator, Sequence
from importlib.metadata import PackageNotFoundError, requires, version
from pathlib import Path
from typing import Literal, NamedTuple

from packaging.requirements import Requirement

from timeviper_platform import __version__
from timeviper_platform.common import storage
from timeviper_platform.common.job import user_error

DISTRIBUTION = "timeviper-platform"
GIB = 2**30
MIN_SHM_BYTES = 2 * GIB
"""Below this, Ray puts its object store on a disk, which is many times slower."""
SHM_SHARE = 0.3
"""Share of the memory that Ray takes for its object store by default."""
MIN_TEMP_BYTES = 10 * GIB
MAX_TEMP_SHARE = 0.95
"""Ray refuses to create objects on a disk that is fuller (`local_fs_capacity_threshold`)."""
MIN_OPEN_FILES = 65_536
"""The number that Ray's documentation asks for."""
PORTS = {6379: "Ray's head", 8265: "Ray's dashboard and jobs", 8000: "the endpoint", 10001: "Ray Client"}
TIMEOUT_S = 5.0


class Finding(NamedTuple):
    check: str
    status: Literal["ok", "warning", "error"]
    """`error`: jobs fail. `warning`: some do, or they are slow."""
    text: str
    way_out: str = ""


def examine(uris: Sequence[str] = (), *, need_gpu: bool = False) -> list[Finding]:
    """Runs every check. A check that raises becomes a finding of status error.

    Args:
        uris: folders to write to, read from and delete in.
        need_gpu: a missing GPU or kernel is an error instead of a warning.
    """
    checks: dict[str, Callable[[], Iterator[Finding]]] = {
        "versions": _versions,
        "devices": lambda: _devices(need_gpu),
        "kernels": lambda: _kernels(need_gpu),
        "video": _video,
        "memory": _shared_memory,
        "disk": _temporary_files,
        "limits": _open_files,
        "token": _token,
        "cluster": _cluster,
        "ports": _ports,
        "storage": lambda: _storage(uris),
    }
    findings: list[Finding] = []
    for name, check in checks.items():
        try:
            findings += check()
        except Exception as error:  # noqa: BLE001 - the other checks still run
            text = user_error(error) or f"{type(error).__name__}: {error}"
            findings.append(Finding(name, "error", text, "report this with `timeviper doctor --debug`"))
    return findings


def describe(findings: Sequence[Finding]) -> list[str]:
    """Returns a line per finding, with its remedy below, and a line of counts."""
    lines = []
    for finding in findings:
        lines.append(f"{finding.status:8} {finding.check:10} {finding.text}")
        if finding.way_out:
            lines.append(f"{'':20}-> {finding.way_out}")
    counts = {status: sum(finding.status == status for finding in findings) for status in ("error", "warning", "ok")}
    return [*lines, ", ".join(f"{count} {status}" for status, count in counts.items())]


def _versions() -> Iterator[Finding]:
    yield Finding("versions", "ok", f"timeviper {__version__}, Python {platform.python_version()}")
    try:
        needed = [Requirement(text) for text in requires(DISTRIBUTION) or []]
    except PackageNotFoundError:
        way_out = "install the wheel, or `pip install -c constraints.txt -e .` in the source tree"
        yield Finding("versions", "warning", f"{DISTRIBUTION} is not installed; the source tree is imported", way_out)
        return
    wrong, found = [], []
    for requirement in needed:
        if requirement.marker is not None and not requirement.marker.evaluate({"extra": ""}):
            continue
        try:
            installed = version(requirement.name)
        except PackageNotFoundError:
            wrong.append(f"{requirement.name} is missing, needs {requirement.specifier}")
            continue
        if requirement.specifier.contains(installed, prereleases=True):
            found.append(f"{requirement.name} {installed}")
        else:
            wrong.append(f"{requirement.name} {installed}, needs {requirement.specifier}")
    if wrong:
        yield Finding("versions", "error", "; ".join(wrong), "pip install -c constraints.txt with this release's file")
    main = ("ray", "torch", "transformers", "deepspeed", "pyarrow", "s3fs")
    yield Finding("versions", "ok", ", ".join(name for name in found if name.split()[0] in main))


def _devices(need_gpu: bool) -> Iterator[Finding]:
    import torch

    status: Literal["warning", "error"] = "error" if need_gpu else "warning"
    cores = len(os.sched_getaffinity(0))
    yield Finding("devices", "ok", f"{cores} CPU cores, {_memory_bytes() / GIB:.1f} GiB of memory")
    if torch.cuda.is_available():
        for index in range(torch.cuda.device_count()):
            sizes = torch.cuda.get_device_properties(index)
            yield Finding("devices", "ok", f"cuda:{index} {sizes.name}, {sizes.total_memory / GIB:.0f} GiB")
    elif torch.version.cuda is None:
        way_out = "with a GPU: pip install -c constraints-cuda.txt; without one: device: cpu, as in ray_configs/tiny"
        yield Finding("devices", status, f"torch {torch.__version__} is built without CUDA", way_out)
    else:
        way_out = "check nvidia-smi and CUDA_VISIBLE_DEVICES; in a container, run it with NVIDIA's runtime"
        yield Finding(
            "devices", status, f"torch {torch.__version__} for CUDA {torch.version.cuda} sees no GPU", way_out
        )


def _kernels(need_gpu: bool) -> Iterator[Finding]:
    import torch

    from timeviper_model.layers.backends import KERNELS, missing_kernels

    if not torch.cuda.is_available():
        yield Finding("kernels", "ok", "none are used without a GPU")
        return
    missing = missing_kernels(torch.device("cuda"), torch.bfloat16)
    present = [function.__name__ for name, function in KERNELS._asdict().items() if name not in missing]
    if present:
        yield Finding("kernels", "ok", ", ".join(present))
    for name, reason in missing.items():
        way_out = "pip install with the lines in constraints-cuda.txt; without it PyTorch operations are used"
        yield Finding("kernels", "error" if need_gpu else "warning", f"{name}: {reason}", way_out)


def _video() -> Iterator[Finding]:
    import av

    wanted = {"h264", "hevc", "vp9", "av1", "mpeg4", "mpeg2video"}
    missing = sorted(wanted - set(av.codecs_available))
    if missing:
        way_out = "install PyAV from its wheel (pip install --force-reinstall av), which contains FFmpeg"
        yield Finding("video", "warning", f"PyAV {version('av')} cannot decode {', '.join(missing)}", way_out)
    else:
        yield Finding("video", "ok", f"PyAV {version('av')} decodes {', '.join(sorted(wanted))}")


def _shared_memory() -> Iterator[Finding]:
    shm = Path("/dev/shm")
    if not shm.is_dir():
        yield Finding("/dev/shm", "error", "/dev/shm does not exist", "mount a tmpfs there")
        return
    total, wanted = shutil.disk_usage(shm).total, max(MIN_SHM_BYTES, SHM_SHARE * _memory_bytes())
    text = f"/dev/shm has {total / GIB:.1f} GiB; Ray takes up to {wanted / GIB:.1f} GiB of this memory for its objects"
    way_out = (
        f"docker run --shm-size={wanted / GIB:.0f}g; in Kubernetes an emptyDir of medium Memory (timeviper render)"
    )
    yield Finding("/dev/shm", "ok", text) if total >= wanted else Finding("/dev/shm", "warning", text, way_out)


def _temporary_files() -> Iterator[Finding]:
    folder = os.environ.get("RAY_TMPDIR") or "/tmp"
    usage = shutil.disk_usage(folder)
    text = f"{folder} has {usage.free / GIB:.1f} GiB free of {usage.total / GIB:.1f}"
    if usage.free > MIN_TEMP_BYTES and usage.used < MAX_TEMP_SHARE * usage.total:
        yield Finding("disk", "ok", text)
    else:
        way_out = (
            "free space, or set RAY_TMPDIR to a larger disk; Ray spills objects there and stops when it is 95 % full"
        )
        yield Finding("disk", "warning", text, way_out)


def _open_files() -> Iterator[Finding]:
    soft, _ = resource.getrlimit(resource.RLIMIT_NOFILE)
    if soft == resource.RLIM_INFINITY or soft >= MIN_OPEN_FILES:
        yield Finding("limits", "ok", f"{soft} open files per process")
    else:
        way_out = f"ulimit -n {MIN_OPEN_FILES} before `ray start`"
        yield Finding("limits", "warning", f"{soft} open files per process", way_out)


def _token() -> Iterator[Finding]:
    mode = os.environ.get("RAY_AUTH_MODE")
    file = Path(os.environ.get("RAY_AUTH_TOKEN_PATH") or Path("~/.ray/auth_token").expanduser())
    if mode == "disabled":
        way_out = "RAY_AUTH_MODE=token; without it, whoever reaches the ports runs code on the cluster"
        yield Finding("token", "warning", "RAY_AUTH_MODE=disabled", way_out)
    elif os.environ.get("RAY_AUTH_TOKEN"):
        yield Finding("token", "ok", "RAY_AUTH_TOKEN is set")
    elif not file.is_file():
        uses_cluster = any(os.environ.get(name) for name in ("RAY_ADDRESS", "RAY_API_SERVER_ADDRESS"))
        way_out = (
            f"copy the cluster's token to {file}, or set RAY_AUTH_TOKEN_PATH; a new one: ray get-auth-token --generate"
        )
        text = f"there is no token at {file}"
        yield (
            Finding("token", "error", text, way_out) if uses_cluster else Finding("token", "ok", f"{text}; local only")
        )
    elif file.stat().st_mode & (stat.S_IRGRP | stat.S_IROTH):
        yield Finding("token", "warning", f"others may read {file}", f"chmod 600 {file}")
    else:
        yield Finding("token", "ok", str(file))


def _cluster() -> Iterator[Finding]:
    url = os.environ.get("RAY_API_SERVER_ADDRESS")
    if not url:
        yield Finding("cluster", "ok", "RAY_API_SERVER_ADDRESS is not set; jobs start a Ray of their own")
        return
    request = urllib.request.Request(f"{url.rstrip('/')}/api/version")
    if token := _token_text():
        request.add_header("Authorization", f"Bearer {token}")
    try:
        with urllib.request.urlopen(request, timeout=TIMEOUT_S) as response:
            theirs = str(json.load(response)["ray_version"])
    except urllib.error.HTTPError as error:
        way_out = (
            "use the cluster's token (RAY_AUTH_TOKEN_PATH)" if error.code in (401, 403) else "is this Ray's dashboard?"
        )
        yield Finding("cluster", "error", f"{url} answers {error.code}", way_out)
        return
    except (OSError, ValueError, KeyError) as error:
        way_out = "check the address and the network, or forward the port: kubectl port-forward service/... 8265"
        yield Finding("cluster", "error", f"{url} does not answer: {error}", way_out)
        return
    ours = version("ray")
    if theirs == ours:
        yield Finding("cluster", "ok", f"{url} runs Ray {theirs}")
    else:
        way_out = f"use the same: pip install ray=={theirs} here, or an image with {ours} there"
        yield Finding("cluster", "error", f"{url} runs Ray {theirs}, and Ray {ours} is installed here", way_out)


def _token_text() -> str:
    if text := os.environ.get("RAY_AUTH_TOKEN"):
        return text
    file = Path(os.environ.get("RAY_AUTH_TOKEN_PATH") or Path("~/.ray/auth_token").expanduser())
    return file.read_text().strip() if file.is_file() else ""


def _ports() -> Iterator[Finding]:
    taken = [port for port in PORTS if _listens(port)]
    for port in taken:
        way_out = "a Ray that runs here already; or choose another port (`timeviper serve --port`, `ray start --port`)"
        yield Finding("ports", "warning", f"{port} ({PORTS[port]}) is in use on this machine", way_out)
    if len(taken) < len(PORTS):
        yield Finding("ports", "ok", f"free: {', '.join(str(port) for port in PORTS if port not in taken)}")


def _listens(port: int) -> bool:
    with socket.socket() as client:
        client.settimeout(TIMEOUT_S)
        return client.connect_ex(("127.0.0.1", port)) == 0


def _storage(uris: Sequence[str]) -> Iterator[Finding]:
    if not uris:
        yield Finding("storage", "ok", "not checked; name folders: timeviper doctor s3://bucket/features")
    for uri in uris:
        shown = storage.shown_uri(uri)
        probe = storage.join_uri(uri, f".doctor-{os.getpid()}-{socket.gethostname()}")
        try:
            storage.write_bytes(probe, b"timeviper")
            read = storage.read_bytes(probe)
            storage.remove(probe)
        except Exception as error:  # every library has its own; all mean that a job would fail here
            if (message := user_error(error)) is None:
                raise
            way_out = "check the name, the credentials (AWS_PROFILE, AWS_ENDPOINT_URL, an instance role) and its policy"
            yield Finding("storage", "error", f"{shown}: {message}", way_out)
            continue
        good = read == b"timeviper"
        yield Finding(
            "storage", "ok" if good else "error", f"{shown}: written, read{'' if good else ' wrongly'}, deleted"
        )


def _memory_bytes() -> int:
    """Memory of the machine, or of the container where that is less."""
    total = os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES")
    for file in ("/sys/fs/cgroup/memory.max", "/sys/fs/cgroup/memory/memory.limit_in_bytes"):
        if Path(file).is_file() and (text := Path(file).read_text().strip()).isdigit():
            return min(total, int(text))
    return total

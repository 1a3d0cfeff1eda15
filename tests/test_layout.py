"""The house rules that hold the tree together; a new file that breaks one is named here."""

from __future__ import annotations

import ast
import functools
import subprocess
import sys
from collections.abc import Mapping
from pathlib import Path

import pytest
import yaml

ROOT = Path(__file__).parent.parent
PLATFORM = ROOT / "platform" / "timeviper_platform"
MODEL = ROOT / "model" / "timeviper_model"
MAX_MODULES = 16
ROOMS = {
    "timeviper_model": ("batching", "ops", "layers", "inference", "analysis", "weights"),
    "timeviper_platform": ("common", "data", "training", "evaluation", "serving", "cluster", "benchmarks", "cli"),
    "timeviper_platform.data": (
        "media",
        "inputs",
        "video",
        "video_worker",
        "encode",
        "store",
        "plan",
        "preprocess",
        "annotations",
        "synthetic",
    ),
}
"""Lowest room first: a room imports from itself and from those before it."""


def _tracked_files() -> list[Path]:
    listed = subprocess.run(["git", "ls-files"], cwd=ROOT, capture_output=True, text=True)
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


def _source(package: str) -> Path:
    top = ROOT / ("platform" if package.startswith("timeviper_platform") else "model")
    return top.joinpath(*package.split("."))


@functools.cache
def _module_imports() -> dict[str, set[str]]:
    """Every module of both packages with the modules of theirs that it imports, at the top or inside a function."""
    paths = {}
    for package in (PLATFORM, MODEL):
        for path in package.rglob("*.py"):
            parts = path.relative_to(package.parent).with_suffix("").parts
            paths[".".join(parts[:-1] if parts[-1] == "__init__" else parts)] = path
    return {module: (_imported_modules(path) & paths.keys()) - {module} for module, path in paths.items()}


def _room(module: str) -> str:
    path = _source(module)
    if path.is_dir():
        return module
    folder = module.rpartition(".")[0]
    return module if any(entry.is_dir() and entry.name != "__pycache__" for entry in path.parent.iterdir()) else folder


def _cycles(imports: Mapping[str, set[str]]) -> list[list[str]]:
    """Sets of names that reach each other."""

    def reach(name: str) -> set[str]:
        found: set[str] = set()
        waiting = [name]
        while waiting:
            for other in imports.get(waiting.pop(), set()) - found:
                found.add(other)
                waiting.append(other)
        return found

    reached = {name: reach(name) for name in imports}
    groups = {
        frozenset(other for other in reached[name] if name in reached.get(other, set()))
        for name in imports
        if name in reached[name]
    }
    return sorted(sorted(group) for group in groups)


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


def test_no_import_cycle_between_modules() -> None:
    assert _cycles(_module_imports()) == []


def test_no_import_cycle_between_rooms() -> None:
    """A room is a folder; the modules beside its subfolders stand for themselves."""
    rooms: dict[str, set[str]] = {}
    for module, imports in _module_imports().items():
        rooms.setdefault(_room(module), set()).update(_room(name) for name in imports)
    assert _cycles({room: others - {room} for room, others in rooms.items()}) == []


@pytest.mark.parametrize(("package", "order"), ROOMS.items())
def test_imports_point_down_the_rooms(package: str, order: tuple[str, ...]) -> None:
    """The first room of a package stands on no other, the last on all."""
    folders = {path.name for path in _source(package).iterdir() if path.is_dir() and path.name != "__pycache__"}
    assert folders == set(order), f"{package}: name every room in ROOMS, lowest first"
    rank = {f"{package}.{room}": level for level, room in enumerate(order)}
    wrong = []
    for module, imports in _module_imports().items():
        own = next((level for room, level in rank.items() if module.startswith(f"{room}.")), None)
        for name in imports:
            other = next((level for room, level in rank.items() if f"{name}.".startswith(f"{room}.")), None)
            if own is not None and other is not None and other > own:
                wrong.append(f"{module} imports {name}")
    assert wrong == []


def test_only_jobs_import_benchmarks() -> None:
    benchmarks, cli = "timeviper_platform.benchmarks", "timeviper_platform.cli"
    wrong = [
        f"{module}: {name}"
        for module, imports in _module_imports().items()
        for name in imports
        if name.startswith(benchmarks) and not module.startswith((benchmarks, cli))
    ]
    assert wrong == []


def test_no_folder_holds_more_than_16_modules() -> None:
    full = {
        str(folder.relative_to(ROOT)): count
        for folder in {path.parent for path in [*PLATFORM.rglob("*.py"), *MODEL.rglob("*.py")]}
        if (count := sum(path.name != "__init__.py" for path in folder.glob("*.py"))) > MAX_MODULES
    }
    assert full == {}


def test_tests_mirror_the_packages() -> None:
    """Every folder of tests is the folder of a package, so that a module's tests are found by its path."""
    wrong = []
    for path in (ROOT / "tests").rglob("test_*.py"):
        parts = path.relative_to(ROOT / "tests").parts
        if parts[0] in {"platform", "model"}:
            package = PLATFORM if parts[0] == "platform" else MODEL
            if not package.joinpath(*parts[1:-1]).is_dir():
                wrong.append(str(path.relative_to(ROOT)))
    assert wrong == []


def test_a_cycle_is_found() -> None:
    assert _cycles({"a": {"b"}, "b": {"c"}, "c": {"b"}, "d": {"a"}}) == [["b", "c"]]


def test_packages_do_not_print() -> None:
    wrong = []
    for path in [*PLATFORM.rglob("*.py"), *MODEL.rglob("*.py")]:
        if path.is_relative_to(PLATFORM / "cli"):  # jobs print their report
            continue
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
    cases = ROOT / "tests" / "reference" / "cases"
    tracked = [path for path in _tracked_files() if path.suffix in binary]
    assert [str(path) for path in tracked if not path.is_relative_to(cases)] == []
    assert sum(path.stat().st_size for path in tracked if path.is_relative_to(cases)) < 2_000_000

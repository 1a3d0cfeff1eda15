"""The documents name what exists: modules, classes, files and configuration; and stay as short as they promise."""

from __future__ import annotations

import ast
import functools
import re
from pathlib import Path

import pytest

ROOT = Path(__file__).parent.parent
DOCUMENTS = [ROOT / "README.md", *sorted((ROOT / "docs").glob("*.md"))]
MAX_README_WORDS = 1500
MAX_FORMS = 12
PATHS = ("The path of one video", "The path of one sample", "The path of one request")


@functools.cache
def _names(module: str) -> frozenset[str] | None:
    """What a module defines, with the members of its classes as `Class.member`; None if there is no such module."""
    top = ROOT / ("platform" if module.startswith("timeviper_platform") else "model")
    path = top.joinpath(*module.split("."))
    if path.is_dir():
        return frozenset()
    if not path.with_suffix(".py").is_file():
        return None
    names = set()
    for node in ast.parse(path.with_suffix(".py").read_text("utf-8")).body:
        if isinstance(node, ast.ClassDef | ast.FunctionDef | ast.AsyncFunctionDef):
            names.add(node.name)
        elif isinstance(node, ast.Assign):
            names |= {target.id for target in node.targets if isinstance(target, ast.Name)}
        elif isinstance(node, ast.AnnAssign) and isinstance(node.target, ast.Name):
            names.add(node.target.id)
        if isinstance(node, ast.ClassDef):
            members = (member for member in node.body if isinstance(member, ast.FunctionDef | ast.AsyncFunctionDef))
            names |= {f"{node.name}.{member.name}" for member in members}
    return frozenset(names)


def _exists(dotted: str) -> bool:
    parts = dotted.split(".")
    for length in range(len(parts), 0, -1):
        names = _names(".".join(parts[:length]))
        if names is not None:
            return length == len(parts) or ".".join(parts[length:]) in names
    return False


def _section(text: str, heading: str) -> str:
    return text.split(f"## {heading}\n")[1].split("\n## ")[0]


@pytest.mark.parametrize("document", DOCUMENTS, ids=lambda path: path.name)
def test_every_module_class_and_function_named_exists(document: Path) -> None:
    named = set(re.findall(r"`(timeviper_(?:platform|model)(?:\.\w+)+)`", document.read_text("utf-8")))
    assert sorted(name for name in named if not _exists(name)) == []


def test_a_name_that_does_not_exist_is_found() -> None:
    assert _exists("timeviper_model.timeviper.TimeViper.decode_step")
    assert not _exists("timeviper_model.timeviper.TimeViper.no_such_method")
    assert not _exists("timeviper_model.no_such_module")


@pytest.mark.parametrize("document", DOCUMENTS, ids=lambda path: path.name)
def test_every_file_named_exists(document: Path) -> None:
    text = document.read_text("utf-8")
    files = set(
        re.findall(r"(?<![\w./-])((?:jobs|ray_configs|docs|tests|model|platform)/[\w./-]+\.(?:py|yaml|md|svg))\b", text)
    )
    files |= {
        f"docs/{name}" for name in re.findall(r"\]\(([\w-]+\.(?:md|svg))\)", text) if document.parent.name == "docs"
    }
    assert sorted(name for name in files if not (ROOT / name).is_file()) == []


def test_readme_is_short() -> None:
    assert len((ROOT / "README.md").read_text("utf-8").split()) <= MAX_README_WORDS


@pytest.mark.parametrize("path", PATHS)
def test_a_path_has_few_named_forms(path: str) -> None:
    section = _section((ROOT / "docs" / "architecture.md").read_text("utf-8"), path)
    rows = re.findall(r"^\| \d+ \| `(timeviper_[\w.]+)` \|", section, flags=re.MULTILINE)
    assert 3 <= len(rows) <= MAX_FORMS
    assert [name for name in rows if not _exists(name)] == []


def test_every_step_from_a_video_to_an_answer_is_reached_from_the_one_named_before_it() -> None:
    text = (ROOT / "docs" / "architecture.md").read_text("utf-8")
    section = text.split("## From a video to an answer")[1].split("\n## ")[0]
    lines = [line for line in section.splitlines() if re.match(r"\| \d", line)]
    rows = [[cell.strip(" `") for cell in line.split("|")[1:-1]] for line in lines]
    files = {number: file for number, _, file, _, _ in rows}
    assert list(files) == [str(number) for number in range(1, len(rows) + 1)]
    assert len(rows) > 20
    for number, _, file, name, source in rows:
        defined, used = _definitions_and_uses(file)
        assert name in (defined if source else used), f"step {number}: {file} has no {name}"
        if source:
            _, used = _definitions_and_uses(files.get(source, source))
            assert name in used, f"step {number}: {source} does not use {name}"


def _definitions_and_uses(file: str) -> tuple[set[str], set[str]]:
    """Names that a file defines at its top, and those that it imports or uses."""
    tree = ast.parse((ROOT / file).read_text("utf-8"))
    kinds = ast.ClassDef | ast.FunctionDef | ast.AsyncFunctionDef
    used = set()
    for node in ast.walk(tree):
        if isinstance(node, ast.Name):
            used.add(node.id)
        elif isinstance(node, ast.ImportFrom):
            used |= {alias.name for alias in node.names}
    return {node.name for node in tree.body if isinstance(node, kinds)}, used

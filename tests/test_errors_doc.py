"""docs/errors.md names every reason of a reject and every message that can end a preprocessing job, and no other."""

from __future__ import annotations

import ast
import functools
import re
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import NamedTuple, get_args

from timeviper_platform.data.media.container import RETRYABLE, ErrorType, Stage

ROOT = Path(__file__).parent.parent
DOCUMENT = ROOT / "docs" / "errors.md"
JOB = ROOT / "jobs" / "preprocess.py"
FATAL = (
    "ValueError",
    "TableError",
    "DamagedTableError",
    "RuntimeError",
    "JobError",
    "LeaseHeldError",
    "StorageUnavailableError",
)
OTHER_JOBS = ("timeviper_model.config", "timeviper_platform.data.preprocess.calibrate")
"""Imported by the job, which does not call what raises there: a model's configuration, and a benchmark."""
MISUSE = (
    "frames must be (F, H, W, 3) uint8, not … …",
    "… frames need as many PTS and times: …",
    "frames must ascend in time",
    "frames must be uint8 (B, height, width, 3), not … …",
    "sampling times must ascend",
    "PTS … follows DTS …",
    "max_open = … must be at least 1",
    "max_frames = … must be at least 1, or None for every frame",
    "end_seconds = … must be after start_seconds = …",
    "…: features must be (F, N, dim), not …",
    "self.num_damaged = … frames cannot be among …",
    "a box ends early",
    "a grid of … x … has … tiles",
    "an item of type … is not HEVC",
    "a number may continue in the next chunk",
    "something follows the array",
    "a …, not text",
    "… is not a number",
    "… is not a whole number of at most …",
    "the columns … all hold bytes; choose one with bytes_column=…",
    "bytes_column=… is not a column of bytes; it has …",
    "…: failures of a download cannot be read: …",
)
"""Mistakes of a caller in Python, or caught and turned into a reject: no user meets them."""


class Raised(NamedTuple):
    where: str
    message: str
    """constant parts, with … for values"""


def _path(module: str) -> Path | None:
    top = {"timeviper_platform": "platform", "timeviper_model": "model"}.get(module.split(".")[0])
    file = ROOT.joinpath(top, *module.split(".")).with_suffix(".py") if top else None
    return file if file is not None and file.is_file() else None


def _imports(tree: ast.Module) -> Iterator[str]:
    for node in ast.walk(tree):
        if isinstance(node, ast.Import):
            yield from (alias.name for alias in node.names)
        elif isinstance(node, ast.ImportFrom) and node.module:
            yield from (node.module, *(f"{node.module}.{alias.name}" for alias in node.names))


@functools.cache
def _modules() -> dict[str, ast.Module]:
    """The modules that the job imports, directly or not."""
    found: dict[str, ast.Module] = {}
    todo = set(_imports(ast.parse(JOB.read_text("utf-8"))))
    while todo:
        module = todo.pop()
        path = _path(module)
        if path is not None and module not in found:
            found[module] = ast.parse(path.read_text("utf-8"))
            todo |= set(_imports(found[module]))
    return found


def _message(node: ast.expr, scopes: Sequence[ast.AST]) -> str:
    """The text of an expression: follows names and calls to where their text is made."""
    if isinstance(node, ast.Constant):
        return str(node.value)
    if isinstance(node, ast.JoinedStr):
        return "".join(_message(value, scopes) for value in node.values)
    if isinstance(node, ast.BinOp):
        return _message(node.left, scopes) + _message(node.right, scopes)
    if isinstance(node, ast.Call) and node.args and isinstance(node.args[0], ast.List):  # "\n".join([...])
        return "".join(_message(value, scopes) for value in node.args[0].elts)
    name = node.id if isinstance(node, ast.Name) else getattr(getattr(node, "func", None), "attr", None)
    for scope in scopes:
        for inner in ast.walk(scope):
            if isinstance(inner, ast.Assign) and isinstance(inner.targets[0], ast.Name) and inner.targets[0].id == name:
                return _message(inner.value, scopes)
            if isinstance(inner, ast.FunctionDef) and inner.name == name:
                returned = [n.value for n in ast.walk(inner) if isinstance(n, ast.Return) and n.value is not None]
                return _message(returned[0], scopes)
    return "…"


@functools.cache
def _raised() -> list[Raised]:
    found = []
    for module, tree in sorted(_modules().items()):
        functions = [node for node in ast.walk(tree) if isinstance(node, ast.FunctionDef)]
        for node in ast.walk(tree):
            call = node.exc if isinstance(node, ast.Raise) else None
            if isinstance(call, ast.Call) and isinstance(call.func, ast.Name) and call.func.id in FATAL:
                around = [f for f in functions if f.lineno <= node.lineno <= (f.end_lineno or 0)]
                message = _message(call.args[-1], [*reversed(around), tree])
                found.append(Raised(f"{module}:{node.lineno}", re.sub("…+", "…", message)))
    return [one for one in found if one.where.partition(":")[0] not in OTHER_JOBS]


def _rows(heading: str) -> list[list[str]]:
    section = DOCUMENT.read_text("utf-8").split(f"\n## {heading}\n")[1].split("\n## ")[0]
    lines = [line for line in section.splitlines() if line.startswith("|")]
    return [[cell.strip() for cell in line.strip("|").split("|")] for line in lines[2:]]


@functools.cache
def _documented() -> list[str]:
    headings = re.findall(r"^## (.+)$", DOCUMENT.read_text("utf-8"), flags=re.MULTILINE)
    return [row[0].strip("`") for heading in headings if heading != "Media" for row in _rows(heading)]


def _is_line_of(line: str, message: str) -> bool:
    """Whether a line of the document is the beginning of a message; it leaves out quotes of code."""
    text = message.replace("`", "")
    return line == text or (line != "…: …" and text.startswith(line.removesuffix("…")))


def test_every_message_that_ends_the_job_has_a_line() -> None:
    public = [one for one in _raised() if one.message not in MISUSE]
    assert len(public) > 50
    lines = _documented()
    assert [one for one in public if not any(_is_line_of(line, one.message) for line in lines)] == []


def test_every_line_is_the_message_of_something_raised() -> None:
    messages = [one.message for one in _raised()]
    assert [line for line in _documented() if not any(_is_line_of(line, message) for message in messages)] == []
    assert [misuse for misuse in MISUSE if misuse not in messages] == []


def test_every_line_has_a_meaning_and_a_remedy_and_appears_once() -> None:
    headings = re.findall(r"^## (.+)$", DOCUMENT.read_text("utf-8"), flags=re.MULTILINE)
    rows = [row for heading in headings for row in _rows(heading)]
    assert [row[0] for row in rows if len(row) not in (3, 5) or not all(row)] == []
    names = [row[0] for row in rows]
    assert [name for name in names if names.count(name) > 1] == []


def test_every_reason_of_a_reject_has_a_line_that_says_whether_it_is_tried_again() -> None:
    rows = _rows("Media")
    assert [row[0].strip("`") for row in rows] == list(ErrorType)
    assert {row[0].strip("`") for row in rows if row[4] == "yes"} == set(RETRYABLE)


def test_a_reason_lists_the_stages_in_which_it_is_raised() -> None:
    listed = {row[0].strip("`"): row[1].split(", ") for row in _rows("Media")}
    assert {stage for stages in listed.values() for stage in stages} == set(get_args(Stage))
    raised = set()
    for tree in _modules().values():
        for node in ast.walk(tree):
            if isinstance(node, ast.Call) and getattr(node.func, "id", "") == "DecodeError":
                stage, kind = node.args[0], node.args[1]
                if isinstance(stage, ast.Constant) and ast.unparse(kind).startswith("ErrorType."):
                    raised.add((ErrorType[ast.unparse(kind).removeprefix("ErrorType.")].value, stage.value))
    assert len(raised) > 10
    assert sorted(pair for pair in raised if pair[1] not in listed[pair[0]]) == []


def test_an_unlisted_message_and_an_outdated_line_are_found() -> None:
    assert not any(_is_line_of(line, "a new refusal of …") for line in _documented())
    assert not any(_is_line_of("no such message", one.message) for one in _raised())
    assert _is_line_of("cannot write …", "cannot write …: …; is the folder writable and the disk not full?")

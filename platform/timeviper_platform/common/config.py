"""Loads a YAML file into a frozen dataclass."""

from __future__ import annotations

import difflib
from collections.abc import Callable, Iterable, Sequence
from dataclasses import replace
from functools import partial
from pathlib import Path
from typing import Any, TypeVar

import yaml
from pydantic import ConfigDict, TypeAdapter, ValidationError

from timeviper_platform.common.config_docs import config_keys
from timeviper_platform.common.storage import is_local

T = TypeVar("T")


def load_config(cls: type[T], path: str | Path, overrides: Sequence[str] = ()) -> T:
    """Reads a YAML file. Overrides have the form `phases.align.steps=10`.

    Raises:
        ValueError: for a missing file, invalid YAML, or invalid keys or values.
    """
    file = Path(path)
    if not file.is_file():
        raise ValueError(f"no configuration file at {str(path)!r}; pass --config with a YAML file")
    try:
        values = yaml.safe_load(file.read_text(encoding="utf-8"))
    except (yaml.YAMLError, UnicodeDecodeError) as error:
        raise ValueError(f"{path} is not valid YAML: {' '.join(str(error).split())}") from error
    values = {} if values is None else values
    if not isinstance(values, dict):
        raise ValueError(f"{path} must hold keys and values at its top level, not a {type(values).__name__}")
    for override in overrides:
        _apply_override(values, override)
    return parse_config(cls, values, source=str(path))


def parse_config(cls: type[T], values: dict[str, Any], *, source: str = "the configuration") -> T:
    """Validates `values`.

    Raises:
        ValueError: with the dotted path of every wrong key.
    """
    # pydantic accepts a config for a list, but not for a standard dataclass
    adapter = TypeAdapter(list[cls], config=ConfigDict(extra="forbid"))  # type: ignore[valid-type]
    try:
        (config,) = adapter.validate_python([values])
    except ValidationError as error:
        problems = [_describe(cls, item) for item in error.errors()]
        raise ValueError(f"{source}: " + "; ".join(problems)) from error
    return config


def with_absolute_paths(config: T, keys: Iterable[str], *, root: Path | None = None, if_exists: bool = False) -> T:
    """Makes paths absolute, for processes that run in another folder.

    Args:
        config: a dataclass. URIs and nulls stay.
        keys: dotted paths; `*` stands for every entry of a mapping or tuple.
        root: None = the current folder.
        if_exists: keep values that do not exist, such as names on a hub.
    """
    for key in keys:
        config = _map_value(config, key.split("."), partial(_absolute, root=root or Path.cwd(), if_exists=if_exists))
    return config


def absolute_path(path: str, *, if_exists: bool = False) -> str:
    """Makes a local path absolute; leaves URIs, and with `if_exists` also names of files that do not exist."""
    return _absolute(path, root=Path.cwd(), if_exists=if_exists)


def _map_value(node: Any, path: Sequence[str], change: Callable[[str], str]) -> Any:
    if node is None:
        return None
    if not path:
        return change(node)
    name, *rest = path
    if name != "*":
        return replace(node, **{name: _map_value(getattr(node, name), rest, change)})
    if isinstance(node, dict):
        return {key: _map_value(value, rest, change) for key, value in node.items()}
    return type(node)(_map_value(value, rest, change) for value in node)


def _absolute(path: str, *, root: Path, if_exists: bool) -> str:
    if not is_local(path):
        return path
    absolute = root / Path(path.removeprefix("file://")).expanduser()
    return str(absolute) if absolute.exists() or not if_exists else path


def _apply_override(values: dict[str, Any], override: str) -> None:
    key, sign, text = override.partition("=")
    if not sign or not key:
        raise ValueError(f"override {override!r} must read key=value, for example max_questions=40")
    *parents, last = key.split(".")
    node: Any = values
    for parent in parents:
        if isinstance(node, list) and parent.isdigit() and int(parent) < len(node):
            node = node[int(parent)]
        elif isinstance(node, dict):
            if node.get(parent) is None:  # absent, or null in the file
                node[parent] = {}
            node = node[parent]
        if not isinstance(node, dict | list):
            raise ValueError(f"override {override!r}: {parent!r} holds a value, not keys")
    if not isinstance(node, dict):
        raise ValueError(f"override {override!r}: {last!r} is not an index of the list")
    try:
        node[last] = yaml.safe_load(text)
    except yaml.YAMLError as error:
        raise ValueError(f"override {override!r}: the value is not valid YAML") from error


def _describe(cls: type, error: Any) -> str:
    location = [str(part) for part in error["loc"][1:]]  # without the index in the list around the configuration
    path = ".".join(location) or "(top level)"
    if error["type"] == "unexpected_keyword_argument":
        return f"unknown key {path!r}{_suggestion(cls, location)}"
    if error["type"] == "missing":
        return f"{path}: {error['msg']}"
    return f"{path}: {error['msg']} (got {repr(error.get('input'))[:80]})"


def _suggestion(cls: type, location: Sequence[str]) -> str:
    *parents, name = location
    siblings = [key.path[-1] for key in config_keys(cls) if _matches(key.path[:-1], parents)]
    close = difflib.get_close_matches(name, siblings, n=1, cutoff=0.75)
    names = f"the keys here are {', '.join(dict.fromkeys(siblings))}" if siblings else "no keys are allowed here"
    return f" (did you mean {close[0]!r}?); {names}" if close else f"; {names}"


def _matches(pattern: Sequence[str], location: Sequence[str]) -> bool:
    return len(pattern) == len(location) and all(
        expected in ("*", part) for expected, part in zip(pattern, location, strict=True)
    )

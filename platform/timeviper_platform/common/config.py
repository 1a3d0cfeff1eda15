"""One YAML file to one frozen dataclass: `load_config(TrainConfig, path, overrides)`.

Knows YAML, dotted overrides and how to say which key is wrong. Does not know any particular configuration:
each dataclass lives beside the class that it configures.
"""

from __future__ import annotations

import argparse
import logging
import sys
from collections.abc import Callable, Iterable, Sequence
from dataclasses import fields, is_dataclass
from pathlib import Path
from typing import Any, NamedTuple, TypeVar, get_args, get_origin, get_type_hints

import yaml
from pydantic import TypeAdapter, ValidationError

T = TypeVar("T")


def load_config(cls: type[T], path: str | Path, overrides: Sequence[str] = ()) -> T:
    """The file at `path` as a `cls`, with `overrides` such as `["phases.align.steps=10"]` laid over it.

    Raises:
        ValueError: for a missing file, YAML that does not parse, an unknown key (with its dotted path and the
            keys that exist there), a missing key or a value of the wrong type.
    """
    file = Path(path)
    if not file.is_file():
        raise ValueError(f"there is no configuration at {str(path)!r}; pass --config with a YAML file")
    try:
        values = yaml.safe_load(file.read_text(encoding="utf-8"))
    except yaml.YAMLError as error:
        raise ValueError(f"{path} is not valid YAML: {error}") from error
    values = {} if values is None else values
    if not isinstance(values, dict):
        raise ValueError(f"{path} must hold keys and values at its top level, not a {type(values).__name__}")
    for override in overrides:
        _apply_override(values, override)
    return parse_config(cls, values, source=str(path))


def parse_config(cls: type[T], values: dict[str, Any], *, source: str = "the configuration") -> T:
    """`values` as a `cls`; every unknown or wrong key is listed with its dotted path.

    Raises:
        ValueError: see `load_config`.
    """
    unknown = _unknown_keys(cls, values, "")
    if unknown:
        raise ValueError("\n".join(f"{source}: {line}" for line in unknown))
    try:
        return TypeAdapter(cls).validate_python(values)
    except ValidationError as error:
        raise ValueError("\n".join(f"{source}: {_describe(item)}" for item in error.errors())) from error


def _apply_override(values: dict[str, Any], override: str) -> None:
    key, sign, text = override.partition("=")
    if not sign or not key:
        raise ValueError(f"override {override!r} must read key=value, for example loader.prefetch_bytes=1000000")
    *parents, last = key.split(".")
    node: Any = values
    for parent in parents:
        if isinstance(node, list) and parent.isdigit() and int(parent) < len(node):
            node = node[int(parent)]  # applications.0.args.weights: an entry of a list by its number
        elif isinstance(node, dict):
            if node.get(parent) is None:  # absent, or a part that the file leaves out by null
                node[parent] = {}
            node = node[parent]
        if not isinstance(node, dict | list):
            raise ValueError(f"override {override!r}: {parent!r} holds a value, not keys")
    if not isinstance(node, dict):
        raise ValueError(f"override {override!r}: {last!r} is no entry of the list there")
    node[last] = yaml.safe_load(text)


def _unknown_keys(annotation: Any, values: Any, path: str) -> list[str]:
    """Lines that name each key in `values` that the annotated dataclass does not have, at any depth."""
    inside = [argument for argument in get_args(annotation) if argument not in (type(None), Ellipsis)]
    if isinstance(values, list) and inside:
        return [line for i, value in enumerate(values) for line in _unknown_keys(inside[0], value, f"{path}[{i}]")]
    if not isinstance(values, dict):
        return []
    if get_origin(annotation) is dict:
        return [line for key, value in values.items() for line in _unknown_keys(inside[1], value, _join(path, key))]
    if not is_dataclass(annotation):  # a union: each of its dataclasses may be meant
        candidates = [_unknown_keys(choice, values, path) for choice in inside]
        return min(candidates, key=len, default=[])
    hints = get_type_hints(annotation)
    names = [field.name for field in fields(annotation)]
    lines = []
    for key, value in values.items():
        if key not in names:
            lines.append(f"unknown key {_join(path, key)!r}; the keys here are {', '.join(names)}")
        else:
            lines += _unknown_keys(hints[key], value, _join(path, key))
    return lines


def _join(path: str, key: object) -> str:
    return f"{path}.{key}" if path else str(key)


def _describe(error: Any) -> str:
    path = ".".join(str(part) for part in error["loc"]) or "(top level)"
    shown = repr(error.get("input"))
    return f"{path}: {error['msg']}" + (f" (got {shown[:80]})" if error["type"] != "missing" else "")


Config = TypeVar("Config")


class CommandResult(NamedTuple):
    """What a job has to say, and its exit code; the lines of a code other than 0 belong on standard error."""

    text: str
    exit_code: int


def run_command(
    arguments: Sequence[str] | None,
    config_class: type[Config],
    work: Callable[[Config], Iterable[str]],
    *,
    description: str | None,
    config_file: str,
    override: str,
) -> CommandResult:
    """Loads the configuration that the arguments name and works on it.

    Args:
        arguments: None = the process' own.
        config_class: what the file holds.
        work: gives the lines to print; a ValueError or RuntimeError becomes one line and exit code 1.
        description: for `--help`.
        config_file: an example of a file.
        override: an example of `key=value`.
    """
    parser = argparse.ArgumentParser(description=description, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--config", required=True, help=f"YAML file, see {config_file}")
    parser.add_argument("overrides", nargs="*", help=f"key=value, e.g. {override}")
    options = parser.parse_args(arguments)
    setup_logging()
    try:
        return CommandResult("\n".join(work(load_config(config_class, options.config, options.overrides))), 0)
    except (ValueError, RuntimeError) as error:
        return CommandResult(f"error: {error}", 1)


def setup_logging(level: int | str = logging.INFO) -> None:
    """Sends every logger's records at `level` and above to standard error, once however often it is called."""
    logging.basicConfig(
        level=level,
        format="%(asctime)s %(levelname)s %(name)s: %(message)s",
        datefmt="%H:%M:%S",
        stream=sys.stderr,
        force=True,
    )

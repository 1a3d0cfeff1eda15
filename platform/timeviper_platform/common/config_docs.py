"""Documents configuration dataclasses by the text under each field."""

from __future__ import annotations

import ast
import functools
import inspect
import textwrap
from collections.abc import Iterator
from dataclasses import MISSING, Field, fields, is_dataclass
from types import NoneType, UnionType
from typing import Any, Literal, NamedTuple, Union, get_args, get_origin, get_type_hints

REQUIRED = "required"


class ConfigKey(NamedTuple):
    path: tuple[str, ...]
    """`*` stands for any key or index."""
    type: str
    default: str
    doc: str
    is_section: bool
    """True when it holds further keys."""

    @property
    def dotted(self) -> str:
        """`phases.*.steps`."""
        return ".".join(self.path)


def config_keys(config_class: type, path: tuple[str, ...] = ()) -> Iterator[ConfigKey]:
    """Yields keys depth first, each section before its own."""
    hints = get_type_hints(config_class)
    docs = field_docs(config_class)
    for field in fields(config_class):
        here = (*path, field.name)
        sections = list(_sections(hints[field.name], here))
        default = _default(field, is_section=bool(sections))
        yield ConfigKey(here, _type_name(hints[field.name]), default, docs.get(field.name, ""), bool(sections))
        for section, inner in sections:
            yield from config_keys(section, inner)


def help_lines(config_class: type) -> list[str]:
    """Returns a line per key: path, default and the doc's first sentence."""
    keys = [key for key in config_keys(config_class) if not key.is_section or key.doc]
    return [f"  {key.dotted} ({key.default}): {_first_sentence(key.doc)}".rstrip(" :") for key in keys]


def markdown_table(config_class: type) -> str:
    lines = ["| key | type | default | meaning |", "|---|---|---|---|"]
    for key in config_keys(config_class):
        cells = (f"`{key.dotted}`", f"`{key.type}`", f"`{key.default}`" if key.default else "", key.doc)
        lines.append("| " + " | ".join(cell.replace("|", "\\|") for cell in cells) + " |")
    return "\n".join(lines)


@functools.cache
def field_docs(config_class: type) -> dict[str, str]:
    """Returns the string literal under each field, on one line; includes inherited fields."""
    docs: dict[str, str] = {}
    for base in reversed(config_class.__mro__):
        if is_dataclass(base):
            docs |= _own_field_docs(base)
    return docs


def _own_field_docs(config_class: type) -> dict[str, str]:
    (node,) = ast.parse(textwrap.dedent(inspect.getsource(config_class))).body
    assert isinstance(node, ast.ClassDef)
    docs = {}
    for field, after in zip(node.body, node.body[1:], strict=False):
        if (
            isinstance(field, ast.AnnAssign)
            and isinstance(field.target, ast.Name)
            and isinstance(after, ast.Expr)
            and isinstance(after.value, ast.Constant)
            and isinstance(after.value.value, str)
        ):
            docs[field.target.id] = " ".join(after.value.value.split())
    return docs


def _sections(annotation: Any, path: tuple[str, ...]) -> Iterator[tuple[type, tuple[str, ...]]]:
    if is_dataclass(annotation):
        assert isinstance(annotation, type)
        yield annotation, path
        return
    arguments = [argument for argument in get_args(annotation) if argument not in (NoneType, Ellipsis)]
    origin = get_origin(annotation)
    if origin in (Union, UnionType):
        for argument in arguments:
            yield from _sections(argument, path)
    elif origin is not Literal and arguments:
        yield from _sections(arguments[-1], (*path, "*"))


def _type_name(annotation: Any) -> str:
    origin, arguments = get_origin(annotation), get_args(annotation)
    if annotation is NoneType:
        return "null"
    if origin is Literal:
        return " | ".join(str(argument) for argument in arguments)
    if origin in (Union, UnionType):
        return " | ".join(_type_name(argument) for argument in arguments)
    if origin is not None and arguments:
        inner = ", ".join("..." if argument is Ellipsis else _type_name(argument) for argument in arguments)
        return f"{origin.__name__}[{inner}]"
    return str(getattr(annotation, "__name__", annotation))


def _default(field: Field[Any], *, is_section: bool) -> str:
    if field.default_factory is not MISSING:
        value = field.default_factory()
        if is_section and is_dataclass(value):
            return ""  # its keys have their own
    elif field.default is not MISSING:
        value = field.default
        if is_dataclass(value):
            return ""
    else:
        return REQUIRED
    return _plain(value)


def _plain(value: Any) -> str:
    if value is None or isinstance(value, bool):
        return {None: "null", True: "true", False: "false"}[value]
    if isinstance(value, tuple | list):
        return "[" + ", ".join(_plain(item) for item in value) + "]"
    if isinstance(value, dict):
        return "{" + ", ".join(f"{key}: {_plain(item)}" for key, item in value.items()) + "}"
    return str(value)


def _first_sentence(doc: str) -> str:
    return doc.partition(". ")[0].rstrip(".")

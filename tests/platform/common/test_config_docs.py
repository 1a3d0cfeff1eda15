from __future__ import annotations

from dataclasses import dataclass, field
from typing import Literal

from timeviper_platform.common.config_docs import config_keys, field_docs, help_lines, markdown_table


@dataclass(frozen=True, kw_only=True, slots=True)
class Base:
    steps: int
    """Optimizer steps.
    At least 1."""


@dataclass(frozen=True, kw_only=True, slots=True)
class Phase(Base):
    betas: tuple[float, float] = (0.9, 0.95)
    mode: Literal["a", "b"] | None = None
    """Either a | b. Later."""


@dataclass(frozen=True, kw_only=True, slots=True)
class Run:
    name: str
    first: Phase | None = None
    """Runs before the others."""
    phases: dict[str, Phase] = field(default_factory=dict)
    sources: tuple[Base, ...] = ()


def test_docs_are_the_strings_under_the_fields_of_all_bases() -> None:
    assert field_docs(Phase) == {"steps": "Optimizer steps. At least 1.", "mode": "Either a | b. Later."}


def test_keys_of_nested_dataclasses_have_dotted_paths() -> None:
    assert [(key.dotted, key.default) for key in config_keys(Run)] == [
        ("name", "required"),
        ("first", "null"),
        ("first.steps", "required"),
        ("first.betas", "[0.9, 0.95]"),
        ("first.mode", "null"),
        ("phases", "{}"),
        ("phases.*.steps", "required"),
        ("phases.*.betas", "[0.9, 0.95]"),
        ("phases.*.mode", "null"),
        ("sources", "[]"),
        ("sources.*.steps", "required"),
    ]


def test_help_shows_the_first_sentence() -> None:
    assert "  first.steps (required): Optimizer steps" in help_lines(Run)
    assert "  name (required)" in help_lines(Run)
    assert "  first (null): Runs before the others" in help_lines(Run)


def test_the_table_holds_the_whole_doc_and_escapes_bars() -> None:
    lines = markdown_table(Run).splitlines()
    assert "| `first.steps` | `int` | `required` | Optimizer steps. At least 1. |" in lines
    assert r"| `first.mode` | `a \| b \| null` | `null` | Either a \| b. Later. |" in lines

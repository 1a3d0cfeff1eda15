from __future__ import annotations

from dataclasses import dataclass, field
from pathlib import Path

import pytest

from timeviper_platform.common.config import load_config


@dataclass(frozen=True, kw_only=True, slots=True)
class Inner:
    steps: int
    rate: float = 0.5


@dataclass(frozen=True, kw_only=True, slots=True)
class Outer:
    name: str
    inner: Inner | None = None
    phases: tuple[Inner, ...] = ()
    by_name: dict[str, Inner] = field(default_factory=dict)


def _write(folder: Path, text: str) -> Path:
    path = folder / "run.yaml"
    path.write_text(text)
    return path


def test_values_arrive_typed(tmp_path: Path) -> None:
    config = load_config(Outer, _write(tmp_path, "name: a\ninner: {steps: 3}\nphases: [{steps: 4, rate: 1}]\n"))
    assert config == Outer(name="a", inner=Inner(steps=3), phases=(Inner(steps=4, rate=1.0),))


def test_overrides_reach_into_the_tree(tmp_path: Path) -> None:
    config = load_config(Outer, _write(tmp_path, "name: a\n"), ["inner.steps=7", "inner.rate=0.25", "name=b"])
    assert config == Outer(name="b", inner=Inner(steps=7, rate=0.25))


def test_overrides_fill_a_part_that_the_file_leaves_out(tmp_path: Path) -> None:
    config = load_config(Outer, _write(tmp_path, "name: a\ninner: null\n"), ["inner.steps=7"])
    assert config == Outer(name="a", inner=Inner(steps=7))
    with pytest.raises(ValueError, match=r"inner\.steps: Field required"):
        load_config(Outer, _write(tmp_path, "name: a\ninner: null\n"), ["inner.rate=0.25"])


@pytest.mark.parametrize(
    ("text", "message"),
    [
        (
            "name: a\ninner: {steps: 1, stepz: 2}\n",
            r"unknown key 'inner\.stepz' \(did you mean 'steps'\?\); the keys here are steps, rate$",
        ),
        ("name: a\nphases: [{steps: 1}, {steps: 1, x: 2}]\n", r"unknown key 'phases\.1\.x'"),
        ("name: a\nby_name: {align: {steps: 1, x: 2}}\n", r"unknown key 'by_name\.align\.x'"),
        ("inner: {steps: 1}\n", r"name: Field required"),
        ("name: a\nnumber: 1\ninner: {steps: x}\n", r"run.yaml: inner\.steps: .*; unknown key 'number'; the keys"),
        ("name: a\ninner: {steps: many}\n", r"inner\.steps: Input should be a valid integer.*'many'"),
        ("- a\n", r"must hold keys and values"),
        ("name: [\n", r"not valid YAML"),
    ],
)
def test_wrong_files_say_which_key(tmp_path: Path, text: str, message: str) -> None:
    with pytest.raises(ValueError, match=message):
        load_config(Outer, _write(tmp_path, text))


def test_missing_file_names_the_path(tmp_path: Path) -> None:
    with pytest.raises(ValueError, match=r"no configuration file at .*nowhere"):
        load_config(Outer, tmp_path / "nowhere.yaml")


@pytest.mark.parametrize("override", ["steps", "=3", "name.x=1"])
def test_malformed_overrides_are_refused(tmp_path: Path, override: str) -> None:
    with pytest.raises(ValueError, match="override"):
        load_config(Outer, _write(tmp_path, "name: a\n"), [override])

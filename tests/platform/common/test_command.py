from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path

import pytest

from timeviper_platform.common.config import CommandResult, run_command


@dataclass(frozen=True, kw_only=True, slots=True)
class Config:
    number: int


def lines(config: Config) -> list[str]:
    if config.number < 0:
        raise RuntimeError("the disk is full")
    return [f"number {config.number}", "done"]


def run(tmp_path: Path, *overrides: str) -> CommandResult:
    file = tmp_path / "config.yaml"
    file.write_text("number: 3\n")
    return run_command(
        ["--config", str(file), *overrides], Config, lines, description="d", config_file="f", override="number=4"
    )


def test_the_works_lines_are_the_text(tmp_path: Path) -> None:
    assert run(tmp_path, "number=5") == CommandResult("number 5\ndone", 0)


@pytest.mark.parametrize(("override", "message"), [("number=-1", "the disk is full"), ("nummer=1", "'nummer'")])
def test_a_wrong_key_and_a_failing_world_are_one_line_and_code_1(tmp_path: Path, override: str, message: str) -> None:
    result = run(tmp_path, override)
    assert result.exit_code == 1
    assert result.text.startswith("error: ")
    assert message in result.text

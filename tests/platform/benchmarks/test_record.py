"""Measured rows in a document's tables: what a run replaces and what it leaves alone."""

from __future__ import annotations

from pathlib import Path

import pytest

from timeviper_platform.benchmarks.measure import Row
from timeviper_platform.benchmarks.record import json_file, read_records, record, with_tables
from timeviper_platform.cli.benchmark import EVERY_SUITE, SUITES, main

DOCUMENT = Path(__file__).resolve().parents[3] / "docs" / "benchmarks.md"
MODEL = "<!-- measured: model -->"
TEXT = f"# Title\n\nProse.\n\n{MODEL}\nold\n<!-- end -->\n\nMore.\n\n<!-- measured: store -->\n<!-- end -->"


def row(name: str, value: float) -> Row:
    return Row(name=name, value=value, unit="x", bar=">= 2", command=f"python jobs/benchmark.py model --only {name}")


def test_a_group_replaces_its_rows_alone(tmp_path: Path) -> None:
    document = tmp_path / "figures.md"
    document.write_text(TEXT)
    record(document, "model", "scan", [row("scan", 4.0)], stolen=0.0)
    record(document, "model", "decode", [row("decode", 1.5)], stolen=0.02)
    record(document, "model", "scan", [row("scan", 5.25)], stolen=0.0)
    text = document.read_text()
    assert text.startswith("# Title\n\nProse.\n\n<!-- measured: model -->\n\n| figure |")
    assert text.endswith("<!-- end -->\n\nMore.\n\n<!-- measured: store -->\n<!-- end -->")
    assert "| scan | 5.25 x | >= 2 | `python jobs/benchmark.py model --only scan` |" in text
    assert "| decode | **1.5 x** |" in text  # misses its bar
    assert "4 x" not in text
    assert "old" not in text
    (group, other) = (read_records(document)["model"][name] for name in ("scan", "decode"))
    assert f"- `scan`: {group['date']}, commit {group['commit']}, {group['machine']}, 0% stolen" in text
    assert other["stolen"] == 0.02


def test_a_document_without_markers_is_refused_and_stays(tmp_path: Path) -> None:
    document = tmp_path / "figures.md"
    document.write_text("# Title\n")
    with pytest.raises(ValueError, match="0 tables of 'model'; put '<!-- measured: model -->'"):
        record(document, "model", "scan", [row("scan", 4.0)], stolen=0.0)
    assert document.read_text() == "# Title\n"
    assert not json_file(document).exists()


def test_the_tables_of_the_documents_are_those_of_the_rows_and_every_suite_has_one() -> None:
    text = DOCUMENT.read_text()
    assert with_tables(text, read_records(DOCUMENT)) == text
    for suite in SUITES:
        assert text.count(f"<!-- measured: {suite} -->") == 1


@pytest.mark.parametrize("option", ["--only=scan", "--json=rows.json"])
def test_every_suite_takes_no_choice_of_groups(option: str, capsys: pytest.CaptureFixture[str]) -> None:
    assert main([EVERY_SUITE, option]) == 2
    assert "go with one suite" in capsys.readouterr().err


def test_every_group_runs_in_turn_and_failures_are_named(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    import subprocess

    from timeviper_platform.cli import benchmark

    commands: list[list[str]] = []

    def run(command: list[str], *, check: bool) -> subprocess.CompletedProcess[str]:
        commands.append(command[command.index("benchmark") + 1 :])
        return subprocess.CompletedProcess(command, returncode=int("b" in command))

    def no_device() -> benchmark.Groups:
        raise RuntimeError("needs a CUDA device")

    groups: benchmark.Groups = {"a": lambda film: [], "b": lambda film: []}
    monkeypatch.setattr(benchmark, "SUITES", {"one": lambda: groups, "gpu": no_device})
    monkeypatch.setattr(benchmark.subprocess, "run", run)
    document = tmp_path / "figures.md"
    document.write_text(TEXT)
    parser = benchmark.JobParser("")
    options = parser.parse_args([])
    options.suite, options.only, options.json, options.record, options.film = EVERY_SUITE, None, None, document, None
    result = benchmark.benchmark(options)
    assert commands == [["one", "--only", key, f"--record={document}"] for key in ("a", "b")]
    assert (result.lines, result.exit_code) == (["failed, or misses its bar: one --only b"], 1)

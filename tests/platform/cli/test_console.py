"""The program `timeviper`, and the wheel that holds it."""

from __future__ import annotations

import os
import subprocess
import sys
import zipfile
from pathlib import Path

import pytest

from timeviper_platform import __version__
from timeviper_platform.cli.__main__ import COMMANDS, main
from timeviper_platform.common.job import config_folder, find_config, job_command

ROOT = Path(__file__).resolve().parents[3]
CLI = ROOT / "platform" / "timeviper_platform" / "cli"


def test_every_module_is_a_command_and_every_job_calls_one() -> None:
    modules = {path.stem for path in CLI.glob("*.py")} - {"__init__", "__main__"}
    assert set(COMMANDS) == modules
    for script in (ROOT / "jobs").glob("*.py"):
        if script.stem != "config_docs":  # writes a document of the source tree
            assert f"from timeviper_platform.cli.{script.stem} import main" in script.read_text(), script.name


def test_the_program_runs_a_command_with_its_arguments(capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["store", "inspect", "/nowhere/store"]) == 1
    assert "error: no feature store at '/nowhere/store'" in capsys.readouterr().err


@pytest.mark.parametrize(("arguments", "code"), [(["--version"], 0), (["trian"], 2), ([], 2)])
def test_a_wrong_command_names_the_right_ones(
    arguments: list[str], code: int, capsys: pytest.CaptureFixture[str]
) -> None:
    with pytest.raises(SystemExit) as ended:
        main(arguments)
    assert ended.value.code == code
    shown = capsys.readouterr()
    assert f"timeviper {__version__}" in shown.out if code == 0 else shown.err.splitlines()[-1].startswith("error: ")


def test_usage_names_the_program(tmp_path: Path) -> None:
    ended = subprocess.run(job_command("doctor", "--help"), capture_output=True, text=True, check=True, cwd=tmp_path)
    assert ended.stdout.startswith("usage: timeviper doctor ")


def test_a_packaged_configuration_is_found_where_no_file_has_its_name(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    packaged = config_folder() / "tiny" / "train.yaml"
    assert find_config("ray_configs/tiny/train.yaml") == str(packaged)
    assert find_config("ray_configs/none.yaml") == "ray_configs/none.yaml"
    assert find_config("train.yaml") == "train.yaml"
    own = tmp_path / "ray_configs" / "tiny" / "train.yaml"
    own.parent.mkdir(parents=True)
    own.touch()
    assert find_config("ray_configs/tiny/train.yaml") == "ray_configs/tiny/train.yaml"


def test_the_wheel_alone_has_the_program_and_the_configurations(tmp_path: Path) -> None:
    command = [sys.executable, "-m", "hatchling", "build", "-t", "wheel", "-d", str(tmp_path)]
    subprocess.run(command, check=True, cwd=ROOT, capture_output=True)
    (wheel,) = tmp_path.glob("*.whl")
    assert wheel.name == f"timeviper_platform-{__version__}-py3-none-any.whl"
    installed = tmp_path / "installed"
    with zipfile.ZipFile(wheel) as archive:
        archive.extractall(installed)
    (metadata,) = installed.glob("*.dist-info")
    assert "timeviper = timeviper_platform.cli.__main__:main" in (metadata / "entry_points.txt").read_text()
    files = [path.relative_to(ROOT / "ray_configs") for path in (ROOT / "ray_configs").rglob("*.yaml")]
    assert [file for file in files if not (installed / "timeviper_platform" / "ray_configs" / file).is_file()] == []

    empty = tmp_path / "empty"
    empty.mkdir()
    ended = subprocess.run(
        job_command("convert", "--config", "ray_configs/convert.yaml", "input=/nowhere.json", "output=s.parquet"),
        env={**os.environ, "PYTHONPATH": str(installed)},
        cwd=empty,
        capture_output=True,
        text=True,
        check=False,
    )
    assert ended.returncode == 1
    assert "/nowhere.json" in ended.stderr.splitlines()[-1]

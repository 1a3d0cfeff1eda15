"""What a release says about itself agrees: version, archive, citation and model cards."""

from __future__ import annotations

import re
import subprocess
import sys
import tarfile
from pathlib import Path

import torch
import yaml

from timeviper_model.config import NEMOTRON_NANO_9B_V2, PRESETS, TimeViperConfig
from timeviper_model.timeviper import TimeViper
from timeviper_platform import __version__

ROOT = Path(__file__).parent.parent


def num_parameters(config: TimeViperConfig) -> int:
    with torch.device("meta"):
        return sum(parameter.numel() for parameter in TimeViper(config).parameters())


def test_the_version_stands_in_one_place_and_is_repeated_rightly() -> None:
    assert 'dynamic = ["version"]' in (ROOT / "pyproject.toml").read_text()
    assert yaml.safe_load((ROOT / "CITATION.cff").read_text())["version"] == __version__
    first = re.search(r"^## (\S+)", (ROOT / "CHANGELOG.md").read_text(), flags=re.MULTILINE)
    assert first is not None
    assert first[1] == __version__


def test_the_citation_has_the_fields_of_its_format() -> None:
    citation = yaml.safe_load((ROOT / "CITATION.cff").read_text())
    assert citation["cff-version"] == "1.2.0"
    assert all(citation[key] for key in ("message", "title", "authors"))  # the required ones
    assert citation["license"] == "Apache-2.0"
    (paper,) = citation["references"]
    assert all(paper[key] for key in ("type", "title", "authors"))
    assert "2511.16595" in paper["url"]


def test_the_source_archive_has_what_its_tests_need(tmp_path: Path) -> None:
    command = [sys.executable, "-m", "hatchling", "build", "-t", "sdist", "-d", str(tmp_path)]
    subprocess.run(command, check=True, cwd=ROOT, capture_output=True)
    (archive,) = tmp_path.glob("*.tar.gz")
    with tarfile.open(archive) as files:
        names = {name.partition("/")[2] for name in files.getnames()}
    wanted = {"Makefile", "Dockerfile", ".dockerignore", "CITATION.cff", "CHANGELOG.md", "constraints-cuda.txt"}
    wanted |= {"jobs/train.py", "ray_configs/cluster/values.yaml", "docs/models.md", "tests/conftest.py", ".ci/run"}
    assert wanted <= names
    assert not [name for name in names if "__pycache__" in name or name.startswith((".venv", "outputs"))]


def test_model_cards_have_the_sizes_of_the_presets() -> None:
    text = (ROOT / "docs" / "models.md").read_text()
    with_transv = num_parameters(PRESETS["9b"])
    without = num_parameters(TimeViperConfig(text=NEMOTRON_NANO_9B_V2, transv=()))
    for count in (with_transv, without, num_parameters(PRESETS["tiny"])):
        assert f"{count:,} besides the vision encoder" in text
    pattern = NEMOTRON_NANO_9B_V2.block_types
    counts = [pattern.count(kind) for kind in ("mamba", "mlp", "attention")]
    assert "{} Mamba-2, {} MLP and {} attention blocks".format(*counts) in text
    assert f"the same blocks, {len(PRESETS['tiny'].text.block_types)} of them" in text

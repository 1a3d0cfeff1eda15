"""Jobs through `ray job submit`, with the runtime environment and token authentication."""

from __future__ import annotations

import os
import re
import shutil
import subprocess
import sys
import zipfile
from pathlib import Path

import pyarrow as pa
import pyarrow.parquet as pq
import pytest
import torch
import yaml

from timeviper_model.weights.weights_folder import from_pretrained
from timeviper_platform.data.store.reader import FeatureStore
from timeviper_platform.data.synthetic.corpus import CorpusConfig, SceneCounts, make_corpus

ROOT = Path(__file__).parent.parent
RAY = str(Path(sys.executable).parent / "ray")

pytestmark = pytest.mark.cluster


def submit(environment: dict[str, str], *command: str) -> subprocess.CompletedProcess[str]:
    """Runs `ray job submit`; stdout holds all of its output."""
    return subprocess.run(
        [RAY, "job", "submit", "--runtime-env", "ray_configs/runtime_env.yaml", "--", "python", *command],
        cwd=ROOT,
        env={**os.environ, **environment},
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        text=True,
        timeout=240,
        check=False,
    )


@pytest.fixture(scope="module")
def corpus(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("end-to-end") / "corpus"
    counts = SceneCounts(needle=6, order=2, count=2)
    make_corpus(
        CorpusConfig(
            output=str(folder),
            train=counts,
            held_out=counts,
            num_images=8,
            num_language_samples=40,
            encoder_steps=5,
            num_workers=1,
        )
    )
    return folder


@pytest.mark.slow
def test_submitted_jobs_write_features_and_weights(ray_cluster: dict[str, str], corpus: Path, tmp_path: Path) -> None:
    features, runs = tmp_path / "features", tmp_path / "runs"
    preprocess = submit(
        ray_cluster,
        "jobs/preprocess.py",
        "--config=ray_configs/tiny/preprocess.yaml",
        f"input={_manifest_with_a_broken_file(corpus, tmp_path)}",
        f"feature_store={features}",
        f"encoder.model={corpus / 'encoder'}",
        "execution.num_workers=1",
    )
    assert preprocess.returncode == 0, preprocess.stdout
    assert re.search(r"media\s+29, of which rejected: 1", preprocess.stdout), preprocess.stdout
    assert len(FeatureStore.open(str(features)).media_ids) == 28

    train = submit(
        ray_cluster,
        "jobs/train.py",
        "--config=ray_configs/tiny/train.yaml",
        f"runs={runs}",
        f"feature_store={features}",
        f"tokenizer={corpus / 'tokenizer'}",
        f"encoder={corpus / 'encoder'}",
        *(
            f"phases.{phase}.{value}"
            for phase in ("language", "align", "instruct")
            for value in ("steps=2", f"samples.0.uri={corpus}/samples/{phase}.parquet")
        ),
    )
    assert train.returncode == 0, train.stdout
    assert re.search(r"^instruct\s+2\s", train.stdout, re.MULTILINE), train.stdout
    model = from_pretrained(runs / "tiny" / "weights" / "instruct")
    assert all(bool(torch.isfinite(parameter).all()) for parameter in model.parameters())


@pytest.mark.slow
def test_a_failing_job_fails_at_the_submitter(ray_cluster: dict[str, str], tmp_path: Path) -> None:
    failed = submit(
        ray_cluster,
        "jobs/preprocess.py",
        "--config=ray_configs/tiny/preprocess.yaml",
        f"encoder.model={tmp_path / 'nowhere'}",
    )
    assert failed.returncode != 0
    assert re.search(r"^error: there is no folder .*nowhere", failed.stdout, re.MULTILINE), failed.stdout


def test_a_submission_ships_jobs_and_configurations_and_never_strays(tmp_path: Path) -> None:
    from ray._private.runtime_env import packaging

    for name in ("jobs/serve.py", "ray_configs/tiny/serve.yaml", "platform/a.py", "test.log", "x", ".env", "weights/w"):
        (tmp_path / name).parent.mkdir(parents=True, exist_ok=True)
        (tmp_path / name).touch()
    shutil.copy(ROOT / ".rayignore", tmp_path)
    values = yaml.safe_load((ROOT / "ray_configs" / "runtime_env.yaml").read_text())
    uri = packaging.get_uri_for_directory(str(tmp_path), include_gitignore=True, excludes=values["excludes"])
    package = tmp_path.parent / uri.removeprefix("gcs://")
    (tmp_path / "test.log").write_text("grows between hashing and packing")
    packaging.create_package(str(tmp_path), package, include_gitignore=True, excludes=values["excludes"])
    names = {name for name in zipfile.ZipFile(package).namelist() if not name.endswith("/")}
    assert {name.removeprefix(f"{tmp_path.name}/") for name in names} == {
        "jobs/serve.py",
        "ray_configs/tiny/serve.yaml",
    }
    again = packaging.get_uri_for_directory(str(tmp_path), include_gitignore=True, excludes=values["excludes"])
    assert again == uri


def _manifest_with_a_broken_file(corpus: Path, folder: Path) -> Path:
    broken = folder / "broken.mp4"
    broken.write_text("this is not a video")
    table = pq.read_table(corpus / "manifest.parquet")
    row = dict.fromkeys(table.schema.names) | {"uri": str(broken), "media_id": "broken"}
    rows = [{**kept, "uri": str(corpus / kept["uri"])} for kept in table.to_pylist()]
    pq.write_table(pa.Table.from_pylist([*rows, row], schema=table.schema), folder / "manifest.parquet")
    return folder / "manifest.parquet"

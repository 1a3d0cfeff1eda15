"""Jobs through `ray job submit`, with the runtime environment and token authentication."""

from __future__ import annotations

import os
import re
import shutil
import subprocess
import sys
import time
import zipfile
from pathlib import Path

import pyarrow as pa
import pyarrow.parquet as pq
import pytest
import torch
import yaml

from reference.training_corpus import make_corpus as make_training_corpus
from reference.training_corpus import train_values
from timeviper_model.weights.weights_folder import from_pretrained
from timeviper_platform.data.store.reader import FeatureStore
from timeviper_platform.data.synthetic.corpus import CorpusConfig, SceneCounts, make_corpus
from timeviper_platform.training.metrics.writer import read_metrics

ROOT = Path(__file__).parent.parent
RAY = str(Path(sys.executable).parent / "ray")
NUM_STEPS = 80
"""So many that a submission is stopped in time."""

pytestmark = pytest.mark.cluster


def submit(environment: dict[str, str], *command: str, submission_id: str | None = None) -> subprocess.Popen[str]:
    """Starts `ray job submit`; stdout gets all of its output."""
    named = [] if submission_id is None else ["--submission-id", submission_id]
    return subprocess.Popen(
        [RAY, "job", "submit", *named, "--runtime-env", "ray_configs/runtime_env.yaml", "--", "python", *command],
        cwd=ROOT,
        env={**os.environ, **environment},
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        text=True,
    )


def run_submitted(environment: dict[str, str], *command: str, exit_code: int = 0) -> str:
    """Returns what a submitted job prints at the submitter."""
    return output_of(submit(environment, *command), exit_code)


def output_of(submitted: subprocess.Popen[str], exit_code: int = 0) -> str:
    try:
        printed, _ = submitted.communicate(timeout=300)
    finally:
        submitted.kill()
    assert submitted.returncode == exit_code, printed
    return printed


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
@pytest.mark.timeout(900)
def test_submitted_jobs_take_a_corpus_to_weights_scores_and_figures(
    ray_cluster: dict[str, str], corpus: Path, tmp_path: Path
) -> None:
    features, runs, weights = tmp_path / "features", tmp_path / "runs", tmp_path / "weights"
    printed = run_submitted(
        ray_cluster,
        "jobs/preprocess.py",
        "--config=ray_configs/tiny/preprocess.yaml",
        f"input={_manifest_with_a_broken_file(corpus, tmp_path)}",
        f"feature_store={features}",
        f"encoder.model={corpus / 'encoder'}",
        "execution.num_workers=1",
    )
    assert re.search(r"media\s+29 planned = 28 ok \+ 0 partial \+ 1 rejected", printed), printed
    assert re.search(r"\d+/28 segments \(\d+%\)", printed), printed  # progress
    assert len(FeatureStore.open(str(features)).media_ids) == 28

    training = [
        "--config=ray_configs/tiny/train.yaml",
        f"runs={runs}",
        f"feature_store={features}",
        f"tokenizer={corpus / 'tokenizer'}",
        f"encoder={corpus / 'encoder'}",
        "metrics.log_every_steps=1",
        *(
            f"phases.{phase}.{value}"
            for phase in ("language", "align", "instruct")
            for value in ("steps=2", f"samples.0.uri={corpus}/samples/{phase}.parquet")
        ),
    ]
    printed = run_submitted(ray_cluster, "jobs/train.py", *training)
    assert re.search(r"^instruct\s+2\s", printed, re.MULTILINE), printed
    assert re.search(r"instruct step 1/2 loss \d", printed), printed  # progress

    run_submitted(ray_cluster, "jobs/export.py", *training, f"--output={weights}")
    model = from_pretrained(weights)
    assert all(bool(torch.isfinite(parameter).all()) for parameter in model.parameters())

    asked = [f"weights={weights}", f"feature_store={features}", f"questions={corpus / 'held_out'}"]
    scores = tmp_path / "scores.json"
    evaluation = submit(
        ray_cluster,
        "jobs/evaluate.py",
        "--config=ray_configs/tiny/evaluate.yaml",
        *asked,
        f"output={scores}",
        "tasks=[choice]",
        "max_questions=2",
        "workers.num_workers=1",
    )
    analysis = submit(
        ray_cluster,
        "jobs/analyze.py",
        "--config=ray_configs/tiny/analyze.yaml",
        *asked,
        f"output={tmp_path / 'figures'}",
        "figures=[maps]",
        "max_questions=1",
        "maps.num_questions=1",
    )
    output_of(evaluation)
    assert "accuracy" in scores.read_text()
    printed = output_of(analysis)
    assert re.search(r"^written\s+\S+/maps\.json$", printed, re.MULTILINE), printed


@pytest.mark.slow
@pytest.mark.timeout(600)
def test_a_stopped_submission_saves_and_a_second_one_goes_on(ray_cluster: dict[str, str], tmp_path: Path) -> None:
    workers = {"num_workers": 1, "resources_per_worker": {"CPU": 0.9}}
    values = train_values(make_training_corpus(tmp_path), workers=workers)
    init = values["phases"].pop("align")["init"]
    values["phases"]["instruct"] |= {"init": init, "steps": NUM_STEPS}
    values["checkpoint"] = {"every_steps": NUM_STEPS, "keep": 2}
    (tmp_path / "train.yaml").write_text(yaml.safe_dump(values, sort_keys=False))
    command = ["jobs/train.py", "--config", str(tmp_path / "train.yaml")]
    run = str(tmp_path / "runs" / "run")

    first = submit(ray_cluster, *command, submission_id="to-be-stopped")
    try:
        while len(read_metrics(run)) < 3:
            assert first.poll() is None, first.communicate()[0]
            time.sleep(0.1)
        subprocess.run([RAY, "job", "stop", "to-be-stopped"], env={**os.environ, **ray_cluster}, check=True)
        printed, _ = first.communicate(timeout=120)
    finally:
        first.kill()
    assert "error: stopped on request after step" in printed, printed
    assert (first.returncode, "was stopped" in printed) == (0, True)  # as docs/operate.md says of Ray
    num_saved = len(read_metrics(run))
    assert 3 <= num_saved < NUM_STEPS

    run_submitted(ray_cluster, *command)
    rows = read_metrics(run)
    assert [row["global_step"] for row in rows] == list(range(1, NUM_STEPS + 1))
    assert [row["attempt"] for row in rows] == [1] * num_saved + [2] * (NUM_STEPS - num_saved)


@pytest.mark.slow
def test_a_failing_job_fails_at_the_submitter(ray_cluster: dict[str, str], tmp_path: Path) -> None:
    printed = run_submitted(
        ray_cluster,
        "jobs/preprocess.py",
        "--config=ray_configs/tiny/preprocess.yaml",
        f"feature_store={tmp_path / 'features'}",
        f"encoder.model={tmp_path / 'nowhere'}",
        exit_code=1,
    )
    assert re.search(r"^error: .*nowhere", printed, re.MULTILINE), printed


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

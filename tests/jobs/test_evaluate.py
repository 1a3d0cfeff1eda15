from __future__ import annotations

import json
import runpy
from pathlib import Path

import pyarrow.parquet as pq
import pytest
import torch

from reference.benchmark_miniatures import make_miniature
from reference.known_answers import make_known_answers
from timeviper_platform.data.media.medium import media_id_of
from timeviper_platform.data.store.writer import write_store

ROOT = Path(__file__).parents[2]


def _run(*overrides: str) -> int:
    main = runpy.run_path(str(ROOT / "jobs" / "evaluate.py"))["main"]
    return int(main(["--config", str(ROOT / "ray_configs" / "tiny" / "evaluate.yaml"), *overrides]))


@pytest.mark.cluster
def test_evaluation_on_ray_finds_the_known_answers(
    tmp_path: Path, ray_address: str, capsys: pytest.CaptureFixture[str]
) -> None:
    known = make_known_answers(tmp_path)
    output = tmp_path / "scores" / "evaluation.json"
    code = _run(
        f"weights={known.weights}",
        f"feature_store={known.feature_store}",
        f"questions={known.questions}",
        f"output={output}",
        "tasks=[choice, grounding]",
        "workers.batch_size=3",
        "workers.num_workers=1",
    )
    assert code == 0
    report = json.loads(output.read_text())
    assert report["choice"]["accuracy"] == 1.0
    assert report["choice"]["accuracy_without_video"] == 0.25
    assert report["grounding"]["miou"] == 1.0
    assert pq.read_table(output.with_name("evaluation.outcomes.parquet")).num_rows == 8
    assert "grounding" in capsys.readouterr().out


def test_a_wrong_key_ends_with_its_path_before_ray_starts(capsys: pytest.CaptureFixture[str]) -> None:
    assert _run("answering.max_framez=3") == 1
    assert "answering.max_framez" in capsys.readouterr().err


@pytest.mark.slow
@pytest.mark.cluster
def test_a_benchmark_is_answered_on_ray_and_scored_again(
    tmp_path: Path, ray_address: str, capsys: pytest.CaptureFixture[str]
) -> None:
    known = make_known_answers(tmp_path)
    folder = make_miniature("longvideobench", tmp_path / "benchmark")
    features = {media_id_of(f"videos/v{n}.mp4", ""): torch.ones(8, 1, 8).bfloat16() for n in range(2)}
    write_store(str(tmp_path / "clips"), features, recipe={"synthetic": "benchmark"})
    arguments = [
        *("--config", str(ROOT / "ray_configs" / "eval" / "longvideobench.yaml")),
        *(f"weights={known.weights}", f"feature_store={tmp_path / 'clips'}", f"benchmark.folder={folder}"),
        *(f"output={tmp_path / 'report.json'}", "answering.device=cpu", "answering.dtype=float32"),
        *("answering.max_new_tokens=4", "workers.num_workers=1", "workers.cpus_per_worker=0.75"),
        "workers.gpus_per_worker=0",
    ]
    main = runpy.run_path(str(ROOT / "jobs" / "evaluate.py"))["main"]
    assert main(arguments) == 0
    first = json.loads((tmp_path / "report.json").read_text())
    assert {name: found["num_questions"] for name, found in first["protocols"].items()} == {
        "paper": 2,
        "whole": 2,
        "without_video": 2,
    }
    assert "<h2>Overview</h2>" in (tmp_path / "report.html").read_text()
    assert "published" in capsys.readouterr().out
    assert main(["--rescore", *arguments]) == 0
    assert json.loads((tmp_path / "report.json").read_text()) == first

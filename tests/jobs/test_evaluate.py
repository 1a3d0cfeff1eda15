from __future__ import annotations

import json
import runpy
from pathlib import Path

import pyarrow.parquet as pq
import pytest

from reference.known_answers import make_known_answers

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

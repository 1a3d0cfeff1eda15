from __future__ import annotations

from pathlib import Path

import av
import pyarrow.parquet as pq
import pytest

from timeviper_platform.data.synthetic.benchmark import SynthBenchmarkConfig, make_benchmark
from timeviper_platform.evaluation.benchmarks.registry import BENCHMARKS


def test_a_generated_benchmark_is_read_like_a_published_one(tmp_path: Path) -> None:
    config = SynthBenchmarkConfig(output=str(tmp_path), seconds=(20, 30), videos_per_kind=1, num_workers=1, side=48)
    num_questions = make_benchmark(config)
    rows = pq.read_table(tmp_path / "test.parquet").to_pylist()
    assert num_questions == len(rows) == 2 * (3 + 3 + 2)
    assert {row["task"] for row in rows} == {"choice", "order", "count", "grounding", "caption"}
    for row in rows:
        with av.open(str(tmp_path / "videos" / row["video"])) as container:
            assert float(container.duration or 0) / av.time_base == pytest.approx(row["seconds"], abs=0.6)
    choices = BENCHMARKS["synth"].read(str(tmp_path))
    grounding = BENCHMARKS["synth_grounding"].read(str(tmp_path))
    assert (len(choices), len(grounding)) == (8, 2)
    assert all(len(question.answers) == 1 and len(question.options) == 4 for question in choices)
    assert all(0 <= question.spans[0].start_seconds < question.spans[0].end_seconds <= 30 for question in grounding)
    assert "Options" not in choices[0].text

    written = (tmp_path / "test.parquet").stat().st_mtime_ns
    assert make_benchmark(config) == num_questions
    assert (tmp_path / "test.parquet").stat().st_mtime_ns == written, "a finished benchmark is reused"


def test_wrong_sizes_are_refused(tmp_path: Path) -> None:
    with pytest.raises(ValueError, match="different lengths of at least 20 seconds"):
        SynthBenchmarkConfig(output=str(tmp_path), seconds=(10,))
    with pytest.raises(ValueError, match="must be at least 1"):
        SynthBenchmarkConfig(output=str(tmp_path), videos_per_kind=0)
    with pytest.raises(ValueError, match="must be a local folder"):
        make_benchmark(SynthBenchmarkConfig(output="s3://bucket/x"))


def test_a_folder_of_other_videos_is_not_cleared(tmp_path: Path) -> None:
    video = tmp_path / "videos" / "own.mp4"
    video.parent.mkdir()
    video.write_bytes(b"1")
    with pytest.raises(ValueError, match="holds files that were not generated, and could be deleted"):
        make_benchmark(SynthBenchmarkConfig(output=str(tmp_path), seconds=(20,), videos_per_kind=1, num_workers=1))
    assert video.exists()

from __future__ import annotations

import json
import os
import shutil
from collections.abc import Iterator, Sequence
from dataclasses import replace
from fractions import Fraction
from pathlib import Path
from typing import Any

import pyarrow.parquet as pq
import pytest
import torch
from PIL import Image

from reference.benchmark_miniatures import make_miniature, write_json
from reference.known_answers import NAMES, WHICH, KnownAnswers
from timeviper_platform.common.config import load_config
from timeviper_platform.common.job import JobError
from timeviper_platform.common.lease import LeaseHeldError
from timeviper_platform.data.media.medium import media_id_of
from timeviper_platform.data.store.reader import FeatureStore
from timeviper_platform.data.store.writer import write_store
from timeviper_platform.data.video.reader import open_video
from timeviper_platform.evaluation.benchmark_answers import BenchmarkAnswer, BenchmarkAnswerer, BenchmarkTask
from timeviper_platform.evaluation.benchmark_config import BenchmarkConfig
from timeviper_platform.evaluation.benchmark_run import (
    blocks_of,
    read_benchmark,
    read_tasks,
    rescore,
    run_benchmark,
    write_manifest,
)
from timeviper_platform.evaluation.evaluator import AnsweringConfig
from timeviper_platform.evaluation.protocols import protocol_frames
from timeviper_platform.evaluation.run import EvaluateConfig, EvalWorkersConfig

ROOT = Path(__file__).parents[3]


@pytest.fixture(scope="module")
def config(known: KnownAnswers, tmp_path_factory: pytest.TempPathFactory) -> EvaluateConfig:
    """A miniature of LongVideoBench about the known model's four videos, two questions each, and a missing video."""
    root = tmp_path_factory.mktemp("benchmark")
    rows = [_row(video, number) for number in range(2) for video in range(5)]
    write_json(root / "lvb_val.json", rows)
    store = FeatureStore.open(known.feature_store)
    media = {media_id_of(f"videos/v{n}.mp4", ""): store.read(f"video-{n}").features for n in range(4)}
    write_store(str(root / "features"), media, recipe={"synthetic": "benchmark"})
    return EvaluateConfig(
        weights=known.weights,
        feature_store=str(root / "features"),
        output=str(root / "out" / "report.json"),
        benchmark=BenchmarkConfig(name="longvideobench", folder=str(root), protocols=("paper", "without_video")),
        answering=AnsweringConfig(max_new_tokens=8),
        workers=EvalWorkersConfig(batch_size=4),
    )


def _row(video: int, number: int) -> dict[str, Any]:
    return {
        "id": f"v{video}_{number}",
        "video_path": f"v{video}.mp4",
        "subtitle_path": f"v{video}.json",
        "question": (WHICH, f"{WHICH} Again.")[number],
        "candidates": list(NAMES),
        "correct_choice": min(video, 3),
        "duration": 4.0,
        "duration_group": 15,
        "question_category": "T2E",
    }


class _Killed(BaseException):
    """Ends a run as a signal does."""


class _InProcess:
    """Answers blocks in this process; may be killed before one of them."""

    def __init__(self, killed_before_block: int | None = None) -> None:
        self._killed_before_block = killed_before_block
        self.asked: list[str] = []

    def __call__(
        self, blocks: Sequence[Sequence[BenchmarkTask]], config: EvaluateConfig
    ) -> Iterator[list[BenchmarkAnswer]]:
        answerer = _answerer(config)
        for number, block in enumerate(blocks):
            if number == self._killed_before_block:
                raise _Killed
            self.asked += [f"{task.question.question_id} {task.protocol}" for task in block]
            yield answerer.answer(block)


def _answerer(config: EvaluateConfig) -> BenchmarkAnswerer:
    assert config.benchmark is not None
    return BenchmarkAnswerer(
        weights_folder=config.weights,
        feature_store=config.feature_store,
        config=config.answering,
        benchmark=config.benchmark.name,
        prompts=config.benchmark.prompts,
        media_prefix=config.benchmark.media_prefix,
    )


def test_a_killed_evaluation_repeats_no_question(config: EvaluateConfig, tmp_path: Path) -> None:
    config = replace(config, output=str(tmp_path / "report.json"))
    killed = _InProcess(killed_before_block=2)
    with pytest.raises(_Killed):
        run_benchmark(config, killed)
    rest = _InProcess()
    report = run_benchmark(config, rest)
    assert len(killed.asked) == 8
    assert sorted(killed.asked + rest.asked) == sorted(
        f"v{video}_{number} {protocol}"
        for video in range(5)
        for number in range(2)
        for protocol in ("paper", "without_video")
    )
    assert sorted(path.name for path in tmp_path.iterdir()) == ["report.answers.parquet", "report.html", "report.json"]
    paper, blind = report["protocols"]["paper"], report["protocols"]["without_video"]
    assert (paper["num_missing_videos"], paper["num_missing"], paper["num_questions"]) == (1, 2, 8)
    assert blind["num_missing"] == 0
    rows = pq.read_table(tmp_path / "report.answers.parquet").to_pylist()
    assert len(rows) == 20
    assert [row["question_id"] for row in rows[:4]] == ["v0_0", "v0_1", "v0_0", "v0_1"], "by clip, then protocol"


def test_a_second_evaluation_with_the_same_output_is_refused(config: EvaluateConfig, tmp_path: Path) -> None:
    config = replace(config, output=str(tmp_path / "report.json"))

    def meanwhile(blocks: Sequence[Sequence[BenchmarkTask]], of: EvaluateConfig) -> Iterator[list[BenchmarkAnswer]]:
        with pytest.raises(LeaseHeldError, match=r"report\.partial is in use by jobs/evaluate\.py"):
            run_benchmark(config, _InProcess())
        yield from _InProcess()(blocks, of)

    assert run_benchmark(config, meanwhile)["protocols"]["paper"]["num_questions"] == 8


def test_answers_of_weights_that_were_exported_again_are_not_taken(config: EvaluateConfig, tmp_path: Path) -> None:
    weights = Path(shutil.copytree(config.weights, tmp_path / "weights"))
    config = replace(config, weights=str(weights), output=str(tmp_path / "out" / "report.json"))
    with pytest.raises(_Killed):
        run_benchmark(config, _InProcess(killed_before_block=2))
    (file,) = weights.glob("*.safetensors")
    os.utime(file, ns=(0, file.stat().st_mtime_ns + 1_000_000))
    again = _InProcess()
    run_benchmark(config, again)
    assert len(again.asked) == 20


def test_answers_are_scored_again_without_weights_features_or_annotations(
    config: EvaluateConfig, tmp_path: Path
) -> None:
    config = replace(config, output=str(tmp_path / "report.json"))
    with pytest.raises(ValueError, match=r"no answers at .*report\.answers\.parquet; run the evaluation first"):
        rescore(config)
    first = run_benchmark(config, _InProcess())
    assert config.benchmark is not None
    moved = replace(config, weights="gone", benchmark=replace(config.benchmark, folder="gone", num_examples=0))
    assert rescore(moved)["protocols"] == first["protocols"]


def test_a_videos_questions_share_its_prefix_and_answer_as_alone(config: EvaluateConfig) -> None:
    tasks = read_tasks(config)[:2]
    assert [task.question.question_id for task in tasks] == ["v0_0", "v0_1"]
    first, second = _answerer(config).answer(tasks)
    uncached = replace(config, answering=replace(config.answering, prefix_cache_bytes=0))
    alone = [_answerer(uncached).answer([task])[0] for task in tasks]
    assert (first.num_cached_tokens, alone[1].num_cached_tokens) == (0, 0)
    assert second.num_cached_tokens > 0
    assert [first.answer, second.answer] == [answer.answer for answer in alone]
    assert second.option_log_probs == pytest.approx(alone[1].option_log_probs, abs=1e-5)
    assert first.num_frames == 4


def test_a_failing_question_fails_alone(config: EvaluateConfig) -> None:
    tasks = read_tasks(config)[:2]
    broken = replace(tasks[0].question, details={"tempcompass": "no such task"})
    failed, fine = _answerer(config).answer([replace(tasks[0], question=broken), tasks[1]])
    assert (failed.status, fine.status) == ("failed", "ok")
    assert "KeyError" in failed.detail


def test_blocks_never_part_a_clip(config: EvaluateConfig) -> None:
    blocks = blocks_of(read_tasks(config), 3)
    assert [len(block) for block in blocks] == [4] * 5
    assert len(blocks_of(read_tasks(config), 8)) == 3


def test_without_any_video_the_job_fails_after_its_report(config: EvaluateConfig, tmp_path: Path) -> None:
    assert config.benchmark is not None
    benchmark = replace(config.benchmark, media_prefix="elsewhere", protocols=("paper",))
    config = replace(config, output=str(tmp_path / "report.json"), benchmark=benchmark)
    with pytest.raises(JobError, match=r"none of 10 questions could be asked; .*store lacks videos/v0\.mp4"):
        run_benchmark(config, _InProcess())
    assert json.loads((tmp_path / "report.json").read_text())["protocols"]["paper"]["num_missing_videos"] == 5


def test_a_manifest_lists_clips_that_exist(config: EvaluateConfig, tmp_path: Path) -> None:
    assert config.benchmark is not None
    folder = Path(config.benchmark.folder)
    with pytest.raises(ValueError, match=r"has none of 5 videos, such as videos/v0\.mp4"):
        write_manifest(config, str(tmp_path / "manifest.parquet"))
    (folder / "videos").mkdir()
    (folder / "videos" / "v1.mp4").touch()
    assert write_manifest(config, str(tmp_path / "manifest.parquet")) == (1, [f"videos/v{n}.mp4" for n in (0, 2, 3, 4)])
    (row,) = pq.read_table(tmp_path / "manifest.parquet").to_pylist()
    assert row["media_id"] == media_id_of("videos/v1.mp4", "")


def test_the_report_shows_frames_from_the_first_to_the_last(known: KnownAnswers, tmp_path: Path) -> None:
    media = {media_id_of("videos/v0.mp4", ""): torch.zeros(20, 1, 8).bfloat16()}
    write_store(str(tmp_path / "features"), media, recipe={"synthetic": "frames"})
    write_json(tmp_path / "lvb_val.json", [_row(0, 0)])
    config = EvaluateConfig(
        weights=known.weights,
        feature_store=str(tmp_path / "features"),
        output=str(tmp_path / "report.json"),
        benchmark=BenchmarkConfig(name="longvideobench", folder=str(tmp_path), protocols=("whole",)),
    )
    run_benchmark(config, _InProcess())
    (row,) = pq.read_table(tmp_path / "report.answers.parquet").to_pylist()
    assert row["frame_seconds"] == [0.0, 3.0, 5.0, 8.0, 11.0, 14.0, 16.0, 19.0]
    assert "Expected: A (red (A))" in (tmp_path / "report.html").read_text()


def test_folders_of_frames_become_videos_in_the_manifest(config: EvaluateConfig, tmp_path: Path) -> None:
    folder = make_miniature("mvbench", tmp_path / "mvbench")
    config = replace(config, benchmark=BenchmarkConfig(name="mvbench", folder=folder))
    (clip,) = {q.clip for q in read_benchmark(config) if q.groups["task"] == ("episodic_reasoning",)}
    frames = Path(folder, clip.path)
    frames.mkdir(parents=True)
    for number in range(1, 37):
        Image.new("RGB", (64, 48), (7 * number,) * 3).save(frames / f"{number:05d}.jpg", quality=95)
    assert write_manifest(config, str(tmp_path / "manifest.parquet"))[0] == 1
    (row,) = pq.read_table(tmp_path / "manifest.parquet").to_pylist()
    assert (row["start_seconds"], row["end_seconds"]) == (clip.start_seconds, clip.end_seconds)
    assert row["media_id"] == clip.media_ids("")[0], "features are found by the benchmark's own path"
    reader = open_video(row["uri"], 32)
    batch = reader.sample([Fraction(second) for second in (0, 5, 11)])
    reader.close()
    assert batch.pts_seconds.tolist() == [0.0, 5.0, 11.0]
    assert [round(float(pixels.mean()) / 7) for pixels in batch.frames] == [1, 16, 34], "3 frames per second"

    (frames / "00007.jpg").unlink()
    Path(row["uri"]).unlink()
    with pytest.raises(ValueError, match="lacks frame 7; copy the folder again"):
        write_manifest(config, str(tmp_path / "manifest.parquet"))


def test_the_papers_protocol_repeats_the_last_frame_up_to_a_multiple_of_4(tmp_path: Path) -> None:
    media = {"a": torch.zeros(30, 1, 8).bfloat16(), "b": torch.zeros(300, 1, 8).bfloat16()}
    write_store(str(tmp_path), media, recipe={"synthetic": "protocol"})
    store = FeatureStore.open(str(tmp_path))
    assert protocol_frames(store.info("a"), "paper", max_frames=8) == [*range(30), 29, 29]
    assert protocol_frames(store.info("b"), "paper", max_frames=8) == list(range(256))
    assert len(protocol_frames(store.info("b"), "whole", max_frames=8)) == 8
    assert protocol_frames(store.info("b"), "whole", max_frames=8)[-1] == 299
    clip = protocol_frames(store.info("b"), "paper", max_frames=8, start_seconds=10.0, end_seconds=12.0)
    assert clip == [10, 11, 11, 11]


def test_questions_that_occur_twice_are_refused(config: EvaluateConfig, tmp_path: Path) -> None:
    assert config.benchmark is not None
    rows = json.loads((Path(config.benchmark.folder) / "lvb_val.json").read_text())
    write_json(tmp_path / "lvb_val.json", [rows[0], rows[0]])
    with pytest.raises(ValueError, match=r"question 'v0_0' occurs twice"):
        read_benchmark(replace(config, benchmark=replace(config.benchmark, folder=str(tmp_path))))


@pytest.mark.parametrize("path", sorted((ROOT / "ray_configs" / "eval").glob("*.yaml")), ids=lambda path: path.stem)
def test_shipped_configurations_load(path: Path) -> None:
    config = load_config(EvaluateConfig, path)
    assert config.benchmark is not None
    assert config.benchmark.name == path.stem


def test_questions_or_a_benchmark_are_needed(config: EvaluateConfig) -> None:
    for changes in ({"benchmark": None}, {"questions": "q"}):
        with pytest.raises(ValueError, match="set either `questions` or `benchmark`"):
            replace(config, **changes)  # type: ignore[arg-type]

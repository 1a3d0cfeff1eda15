"""Generates timeviper-synth: a benchmark in the usual format with exact ground truth, for videos of any length.

folder/ test.parquet   videos/{seconds}s-{kind}-00000.mp4   benchmark.json (written last)
"""

from __future__ import annotations

import json
import logging
import os
import shutil
from collections.abc import Iterator
from concurrent.futures import ProcessPoolExecutor
from dataclasses import asdict, dataclass, replace
from multiprocessing import get_context
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq

from timeviper_platform.common import storage
from timeviper_platform.data.synthetic.generated import mark_generated, refuse_other_files
from timeviper_platform.data.synthetic.questions import Question, scene_questions
from timeviper_platform.data.synthetic.render import scene_frames, write_video
from timeviper_platform.data.synthetic.scenes import Scene, SceneKind, draw_scenes

logger = logging.getLogger(__name__)

FINISHED_FILE = "benchmark.json"
QUESTION_SEED = 5

ROWS = pa.schema(
    [
        pa.field("question_id", pa.string()),
        pa.field("video", pa.string()),  # below `videos`
        pa.field("task", pa.string()),  # choice | order | count | grounding | caption
        pa.field("seconds", pa.int32()),  # length of the video
        pa.field("question", pa.string()),
        pa.field("options", pa.list_(pa.string())),  # 'A. red circle'; empty for grounding and captions
        pa.field("answer", pa.string()),  # a letter, or the whole answer
        pa.field("span", pa.list_(pa.float64())),  # grounding: [start, end] in seconds; else null
    ]
)


@dataclass(frozen=True, kw_only=True, slots=True)
class SynthBenchmarkConfig:
    output: str
    """Local folder. A finished benchmark of the same configuration in it is reused, anything else replaced."""
    seconds: tuple[int, ...] = (30, 120, 600, 3600, 10800)
    """Lengths of videos, from 30 seconds to 3 hours."""
    videos_per_kind: int = 20
    """Videos of each length and kind: one picture, four in turn, and one that returns."""
    seed: int = 1
    """Seed of the scenes. Differs from the corpus's, whose scenes a model may have been trained on."""
    fps: int = 2
    """Frame rate of the video files."""
    side: int = 112
    """Width and height in pixels; a multiple of 28, to which many clients resize frames, keeps them as they are."""
    num_workers: int | None = None
    """Processes that draw and encode; null = one per core. Does not change the benchmark."""

    def __post_init__(self) -> None:
        if not self.seconds or min(self.seconds) < 20 or len(set(self.seconds)) < len(self.seconds):
            raise ValueError(f"{self.seconds = } must be different lengths of at least 20 seconds")
        if self.videos_per_kind < 1 or self.fps < 1 or self.side < 48 or self.side % 2:
            raise ValueError(
                f"{self.videos_per_kind = } and {self.fps = } must be at least 1, {self.side = } even and at least 48"
            )


def make_benchmark(config: SynthBenchmarkConfig) -> int:
    """Generates the benchmark, or reuses a finished one; returns the number of questions.

    Raises:
        ValueError: if `output` is not a local path, or holds other files.
    """
    if not storage.is_local(config.output):
        raise ValueError(f"{config.output = } must be a local folder; copy the benchmark where it is needed")
    root = Path(storage.split_uri(config.output)[1])
    identity = {name: value for name, value in asdict(config).items() if name not in ("output", "num_workers")}
    identity["seconds"] = list(config.seconds)
    finished = root / FINISHED_FILE
    if finished.is_file() and (found := json.loads(finished.read_text(encoding="utf-8")))["identity"] == identity:
        return int(found["num_questions"])
    refuse_other_files(root, FINISHED_FILE)
    mark_generated(root, FINISHED_FILE)
    finished.unlink(missing_ok=True)
    shutil.rmtree(root / "videos", ignore_errors=True)
    (root / "videos").mkdir(parents=True)
    scenes = list(_scenes(config))
    with ProcessPoolExecutor(config.num_workers or os.cpu_count(), mp_context=get_context("spawn")) as pool:
        tasks = [pool.submit(_write, scene, str(root / "videos"), config.side, config.fps) for scene in scenes]
        rows = [row for scene in scenes for row in _rows(scene, config.seed)]
        pq.write_table(pa.Table.from_pylist(rows, schema=ROWS), root / "test.parquet")
        for number, task in enumerate(tasks, start=1):
            task.result()
            if number % max(1, len(tasks) // 10) == 0:
                logger.info("timeviper-synth: %d of %d videos", number, len(tasks))
    storage.write_json(str(finished), {"identity": identity, "num_questions": len(rows)})
    return len(rows)


def _scenes(config: SynthBenchmarkConfig) -> Iterator[Scene]:
    counts: dict[SceneKind, int] = dict.fromkeys(("needle", "order", "count"), config.videos_per_kind)
    for seconds in config.seconds:
        for scene in draw_scenes("held_out", counts, duration_seconds=seconds, seed=config.seed * 100_003 + seconds):
            yield replace(scene, media_id=scene.media_id.replace("held-out", f"{seconds}s"))


def _write(scene: Scene, folder: str, side: int, fps: int) -> None:
    path = Path(folder) / f"{scene.media_id}.mp4"
    write_video(path, scene_frames(scene, side=side, fps=fps), side=side, fps=fps)


def _rows(scene: Scene, seed: int) -> Iterator[dict[str, Any]]:
    rng = np.random.default_rng([seed, QUESTION_SEED, *scene.media_id.encode()])
    for number, question in enumerate(scene_questions(scene, rng)):
        yield {
            "question_id": f"{scene.media_id}/{number}",
            "video": f"{scene.media_id}.mp4",
            "task": question.task,
            "seconds": scene.duration_seconds,
            "question": question.text.partition(" Options: ")[0],
            "options": [f"{letter}. {text}" for letter, text in zip("ABCD", question.choices, strict=False)],
            "answer": _answer(question),
            "span": None if question.start_seconds is None else [question.start_seconds, question.end_seconds],
        }


def _answer(question: Question) -> str:
    return "ABCD"[question.choices.index(question.answer)] if question.choices else question.answer

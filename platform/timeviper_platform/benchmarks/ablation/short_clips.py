"""Videos with one appearance of 1 or 2 s, from the frames of a finished demo in a new order.

Nothing is drawn or decoded. A frame's token is the mean of its tokens in the demo. A video takes its background from
one video of the demo and its picture from any; training and held-out frames stay separate.
"""

from __future__ import annotations

import json
import logging
import shutil
from collections.abc import Iterator, Mapping
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import torch
from torch import Tensor

from timeviper_platform.common import schemas, storage
from timeviper_platform.data.store.commits import write_table
from timeviper_platform.data.store.reader import FeatureStore
from timeviper_platform.data.store.writer import write_store
from timeviper_platform.data.synthetic.backgrounds import Split
from timeviper_platform.data.synthetic.generated import mark_generated, refuse_other_files
from timeviper_platform.data.synthetic.questions import conversations, question_row, sample_row, scene_questions
from timeviper_platform.data.synthetic.scenes import Scene, draw_scenes

logger = logging.getLogger(__name__)

FINISHED_FILE = "short-clips.json"
TASKS = ("choice", "grounding")
NEEDLE_SECONDS = (1, 2)
FRAME_SEED, QUESTION_SEED = 1, 2
"""Separate random streams."""


@dataclass(frozen=True, kw_only=True, slots=True)
class ShortClipsConfig:
    num_train: int = 2000
    num_held_out: int = 160
    seconds: int = 30
    """Length of a video, in frames and vision tokens too."""
    seed: int = 0


@dataclass(frozen=True, kw_only=True, slots=True)
class ShortClips:
    folder: Path

    @property
    def features(self) -> str:
        return str(self.folder / "features")

    @property
    def samples(self) -> str:
        return str(self.folder / "samples.parquet")

    @property
    def questions(self) -> str:
        """Folder of a QUESTIONS file per task."""
        return str(self.folder / "held_out")


def make_short_clips(folder: Path, demo: Path, config: ShortClipsConfig) -> ShortClips:
    """Generates the corpus, or reuses a finished one.

    Raises:
        ValueError: if `demo` has no features, or not of every picture; if `folder` holds other files.
    """
    truth_file = demo / "corpus" / "truth.parquet"
    if not truth_file.is_file():
        raise ValueError(f"{demo} is not the folder of a demo: it has no corpus/truth.parquet; run `timeviper demo`")
    store, corpus = FeatureStore.open(str(demo / "features")), ShortClips(folder=folder)
    identity = {**asdict(config), "demo": store.index_digest()}
    finished = folder / FINISHED_FILE
    if finished.is_file() and json.loads(finished.read_text(encoding="utf-8")) == identity:
        return corpus
    refuse_other_files(folder, FINISHED_FILE)
    shutil.rmtree(folder, ignore_errors=True)
    mark_generated(folder, FINISHED_FILE)
    truth = pq.read_table(truth_file).to_pylist()
    counts: dict[Split, int] = {"train": config.num_train, "held_out": config.num_held_out}
    scenes = {split: list(_scenes(config, split, count)) for split, count in counts.items()}
    media: dict[str, Tensor] = {}
    for split in scenes:
        frames = _read_frames(store, [video for video in truth if video["split"] == split])
        media |= {scene.media_id: _features(scene, frames, config.seed) for scene in scenes[split]}
    write_store(corpus.features, media, recipe=_recipe(store))
    _write_text(corpus, scenes, config.seed)
    storage.write_json(str(finished), identity)
    logger.info("short clips: %d videos of %d s in %s", len(media), config.seconds, folder)
    return corpus


def _scenes(config: ShortClipsConfig, split: Split, count: int) -> Iterator[Scene]:
    return draw_scenes(
        split,
        {"needle": count},
        duration_seconds=config.seconds,
        seed=config.seed,
        needle_seconds=NEEDLE_SECONDS,
    )


@dataclass(frozen=True, kw_only=True, slots=True)
class _Frames:
    backgrounds: list[Tensor]
    """(F, D) per video."""
    pictures: Mapping[str, Tensor]
    """(F, D) per picture."""


def _read_frames(store: FeatureStore, videos: list[dict[str, Any]]) -> _Frames:
    backgrounds, pictures = [], dict[str, list[Tensor]]()
    for video in videos:
        tokens_FD = store.read(video["media_id"]).features.float().mean(1)
        times = torch.from_numpy(store.info(video["media_id"]).times_seconds)
        is_free = torch.ones(len(times), dtype=torch.bool)
        for appearance in video["appearances"]:
            shown = (times >= appearance["start_seconds"]) & (times < appearance["end_seconds"])
            pictures.setdefault(appearance["picture"], []).append(tokens_FD[shown])
            is_free &= ~shown
        backgrounds.append(tokens_FD[is_free])
    return _Frames(
        backgrounds=[rows for rows in backgrounds if len(rows)],
        pictures={picture: rows for picture, found in pictures.items() if len(rows := torch.cat(found))},
    )


def _features(scene: Scene, frames: _Frames, seed: int) -> Tensor:
    """(F, 1, D), one frame per second."""
    rng = np.random.default_rng([seed, FRAME_SEED, *scene.media_id.encode()])
    background = frames.backgrounds[int(rng.integers(len(frames.backgrounds)))]
    tokens_FD = background[np.sort(rng.integers(len(background), size=scene.duration_seconds))]
    for appearance in scene.appearances:
        shown = frames.pictures.get(str(appearance.picture))
        if shown is None:
            raise ValueError(f"the demo's {scene.split} videos do not show a {appearance.picture}; run a whole demo")
        count = appearance.end_seconds - appearance.start_seconds
        tokens_FD[appearance.start_seconds : appearance.end_seconds] = shown[rng.integers(len(shown), size=count)]
    return tokens_FD[:, None]


def _recipe(store: FeatureStore) -> dict[str, Any]:
    """The demo's towers, but one token per frame and frames in a new order."""
    merge = {**store.recipe["merge"], "num_tokens_per_frame": 1, "then": "mean of a frame's tokens"}
    return {**store.recipe, "merge": merge, "frames": "in a new order"}


def _write_text(corpus: ShortClips, scenes: Mapping[Split, list[Scene]], seed: int) -> None:
    samples = [
        sample_row(f"{scene.media_id}-{number}", questions, media_id=scene.media_id)
        for scene in scenes["train"]
        for number, questions in enumerate(conversations(scene, _question_rng(scene, seed)))
    ]
    write_table(corpus.samples, pa.Table.from_pylist(samples, schema=schemas.SAMPLES))
    for task in TASKS:
        rows = [row for scene in scenes["held_out"] for row in _question_rows(scene, task, seed)]
        Path(corpus.questions).mkdir(exist_ok=True)
        table = pa.Table.from_pylist(rows, schema=schemas.QUESTIONS)
        write_table(str(Path(corpus.questions) / f"{task}.parquet"), table)


def _question_rows(scene: Scene, task: str, seed: int) -> Iterator[dict[str, Any]]:
    for question in scene_questions(scene, _question_rng(scene, seed)):
        if question.task == task:
            yield question_row(f"{scene.media_id}-{task}", question, media_id=scene.media_id)


def _question_rng(scene: Scene, seed: int) -> np.random.Generator:
    return np.random.default_rng([seed, QUESTION_SEED, *scene.media_id.encode()])

"""Training data without media: the demo's samples with random features, and long films in the sizes of the paper."""

from __future__ import annotations

import sys
from collections.abc import Mapping
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import pyarrow as pa
import torch

from timeviper_model.config import TINY, VisionConfig
from timeviper_model.timeviper import TimeViper
from timeviper_model.weights.weights_folder import load_tokenizer, save_pretrained
from timeviper_platform.common import schemas
from timeviper_platform.data.store.commits import write_table
from timeviper_platform.data.store.writer import write_store
from timeviper_platform.data.synthetic.corpus import CorpusConfig, SceneCounts, image_id, training_samples
from timeviper_platform.data.synthetic.questions import Question, sample_row
from timeviper_platform.data.synthetic.scenes import draw_scenes
from timeviper_platform.data.synthetic.tokenizer import save_tokenizer

DEMO = CorpusConfig(output="")
"""The demo's corpus: 2,000 videos of 24 s, 640 images, 6,000 texts."""
TOY = CorpusConfig(
    output="", train=SceneCounts(needle=12, order=4, count=4), num_images=8, num_language_samples=40, vocab_size=300
)
"""A small one for tests."""


@dataclass(frozen=True, kw_only=True, slots=True)
class SyntheticCorpus:
    folder: Path
    init: Mapping[str, Any]
    """First weights, as a phase's `init`."""

    @property
    def samples(self) -> str:
        return str(self.folder / "samples")

    @property
    def store(self) -> str:
        return str(self.folder / "features")

    @property
    def tokenizer(self) -> str:
        return str(self.folder / "tokenizer")


def make_mixture(folder: Path, config: CorpusConfig) -> SyntheticCorpus:
    """The demo's texts, images and videos as one mixture with random features."""
    corpus = SyntheticCorpus(folder=folder, init={"preset": "tiny"})
    scenes = list(
        draw_scenes("train", config.train.by_kind(), duration_seconds=config.duration_seconds, seed=config.seed)
    )
    tables = training_samples(config, scenes)
    frames = {image_id(number): 1 for number in range(config.num_images)}
    frames |= {scene.media_id: scene.duration_seconds for scene in scenes}
    _write_features(corpus.store, frames, TINY.vision)
    for name, rows in tables.items():
        _write_samples(corpus, name, rows)
    _write_tokenizer(corpus, [row for rows in tables.values() for row in rows], config.vocab_size)
    return corpus


def make_films(folder: Path, *, num_films: int = 24, num_frames: int = 256, dim: int = 1152) -> SyntheticCorpus:
    """Films with 16 tokens per frame and 256 frames per sample, 9 MB each, and a tiny model of that width."""
    corpus = SyntheticCorpus(folder=folder, init={"weights": str(folder / "weights")})
    vision = replace(TINY.vision, num_tokens_per_frame=16, hidden_size=dim)
    names = [f"film-{number:04d}" for number in range(num_films)]
    _write_features(corpus.store, dict.fromkeys(names, num_frames), vision)
    question = Question(task="caption", text="Describe the video.", answer="A red circle appears from 3 to 5 seconds.")
    rows = [sample_row(f"{name}-0", [question], media_id=name) for name in names]
    _write_samples(corpus, "films", rows)
    _write_tokenizer(corpus, rows, 300)
    model = TimeViper(replace(TINY, vision=vision))
    model.init_weights(torch.Generator().manual_seed(0))
    save_pretrained(model, folder / "weights", tokenizer=load_tokenizer(corpus.tokenizer))
    return corpus


def run_values(corpus: SyntheticCorpus, phase: Mapping[str, Any], **changes: Any) -> dict[str, Any]:
    """Configuration of a run as YAML values: one phase named `train`; changes by top-level key."""
    return {
        "name": "benchmark",
        "runs": str(corpus.folder / "runs"),
        "feature_store": corpus.store,
        "tokenizer": corpus.tokenizer,
        "phases": {
            "train": {
                "init": dict(corpus.init),
                "samples": [{"uri": corpus.samples}],
                "trainable": [{"match": ".*", "lr": 1.0e-3}],
                "packing": {"max_tokens": 2400, "max_frames": 480},
                "packs_per_step": 2,
                **phase,
            }
        },
        "checkpoint": {"every_steps": 0},
        **changes,
    }


def training_command(config: Path) -> list[str]:
    """Command that runs `config` in its own process without Ray."""
    return [sys.executable, "-m", "timeviper_platform.training.local", "--config", str(config)]


def _write_features(uri: str, num_frames: Mapping[str, int], vision: VisionConfig) -> None:
    generator = torch.Generator().manual_seed(0)
    shape = (vision.num_tokens_per_frame, vision.hidden_size)
    media = {name: torch.randn(count, *shape, generator=generator).bfloat16() for name, count in num_frames.items()}
    merge = {"num_tokens_per_frame": vision.num_tokens_per_frame, "heads": vision.merge_heads}
    write_store(uri, media, recipe={"encoder": {"layer": vision.layer}, "merge": merge})


def _write_samples(corpus: SyntheticCorpus, name: str, rows: list[dict[str, Any]]) -> None:
    table = pa.Table.from_pylist(rows, schema=schemas.SAMPLES)
    write_table(str(Path(corpus.samples) / f"{name}.parquet"), table)


def _write_tokenizer(corpus: SyntheticCorpus, rows: list[dict[str, Any]], vocab_size: int) -> None:
    texts = [turn["text"] for row in rows for turn in row["conversation"]]
    save_tokenizer(texts, vocab_size, Path(corpus.tokenizer))

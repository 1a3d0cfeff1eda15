"""A synthetic corpus for training tests: samples, a feature store with random features and a tokenizer."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pyarrow as pa
import pyarrow.parquet as pq
import torch

from timeviper_platform.common.config import parse_config
from timeviper_platform.common.schemas import SAMPLES
from timeviper_platform.data.store.writer import write_store
from timeviper_platform.data.synthetic.tokenizer import save_tokenizer
from timeviper_platform.training.config import TrainConfig

DIM = 64
NUM_TOKENS_PER_FRAME = 4
RECIPE = {"encoder": {"layer": -2}, "merge": {"num_tokens_per_frame": NUM_TOKENS_PER_FRAME, "heads": 4}}
QUESTIONS = ("Which picture appears?", "When does it appear, and for how long does it stay?", "What is this?")
ANSWERS = ("red circle (B)", "from 3 to 5 seconds", "a blue square before the mountains, then nothing at all")


@dataclass(frozen=True, kw_only=True)
class Corpus:
    """Paths of its files."""

    folder: Path

    @property
    def samples(self) -> str:
        """SAMPLES file."""
        return str(self.folder / "samples.parquet")

    @property
    def features(self) -> str:
        """Feature store."""
        return str(self.folder / "features")

    @property
    def tokenizer(self) -> str:
        """Tokenizer folder."""
        return str(self.folder / "tokenizer")


def sample_row(
    index: int, media: list[tuple[str, float | None, float | None]], turns: list[tuple[str, str]]
) -> dict[str, Any]:
    """One SAMPLES row."""
    return {
        "sample_id": f"sample-{index:04d}",
        "media": [{"media_id": m, "start_seconds": start, "end_seconds": end} for m, start, end in media],
        "conversation": [{"role": role, "text": text} for role, text in turns],
        "source": "synthetic",
        "weight": 1.0,
    }


def write_samples(path: str | Path, rows: list[dict[str, Any]]) -> None:
    """Writes a SAMPLES file."""
    pq.write_table(pa.Table.from_pylist(rows, schema=SAMPLES), path)


def make_corpus(folder: Path, *, num_samples: int = 24, num_videos: int = 6) -> Corpus:
    """Videos of 3 to 8 frames. Every fourth sample is text alone, every fifth has two turns."""
    corpus = Corpus(folder=folder)
    generator = torch.Generator().manual_seed(5)
    media = {
        f"video-{n}": torch.randn(3 + n % 6, NUM_TOKENS_PER_FRAME, DIM, generator=generator) for n in range(num_videos)
    }
    write_store(corpus.features, media, recipe=RECIPE)
    rows = []
    for index in range(num_samples):
        turns = [("user", QUESTIONS[index % 3]), ("assistant", ANSWERS[index % 3])]
        if index % 5 == 4:
            turns += [("user", QUESTIONS[(index + 1) % 3]), ("assistant", ANSWERS[(index + 1) % 3])]
        rows.append(sample_row(index, [] if index % 4 == 3 else [(f"video-{index % num_videos}", None, None)], turns))
    write_samples(corpus.samples, rows)
    save_tokenizer([*QUESTIONS, *ANSWERS], 280, folder / "tokenizer")
    return corpus


def write_validation_samples(corpus: Corpus) -> str:
    """Writes five short samples that are not trained on; returns their file."""
    turns = [("user", "What is this?"), ("assistant", "a blue square")]
    path = corpus.folder / "held-out.parquet"
    write_samples(path, [sample_row(n, [(f"video-{n}", None, None)], turns) for n in range(5)])
    return str(path)


def train_values(corpus: Corpus, **changes: Any) -> dict[str, Any]:
    """Configuration values: `align` 3 steps, `instruct` 6 steps; `changes` replace top-level keys."""
    packing = {"max_tokens": 160}
    return {
        "name": "run",
        "runs": str(corpus.folder / "runs"),
        "feature_store": corpus.features,
        "tokenizer": corpus.tokenizer,
        "phases": {
            "align": {
                "init": {"preset": "tiny", "seed": 3},
                "samples": [{"uri": corpus.samples}],
                "trainable": [{"match": r"projector\..*", "lr": 1e-3}],
                "packing": packing,
                "packs_per_step": 2,
                "steps": 3,
                "use_transv": False,
            },
            "instruct": {
                "samples": [{"uri": corpus.samples}],
                "trainable": [
                    {"match": r"(backbone|lm_head|projector)\..*", "lr": 2e-3},
                    {"match": r"transv\..*", "lr": 4e-3},
                ],
                "packing": packing,
                "packs_per_step": 3,
                "steps": 6,
                "frames": {"max_frames": 6},
            },
        },
        "checkpoint": {"every_steps": 2, "keep": 20},
        "metrics": {"tensorboard": False, "curves": False, "log_every_steps": 2},
        **changes,
    }


def train_config(corpus: Corpus, **changes: Any) -> TrainConfig:
    """`train_values` as a TrainConfig."""
    return parse_config(TrainConfig, train_values(corpus, **changes))

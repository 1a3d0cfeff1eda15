"""A tiny model that has learned the answers about four videos, with its folders."""

from __future__ import annotations

from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import pyarrow as pa
import pyarrow.parquet as pq
import torch
from torch import Tensor

from timeviper_model.batching.batch import pack_samples
from timeviper_model.batching.prompt import Turn, build_sample
from timeviper_model.config import TINY
from timeviper_model.timeviper import TimeViper
from timeviper_model.weights.weights_folder import save_pretrained
from timeviper_platform.common import schemas
from timeviper_platform.data.store.writer import write_store
from timeviper_platform.data.synthetic.tokenizer import train_tokenizer

WHICH, WHEN = "Which picture?", "When?"
NAMES = ("red (A)", "blue (B)", "green (C)", "white (D)")
SPANS = ((0, 2), (2, 3), (1, 4), (3, 4))


@dataclass(frozen=True, kw_only=True, slots=True)
class KnownAnswers:
    """Folders that evaluation reads."""

    weights: str
    feature_store: str
    questions: str


def make_known_answers(folder: Path) -> KnownAnswers:
    """Writes weights, features of four videos, and a `choice` and a `grounding` file that the model answers right."""
    media = {f"video-{n}": _features(n) for n in range(4)}
    tokenizer = train_tokenizer([WHICH, WHEN, *NAMES, *(span_answer(n) for n in range(4))] * 5, 320)
    model = _learn(tokenizer, media)
    known = KnownAnswers(
        weights=str(folder / "weights"), feature_store=str(folder / "features"), questions=str(folder / "held_out")
    )
    save_pretrained(model, known.weights, tokenizer=tokenizer)
    write_store(known.feature_store, media, recipe={"synthetic": "known answers"})
    (folder / "held_out").mkdir()
    write_questions(folder / "held_out" / "choice.parquet", [choice_row(n) for n in range(4)])
    write_questions(folder / "held_out" / "grounding.parquet", [grounding_row(n) for n in range(4)])
    return known


def span_answer(number: int) -> str:
    """The model's answer to WHEN."""
    start, end = SPANS[number]
    return f"From {start} to {end} seconds."


def choice_row(number: int, **changes: Any) -> dict[str, Any]:
    """A QUESTIONS row with four choices."""
    return _row(f"choice-{number}", f"video-{number}", WHICH, NAMES[number], "choice") | changes


def grounding_row(number: int, **changes: Any) -> dict[str, Any]:
    """A QUESTIONS row with an interval."""
    start, end = SPANS[number]
    row = _row(f"grounding-{number}", f"video-{number}", WHEN, span_answer(number), "grounding")
    return row | {"choices": [], "start_seconds": float(start), "end_seconds": float(end)} | changes


def write_questions(path: Path, rows: list[dict[str, Any]]) -> None:
    """A file of the QUESTIONS schema."""
    pq.write_table(pa.Table.from_pylist(rows, schema=schemas.QUESTIONS), path)


def _row(sample_id: str, media_id: str, question: str, answer: str, task: str) -> dict[str, Any]:
    return {
        "sample_id": sample_id,
        "media": [{"media_id": media_id, "start_seconds": None, "end_seconds": None}],
        "question": question,
        "answer": answer,
        "choices": list(NAMES),
        "start_seconds": None,
        "end_seconds": None,
        "source": task,
    }


def _features(number: int) -> Tensor:
    """(4 frames, 1 token, 8): the video's number, one-hot."""
    return torch.nn.functional.one_hot(torch.full((4, 1), number), 8).bfloat16() * 4


def _learn(tokenizer: Any, media: dict[str, Tensor]) -> TimeViper:
    text = replace(
        TINY.text,
        hybrid_override_pattern="M*-",
        vocab_size=320,
        hidden_size=32,
        intermediate_size=64,
        mamba_num_heads=2,
        ssm_state_size=8,
    )
    vision = replace(TINY.vision, num_tokens_per_frame=1, merge_heads=1, hidden_size=8)
    model = TimeViper(replace(TINY, text=text, vision=vision, transv=()))
    model.init_weights(torch.Generator().manual_seed(0))
    pairs = [(n, WHICH, NAMES[n]) for n in range(4)] + [(n, WHEN, span_answer(n)) for n in range(4)]
    samples = [
        build_sample(tokenizer, [Turn(role="user", text=question), Turn(role="assistant", text=answer)], [4])
        for _, question, answer in pairs
    ]
    batch = pack_samples(samples, [media[f"video-{n}"].flatten(0, 1).float() for n, _, _ in pairs])
    optimizer = torch.optim.Adam(model.parameters(), lr=1e-2)
    for _ in range(70):
        output = model(batch)
        optimizer.zero_grad()
        (output.loss_sum / output.num_targets).backward()
        optimizer.step()
    return model.eval()

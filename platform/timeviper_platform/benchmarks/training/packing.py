"""Row group `packing`: share of real tokens in packs, in padded batches, and in batches grouped by length."""

from __future__ import annotations

import tempfile
from pathlib import Path

import numpy as np

from timeviper_model.weights.weights_folder import load_tokenizer
from timeviper_platform.benchmarks.measure import Row
from timeviper_platform.benchmarks.training.synthetic_corpus import DEMO, make_mixture
from timeviper_platform.data.store.reader import FeatureStore
from timeviper_platform.data.synthetic.corpus import CorpusConfig
from timeviper_platform.training.batches.packing import PackingConfig, PackPlan, epoch_order
from timeviper_platform.training.batches.rows import SampleRows, SourceConfig
from timeviper_platform.training.batches.samples import FramesConfig, SampleBuilder
from timeviper_platform.training.batches.sizes import SampleTable, measure_samples

COMMAND = "python jobs/benchmark.py training --only packing"
MEGABATCH = 50
"""Batches sorted together, as in transformers' group_by_length."""


def packing_rows(config: CorpusConfig = DEMO, packing: PackingConfig | None = None) -> list[Row]:
    packing = packing or PackingConfig(max_tokens=2400, max_frames=480)
    table = measure_mixture(config, packing)
    packs = PackPlan(table, packing, seed=0).epoch(0)
    fill = sum(pack.num_tokens for pack in packs) / (len(packs) * packing.max_tokens)
    lengths = table.num_tokens[epoch_order(table.weights, 0, 0)]
    batch_size = max(1, round(len(table) / len(packs)))
    label = f"{len(table)} samples of {lengths.min()} to {lengths.max()} tokens"
    values = [
        (f"fill of packs of {packing.max_tokens} tokens, {label}", fill, ">= 98"),
        (f"fill of padded batches of {batch_size}", padded_fill(lengths, batch_size), None),
        (f"fill of length-grouped batches of {batch_size}", grouped_fill(lengths, batch_size), None),
    ]
    return [Row(name=name, value=100 * value, unit="%", bar=bar, command=COMMAND) for name, value, bar in values]


def measure_mixture(config: CorpusConfig, packing: PackingConfig) -> SampleTable:
    with tempfile.TemporaryDirectory(prefix="timeviper-benchmark-") as folder:
        corpus = make_mixture(Path(folder), config)
        store, tokenizer = FeatureStore.open(corpus.store), load_tokenizer(corpus.tokenizer)
        rows = SampleRows.read([SourceConfig(uri=corpus.samples)])
        builder = SampleBuilder(store, tokenizer, "nemotron", FramesConfig())
        table = measure_samples(rows, builder, max_tokens=packing.max_tokens, max_frames=packing.max_frames)
    return table


def padded_fill(lengths: np.ndarray, batch_size: int) -> float:
    """Tokens over positions when each batch is as wide as its longest sample: [1, 3] and [2, 2] -> 8 / 10."""
    batches = [lengths[start : start + batch_size] for start in range(0, len(lengths), batch_size)]
    return float(lengths.sum() / sum(len(batch) * batch.max() for batch in batches))


def grouped_fill(lengths: np.ndarray, batch_size: int, *, megabatch: int = MEGABATCH) -> float:
    """`padded_fill` after sorting within every `megabatch` batches."""
    size = megabatch * batch_size
    chunks = [np.sort(lengths[start : start + size])[::-1] for start in range(0, len(lengths), size)]
    return padded_fill(np.concatenate(chunks), batch_size)

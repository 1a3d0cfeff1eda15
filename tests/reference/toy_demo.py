"""The folder of a finished demo as far as an ablation reads it: truth, features, tokenizer and random weights."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Any

import pyarrow as pa
import pyarrow.parquet as pq
import torch

from reference.training_corpus import RECIPE
from timeviper_model.config import TINY
from timeviper_model.timeviper import TimeViper
from timeviper_model.weights.weights_folder import load_tokenizer, save_pretrained
from timeviper_platform.data.store.writer import write_store
from timeviper_platform.data.synthetic.corpus import TRUTH
from timeviper_platform.data.synthetic.pictures import ALL_PICTURES, Picture
from timeviper_platform.data.synthetic.tokenizer import save_tokenizer


def make_toy_demo(folder: Path, *, pictures: Sequence[Picture] = ALL_PICTURES) -> Path:
    """Two videos of 6 s per picture, shown in seconds 2 and 3, one for each split.

    Channels of a token: picture (-1 = none), split, video, index in its frame.
    """
    media, truth = {}, []
    for number, picture in enumerate(pictures):
        for split, name in enumerate(("train", "held_out")):
            media_id = f"{name}-{number}"
            features_FND = torch.zeros(6, 4, TINY.vision.hidden_size)
            features_FND[..., 0] = -1
            features_FND[2:4, :, 0] = ALL_PICTURES.index(picture)
            features_FND[..., 1], features_FND[..., 2] = split, number
            features_FND[..., 3] = torch.arange(4)
            media[media_id] = features_FND
            truth.append(_truth(media_id, name, picture))
    write_store(str(folder / "features"), media, recipe=RECIPE)
    tokenizer = folder / "corpus" / "tokenizer"
    tokenizer.mkdir(parents=True)
    pq.write_table(pa.Table.from_pylist(truth, schema=TRUTH), folder / "corpus" / "truth.parquet")
    save_tokenizer(["Which picture appears in the video?", "From 3 to 5 seconds."], 280, tokenizer)
    model = TimeViper(TINY)
    model.init_weights(torch.Generator().manual_seed(0))
    weights = folder / "runs" / "tiny" / "weights" / "instruct"
    weights.parent.mkdir(parents=True)
    save_pretrained(model, weights, tokenizer=load_tokenizer(tokenizer))
    return folder


def _truth(media_id: str, split: str, picture: Picture) -> dict[str, Any]:
    return {
        "media_id": media_id,
        "split": split,
        "kind": "needle",
        "duration_seconds": 6.0,
        "background_segments": [],
        "appearances": [{"picture": str(picture), "start_seconds": 2.0, "end_seconds": 4.0}],
    }

"""Small random weights, a byte tokenizer and matching folders for tests of engine and serving."""

from __future__ import annotations

import json
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import av
import numpy as np
import torch
from tokenizers import Tokenizer, decoders, models, pre_tokenizers
from transformers import PreTrainedTokenizerFast, SiglipVisionConfig, SiglipVisionModel

from timeviper_model.batching.batch import Sample, pack_samples
from timeviper_model.batching.prompt import Turn, build_sample
from timeviper_model.config import TINY, TimeViperConfig
from timeviper_model.inference.prefill import prefill
from timeviper_model.timeviper import TimeViper
from timeviper_model.weights.weights_folder import save_pretrained
from timeviper_platform.data.encode.frame_encoder import FrameEncoder, VisionTowerConfig
from timeviper_platform.data.store.writer import write_store

IMAGE_SIZE = 32

SPECIAL_TOKENS = ["<pad>", *(f"<SPECIAL_{number}>" for number in range(1, 13))]

CONFIG: TimeViperConfig = replace(
    TINY, text=replace(TINY.text, hybrid_override_pattern="M-M*-M*-", hidden_size=64, vocab_size=300), transv=()
)
SITES = TINY.transv[0], replace(TINY.transv[1], layer=6)
CONFIG_WITH_TRANSV: TimeViperConfig = replace(CONFIG, transv=SITES)


def byte_tokenizer() -> Any:
    """One token per byte, after the special tokens of Nemotron's template."""
    letters = sorted(pre_tokenizers.ByteLevel.alphabet())
    vocabulary = {token: number for number, token in enumerate([*SPECIAL_TOKENS, *letters])}
    tokenizer = Tokenizer(models.BPE(vocab=vocabulary, merges=[]))
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    tokenizer.add_special_tokens(SPECIAL_TOKENS)
    return PreTrainedTokenizerFast(tokenizer_object=tokenizer, pad_token="<pad>")


def random_model(
    config: TimeViperConfig = CONFIG_WITH_TRANSV, *, seed: int = 0, dtype: torch.dtype = torch.float64
) -> TimeViper:
    """Weights large enough for answers to vary, and TransV that transfers."""
    model = TimeViper(config)
    generator = torch.Generator().manual_seed(seed)
    model.init_weights(generator)
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            if name.endswith("alpha"):
                parameter.fill_(0.5)
            elif parameter.ndim == 2:
                parameter.mul_(4.0)
    return model.to(dtype).eval()


def prompt(tokenizer: Any, question: str, num_vision_tokens: int = 0) -> Sample:
    """A user's question about a medium of `num_vision_tokens`."""
    media = [num_vision_tokens] if num_vision_tokens else []
    return build_sample(tokenizer, [Turn(role="user", text=question)], media, add_generation_prompt=True)


def generate_alone(
    model: TimeViper, sample: Sample, features: torch.Tensor, *, num_tokens: int, end_ids: frozenset[int]
) -> list[int]:
    """Greedy tokens of one request, by prefill and decode_step: the slow reference."""
    cache = model.new_cache(1, device="cpu", dtype=next(model.parameters()).dtype)
    slot = torch.tensor([0])
    logits = prefill(model, pack_samples([sample], [features]), cache, 0)
    tokens = [int(logits.argmax())]
    while len(tokens) < num_tokens and tokens[-1] not in end_ids:
        tokens.append(int(model.decode_step(torch.tensor(tokens[-1:]), cache, slot)[0].argmax()))
    return tokens


@dataclass(frozen=True)
class ServingFolders:
    """Weights, feature store and encoder that fit one another."""

    weights: str
    store: str
    """Contains `film`, 40 frames at 1 fps."""
    encoder: VisionTowerConfig


def make_serving_folders(root: Path) -> ServingFolders:
    """Random weights, a random encoder, and a store of random features with its recipe."""
    torch.manual_seed(0)
    width = CONFIG.vision.hidden_size
    tower = SiglipVisionConfig(
        hidden_size=width,
        intermediate_size=64,
        num_hidden_layers=2,
        num_attention_heads=4,
        image_size=IMAGE_SIZE,
        patch_size=8,
    )
    SiglipVisionModel(tower).save_pretrained(root / "encoder")
    statistics = {"image_mean": [0.5] * 3, "image_std": [0.5] * 3}
    (root / "encoder" / "preprocessor_config.json").write_text(json.dumps(statistics))
    encoder = VisionTowerConfig(
        model=str(root / "encoder"), num_tokens_per_frame=4, merge_heads=4, encode_batch_frames=4
    )
    write_store(str(root / "store"), {"film": torch.randn(40, 4, width)}, recipe=FrameEncoder(encoder).recipe)
    save_pretrained(random_model(dtype=torch.float32), root / "weights", tokenizer=byte_tokenizer())
    return ServingFolders(str(root / "weights"), str(root / "store"), encoder)


def write_video(path: Path, *, seconds: int = 4, size: int = 64, fps: int = 4) -> Path:
    """An H.264 file whose seconds are grey 20, 60, 100, ..."""
    with av.open(str(path), "w", format="mp4") as container:
        stream = container.add_stream("libx264", rate=fps, options={"crf": "10"})
        stream.width = stream.height = size
        stream.pix_fmt = "yuv420p"
        for number in range(seconds * fps):
            grey = np.full((size, size, 3), (40 * (number // fps) + 20) % 256, dtype=np.uint8)
            container.mux(stream.encode(av.VideoFrame.from_ndarray(grey, format="rgb24")))
        container.mux(stream.encode())
    return path

"""Small TimeViper models and random samples for them."""

from __future__ import annotations

from dataclasses import replace

import torch
from torch import Tensor

from timeviper_model.batching.batch import IGNORE_INDEX, PackedBatch, Sample, TokenKind, pack_samples
from timeviper_model.config import HybridConfig, Qwen2Config, TimeViperConfig, TransVSite, VisionConfig
from timeviper_model.timeviper import TimeViper

VISION_SIZE = 12
VOCAB_SIZE = 40

SMALL = TimeViperConfig(
    text=HybridConfig(
        hybrid_override_pattern="M-*M*-",
        vocab_size=VOCAB_SIZE,
        hidden_size=24,
        intermediate_size=40,
        num_attention_heads=4,
        num_key_value_heads=2,
        head_dim=8,
        mamba_num_heads=4,
        mamba_head_dim=6,
        ssm_state_size=5,
        n_groups=2,
        chunk_size=8,
        initializer_range=0.2,
    ),
    vision=VisionConfig(encoder="none", num_tokens_per_frame=4, hidden_size=VISION_SIZE),
    transv=(TransVSite(layer=1, select="uniform", keep=0.5), TransVSite(layer=4, select="attention", keep=0.25)),
)

SMALL_QWEN = TimeViperConfig(
    text=Qwen2Config(
        vocab_size=VOCAB_SIZE,
        hidden_size=24,
        intermediate_size=40,
        num_hidden_layers=3,
        num_attention_heads=4,
        num_key_value_heads=2,
        rope_theta=100.0,
        initializer_range=0.2,
    ),
    vision=SMALL.vision,
    transv=(TransVSite(layer=1, select="uniform", keep=0.5), TransVSite(layer=2, select="attention", keep=0.25)),
    chat_template="chatml",
)


def make_model(
    config: TimeViperConfig = SMALL, *, seed: int = 0, alpha: float = 0.8, dtype: torch.dtype = torch.float64
) -> TimeViper:
    """A model whose every weight matters: no zero biases, no unit scales, open gates."""
    model = TimeViper(config).to(dtype)
    generator = torch.Generator().manual_seed(seed)
    model.init_weights(generator)
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            if name.endswith("alpha"):
                parameter.fill_(alpha)
            elif parameter.ndim == 1:
                parameter += 0.2 * torch.randn(parameter.shape, generator=generator, dtype=dtype)
    return model


def make_sample(layout: str, *, seed: int = 0) -> Sample:
    """A random sample of the given kinds: `s` system, `v` vision, `i` instruction, `r` response."""
    letters = {"s": TokenKind.SYSTEM, "v": TokenKind.VISION, "i": TokenKind.INSTRUCTION, "r": TokenKind.RESPONSE}
    kinds = [int(letters[letter]) for letter in layout]
    generator = torch.Generator().manual_seed(seed)
    ids = torch.randint(0, VOCAB_SIZE, (len(kinds),), generator=generator).tolist()
    vision = iter(range(len(kinds)))
    targets = [token if kind == TokenKind.RESPONSE else IGNORE_INDEX for token, kind in zip(ids, kinds, strict=True)]
    return Sample(
        input_ids=ids,
        vision_index=[next(vision) if kind == TokenKind.VISION else -1 for kind in kinds],
        token_kind=kinds,
        labels=[*targets[1:], IGNORE_INDEX],
    )


def make_features(sample: Sample, *, seed: int = 0, dtype: torch.dtype = torch.float64) -> Tensor:
    generator = torch.Generator().manual_seed(1000 + seed)
    return torch.randn(sample.num_vision_tokens, VISION_SIZE, generator=generator, dtype=dtype)


def pack(samples: list[Sample], *, dtype: torch.dtype = torch.float64, pad_to: int | None = None) -> PackedBatch:
    """The samples in one pack; features depend only on a sample's ids, so neighbours do not change them."""
    features = [make_features(sample, seed=sum(sample.input_ids), dtype=dtype) for sample in samples]
    return pack_samples(samples, features, pad_to=pad_to)


def first_tokens(sample: Sample, length: int) -> Sample:
    return replace(
        sample,
        input_ids=sample.input_ids[:length],
        vision_index=sample.vision_index[:length],
        token_kind=sample.token_kind[:length],
        labels=sample.labels[:length],
    )

"""Narrow models with the blocks and plan of the paper, all-attention controls, and prompts about random videos."""

from __future__ import annotations

from collections.abc import Iterator

import torch
from torch import Tensor

from timeviper_model.batching.batch import IGNORE_INDEX, Sample, TokenKind
from timeviper_model.config import (
    NEMOTRON_NANO_9B_V2,
    PAPER_PLAN,
    HybridConfig,
    TimeViperConfig,
    TransVSite,
    VisionConfig,
)
from timeviper_model.timeviper import TimeViper

PAPER_PATTERN = NEMOTRON_NANO_9B_V2.hybrid_override_pattern
TOKENS_PER_FRAME = 16
FEATURE_SIZE = 64
VOCAB_SIZE = 1024
NUM_SYSTEM, NUM_QUESTION = 8, 24
"""Text tokens before and after the video."""
FRAMES_PER_BLOCK = 64
"""Frames per block of features."""


def narrow_config(
    width: int, *, plan: tuple[TransVSite, ...] = PAPER_PLAN, pattern: str = PAPER_PATTERN
) -> TimeViperConfig:
    """Proportions of the 9B: MLP 3.5, queries 1, keys 1/4, Mamba 2, B and C 1/4 of the width."""
    text = HybridConfig(
        hybrid_override_pattern=pattern,
        vocab_size=VOCAB_SIZE,
        hidden_size=width,
        intermediate_size=7 * width // 2,
        num_attention_heads=4,
        num_key_value_heads=1,
        head_dim=width // 4,
        mamba_num_heads=8,
        mamba_head_dim=width // 4,
        ssm_state_size=width // 4,
        n_groups=1,
        initializer_range=width**-0.5,  # the 9B's 0.02 would make outputs of narrow models vanish
    )
    vision = VisionConfig(encoder="none", num_tokens_per_frame=TOKENS_PER_FRAME, hidden_size=FEATURE_SIZE)
    return TimeViperConfig(text=text, vision=vision, transv=plan)


def make_model(config: TimeViperConfig) -> TimeViper:
    """A model with random fp32 weights on the CPU and half-open gates."""
    model = TimeViper(config).eval()
    model.init_weights(torch.Generator().manual_seed(0))
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            if name.endswith("alpha"):
                parameter.fill_(0.5)
    return model.requires_grad_(False)


def video_question(num_frames: int, *, seed: int = 0) -> Sample:
    """A system text, a video, and a question that depends on the seed."""
    num_vision = num_frames * TOKENS_PER_FRAME
    question = torch.randint(VOCAB_SIZE, (NUM_QUESTION,), generator=torch.Generator().manual_seed(seed)).tolist()
    kinds = [TokenKind.SYSTEM] * NUM_SYSTEM + [TokenKind.VISION] * num_vision + [TokenKind.INSTRUCTION] * NUM_QUESTION
    return Sample(
        input_ids=[*range(NUM_SYSTEM), *[0] * num_vision, *question],
        vision_index=[*[-1] * NUM_SYSTEM, *range(num_vision), *[-1] * NUM_QUESTION],
        token_kind=[int(kind) for kind in kinds],
        labels=[IGNORE_INDEX] * len(kinds),
    )


def text_prompt(num_tokens: int, *, seed: int = 0) -> Sample:
    ids = torch.randint(VOCAB_SIZE, (num_tokens,), generator=torch.Generator().manual_seed(seed)).tolist()
    kinds = [int(TokenKind.SYSTEM)] * num_tokens
    return Sample(input_ids=ids, vision_index=[-1] * num_tokens, token_kind=kinds, labels=[IGNORE_INDEX] * num_tokens)


def iter_features(num_frames: int) -> Iterator[Tensor]:
    generator = torch.Generator().manual_seed(1)
    for start in range(0, num_frames, FRAMES_PER_BLOCK):
        rows = min(FRAMES_PER_BLOCK, num_frames - start) * TOKENS_PER_FRAME
        yield torch.randn(rows, FEATURE_SIZE, generator=generator)

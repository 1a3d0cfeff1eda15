"""A model with random weights, a byte tokenizer and a one-request-at-a-time generator, for the engine and serving."""

from __future__ import annotations

from dataclasses import replace
from typing import Any

import torch
from tokenizers import Tokenizer, decoders, models, pre_tokenizers
from transformers import PreTrainedTokenizerFast

from timeviper_model.batch import Sample, pack_samples
from timeviper_model.config import TINY, TimeViperConfig
from timeviper_model.prompt import Turn, build_sample
from timeviper_model.timeviper import TimeViper

SPECIAL_TOKENS = ["<pad>", *(f"<SPECIAL_{number}>" for number in range(1, 13))]

CONFIG: TimeViperConfig = replace(
    TINY, text=replace(TINY.text, hybrid_override_pattern="M-M*-M*-", hidden_size=64, vocab_size=300), transv=()
)
SITES = TINY.transv[0], replace(TINY.transv[1], layer=6)
CONFIG_WITH_TRANSV: TimeViperConfig = replace(CONFIG, transv=SITES)


def byte_tokenizer() -> Any:
    """One token a byte, behind the special tokens of Nemotron's prompt."""
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
    """A user's question about a medium of that many tokens."""
    media = [num_vision_tokens] if num_vision_tokens else []
    return build_sample(tokenizer, [Turn(role="user", text=question)], media, add_generation_prompt=True)


def generate_alone(
    model: TimeViper, sample: Sample, features: torch.Tensor, *, num_tokens: int, end_ids: frozenset[int]
) -> list[int]:
    """Greedy tokens of one request in a cache of its own, the plain way."""
    cache = model.new_cache(1, device="cpu", dtype=next(model.parameters()).dtype)
    slot = torch.tensor([0])
    logits = model.prefill(pack_samples([sample], [features]), cache, 0)
    tokens = [int(logits.argmax())]
    while len(tokens) < num_tokens and tokens[-1] not in end_ids:
        tokens.append(int(model.decode_step(torch.tensor(tokens[-1:]), cache, slot)[0].argmax()))
    return tokens

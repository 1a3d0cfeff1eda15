"""Trains a byte-level BPE tokenizer with Nemotron's special tokens: <SPECIAL_n> has id n."""

from __future__ import annotations

from collections.abc import Iterable
from pathlib import Path

from tokenizers import Tokenizer, decoders, models, pre_tokenizers, trainers
from transformers import PreTrainedTokenizerFast

SPECIAL_TOKENS = ("<pad>", "<s>", "</s>", *(f"<SPECIAL_{n}>" for n in range(3, 13)))
"""Indexed by id; <SPECIAL_12> ends a turn."""


def train_tokenizer(texts: Iterable[str], vocab_size: int) -> PreTrainedTokenizerFast:
    """Trains a tokenizer; deterministic.

    Raises:
        ValueError: if `vocab_size` is too small for the special tokens and 256 bytes.
    """
    smallest = len(SPECIAL_TOKENS) + 256
    if vocab_size < smallest:
        raise ValueError(f"{vocab_size = } must be at least {smallest}: special tokens and 256 bytes")
    tokenizer = Tokenizer(models.BPE())
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    trainer = trainers.BpeTrainer(
        vocab_size=vocab_size,
        special_tokens=list(SPECIAL_TOKENS),
        initial_alphabet=sorted(pre_tokenizers.ByteLevel.alphabet()),
        show_progress=False,
    )
    tokenizer.train_from_iterator(texts, trainer)
    return PreTrainedTokenizerFast(
        tokenizer_object=tokenizer,
        pad_token="<pad>",
        bos_token="<s>",
        eos_token="<SPECIAL_12>",
        additional_special_tokens=[t for t in SPECIAL_TOKENS if t not in ("<pad>", "<s>", "<SPECIAL_12>")],
        clean_up_tokenization_spaces=False,
    )


def save_tokenizer(texts: Iterable[str], vocab_size: int, folder: Path) -> None:
    train_tokenizer(texts, vocab_size).save_pretrained(str(folder))

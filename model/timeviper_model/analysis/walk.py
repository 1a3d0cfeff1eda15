"""A run through the blocks with a hand on each of them: the loop that blocking and attention maps share.

Turns a pack into the stream behind the last block, TransV included, and that stream into what a score needs. Knows
the model's own steps and their order; not what is done at a block.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import NamedTuple

import torch
from torch import Tensor
from torch.nn import functional as F

from timeviper_model.batching.batch import PackedBatch
from timeviper_model.layers.backbone import DecoderBlock
from timeviper_model.layers.transv import TokenStream
from timeviper_model.timeviper import TimeViper

RunBlock = Callable[[int, DecoderBlock, TokenStream], Tensor]
"""(layer, block, stream before it) -> hidden states (T, D) behind it"""


class LabelledLogits(NamedTuple):
    """What the model says at the labelled positions of a pack, K of them."""

    logits_KV: Tensor
    """fp32 (float64 for a float64 model)"""
    targets_K: Tensor
    segment_ids_K: Tensor

    @property
    def log_probs_K(self) -> Tensor:
        """The log-probability of each target."""
        return -F.cross_entropy(self.logits_KV, self.targets_K, reduction="none")

    @property
    def loss_sum(self) -> Tensor:
        """Scalar: the sum of cross entropy over the labelled positions."""
        return F.cross_entropy(self.logits_KV, self.targets_K, reduction="sum")


def run_block(layer: int, block: DecoderBlock, stream: TokenStream) -> Tensor:
    """The block as the model runs it."""
    hidden: Tensor = block(stream.hidden_TD, stream.segments)
    return hidden


@torch.no_grad()
def walk(model: TimeViper, batch: PackedBatch, run: RunBlock = run_block) -> TokenStream:
    """The stream behind the last block, each block being run by `run` after the TransV site before it."""
    stream = model._embed(batch)
    for layer in range(model.config.text.num_hidden_layers):
        if layer in model._sites:
            stream = model._site(stream, layer, use_transv=True)
        stream = stream.with_hidden(run(layer, model.backbone.block(layer), stream))
    return stream


@torch.no_grad()
def labelled_logits(model: TimeViper, stream: TokenStream) -> LabelledLogits:
    """Logits of the labelled positions of a stream behind the last block."""
    hidden, targets, segment_ids = model._labelled(stream)
    return LabelledLogits(model.logits(hidden), targets, segment_ids)

"""Row group `training`: forward and backward of a 3 B hybrid on packed and on padded samples.

Loss and gradients are compared with those of separate samples, memory with the estimate of the dry run.
"""

from __future__ import annotations

import logging
from collections.abc import Sequence
from dataclasses import replace

import torch

from timeviper_model.batching.batch import IGNORE_INDEX, PackedBatch, Sample, TokenKind, pack_samples
from timeviper_model.config import NEMOTRON_NANO_9B_V2, PRESETS, TimeViperConfig
from timeviper_model.timeviper import TimeViper
from timeviper_platform.benchmarks.gpu.device import (
    DTYPE,
    Measurement,
    free_memory,
    make_model,
    make_row,
    measure,
    peak_bytes,
)
from timeviper_platform.benchmarks.measure import Row
from timeviper_platform.common.devices import device_name, peak_flops
from timeviper_platform.training.batches.packing import Pack
from timeviper_platform.training.cost.flops import ASSUMED_MFU, training_flops
from timeviper_platform.training.cost.memory import activation_bytes

logger = logging.getLogger(__name__)

HYBRID_3B = replace(
    PRESETS["9b"],
    text=replace(
        NEMOTRON_NANO_9B_V2, hidden_size=2560, intermediate_size=8960, num_attention_heads=24, mamba_num_heads=64
    ),
)
"""Blocks of the 9B at 4/7 of its width: 3.1 B weights, which leave most of a device to activations."""
SHARES = (2, 4, 8, 16, 16)
"""Samples are 1/2, 1/4 ... of a pack; padding to the longest makes 2.5 times as many tokens."""


def training_rows(
    device: torch.device,
    *,
    config: TimeViperConfig = HYBRID_3B,
    num_tokens: tuple[int, ...] = (4096, 16384, 65536),
    repeats: int = 3,
    peak: float | None = None,
) -> list[Row]:
    """Errors of packing, then seconds, MFU and memory by tokens per pack.

    Args:
        config: model, trained completely with activation checkpointing.
        num_tokens: tokens per pack.
        peak: FLOP/s; None = the device's. Unknown devices have no MFU.
    """
    model, words = make_model(config, device)
    model.train().requires_grad_(True)
    model.gradient_checkpointing = True
    peak = peak_flops(device_name(device)) if peak is None else peak
    rows = _error_rows(model, num_tokens[0], device, words)
    for count in num_tokens:
        rows += _rows(model, count, device, words, repeats=repeats, peak=peak)
    return rows


def synthetic_samples(num_tokens: int) -> list[Sample]:
    """Samples that fill a pack of a multiple of 256 tokens, three quarters of each vision."""
    return [_sample(num_tokens // share, number) for number, share in enumerate(SHARES)]


def padded(samples: Sequence[Sample]) -> list[Sample]:
    longest = max(map(len, samples))
    return [_padded(sample, longest - len(sample)) for sample in samples]


def _sample(length: int, seed: int) -> Sample:
    num_vision = length * 3 // 4
    num_answer = (length - num_vision) // 2
    num_question = length - num_vision - num_answer
    ids = torch.randint(1, 1000, (length,), generator=torch.Generator().manual_seed(seed)).tolist()
    targets = [IGNORE_INDEX] * (length - num_answer) + ids[-num_answer:]
    kinds = [TokenKind.SYSTEM, *[TokenKind.VISION] * num_vision]
    kinds += [TokenKind.INSTRUCTION] * (num_question - 1) + [TokenKind.RESPONSE] * num_answer
    return Sample(
        input_ids=[0 if kind == TokenKind.VISION else token for token, kind in zip(ids, kinds, strict=True)],
        vision_index=[-1, *range(num_vision), *[-1] * (length - num_vision - 1)],
        token_kind=[int(kind) for kind in kinds],
        labels=[*targets[1:], IGNORE_INDEX],
    )


def _padded(sample: Sample, num_pads: int) -> Sample:
    return Sample(
        input_ids=[*sample.input_ids, *[0] * num_pads],
        vision_index=[*sample.vision_index, *[-1] * num_pads],
        token_kind=[*sample.token_kind, *[int(TokenKind.RESPONSE)] * num_pads],
        labels=[*sample.labels, *[IGNORE_INDEX] * num_pads],
    )


def _batches(
    samples: Sequence[Sample], config: TimeViperConfig, device: torch.device, *, together: bool
) -> list[PackedBatch]:
    features = [
        torch.randn(sample.num_vision_tokens, config.vision.row_size, generator=torch.Generator().manual_seed(number))
        for number, sample in enumerate(samples)
    ]
    if together:
        return [pack_samples(samples, features).to(device, DTYPE)]
    return [pack_samples([sample], [rows]).to(device, DTYPE) for sample, rows in zip(samples, features, strict=True)]


def _step(model: TimeViper, batches: Sequence[PackedBatch]) -> float:
    model.zero_grad(set_to_none=True)
    losses = []
    for batch in batches:
        loss_sum = model(batch, use_transv=True).loss_sum
        loss_sum.backward()
        losses.append(loss_sum.detach())
    return float(torch.stack(losses).sum())


def _error_rows(model: TimeViper, num_tokens: int, device: torch.device, words: str) -> list[Row]:
    samples = synthetic_samples(num_tokens)
    alone_loss = _step(model, _batches(samples, model.config, device, together=False))
    alone = {name: p.grad.clone() for name, p in model.named_parameters() if p.grad is not None}
    loss = _step(model, _batches(samples, model.config, device, together=True))
    difference, size = torch.zeros((), device=device), torch.zeros((), device=device)
    for name, parameter in model.named_parameters():
        if parameter.grad is not None:
            difference += (parameter.grad.float() - alone[name].float()).square().sum()
            size += alone[name].float().square().sum()
    model.zero_grad(set_to_none=True)
    label = f"{len(samples)} samples packed against one by one, {num_tokens} tokens in bf16 ({words})"
    # bf16 rounds by up to 0.4 %, and blocks may chunk their tokens differently
    return [
        make_row("training", f"loss of {label}: relative error", abs(loss / alone_loss - 1), "", "<= 0.01"),
        make_row("training", f"gradients of {label}: relative error", float((difference / size).sqrt()), "", "<= 0.05"),
    ]


def _rows(
    model: TimeViper, num_tokens: int, device: torch.device, words: str, *, repeats: int, peak: float | None
) -> list[Row]:
    samples, config = synthetic_samples(num_tokens), model.config
    name = f"training on {num_tokens} tokens, {len(samples)} samples {{}} ({words})"
    pack = Pack(
        num_tokens=num_tokens,
        vision_counts=tuple(sample.num_vision_tokens for sample in samples),
        num_targets=sum(label != IGNORE_INDEX for sample in samples for label in sample.labels),
    )
    flops = training_flops(config, pack, use_transv=True, trained_share=1.0)
    rows: list[Row] = []
    seconds: list[float] = []
    for layout, chosen in (("packed", samples), ("padded to the longest", padded(samples))):
        taken = _measured(model, _batches(chosen, config, device, together=True), device, repeats=repeats)
        own = name.format(layout)
        if not isinstance(taken, Measurement):
            rows.append(make_row("training", f"{own}: OUT OF MEMORY, peak memory", taken / 1e9, "GB"))
            continue
        seconds.append(taken.seconds)
        rows.append(make_row("training", f"{own}: median of {taken.num_passes}", taken.seconds, "s"))
        if peak is not None:
            bar = f">= {ASSUMED_MFU}" if layout == "packed" else None
            rows.append(make_row("training", f"{own}: MFU", flops / taken.seconds / peak, "", bar))
        if layout == "packed" and taken.peak_bytes:
            ratio = taken.peak_bytes / _estimated_bytes(model, pack)
            rows.append(make_row("training", f"{own}: peak memory over the dry run's", ratio, "x", "<= 1.2"))
    if len(seconds) == 2:
        ratio = seconds[1] / seconds[0]
        rows.append(
            make_row("training", f"training on {num_tokens} tokens, times faster packed than padded", ratio, "x")
        )
    return rows


def _measured(model: TimeViper, batches: list[PackedBatch], device: torch.device, *, repeats: int) -> Measurement | int:
    """Measurement of a step, or the bytes in use when memory ran out."""
    free_memory(device)
    try:
        return measure(lambda: _step(model, batches), device, repeats=repeats)
    except torch.OutOfMemoryError as error:
        logger.warning("training on %d tokens: %s", len(batches[0].input_ids), str(error).split("\n")[0])
        return peak_bytes(device)
    finally:
        model.zero_grad(set_to_none=True)


def _estimated_bytes(model: TimeViper, pack: Pack) -> float:
    """Parameters, gradients and activations of a single rank without optimizer."""
    states = 2 * sum(parameter.nbytes for parameter in model.parameters())
    return states + activation_bytes(
        model.config, pack, dtype="bfloat16", use_transv=True, activation_checkpointing=True
    )

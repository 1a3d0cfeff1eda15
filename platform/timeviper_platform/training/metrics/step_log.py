"""Builds a step's row of metrics and logs it."""

from __future__ import annotations

import logging
import time
from typing import Any

import torch
import torch.distributed as dist

from timeviper_platform.common.devices import device_name, peak_flops, peak_memory_bytes
from timeviper_platform.common.logs import shown_time
from timeviper_platform.training.batches.step_batches import StepCounts
from timeviper_platform.training.step import StepResult

logger = logging.getLogger(__name__)


class StepLogger:
    """Logs loss, learning rates, step time, throughput, memory and remaining time every few steps."""

    def __init__(
        self, phase: str, num_steps: int, every: int, first_step: int, *, steps_after: float | None = 0.0
    ) -> None:
        """`steps_after` is the work of later phases in steps of this one; None if it is unknown."""
        self._phase, self._num_steps = phase, num_steps
        self._every = every
        self._first_step = first_step
        self._steps_after = steps_after
        self._started = time.perf_counter()

    def log(self, row: dict[str, Any]) -> None:
        step, num_steps = row["step"], self._num_steps
        if step % self._every and step not in (self._first_step + 1, num_steps):
            return
        elapsed = time.perf_counter() - self._started
        left = elapsed / (step - self._first_step) * (num_steps - step + (self._steps_after or 0.0))
        logger.info(
            "%s step %d/%d loss %.4f grad norm %.2f lr %s %.2f s/step %.0f tokens/s%s data wait %.1f %% memory %.1f GB,"
            " %s left%s",
            *(self._phase, step, num_steps, row["loss"], row["grad_norm"], shown_rates(row["lr"])),
            *(row["seconds"], row["tokens_per_second"], f" MFU {row['mfu']:.1%}" if "mfu" in row else ""),
            *(100 * row["data_wait_share"], row["peak_memory_bytes"] / 1e9, shown_time(left)),
            " in this phase" if self._steps_after is None else "",
        )


def shown_rates(rates: dict[str, float]) -> str:
    """Returns `1.00e-03`, or `projector 1.00e-03, transv 4.00e-03` when rules differ."""
    by_rule = {name.removesuffix(" no decay").removesuffix(" decay"): rate for name, rate in rates.items()}
    if len(set(by_rule.values())) == 1:
        return f"{next(iter(by_rule.values())):.2e}"
    return ", ".join(f"{rule} {rate:.2e}" for rule, rate in by_rule.items())


def step_row(
    phase: str,
    counts: StepCounts,
    result: StepResult,
    rates: dict[str, float],
    global_step: int,
    seconds: float,
    waited_s: float,
    num_damaged: int,
    device: torch.device,
) -> dict[str, Any]:
    """Returns a step's metrics, with this rank's times and memory."""
    computed = counts.num_tokens + counts.num_padding_tokens
    flops_per_second = counts.flops / seconds
    peak = peak_flops(device_name(device))
    return {
        "phase": phase,
        "step": counts.step,
        "global_step": global_step,
        "epoch": counts.end.epoch - (counts.end.next_pack == 0),  # epoch of the last pack
        "loss": result.loss,
        "lr": rates,
        "grad_norm": result.grad_norm,
        "num_tokens": counts.num_tokens,
        "num_targets": counts.num_targets,
        "num_samples": counts.num_samples,
        "num_damaged_samples": num_damaged,
        "num_vision_tokens": list(result.num_vision_tokens),
        "tokens_per_second": counts.num_tokens / seconds,
        "padding_share": counts.num_padding_tokens / computed,
        "fill": counts.fill,
        "data_wait_share": waited_s / seconds,
        "seconds": seconds,
        "tflops_per_second": flops_per_second / 1e12,
        "peak_memory_bytes": peak_memory_bytes(device),
    } | ({} if peak is None else {"mfu": flops_per_second / (peak * dist.get_world_size())})

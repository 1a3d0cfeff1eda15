"""Row group `step`: the platform's training steps against a bare loop on the same packs, in turn, in several processes.

The bare loop holds its packs in memory: forward, backward, clipping and torch's AdamW. The platform adds reading,
packing, DeepSpeed, agreement between ranks and metrics. The row is the median over processes, whose memory layouts
shift the ratio by several percent.
"""

from __future__ import annotations

import multiprocessing
import statistics
import tempfile
import time
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any, NamedTuple

import torch

from timeviper_model.weights.weights_folder import load_tokenizer
from timeviper_platform.benchmarks.measure import Row
from timeviper_platform.benchmarks.training.synthetic_corpus import DEMO, make_mixture, run_values
from timeviper_platform.common.config import parse_config
from timeviper_platform.data.store.reader import FeatureStore
from timeviper_platform.data.synthetic.corpus import CorpusConfig
from timeviper_platform.training.batches.packing import PackPosition
from timeviper_platform.training.batches.step_batches import StepBatches
from timeviper_platform.training.config import TrainConfig
from timeviper_platform.training.hooks import RunHooks
from timeviper_platform.training.local import process_group
from timeviper_platform.training.optim.deepspeed_engine import ZeroConfig
from timeviper_platform.training.optim.lr_schedule import learning_rate_factor
from timeviper_platform.training.optim.parameter_groups import freeze_others
from timeviper_platform.training.phase import Phase, first_model, prepare_phase
from timeviper_platform.training.run import run_training

COMMAND = "python jobs/benchmark.py training --only step"

PACK_TOKENS = 8192
"""As in align.yaml."""


def step_rows(
    config: CorpusConfig = DEMO,
    *,
    num_processes: int = 15,
    num_blocks: int = 5,
    steps_per_block: int = 1,
    zero_stage: int = 2,
    run: Callable[[dict[str, Any], int], Pairs] | None = None,
) -> list[Row]:
    """Ratio of the platform to the bare loop, and the time of a bare step."""
    run = run or run_apart
    with tempfile.TemporaryDirectory(prefix="timeviper-benchmark-") as folder:
        corpus = make_mixture(Path(folder), config)
        # one step ahead: a longer queue would be filled during the bare steps
        values = run_values(
            corpus,
            {"steps": (num_blocks + 1) * steps_per_block, "packing": {"max_tokens": PACK_TOKENS}},
            loader={"prefetch_bytes": 1},
            zero={"stage": zero_stage, "bucket_size": 2_000_000},
        )
        pairs = [run({**values, "name": f"run-{index}"}, steps_per_block) for index in range(num_processes)]
    wall = [one.wall_ratio for one in pairs]
    bare_s = statistics.median(block.wall_s for one in pairs for block in one.bare) / steps_per_block
    about = (
        f"two packs of {PACK_TOKENS} tokens, ZeRO-{zero_stage}, {num_processes} processes of {min(wall):.3f} to"
        f" {max(wall):.3f}"
    )
    name = f"the platform's step over a bare loop's, same packs ({about})"
    cpu = statistics.median(one.cpu_ratio for one in pairs)
    return [
        Row(name=name, value=statistics.median(wall), unit="x", bar="<= 1.03", command=COMMAND),
        Row(name="the same in CPU time", value=cpu, unit="x", command=COMMAND),
        Row(name="the bare step", value=1000 * bare_s, unit="ms", bar=">= 100", command=COMMAND),
    ]


def run_apart(values: dict[str, Any], steps_per_block: int) -> Pairs:
    with multiprocessing.get_context("spawn").Pool(1) as pool:
        return pool.apply(_run, (values, steps_per_block))


def _run(values: dict[str, Any], steps_per_block: int) -> Pairs:
    turns = run_in_turn(parse_config(TrainConfig, values), steps_per_block)
    return Pairs(turns.own_blocks, turns.bare_blocks)


def run_in_turn(config: TrainConfig, steps_per_block: int) -> InTurn:
    """Runs `config` with a block of bare steps after each block of its own."""
    torch.set_num_threads(config.workers.threads_per_worker)
    with process_group(use_gpu=False) as device:
        bare = BareLoop(prepare(config), config.zero)
        turns = InTurn(bare, steps_per_block)
        run_training(config, resume_from=None, device=device, hooks=RunHooks(trackers=(turns,)))
    return turns


def prepare(config: TrainConfig) -> Phase:
    (name, phase), *_ = config.phases.items()
    assert phase.init is not None
    store = FeatureStore.open(config.feature_store)
    model = first_model(phase.init, store, config.encoder, config.second_encoder)
    return prepare_phase(config, name, model, store, load_tokenizer(config.tokenizer), rank=0, world_size=1)


class BareLoop:
    """Plain torch in fp32 on packs in memory."""

    def __init__(self, phase: Phase, zero: ZeroConfig) -> None:
        self._phase = phase
        self._zero = zero
        self._steps = [_as_fp32(step) for step in phase.loader.steps(PackPosition(0, 0), 0, phase.num_steps)]
        self.losses: list[float] = []
        freeze_others(phase.model, phase.groups)
        parameters = dict(phase.model.named_parameters())
        self._trained = [parameters[name] for group in phase.groups for name in group.parameter_names]
        self._optimizer = torch.optim.AdamW(
            [
                {"params": [parameters[n] for n in group.parameter_names], "weight_decay": group.weight_decay}
                for group in phase.groups
            ],
            betas=zero.betas,
            eps=zero.eps,
        )

    def run(self, num_steps: int) -> None:
        for _ in range(num_steps):
            self._step(self._steps[len(self.losses)])

    def _step(self, step: StepBatches) -> None:
        phase = self._phase
        factor = learning_rate_factor(step.counts.step, phase.num_steps, phase.config.schedule)
        for own, group in zip(self._optimizer.param_groups, phase.groups, strict=True):
            own["lr"] = group.lr * factor
        total = 0.0
        for item in step.micro_batches:
            loss = phase.model(item.batch, use_transv=phase.config.use_transv).loss_sum / step.counts.num_targets
            loss.backward()
            total += loss.item()
        torch.nn.utils.clip_grad_norm_(self._trained, self._zero.max_grad_norm)
        self._optimizer.step()
        self._optimizer.zero_grad()
        self.losses.append(total)


class Clock(NamedTuple):
    wall_s: float
    cpu_s: float
    """CPU time of all threads of this process."""

    def since(self, before: Clock) -> Clock:
        return Clock(self.wall_s - before.wall_s, self.cpu_s - before.cpu_s)


def read_clock() -> Clock:
    return Clock(time.perf_counter(), time.process_time())


class Pairs(NamedTuple):
    """Times of neighbouring blocks of the two loops, on the same packs."""

    own: Sequence[Clock]
    bare: Sequence[Clock]

    @property
    def wall_ratio(self) -> float:
        return statistics.median(own.wall_s / bare.wall_s for own, bare in zip(self.own, self.bare, strict=True))

    @property
    def cpu_ratio(self) -> float:
        return statistics.median(own.cpu_s / bare.cpu_s for own, bare in zip(self.own, self.bare, strict=True))


class InTurn:
    """A tracker that runs a block of bare steps after each block of platform steps; the first pair is not timed."""

    def __init__(self, bare: BareLoop, steps_per_block: int) -> None:
        self.bare = bare
        self.losses: list[float] = []
        self._steps_per_block = steps_per_block
        self.own_blocks: list[Clock] = []
        self.bare_blocks: list[Clock] = []
        self._started: Clock | None = None

    def log(self, scalars: Mapping[str, float], global_step: int) -> None:
        self.losses += [value for name, value in scalars.items() if name.endswith("/loss")]
        if global_step % self._steps_per_block:
            return
        stopped = read_clock()
        self.bare.run(self._steps_per_block)
        ended = read_clock()
        if self._started is not None:
            self.own_blocks.append(stopped.since(self._started))
            self.bare_blocks.append(ended.since(stopped))
        self._started = ended

    def close(self) -> None:
        """Does nothing."""


def _as_fp32(step: StepBatches) -> Any:
    micro_batches = [item._replace(batch=item.batch.to("cpu", torch.float32)) for item in step.micro_batches]
    return step._replace(micro_batches=micro_batches)

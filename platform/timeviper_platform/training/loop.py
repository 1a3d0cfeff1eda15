"""A run: its phases one after another, on every rank, from wherever the run stands.

    first weights -> steps -> checkpoint -> weights/<phase> -> steps of the next phase -> ... -> report.json

Plain torch and DeepSpeed, one process a rank; torch.distributed is up before `run_training` is called. Does not know
who started the process: local.py and trainer.py do.
"""

from __future__ import annotations

import logging
import time
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch
import torch.distributed as dist

from timeviper_model.backends import set_backend
from timeviper_model.timeviper import TimeViper
from timeviper_model.weights import config_from_dict, load_tokenizer
from timeviper_platform import storage
from timeviper_platform.data.features import FeatureStore
from timeviper_platform.training.checkpoint import (
    MODEL_FILE,
    Checkpoints,
    TrainState,
    load_checkpoint,
    read_state,
)
from timeviper_platform.training.config import TrainConfig
from timeviper_platform.training.export import export_weights
from timeviper_platform.training.feed import StepBatches
from timeviper_platform.training.metrics import MetricsWriter, next_attempt, phase_report, read_metrics
from timeviper_platform.training.phase import Phase, first_model, load_weights, prepare_phase
from timeviper_platform.training.plan import PlanPosition
from timeviper_platform.training.samples import Reject, count_rejects
from timeviper_platform.training.schedule import learning_rate_factor
from timeviper_platform.training.step import StepResult, train_step
from timeviper_platform.training.zero import DTYPES, build_ds_engine, set_groups

logger = logging.getLogger(__name__)

REPORT_FILE = "report.json"
REJECTS_FOLDER = "rejects"
WEIGHTS_FOLDER = "weights"
CHECKPOINTS_FOLDER = "checkpoints"

OnCheckpoint = Callable[[str, dict[str, Any]], None]
"""Called on every rank after a commit, with the checkpoint's URI and the step's row."""


@dataclass(frozen=True, kw_only=True, slots=True)
class RunFolder:
    """Where the parts of a run lie."""

    uri: str

    @classmethod
    def of(cls, config: TrainConfig) -> RunFolder:
        """The run's folder, runs/name."""
        return cls(uri=storage.join_uri(config.runs, config.name))

    @property
    def checkpoints(self) -> str:
        """Resumable state."""
        return storage.join_uri(self.uri, CHECKPOINTS_FOLDER)

    @property
    def report(self) -> str:
        """One entry a finished phase."""
        return storage.join_uri(self.uri, REPORT_FILE)

    def weights(self, phase: str) -> str:
        """The weights folder at the end of a phase."""
        return storage.join_uri(self.uri, WEIGHTS_FOLDER, phase)

    def rejects(self, phase: str) -> str:
        """Samples that a phase leaves out, with reasons."""
        return storage.join_uri(self.uri, REJECTS_FOLDER, f"{phase}.json")


def run_training(
    config: TrainConfig, *, resume_from: str | None, device: torch.device, on_checkpoint: OnCheckpoint | None = None
) -> dict[str, Any]:
    """Runs every phase that is not finished; the report by phase, equal on all ranks.

    Args:
        config: the run.
        resume_from: a committed checkpoint, or None to begin with the first phase's weights.
        device: of this rank.
        on_checkpoint: see OnCheckpoint.

    Raises:
        ValueError: when the configuration and what it names do not fit together.
        RuntimeError: when the loss is not finite, or files cannot be read or written.
    """
    return _Run(config, device, on_checkpoint).phases(resume_from)


class _Run:
    def __init__(self, config: TrainConfig, device: torch.device, on_checkpoint: OnCheckpoint | None) -> None:
        self._config = config
        self._folder = RunFolder.of(config)
        self._device = device
        self._on_checkpoint = on_checkpoint
        self._rank = dist.get_rank()
        self._store = FeatureStore.open(config.feature_store, cache_bytes=config.feed.cache_bytes)
        self._tokenizer = load_tokenizer(config.tokenizer)
        self._checkpoints = Checkpoints(self._folder.checkpoints, keep=config.checkpoint.keep)

    def phases(self, resume_from: str | None) -> dict[str, Any]:
        resumed = None if resume_from is None else read_state(resume_from)
        names = list(self._config.phases)
        if resumed is not None and resumed.phase not in names:
            raise ValueError(f"{resume_from} is in phase {resumed.phase!r}; this configuration has {names}")
        writer = self._open_metrics()
        global_step = 0 if resumed is None else resumed.global_step
        try:
            for name in names if resumed is None else names[names.index(resumed.phase) :]:
                checkpoint = resume_from if resumed is not None and resumed.phase == name else None
                phase = self._prepare(name, checkpoint)
                global_step, newest = self._train(phase, checkpoint, global_step, writer)
                self._finish(phase, newest)
        finally:
            if writer is not None:
                writer.close()
        report: dict[str, Any] = storage.read_json(self._folder.report)
        return report

    def _open_metrics(self) -> MetricsWriter | None:
        if self._rank != 0:
            return None
        attempt = next_attempt(self._folder.uri)
        logger.info("run %s, attempt %d, %d ranks", self._folder.uri, attempt, dist.get_world_size())
        return MetricsWriter(self._folder.uri, attempt, tensorboard=self._config.metrics.tensorboard)

    def _prepare(self, name: str, checkpoint: str | None) -> Phase:
        phase = prepare_phase(
            self._config,
            name,
            self._model(name, checkpoint),
            self._store,
            self._tokenizer,
            rank=self._rank,
            world_size=dist.get_world_size(),
        )
        phase.model.gradient_checkpointing = self._config.activation_checkpointing
        dtype = DTYPES[self._config.precision]
        set_backend(phase.model, self._config.backend, device=self._device, dtype=dtype)
        if self._rank == 0:
            storage.write_json(self._folder.rejects(name), [reject._asdict() for reject in phase.rejects])
        return phase

    def _model(self, name: str, checkpoint: str | None) -> TimeViper:
        """The phase's first weights; from a checkpoint only the sizes, whose values DeepSpeed loads."""
        if checkpoint is not None:
            description = storage.read_json(storage.join_uri(checkpoint, MODEL_FILE))
            return TimeViper(config_from_dict(description["config"], where=checkpoint)).train()
        init = self._config.phases[name].init
        if init is not None:
            return first_model(init, self._store, self._config.encoder)
        names = list(self._config.phases)
        return load_weights(self._folder.weights(names[names.index(name) - 1])).train()

    def _train(
        self, phase: Phase, checkpoint: str | None, global_step: int, writer: MetricsWriter | None
    ) -> tuple[int, str]:
        """Runs the phase's steps; the number of finished steps of all phases, and the phase's last checkpoint."""
        if checkpoint is not None:
            state = read_state(checkpoint)
            _check_plan(phase, state, checkpoint)
            if state.step >= phase.num_steps:
                return global_step, checkpoint
        ds_engine = build_ds_engine(
            phase.model.to(self._device),
            phase.groups,
            self._config.zero,
            precision=self._config.precision,
            num_micro_steps=phase.feed.num_micro_steps,
        )
        step, position, saved = 0, PlanPosition(0, 0), checkpoint
        if checkpoint is not None:
            load_checkpoint(ds_engine, checkpoint, phase.groups)
            step, position = state.step, state.position
            logger.info("phase %s goes on after step %d, from %s", phase.name, step, checkpoint)
        progress = _Progress(phase, self._config.metrics.log_every_steps, step)
        batches_ahead = phase.feed.prefetch(position, step, phase.num_steps, self._config.feed)
        try:
            started = time.perf_counter()
            for batches in batches_ahead:
                waited_s = time.perf_counter() - started
                result, rates = self._step(ds_engine, phase, batches)
                global_step += 1
                seconds = time.perf_counter() - started
                row = _row(phase, batches, result, rates, global_step, seconds, waited_s)
                if writer is not None:
                    writer.write(row)
                    progress.show(row)
                if self._is_due(batches.step, phase.num_steps):
                    saved = self._save(ds_engine, phase, batches, global_step, writer, row)
                started = time.perf_counter()
        finally:
            batches_ahead.close()
            ds_engine.destroy()
        assert saved is not None  # the last step is always saved
        return global_step, saved

    def _step(self, ds_engine: Any, phase: Phase, batches: StepBatches) -> tuple[StepResult, dict[str, float]]:
        factor = learning_rate_factor(batches.step, phase.num_steps, phase.config.schedule)
        set_groups(ds_engine, phase.groups, factor)
        result = train_step(
            ds_engine,
            batches,
            use_transv=phase.config.use_transv,
            device=self._device,
            dtype=DTYPES[self._config.precision],
        )
        return result, {group.name: group.lr * factor for group in phase.groups}

    def _is_due(self, step: int, num_steps: int) -> bool:
        every = self._config.checkpoint.every_steps
        return step == num_steps or (every > 0 and step % every == 0)

    def _save(
        self,
        ds_engine: Any,
        phase: Phase,
        batches: StepBatches,
        global_step: int,
        writer: MetricsWriter | None,
        row: dict[str, Any],
    ) -> str:
        started = time.perf_counter()
        state = TrainState(
            phase=phase.name,
            step=batches.step,
            global_step=global_step,
            position=batches.end,
            plan_hash=phase.plan.hash,
            world_size=dist.get_world_size(),
            zero_stage=self._config.zero.stage,
            precision=self._config.precision,
        )
        if writer is not None:
            writer.flush()
        uri = self._checkpoints.save(ds_engine, state, phase.groups, phase.description)
        logger.info("checkpoint %s committed in %.2f s", uri, time.perf_counter() - started)
        if self._on_checkpoint is not None:
            self._on_checkpoint(uri, row)
        return uri

    def _finish(self, phase: Phase, checkpoint: str) -> None:
        """Weights of the phase and its part of the report, by rank 0; the others wait."""
        if self._rank == 0:
            export_weights(checkpoint, self._folder.weights(phase.name))
            self._write_report(phase.name, phase.rejects)
        dist.barrier()

    def _write_report(self, name: str, rejects: list[Reject]) -> None:
        report = storage.read_json(self._folder.report) if storage.exists(self._folder.report) else {}
        rows = [row for row in read_metrics(self._folder.uri) if row["phase"] == name]
        report[name] = {**phase_report(rows), "rejects": count_rejects(rejects)}
        storage.write_json(self._folder.report, report)


class _Progress:
    """Lines in the log: what is done, how it goes, how long it will take."""

    def __init__(self, phase: Phase, every: int, first_step: int) -> None:
        self._phase = phase
        self._every = every
        self._first_step = first_step
        self._started = time.perf_counter()

    def show(self, row: dict[str, Any]) -> None:
        step, num_steps = row["step"], self._phase.num_steps
        if step % self._every and step not in (self._first_step + 1, num_steps):
            return
        elapsed = time.perf_counter() - self._started
        left = elapsed / (step - self._first_step) * (num_steps - step)
        logger.info(
            "%s step %d/%d loss %.4f lr %.2e grad norm %.2f %.0f tokens/s data wait %.1f %% %.0f s left",
            *(self._phase.name, step, num_steps, row["loss"], max(row["lr"].values()), row["grad_norm"]),
            *(row["tokens_per_second"], 100 * row["data_wait_share"], left),
        )


def _row(
    phase: Phase,
    batches: StepBatches,
    result: StepResult,
    rates: dict[str, float],
    global_step: int,
    seconds: float,
    waited_s: float,
) -> dict[str, Any]:
    computed = batches.num_tokens + batches.num_padding_tokens
    return {
        "phase": phase.name,
        "step": batches.step,
        "global_step": global_step,
        "epoch": batches.end.epoch,
        "loss": result.loss,
        "lr": rates,
        "grad_norm": result.grad_norm,
        "num_tokens": batches.num_tokens,
        "num_targets": batches.num_targets,
        "num_samples": batches.num_samples,
        "num_vision_tokens": list(result.num_vision_tokens),
        "tokens_per_second": batches.num_tokens / seconds,
        "padding_share": batches.num_padding_tokens / computed,
        "fill": batches.fill,
        "data_wait_share": waited_s / seconds,
        "seconds": seconds,
    }


def _check_plan(phase: Phase, state: TrainState, checkpoint: str) -> None:
    if state.plan_hash != phase.plan.hash:
        raise ValueError(
            f"{checkpoint} was training phase {state.phase} on another pack plan ({state.plan_hash[:12]}, now"
            f" {phase.plan.hash[:12]}): seed, samples, weights, packing, frames or the feature store have changed;"
            " put them back, or start a new run from exported weights"
        )

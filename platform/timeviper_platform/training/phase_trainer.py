"""The steps of one phase on one rank, from its first or from a checkpoint to its last, with every way to end before.

    batches read ahead -> all ranks agree -> step -> row -> (snapshot -> a thread writes and commits it) -> ...

Knows when to save and whom to tell. Does not know the other phases, nor who started the process.
"""

from __future__ import annotations

import logging
import time
from dataclasses import replace
from typing import Any, Literal

import torch
import torch.distributed as dist

from timeviper_platform.common.devices import torch_dtype
from timeviper_platform.training.batches.loader import PrefetchSteps, prefetch_in_thread
from timeviper_platform.training.batches.packing import PackPosition
from timeviper_platform.training.batches.step_batches import StepBatches
from timeviper_platform.training.checkpoint.manager import Checkpoints, read_state, restore_checkpoint
from timeviper_platform.training.checkpoint.save_policy import Checkpointer, OnCheckpoint
from timeviper_platform.training.checkpoint.state import StepPlan, TrainState
from timeviper_platform.training.config import TrainConfig
from timeviper_platform.training.distributed import from_rank_0
from timeviper_platform.training.interrupts import FatalTrainingError, Interrupt, InterruptSource, StoppedError
from timeviper_platform.training.metrics.step_log import Progress, step_row
from timeviper_platform.training.metrics.writer import MetricsWriter
from timeviper_platform.training.optim.deepspeed_engine import build_ds_engine, set_groups
from timeviper_platform.training.optim.lr_schedule import learning_rate_factor
from timeviper_platform.training.phase import Phase
from timeviper_platform.training.step import StepResult, agree, strongest_interrupt, train_step
from timeviper_platform.training.validation.async_eval import AsyncEvaluator, EvalTask, StartEval
from timeviper_platform.training.validation.validator import LOSS, look_at_held_out, validation_due
from timeviper_platform.training.watchdog import Watchdog

logger = logging.getLogger(__name__)

LOOK_CHECK_S = 0.2
"""between questions whether a look beside the ranks has ended, once they have nothing else to do"""


class PhaseTrainer:
    """One phase being run.

    Args:
        config: the run.
        phase: made ready.
        checkpoints: of the run.
        writer: of metrics; None on every rank but 0.
        device: of this rank.
        interrupts: what somebody outside wants.
        on_checkpoint: see OnCheckpoint.
        start_eval: at the held-out samples, beside the ranks.
        prefetch: see PrefetchSteps.
    """

    def __init__(
        self,
        config: TrainConfig,
        phase: Phase,
        checkpoints: Checkpoints,
        writer: MetricsWriter | None,
        *,
        device: torch.device,
        interrupts: InterruptSource,
        on_checkpoint: OnCheckpoint | None,
        start_eval: StartEval,
        prefetch: PrefetchSteps = prefetch_in_thread,
    ) -> None:
        self._config = config
        self._phase = phase
        self._checkpoints = checkpoints
        self._writer = writer
        self._device = device
        self._wishes = interrupts
        self._saving = Checkpointer(
            checkpoints,
            max_failed=config.checkpoint.max_failed_saves,
            before_commit=None if writer is None else writer.flush,
            on_checkpoint=on_checkpoint,
        )
        self._prefetch = prefetch
        self._looks = None if writer is None else AsyncEvaluator(start_eval, self._write_look)
        self._row: dict[str, Any] = {}
        """of the last finished step"""
        self._saved_step = 0

    def run(self, checkpoint: str | None, global_step: int) -> tuple[int, str]:
        """Runs the steps that are left; the number of finished steps of all phases, and the phase's last checkpoint.

        Args:
            checkpoint: of this phase, to go on from; None begins with the weights that the model has.
            global_step: finished steps of all phases.

        Raises:
            ValueError: when the checkpoint belongs to another plan, has other steps or trains other parameters.
            FatalTrainingError, StoppedError, RuntimeError: see failures.py.
        """
        state = self._first_state(global_step) if checkpoint is None else self._saved_state(checkpoint)
        lacks_look = checkpoint is not None and self._lacks_look(state)
        if checkpoint is not None and state.step >= self._phase.num_steps and not lacks_look:
            return global_step, checkpoint
        self._want_lost_looks()
        ds_engine = self._ds_engine(checkpoint)
        ahead = self._prefetch(
            self._phase.loader, state.position, state.step, self._phase.num_steps, self._config.loader
        )
        try:
            with Watchdog(self._config.workers.hang_timeout_s) as watchdog:
                if lacks_look:
                    self._look(ds_engine, state, watchdog)
                state = self._steps(ds_engine, ahead, state, watchdog)
            saved = self._saving.finish(lambda: self._save(ds_engine, state)) or checkpoint
            self._wait_for_looks(ds_engine, state)
        except BaseException:
            # no rank is told here: the others may be elsewhere
            written = self._checkpoints.wait_quietly()
            logger.error("the run ends; its newest checkpoint is %s", written or self._checkpoints.newest())
            raise
        finally:
            if self._looks is not None:
                self._looks.close()
            ahead.close()
            ds_engine.destroy()
        assert saved is not None  # the last step is always saved
        return state.global_step, saved

    def _steps(self, ds_engine: Any, ahead: Any, state: TrainState, watchdog: Watchdog) -> TrainState:
        progress = Progress(self._phase.name, self._phase.num_steps, self._config.metrics.log_every_steps, state.step)
        while state.step < self._phase.num_steps:
            started = time.perf_counter()
            watchdog.mark(state.step + 1, "reading")
            batches = next(ahead)
            waited_s = time.perf_counter() - started
            watchdog.mark(state.step + 1, "computing")
            agreement = agree(batches, self._wishes(), device=self._device)
            self._log_damaged(batches)
            self._heed(agreement.interrupt, ds_engine, state)
            self._blow_fuse(state, agreement.num_damaged)
            result, rates = self._step(ds_engine, agreement.batches)
            state = self._after(state, agreement.batches, agreement.num_damaged)
            seconds = time.perf_counter() - started
            counts = state.global_step, seconds, waited_s, agreement.num_damaged
            self._row = step_row(self._phase.name, agreement.batches.counts, result, rates, *counts, self._device)
            watchdog.mark(state.step, "saving")
            if self._is_due(state.step):
                self._save(ds_engine, state)
            else:
                self._write_row(stall_s=0.0)
            progress.show(self._row)
            if self._validation_due(state.step) == "ranks":
                self._look(ds_engine, state, watchdog)
            if self._looks is not None:
                self._looks.advance(self._checkpoints.newest_written)
        return state

    def _heed(self, interrupt: Interrupt, ds_engine: Any, state: TrainState) -> None:
        """Does between two steps or batches what all ranks have agreed that somebody interrupts."""
        if interrupt is Interrupt.NONE:
            return
        if state.step > self._saved_step:
            self._save(ds_engine, state)
        if interrupt is Interrupt.STOP:
            uri = self._saving.finish(lambda: self._save(ds_engine, state)) or self._checkpoints.newest()
            raise StoppedError(
                f"stopped as asked after step {state.step} of phase {state.phase}; start it again to go on from"
                f" {uri or 'the beginning'}"
            )

    def _lacks_look(self, state: TrainState) -> bool:
        """True when the run ended between this state's checkpoint and the look at the held-out samples behind it."""
        writer = self._writer
        return self._validation_due(state.step) == "ranks" and from_rank_0(
            lambda: writer is not None and writer.lacks(LOSS, state.global_step)
        )

    def _validation_due(self, step: int) -> Literal["task", "ranks"] | None:
        return validation_due(self._phase.config.validation, step, self._phase.num_steps)

    def _look(self, ds_engine: Any, state: TrainState, watchdog: Watchdog) -> None:
        """After the step is saved, as a look may take minutes; the ranks show signs of life and hear interrupts."""

        def between() -> None:
            watchdog.mark(state.step, "evaluating")
            self._heed(strongest_interrupt(self._wishes(), device=self._device), ds_engine, state)

        assert self._phase.validator is not None
        figures = look_at_held_out(
            ds_engine,
            ds_engine.module,
            self._phase.validator,
            use_transv=self._phase.config.use_transv,
            device=self._device,
            dtype=torch_dtype(self._config.dtype),
            between=between,
        )
        self._row |= figures
        self._write_look({"phase": state.phase, "step": state.step, "global_step": state.global_step, **figures})

    def _write_look(self, row: dict[str, Any]) -> None:
        shown = ", ".join(f"{name} {row[name]:.4f}" for name in row if name.startswith("validation"))
        logger.info("%s step %d: %s", row["phase"], row["step"], shown)
        if self._writer is not None:
            self._writer.write(row)

    def _want_look(self, state: TrainState) -> None:
        """Beside the training, of the checkpoint that this state is saved as."""
        if self._looks is not None:
            checkpoint = self._checkpoints.uri_of(state)
            self._looks.want(EvalTask(self._config, state.phase, checkpoint, state.step, state.global_step))

    def _want_lost_looks(self) -> None:
        """Those that an earlier attempt did not end, of checkpoints that are still there."""
        if self._looks is None or self._writer is None or self._phase.config.validation is None:
            return
        for uri in self._checkpoints.committed():
            saved = read_state(uri)
            is_own = saved.phase == self._phase.name and self._validation_due(saved.step) == "task"
            if is_own and self._writer.lacks(LOSS, saved.global_step):
                self._want_look(saved)
            self._checkpoints.newest_written = max(self._checkpoints.newest_written, saved.global_step)

    def _wait_for_looks(self, ds_engine: Any, state: TrainState) -> None:
        """Behind the last step; all ranks wait, and hear interrupts, until rank 0 knows of no look that goes on."""
        validation, looks = self._phase.config.validation, self._looks
        if validation is None:
            return
        until = time.monotonic() + validation.max_wait_s
        if looks is not None and looks.advance(self._checkpoints.newest_written):
            logger.info(
                "%s: all steps are done; looks at held-out samples go on, or wait for %s: validation.max_wait_s is %g",
                *(state.phase, validation.resources, validation.max_wait_s),
            )

        def go_on() -> bool:
            return looks is not None and looks.advance(self._checkpoints.newest_written) and time.monotonic() < until

        while from_rank_0(go_on):
            self._heed(strongest_interrupt(self._wishes(), device=self._device), ds_engine, state)
            time.sleep(LOOK_CHECK_S)

    def _first_state(self, global_step: int) -> TrainState:
        return TrainState(
            phase=self._phase.name,
            step=0,
            global_step=global_step,
            position=PackPosition(0, 0),
            plan_hash=self._phase.plan.hash,
            step_plan=StepPlan(
                packs_per_step=self._phase.config.packs_per_step,
                num_steps=self._phase.num_steps,
                num_epochs=self._phase.config.epochs,
                schedule=self._phase.config.schedule,
            ),
            world_size=dist.get_world_size(),
            zero_stage=self._config.zero.stage,
            dtype=self._config.dtype,
        )

    def _saved_state(self, checkpoint: str) -> TrainState:
        """The checkpoint's state as this run, on its own number of ranks, goes on from it."""
        saved = read_state(checkpoint)
        self._saved_step = saved.step
        shape = self._first_state(saved.global_step)
        saved.check_goes_on(shape, source=checkpoint)
        logger.info("phase %s goes on after step %d, from %s", saved.phase, saved.step, checkpoint)
        return replace(shape, step=saved.step, position=saved.position, num_damaged=saved.num_damaged)

    @staticmethod
    def _after(state: TrainState, batches: StepBatches, num_damaged: int) -> TrainState:
        return replace(
            state,
            step=batches.counts.step,
            global_step=state.global_step + 1,
            position=batches.counts.end,
            num_damaged=state.num_damaged + num_damaged,
        )

    def _ds_engine(self, checkpoint: str | None) -> Any:
        config, phase = self._config, self._phase

        def build() -> Any:
            return build_ds_engine(
                phase.model.to(self._device),
                phase.groups,
                config.zero,
                dtype=config.dtype,
                num_micro_steps=phase.loader.num_micro_steps,
            )

        if checkpoint is None:
            return build()
        return restore_checkpoint(
            checkpoint, phase.model, phase.groups, build, zero_stage=config.zero.stage, dtype=config.dtype
        )

    def _step(self, ds_engine: Any, batches: StepBatches) -> tuple[StepResult, dict[str, float]]:
        phase = self._phase
        factor = learning_rate_factor(batches.counts.step, phase.num_steps, phase.config.schedule)
        set_groups(ds_engine, phase.groups, factor)
        result = train_step(
            ds_engine,
            batches,
            use_transv=phase.config.use_transv,
            device=self._device,
            dtype=torch_dtype(self._config.dtype),
        )
        return result, {group.name: group.lr * factor for group in phase.groups}

    def _is_due(self, step: int) -> bool:
        every = self._config.checkpoint.every_steps
        return (
            step == self._phase.num_steps or (every > 0 and step % every == 0) or self._validation_due(step) == "task"
        )

    def _save(self, ds_engine: Any, state: TrainState) -> None:
        """Training stands still until the checkpoint before is finished and this one is in memory."""
        started = time.perf_counter()
        self._saving.settle()
        snapshot = self._checkpoints.snapshot(ds_engine, state, self._phase.groups, self._phase.description)
        self._write_row(stall_s=time.perf_counter() - started)
        self._saving.start(snapshot, self._row)
        self._saved_step = state.step
        if self._validation_due(state.step) == "task":
            self._want_look(state)

    def _write_row(self, *, stall_s: float) -> None:
        self._row |= {"checkpoint_stall_s": stall_s, "num_failed_saves": self._saving.num_failed}
        if self._writer is not None:
            self._writer.write(self._row)

    @staticmethod
    def _log_damaged(batches: StepBatches) -> None:
        for item in batches.damaged:
            logger.warning("step %d: sample %s is left out: %s", batches.counts.step, item.sample_id, item.detail)

    def _blow_fuse(self, state: TrainState, num_damaged: int) -> None:
        total, limit = state.num_damaged + num_damaged, self._config.loader.max_damaged_samples
        if total > limit:
            raise FatalTrainingError(
                f"{total} samples of phase {state.phase} could not be read up to step {state.step + 1},"
                f" loader.max_damaged_samples is {limit}; the log names them: write the damaged files anew with"
                " jobs/preprocess.py, or raise the limit"
            )

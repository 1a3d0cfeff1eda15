"""The training loop of one phase.

prefetched batches -> agree -> train_step -> log -> save in the background -> validate -> ...
"""

from __future__ import annotations

import logging
import time
from dataclasses import replace
from typing import Any

from timeviper_platform.training.batches.loader import Prefetcher
from timeviper_platform.training.batches.packing import PackPosition
from timeviper_platform.training.batches.step_batches import StepBatches
from timeviper_platform.training.checkpoint.commit import DamagedCheckpointError
from timeviper_platform.training.checkpoint.local_files import OpenCheckpoint
from timeviper_platform.training.checkpoint.manager import Checkpoints, read_state, restore_checkpoint
from timeviper_platform.training.checkpoint.reshard import set_masters
from timeviper_platform.training.checkpoint.save_policy import Checkpointer
from timeviper_platform.training.checkpoint.state import StepPlan, TrainState
from timeviper_platform.training.config import TrainConfig
from timeviper_platform.training.distributed import from_rank_0
from timeviper_platform.training.hooks import RunHooks
from timeviper_platform.training.interrupts import FatalTrainingError, Interrupt, StoppedError
from timeviper_platform.training.metrics.step_log import StepLogger, step_row
from timeviper_platform.training.metrics.writer import MetricsWriter
from timeviper_platform.training.optim.deepspeed_engine import build_ds_engine, set_groups
from timeviper_platform.training.optim.lr_schedule import learning_rate_factor
from timeviper_platform.training.phase import Phase
from timeviper_platform.training.step import StepResult, TrainContext, agree, strongest_interrupt, train_step
from timeviper_platform.training.validation.async_eval import AsyncEvaluator, EvalTask
from timeviper_platform.training.validation.validator import LOSS
from timeviper_platform.training.watchdog import Watchdog

logger = logging.getLogger(__name__)

EVAL_POLL_S = 0.2


class PhaseTrainer:
    """Trains one phase on one rank; `writer` is None on every rank but 0."""

    def __init__(
        self,
        config: TrainConfig,
        phase: Phase,
        checkpoints: Checkpoints,
        writer: MetricsWriter | None,
        *,
        context: TrainContext,
        hooks: RunHooks,
    ) -> None:
        self._config = config
        self._phase = phase
        self._checkpoints = checkpoints
        self._writer = writer
        self._context = context
        self._hooks = hooks
        self._checkpointer = Checkpointer(
            checkpoints,
            config.checkpoint,
            snapshot=lambda state: checkpoints.snapshot(self._ds_engine, state, phase.groups, phase.description),
            log=self._log,
            before_commit=None if writer is None else writer.flush,
            on_checkpoint=hooks.on_checkpoint,
        )
        self._evaluator = None if writer is None else AsyncEvaluator(hooks.start_eval, self._log_validation)
        self._saved_step = 0
        self._saved_at = time.monotonic()
        self._row: dict[str, Any] = {}
        """Metrics row of the last finished step."""

    def run(self, checkpoint: OpenCheckpoint | None, global_step: int) -> tuple[int, str]:
        """Runs the remaining steps; returns all finished steps and the phase's last checkpoint.

        Raises:
            ValueError: if the checkpoint has another plan, other steps or other trained parameters.
            FatalTrainingError: if loss or gradients are not finite, or too many samples are damaged.
            StoppedError: after a stop request.
            RuntimeError: if storage or memory fails.
        """
        state = self._initial_state(global_step) if checkpoint is None else self._resumed_state(checkpoint)
        lacks_validation = checkpoint is not None and self._lacks_validation(state)
        if checkpoint is not None and state.step >= self._phase.num_steps and not lacks_validation:
            checkpoint.close()
            return global_step, checkpoint.uri
        self._resubmit_evaluations()
        self._ds_engine: Any = self._build_ds_engine(checkpoint)
        prefetched = self._hooks.prefetch(
            self._phase.loader, state.position, state.step, self._phase.num_steps, self._config.loader
        )
        try:
            with Watchdog(self._config.workers.hang_timeout_s) as self._watchdog:
                if lacks_validation:
                    self._validate(state)
                state = self._train(prefetched, state)
            saved = self._checkpointer.finish() or (None if checkpoint is None else checkpoint.uri)
            self._await_evaluations(state)
        except BaseException:
            # no collective here: the other ranks may be anywhere
            written = self._checkpoints.wait_quietly()
            logger.error("the run ends; its newest checkpoint is %s", written or self._checkpoints.newest())
            raise
        finally:
            if self._evaluator is not None:
                self._evaluator.close()
            prefetched.close()
            self._ds_engine.destroy()
        assert saved is not None  # the last step is always saved
        return state.global_step, saved

    def _train(self, prefetched: Prefetcher[StepBatches], state: TrainState) -> TrainState:
        every = self._config.metrics.log_every_steps
        log = StepLogger(self._phase.name, self._phase.num_steps, every, state.step, steps_after=self._steps_after())
        while state.step < self._phase.num_steps:
            started = time.perf_counter()
            self._watchdog.mark(state.step + 1, "reading")
            batches = next(prefetched)
            waited_s = time.perf_counter() - started

            self._watchdog.mark(state.step + 1, "computing")
            agreed = agree(batches, self._interrupt(), device=self._context.device)
            self._handle(agreed.interrupt, state)
            self._check_damaged(batches, state.num_damaged + agreed.num_damaged)
            result, lrs = self._step(agreed.batches)
            state = state.after_step(batches.counts.end, agreed.num_damaged)
            seconds = time.perf_counter() - started
            measured = state.global_step, seconds, waited_s, agreed.num_damaged
            self._row = step_row(self._phase.name, agreed.batches.counts, result, lrs, *measured, self._context.device)

            self._watchdog.mark(state.step, "saving")
            if self._save_is_due(state.step):
                self._save(state)
            else:
                self._row |= {"checkpoint_stall_s": 0.0, "num_failed_saves": self._checkpointer.num_failed}
                self._log(self._row)
            log.log(self._row)
            if self._validation_due(state.step) == "ranks":
                self._validate(state)
            if self._evaluator is not None:
                self._evaluator.poll(self._checkpoints.newest_written)
        return state

    def _steps_after(self) -> float | None:
        """Returns the later phases' work in steps of this one, by token budgets; None if it depends on epochs."""
        own = self._phase.config
        names = list(self._config.phases)
        later = [self._config.phases[name] for name in names[names.index(self._phase.name) + 1 :]]
        if any(phase.steps is None for phase in later):
            return None
        budget = own.packs_per_step * own.packing.max_tokens
        work = sum((phase.steps or 0) * phase.packs_per_step * phase.packing.max_tokens for phase in later)
        return work / budget

    def _step(self, batches: StepBatches) -> tuple[StepResult, dict[str, float]]:
        phase = self._phase
        factor = learning_rate_factor(batches.counts.step, phase.num_steps, phase.config.schedule)
        set_groups(self._ds_engine, phase.groups, factor)
        result = train_step(self._ds_engine, batches, self._context)
        return result, {group.name: group.lr * factor for group in phase.groups}

    def _interrupt(self) -> Interrupt:
        """Returns the request from outside, or SAVE once checkpoint.interval_minutes have passed."""
        interval_s = 60.0 * self._config.checkpoint.interval_minutes
        is_due = interval_s > 0 and time.monotonic() - self._saved_at >= interval_s
        return max(self._hooks.interrupts(), Interrupt.SAVE if is_due else Interrupt.NONE)

    def _handle(self, interrupt: Interrupt, state: TrainState) -> None:
        """Saves or stops; all ranks must agree on the interrupt."""
        if interrupt is Interrupt.NONE:
            return
        if state.step > self._saved_step:
            self._save(state)
        if interrupt is Interrupt.STOP:
            uri = self._checkpointer.finish() or self._checkpoints.newest()
            raise StoppedError(
                f"stopped on request after step {state.step} of phase {state.phase}; start it again to resume from"
                f" {uri or 'the beginning'}"
            )

    def _check_damaged(self, batches: StepBatches, num_damaged: int) -> None:
        for item in batches.damaged:
            logger.warning("step %d: sample %s is left out: %s", batches.counts.step, item.sample_id, item.detail)
        limit = self._config.loader.max_damaged_samples
        if num_damaged > limit:
            raise FatalTrainingError(
                f"{num_damaged} samples of phase {self._phase.name} could not be read up to step {batches.counts.step},"
                f" loader.max_damaged_samples is {limit}; the log names them: write the damaged files again with"
                " jobs/preprocess.py, or raise the limit"
            )

    def _save_is_due(self, step: int) -> bool:
        every = self._config.checkpoint.every_steps
        is_regular = step == self._phase.num_steps or (every > 0 and step % every == 0)
        return is_regular or self._validation_due(step) == "task"

    def _save(self, state: TrainState) -> None:
        self._checkpointer.save(state, self._row)
        self._saved_step, self._saved_at = state.step, time.monotonic()
        if self._validation_due(state.step) == "task":
            self._submit_evaluation(state)

    def _log(self, row: dict[str, Any]) -> None:
        if self._writer is not None:
            self._writer.write(row)

    def _validation_due(self, step: int) -> str | None:
        return self._phase.config.validation_due(step, self._phase.num_steps)

    def _validate(self, state: TrainState) -> None:
        def before_batch() -> None:
            self._watchdog.mark(state.step, "evaluating")
            self._handle(strongest_interrupt(self._hooks.interrupts(), device=self._context.device), state)

        assert self._phase.validator is not None
        metrics = self._phase.validator.validate(
            self._ds_engine, self._ds_engine.module, self._context, before_batch=before_batch
        )
        self._row |= metrics
        self._log_validation({"phase": state.phase, "step": state.step, "global_step": state.global_step, **metrics})

    def _log_validation(self, row: dict[str, Any]) -> None:
        shown = ", ".join(f"{name} {row[name]:.4f}" for name in row if name.startswith("validation"))
        logger.info("%s step %d: %s", row["phase"], row["step"], shown)
        self._log(row)

    def _lacks_validation(self, state: TrainState) -> bool:
        writer = self._writer
        return self._validation_due(state.step) == "ranks" and from_rank_0(
            lambda: writer is not None and writer.lacks(LOSS, state.global_step)
        )

    def _submit_evaluation(self, state: TrainState) -> None:
        if self._evaluator is not None:
            checkpoint = self._checkpoints.uri_of(state)
            self._evaluator.submit(EvalTask(self._config, state.phase, checkpoint, state.step, state.global_step))

    def _resubmit_evaluations(self) -> None:
        """Queues evaluations that an earlier attempt did not finish."""
        if self._writer is None or self._phase.config.validation is None:
            return
        for uri in self._checkpoints.committed():
            try:
                saved = read_state(uri)
            except DamagedCheckpointError as error:
                logger.warning("not validated: %s", error)
                continue
            is_due = saved.phase == self._phase.name and self._validation_due(saved.step) == "task"
            if is_due and self._writer.lacks(LOSS, saved.global_step):
                self._submit_evaluation(saved)
            self._checkpoints.newest_written = max(self._checkpoints.newest_written, saved.global_step)

    def _await_evaluations(self, state: TrainState) -> None:
        """Waits on all ranks until rank 0 has no evaluation left."""
        validation, evaluator = self._phase.config.validation, self._evaluator
        if validation is None:
            return
        until = time.monotonic() + validation.max_wait_s
        if evaluator is not None and evaluator.poll(self._checkpoints.newest_written):
            logger.info(
                "%s: all steps are done; waiting up to %g s (validation.max_wait_s) for evaluations with resources %s",
                *(state.phase, validation.max_wait_s, validation.resources),
            )

        def is_pending() -> bool:
            is_left = evaluator is not None and evaluator.poll(self._checkpoints.newest_written)
            return is_left and time.monotonic() < until

        while from_rank_0(is_pending):
            self._handle(strongest_interrupt(self._hooks.interrupts(), device=self._context.device), state)
            time.sleep(EVAL_POLL_S)

    def _initial_state(self, global_step: int) -> TrainState:
        phase = self._phase
        return TrainState(
            phase=phase.name,
            step=0,
            global_step=global_step,
            position=PackPosition(0, 0),
            plan_hash=phase.plan.hash,
            step_plan=StepPlan(
                packs_per_step=phase.config.packs_per_step,
                num_steps=phase.num_steps,
                num_epochs=phase.config.epochs,
                schedule=phase.config.schedule,
            ),
            world_size=self._context.world_size,
            zero_stage=self._config.zero.stage,
            dtype=self._config.dtype,
        )

    def _resumed_state(self, checkpoint: OpenCheckpoint) -> TrainState:
        saved = checkpoint.state
        self._saved_step = saved.step
        initial = self._initial_state(saved.global_step)
        saved.check_resumable(initial, source=checkpoint.uri)
        logger.info("phase %s resumes after step %d, from %s", saved.phase, saved.step, checkpoint.uri)
        return replace(initial, step=saved.step, position=saved.position, num_damaged=saved.num_damaged)

    def _build_ds_engine(self, checkpoint: OpenCheckpoint | None) -> Any:
        config, phase = self._config, self._phase

        def build() -> Any:
            return build_ds_engine(
                phase.model.to(self._context.device),
                phase.groups,
                config.zero,
                dtype=config.dtype,
                num_micro_steps=phase.loader.num_micro_steps,
            )

        if checkpoint is None:
            if config.dtype == "float32":
                return build()
            initial = dict(phase.model.named_parameters())  # the engine gives parameters other, rounded tensors
            masters = {name: initial[name].detach() for group in phase.groups for name in group.parameter_names}
            ds_engine = build()
            set_masters(ds_engine, phase.groups, masters)
            return ds_engine
        ds_engine = restore_checkpoint(
            checkpoint, phase.model, phase.groups, build, zero_stage=config.zero.stage, dtype=config.dtype
        )
        checkpoint.close()
        return ds_engine

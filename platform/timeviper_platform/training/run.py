"""A training run on one rank. Does not import Ray.

initial weights -> steps -> checkpoint -> weights/<phase> -> steps of the next phase -> ... -> report.json
"""

from __future__ import annotations

import logging
from dataclasses import dataclass
from typing import Any

import torch
import torch.distributed as dist

from timeviper_model.layers.backends import set_backend
from timeviper_model.timeviper import TimeViper
from timeviper_model.weights.weights_folder import TOKENIZER_FILES, config_from_dict, load_tokenizer
from timeviper_platform.common import storage
from timeviper_platform.common.devices import device_name, torch_dtype
from timeviper_platform.common.machine_cache import local_copy
from timeviper_platform.data.store.reader import FeatureStore
from timeviper_platform.training.batches.samples import Reject
from timeviper_platform.training.batches.sizes import MeasureOnAllRanks, count_rejects
from timeviper_platform.training.checkpoint.export import export_weights
from timeviper_platform.training.checkpoint.initial_weights import InitialWeights, load_weights
from timeviper_platform.training.checkpoint.local_files import OpenCheckpoint, open_for_resume
from timeviper_platform.training.checkpoint.manager import Checkpoints, candidates
from timeviper_platform.training.config import TABLES_FOLDER, TrainConfig
from timeviper_platform.training.distributed import check_shared_folder, from_rank_0
from timeviper_platform.training.hooks import RunHooks
from timeviper_platform.training.metrics.attempt_record import describe_environment, write_attempt
from timeviper_platform.training.metrics.charts import draw_curves
from timeviper_platform.training.metrics.trackers import check_trackers, open_trackers
from timeviper_platform.training.metrics.writer import MetricsWriter, next_attempt, phase_report, read_metrics
from timeviper_platform.training.phase import Phase, adapt, first_model, initial_weights, prepare_phase
from timeviper_platform.training.phase_trainer import PhaseTrainer
from timeviper_platform.training.step import TrainContext

logger = logging.getLogger(__name__)

REPORT_FILE = "report.json"
CURVES_FILE = "curves.svg"
REJECTS_FOLDER = "rejects"
WEIGHTS_FOLDER = "weights"
CHECKPOINTS_FOLDER = "checkpoints"


@dataclass(frozen=True, kw_only=True, slots=True)
class RunFolder:
    uri: str

    @classmethod
    def of(cls, config: TrainConfig) -> RunFolder:
        return cls(uri=storage.join_uri(config.runs, config.name))

    @property
    def checkpoints(self) -> str:
        return storage.join_uri(self.uri, CHECKPOINTS_FOLDER)

    @property
    def report(self) -> str:
        return storage.join_uri(self.uri, REPORT_FILE)

    def weights(self, phase: str) -> str:
        return storage.join_uri(self.uri, WEIGHTS_FOLDER, phase)

    def rejects(self, phase: str) -> str:
        """Samples left out, with reasons."""
        return storage.join_uri(self.uri, REJECTS_FOLDER, f"{phase}.json")


def run_training(
    config: TrainConfig, *, resume_from: str | None, device: torch.device, hooks: RunHooks | None = None
) -> dict[str, Any]:
    """Runs every unfinished phase; returns the report by phase, equal on all ranks.

    Args:
        resume_from: a committed checkpoint, or None for the first phase's initial weights.
        device: this rank's device. torch.distributed must be initialized.

    Raises:
        ValueError: if the inputs do not fit together.
        FatalTrainingError, StoppedError, RuntimeError: see PhaseTrainer.run.
    """
    return _Run(config, device, hooks or RunHooks()).run(resume_from)


class _Run:
    def __init__(self, config: TrainConfig, device: torch.device, hooks: RunHooks) -> None:
        check_trackers(config.metrics.mlflow, config.metrics.wandb)
        self._config = config
        self._folder = RunFolder.of(config)
        self._device = device
        self._dtype = torch_dtype(config.dtype)
        self._hooks = hooks
        self._store = FeatureStore.open(config.feature_store, cache_bytes=config.loader.cache_bytes)
        self._tokenizer = load_tokenizer(local_copy(config.tokenizer, TOKENIZER_FILES))
        self._checkpoints = Checkpoints(self._folder.checkpoints, keep=config.checkpoint.keep)

    def run(self, resume_from: str | None) -> dict[str, Any]:
        check_shared_folder(self._folder.checkpoints)
        saved = None if resume_from is None else self._open(resume_from)
        try:
            return self._run_phases(saved)
        finally:
            if saved is not None:
                saved.close()

    def _open(self, uri: str) -> OpenCheckpoint:
        config = self._config
        saved = open_for_resume(
            lambda: candidates(self._checkpoints, uri), zero_stage=config.zero.stage, dtype=config.dtype
        )
        if saved.state.phase not in config.phases:
            saved.close()
            raise ValueError(
                f"{saved.uri} is in phase {saved.state.phase!r}; this configuration has {list(config.phases)}"
            )
        return saved

    def _run_phases(self, saved: OpenCheckpoint | None) -> dict[str, Any]:
        names = list(self._config.phases)
        global_step = 0 if saved is None else saved.state.global_step
        writer = self._open_metrics()
        try:
            for name in names if saved is None else names[names.index(saved.state.phase) :]:
                checkpoint = saved if saved is not None and saved.state.phase == name else None
                phase = self._prepare(name, checkpoint)
                context = self._context(phase)
                trainer = PhaseTrainer(
                    self._config, phase, self._checkpoints, writer, context=context, hooks=self._hooks
                )
                global_step, newest = trainer.run(checkpoint, global_step)
                self._finish(phase, newest)
        finally:
            if writer is not None:
                writer.close()
        report: dict[str, Any] = storage.read_json(self._folder.report)
        return report

    def _open_metrics(self) -> MetricsWriter | None:
        opened: list[MetricsWriter] = []

        def open_writer() -> None:
            attempt = next_attempt(self._folder.uri)
            logger.info("run %s, attempt %d, %d ranks", self._folder.uri, attempt, dist.get_world_size())
            own = self._config.metrics
            environment = self._hooks.environment or describe_environment()
            ranks = {"num_ranks": dist.get_world_size(), "device": device_name(self._device)}
            write_attempt(self._folder.uri, attempt, self._config, environment | ranks)
            trackers = [*open_trackers(own.mlflow, own.wandb, self._config.name), *self._hooks.trackers]
            opened.append(MetricsWriter(self._folder.uri, attempt, tensorboard=own.tensorboard, trackers=trackers))

        from_rank_0(open_writer)
        return opened[0] if opened else None

    def _context(self, phase: Phase) -> TrainContext:
        return TrainContext(
            device=self._device,
            dtype=self._dtype,
            use_transv=phase.config.use_transv,
            rank=dist.get_rank(),
            world_size=dist.get_world_size(),
        )

    def _prepare(self, name: str, checkpoint: OpenCheckpoint | None) -> Phase:
        phase = prepare_phase(
            self._config,
            name,
            adapt(self._model(name, checkpoint), self._config.phases[name], self._config.seed),
            self._store,
            self._tokenizer,
            rank=dist.get_rank(),
            world_size=dist.get_world_size(),
            measure=MeasureOnAllRanks(storage.join_uri(self._config.runs, TABLES_FOLDER)),
            initial=self._initial(name),
        )
        phase.model.gradient_checkpointing = self._config.activation_checkpointing
        set_backend(phase.model, self._config.backend, device=self._device, dtype=self._dtype)
        rejects = [reject._asdict() for reject in phase.rejects]
        from_rank_0(lambda: storage.write_report(self._folder.rejects(name), rejects))
        return phase

    def _model(self, name: str, checkpoint: OpenCheckpoint | None) -> TimeViper:
        """Omits weights when resuming, as DeepSpeed loads them."""
        if checkpoint is not None:
            return TimeViper(config_from_dict(checkpoint.model["config"], where=checkpoint.uri)).train()
        init = self._config.phases[name].init
        if init is not None:
            return first_model(init, self._store, self._config.encoder, self._config.second_encoder)
        return load_weights(self._weights_before(name)).train()

    def _initial(self, name: str) -> InitialWeights:
        init = self._config.phases[name].init
        return InitialWeights(self._weights_before(name)) if init is None else initial_weights(init)

    def _weights_before(self, name: str) -> str:
        names = list(self._config.phases)
        return self._folder.weights(names[names.index(name) - 1])

    def _finish(self, phase: Phase, checkpoint: str) -> None:

        def write() -> None:
            export_weights(checkpoint, self._folder.weights(phase.name))
            self._write_report(phase.name, phase.rejects)

        from_rank_0(write)

    def _write_report(self, name: str, rejects: list[Reject]) -> None:
        report = storage.read_json(self._folder.report) if storage.exists(self._folder.report) else {}
        all_rows = read_metrics(self._folder.uri)
        rows = [row for row in all_rows if row["phase"] == name]
        counts = count_rejects(rejects)
        if num_damaged := sum(row["num_damaged_samples"] for row in rows):
            counts["damaged_features"] = num_damaged
        report[name] = {**phase_report(rows), "rejects": counts}
        storage.write_report(self._folder.report, report)
        if self._config.metrics.curves:
            picture = draw_curves(all_rows, self._config.name)
            storage.write_bytes(storage.join_uri(self._folder.uri, CURVES_FILE), picture)

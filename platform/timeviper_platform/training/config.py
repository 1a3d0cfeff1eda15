"""Configuration of a training run: a chain of phases."""

from __future__ import annotations

from dataclasses import dataclass, field, replace
from typing import Literal

from timeviper_model.config import PRESETS, TimeViperConfig, TransVSite, with_text
from timeviper_model.layers.backends import Backend
from timeviper_model.layers.lora import LoraConfig
from timeviper_model.weights.weights_folder import load_text_config
from timeviper_platform.common.config import with_absolute_paths
from timeviper_platform.common.devices import Dtype
from timeviper_platform.common.machine_cache import CONFIG_FILES, local_copy
from timeviper_platform.training.batches.loader import LoaderConfig
from timeviper_platform.training.batches.packing import PackingConfig
from timeviper_platform.training.batches.rows import SourceConfig
from timeviper_platform.training.batches.samples import FramesConfig
from timeviper_platform.training.checkpoint.manager import CheckpointConfig
from timeviper_platform.training.metrics.writer import MetricsConfig
from timeviper_platform.training.optim.deepspeed_engine import ZeroConfig
from timeviper_platform.training.optim.lr_schedule import ScheduleConfig
from timeviper_platform.training.optim.parameter_groups import ParameterRule

HANG_TIMEOUT_S = 1800.0
REPORT_S = 300.0
"""Seconds for the watchdog to name the rank that hangs, before torch ends the others."""


@dataclass(frozen=True, kw_only=True, slots=True)
class InitConfig:
    weights: str | None = None
    """URI of a weights folder written by save_pretrained or jobs/export.py. Excludes `backbone`."""
    preset: (
        Literal["tiny", "9b", "tiny-qwen", "qwen2.5-7b", "tiny-pdrop", "9b-pdrop", "tiny-importance", "9b-importance"]
        | None
    ) = None
    """Model sizes. If `weights` are given too, both must match; a dry run then needs no weights."""
    seed: int = 0
    backbone: str | None = None
    """Hugging Face name or URI of a Nemotron-H or Qwen2 language model. Its config.json gives the sizes; a preset
    then adds only vision and TransV."""
    revision: str | None = None
    """Commit, tag or branch of the `backbone`'s Hugging Face name; None = its main branch."""
    chat_template: Literal["paper", "tokenizer"] | None = None
    """Prompt format: the paper's, or the tokenizer's own template without reasoning; None = that of the weights, or the
    paper's."""
    transv: tuple[TransVSite, ...] | None = None
    """TransV sites that replace those of the preset or weights, initialized from attention."""

    def __post_init__(self) -> None:
        if self.weights is None and self.preset is None and self.backbone is None:
            raise ValueError("init needs weights, a preset or a backbone; none is given")
        if self.weights is not None and self.backbone is not None:
            raise ValueError("init.weights brings its own backbone; remove init.backbone")
        if self.revision is not None and self.backbone is None:
            raise ValueError(f"init.revision {self.revision!r} needs init.backbone, which is not given")

    def model_config(self) -> TimeViperConfig:
        """Reads the backbone's config.json if there is one.

        Raises:
            ValueError: if it cannot be read, or the TransV sites do not fit its blocks.
        """
        preset = None if self.preset is None else PRESETS[self.preset]
        if preset is not None and self.transv is not None:
            preset = replace(preset, transv=())
        if self.backbone is not None:
            text = load_text_config(local_copy(self.backbone, CONFIG_FILES), revision=self.revision)
            try:
                preset = with_text(text, preset)
            except ValueError as error:
                raise ValueError(
                    f"init.preset {self.preset!r} does not fit the backbone {self.backbone!r}: {error}; name its sites"
                    " in init.transv"
                ) from error
        if preset is None:
            raise ValueError(f"init.preset is not set; the sizes of {self.weights} are in its config.json")
        return self.changed(preset)

    def changed(self, config: TimeViperConfig) -> TimeViperConfig:
        """Returns `config` with the sites and the chat template of this configuration."""
        if self.transv is not None:
            config = replace(config, transv=self.transv)
        if self.chat_template is None:
            return config
        template = "tokenizer" if self.chat_template == "tokenizer" else with_text(config.text).chat_template
        return replace(config, chat_template=template)


@dataclass(frozen=True, kw_only=True, slots=True)
class ValidationConfig:
    samples: tuple[SourceConfig, ...]
    every_steps: int = 500
    """Steps between validations. The phase's last step is always validated."""
    where: Literal["task", "ranks"] = "task"
    """task: in another process, from a checkpoint. ranks: in the training processes, between two steps. The last step
    is always validated by the ranks.
    """
    resources: dict[str, float] = field(default_factory=lambda: {"CPU": 1.0})
    """Ray resources of the task, which uses a GPU if one is listed."""
    max_wait_s: float = 600.0
    """Maximum seconds to wait for tasks after the last step."""
    num_answers: int = 0
    """Samples answered greedily for `validation_exact_match`. Must be 0 with zero.stage 3."""

    def __post_init__(self) -> None:
        if self.every_steps < 1 or not self.samples:
            raise ValueError(f"validation needs samples, and {self.every_steps = } must be at least 1")
        if self.num_answers < 0:
            raise ValueError(f"validation: {self.num_answers = } must be at least 0 (0 = only the loss)")
        if self.max_wait_s < 0 or any(amount < 0 for amount in self.resources.values()):
            raise ValueError(f"validation: {self.max_wait_s = } and {self.resources = } must not be negative")

    def due(self, step: int, num_steps: int) -> Literal["task", "ranks"] | None:
        if step == num_steps:
            return "ranks"
        return self.where if step > 0 and step % self.every_steps == 0 else None


@dataclass(frozen=True, kw_only=True, slots=True)
class PhaseConfig:
    samples: tuple[SourceConfig, ...]
    trainable: tuple[ParameterRule, ...]
    """Rules for trained parameters; all others are frozen."""
    packing: PackingConfig
    packs_per_step: int
    """Packs per step, over all ranks."""
    steps: int | None = None
    """Number of steps. Exclusive with `epochs`."""
    epochs: int | None = None
    use_transv: bool = True
    frames: FramesConfig = field(default_factory=FramesConfig)
    schedule: ScheduleConfig = field(default_factory=ScheduleConfig)
    init: InitConfig | None = None
    """Initial weights; None continues from the previous phase."""
    validation: ValidationConfig | None = None
    lora: LoraConfig | None = None
    """LoRA adapters, trained by a rule such as `.*\\.lora_[AB]` and merged at the phase's end."""

    def __post_init__(self) -> None:
        if (self.steps is None) == (self.epochs is None):
            raise ValueError(f"a phase needs either steps or epochs: {self.steps = }, {self.epochs = }")
        for name in ("steps", "epochs", "packs_per_step"):
            value = getattr(self, name)
            if value is not None and value < 1:
                raise ValueError(f"{name} = {value} must be at least 1")
        if not self.samples or not self.trainable:
            raise ValueError("a phase needs at least one entry in samples and one in trainable")

    def validation_due(self, step: int, num_steps: int) -> Literal["task", "ranks"] | None:
        return None if self.validation is None else self.validation.due(step, num_steps)


@dataclass(frozen=True, kw_only=True, slots=True)
class WorkersConfig:
    """Worker processes under Ray."""

    num_workers: int | tuple[int, int] = 1
    """Number of workers, or [minimum, maximum] for elastic training."""
    use_gpu: bool = False
    """One GPU per worker, with NCCL."""
    resources_per_worker: dict[str, float] = field(default_factory=lambda: {"CPU": 1.0})
    max_failures: int = 3
    """Maximum restarts from the newest committed checkpoint."""
    preemption_grace_s: float = 60.0
    """Seconds that workers may run past a node's announced removal."""
    hang_timeout_s: float = HANG_TIMEOUT_S
    """Seconds without progress after which a worker ends. Must be more than rank 0 takes to write a phase's weights."""
    threads_per_worker: int = 1
    """torch threads per worker. Losses are bit-identical only for equal numbers."""

    def __post_init__(self) -> None:
        least, most = self.num_workers if isinstance(self.num_workers, tuple) else (self.num_workers, self.num_workers)
        if not 1 <= least <= most:
            raise ValueError(f"workers: {self.num_workers = } must be at least 1, or [minimum, maximum] in this order")
        if self.preemption_grace_s < 0 or self.hang_timeout_s <= 0:
            raise ValueError(
                f"workers: {self.preemption_grace_s = } must be at least 0, and {self.hang_timeout_s = } above 0"
            )

    @property
    def collective_timeout_s(self) -> float:
        """Maximum seconds of a collective. torch's default for NCCL, 10 minutes, is less than rank 0 may take to write
        a phase's weights.
        """
        return max(HANG_TIMEOUT_S, self.hang_timeout_s) + REPORT_S

    @property
    def min_workers(self) -> int:
        return self.num_workers[0] if isinstance(self.num_workers, tuple) else self.num_workers

    @property
    def max_workers(self) -> int:
        return self.num_workers[1] if isinstance(self.num_workers, tuple) else self.num_workers


TABLES_FOLDER = "sample-tables"
"""Cached sample sizes inside `runs`, shared by all runs."""


@dataclass(frozen=True, kw_only=True, slots=True)
class TrainConfig:
    name: str
    """Name of the run's folder inside `runs`."""
    feature_store: str
    tokenizer: str
    """Hugging Face name, or URI of a folder."""
    phases: dict[str, PhaseConfig]
    runs: str = "outputs/runs"
    seed: int = 0
    """Seed of the data order."""
    dtype: Dtype = "float32"
    """Compute dtype; bfloat16 keeps float32 master weights in the optimizer."""
    activation_checkpointing: bool = False
    """Recompute activations in the backward pass."""
    backend: Backend = "auto"
    """Kernels: torch, auto (CUDA kernels if available) or kernels (CUDA kernels required)."""
    encoder: str | None = None
    """Vision encoder of the features (Hugging Face name or folder), recorded for serving."""
    second_encoder: str | None = None
    """Encoder of the second vision tower."""
    zero: ZeroConfig = field(default_factory=ZeroConfig)
    loader: LoaderConfig = field(default_factory=LoaderConfig)
    checkpoint: CheckpointConfig = field(default_factory=CheckpointConfig)
    metrics: MetricsConfig = field(default_factory=MetricsConfig)
    workers: WorkersConfig = field(default_factory=WorkersConfig)

    def __post_init__(self) -> None:
        for name in (self.name, *self.phases):
            if "/" in name or name in ("", ".", ".."):
                raise ValueError(f"{name!r} (`name` and keys of `phases`) must name a folder: no slash, not empty")
        if self.name == TABLES_FOLDER:
            raise ValueError(f"{self.name = } is the folder of a cache inside `runs`; choose another")
        if not self.phases:
            raise ValueError("phases: name at least one")
        first = next(iter(self.phases))
        if self.phases[first].init is None:
            raise ValueError(f"phases.{first}.init: the first phase needs its initial weights")
        answering = [name for name, phase in self.phases.items() if phase.validation and phase.validation.num_answers]
        if answering and self.zero.stage > 2:
            raise ValueError(
                f"phases.{answering[0]}.validation.num_answers: with {self.zero.stage = } no rank holds a whole model"
                " that could answer; choose stage 2 or lower, or num_answers: 0 for the loss alone"
            )


def resolve_paths(config: TrainConfig) -> TrainConfig:
    config = with_absolute_paths(
        config,
        (
            "runs",
            "feature_store",
            "phases.*.samples.*.uri",
            "phases.*.validation.samples.*.uri",
            "phases.*.init.weights",
        ),
    )
    return with_absolute_paths(config, ("tokenizer", "phases.*.init.backbone"), if_exists=True)

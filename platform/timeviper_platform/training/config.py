"""The one YAML of a training run as a tree of frozen dataclasses. Knows keys and what fits together; runs nothing.

A run is a chain of phases. Each says where its first weights come from (None: from the phase before), what it reads,
what it trains and for how long; the optimizer is made anew for every phase.
"""

from __future__ import annotations

from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Literal

from timeviper_model.config import PRESETS, TimeViperConfig, TransVSite
from timeviper_model.layers.backends import Backend
from timeviper_model.layers.lora import LoraConfig
from timeviper_platform.common import storage
from timeviper_platform.common.devices import Dtype
from timeviper_platform.training.batches.loader import LoaderConfig
from timeviper_platform.training.batches.packing import PackingConfig
from timeviper_platform.training.batches.rows import SourceConfig
from timeviper_platform.training.batches.samples import FramesConfig
from timeviper_platform.training.checkpoint.manager import CheckpointConfig
from timeviper_platform.training.metrics.writer import MetricsConfig
from timeviper_platform.training.optim.deepspeed_engine import ZeroConfig
from timeviper_platform.training.optim.lr_schedule import ScheduleConfig
from timeviper_platform.training.optim.parameter_groups import ParameterRule


@dataclass(frozen=True, kw_only=True, slots=True)
class InitConfig:
    """The first weights of a phase: a weights folder, or a preset with seeded values and, if named, a real backbone."""

    weights: str | None = None
    """folder that save_pretrained or jobs/export.py wrote; excludes backbone"""
    preset: Literal["tiny", "9b", "tiny-qwen", "qwen2.5-7b", "tiny-pdrop", "9b-pdrop"] | None = None
    """beside `weights`: the sizes that they must have, which a dry run knows before they are there"""
    seed: int = 0
    backbone: str | None = None
    """Hugging Face name or folder of a language model whose weights replace the preset's random ones"""
    transv: tuple[TransVSite, ...] | None = None
    """replaces the preset's or the weights' TransV sites; in place of the weights' they start anew, from attention"""

    def __post_init__(self) -> None:
        if self.weights is None and self.preset is None:
            raise ValueError("init needs weights or a preset; neither is named")
        if self.weights is not None and self.backbone is not None:
            raise ValueError("init.weights brings its own backbone; leave that key out")

    def model_config(self) -> TimeViperConfig:
        """The preset with this configuration's TransV sites."""
        if self.preset is None:
            raise ValueError(f"the sizes of {self.weights} are in its config.json")
        preset = PRESETS[self.preset]
        return preset if self.transv is None else replace(preset, transv=self.transv)


@dataclass(frozen=True, kw_only=True, slots=True)
class ValidationConfig:
    """Samples that are never trained on: their loss is told beside the training's, and how many are answered."""

    samples: tuple[SourceConfig, ...]
    every_steps: int = 500
    """steps between two looks; also after the phase's last step"""
    where: Literal["task", "ranks"] = "task"
    """task: a process of its own reads the checkpoint that such a step then saves, and the ranks train on; the look
    after the last step is the ranks', who have nothing else to do. ranks: every look is theirs, between two steps"""
    resources: dict[str, float] = field(default_factory=lambda: {"CPU": 1.0})
    """of the task, which Ray finds on any node beside the workers; it computes on a GPU where one is named. Without Ray
    it is a process beside rank 0, on its GPU if one is named"""
    max_wait_s: float = 600.0
    """after the last step, for tasks that go on or wait for their resources; their figures are then left out"""
    num_answers: int = 0
    """of the first so many usable samples the model writes the first answer itself, greedily, at every look; the share
    that it writes id by id is `validation_exact_match`. Not with zero.stage 3, which leaves no rank a whole model"""

    def __post_init__(self) -> None:
        if self.every_steps < 1 or not self.samples:
            raise ValueError(f"validation needs samples, and {self.every_steps = } must be at least 1")
        if self.num_answers < 0:
            raise ValueError(f"validation: {self.num_answers = } must be at least 0 (0 = only the loss)")
        if self.max_wait_s < 0 or any(amount < 0 for amount in self.resources.values()):
            raise ValueError(f"validation: {self.max_wait_s = } and {self.resources = } must not be negative")


@dataclass(frozen=True, kw_only=True, slots=True)
class PhaseConfig:
    """One training phase."""

    samples: tuple[SourceConfig, ...]
    """the mixture"""
    trainable: tuple[ParameterRule, ...]
    """what is trained, at which rate; everything else is frozen"""
    packing: PackingConfig
    packs_per_step: int
    """packs of the global batch, whatever the number of ranks"""
    steps: int | None = None
    epochs: int | None = None
    """exactly one of steps and epochs"""
    use_transv: bool = True
    frames: FramesConfig = field(default_factory=FramesConfig)
    schedule: ScheduleConfig = field(default_factory=ScheduleConfig)
    init: InitConfig | None = None
    """None takes the weights of the phase before"""
    validation: ValidationConfig | None = None
    lora: LoraConfig | None = None
    """adapters beside the chosen linear maps, trained by a rule such as `.*\\.lora_[AB]`; merged at the phase's end"""

    def __post_init__(self) -> None:
        if (self.steps is None) == (self.epochs is None):
            raise ValueError(f"a phase needs either steps or epochs: {self.steps = }, {self.epochs = }")
        for name in ("steps", "epochs", "packs_per_step"):
            value = getattr(self, name)
            if value is not None and value < 1:
                raise ValueError(f"{name} = {value} must be at least 1")
        if not self.samples or not self.trainable:
            raise ValueError("a phase needs at least one entry in samples and one in trainable")


@dataclass(frozen=True, kw_only=True, slots=True)
class WorkersConfig:
    """Processes that share a run; used by the Ray adapter, where a plain launcher sets the same by its own flags."""

    num_workers: int | tuple[int, int] = 1
    """[least, most] under Ray: as many as the cluster has room for, and other numbers when it grows or shrinks. Every
    step has the same packs whatever their number; a change goes on from the newest committed checkpoint"""
    use_gpu: bool = False
    """one GPU a worker, NCCL; else CPU and gloo"""
    resources_per_worker: dict[str, float] = field(default_factory=lambda: {"CPU": 1.0})
    max_failures: int = 3
    """worker groups that may be lost before the run fails; each restart resumes from the newest committed checkpoint"""
    preemption_grace_s: float = 60.0
    """for which workers may go on after the time at which a node is taken away, to finish a checkpoint on its way"""
    hang_timeout_s: float = 1800.0
    """a worker that makes no progress for so long inside a step ends, and the log names the one that it waited for"""
    threads_per_worker: int = 1
    """torch threads; fixed, because another number adds up in another order"""

    def __post_init__(self) -> None:
        least, most = self.num_workers if isinstance(self.num_workers, tuple) else (self.num_workers, self.num_workers)
        if not 1 <= least <= most:
            raise ValueError(f"workers: {self.num_workers = } must be at least 1, or [least, most] in this order")
        if self.preemption_grace_s < 0:
            raise ValueError(f"workers: {self.preemption_grace_s = } must be at least 0")

    @property
    def max_workers(self) -> int:
        """The number of workers, or the most."""
        return self.num_workers[1] if isinstance(self.num_workers, tuple) else self.num_workers


@dataclass(frozen=True, kw_only=True, slots=True)
class TrainConfig:
    """A whole run.

    Raises:
        ValueError: when there is no phase or the first one has no init.
    """

    name: str
    """the run's folder is runs/name"""
    feature_store: str
    tokenizer: str
    """Hugging Face name or folder"""
    phases: dict[str, PhaseConfig]
    """in this order"""
    runs: str = "outputs/runs"
    seed: int = 0
    """of the epochs' orders"""
    dtype: Dtype = "float32"
    """bfloat16 keeps fp32 master weights in the optimizer"""
    activation_checkpointing: bool = False
    backend: Backend = "auto"
    """what computes scans, convolutions and attention: CUDA kernels where they can be used (auto), torch, or kernels
    or an error"""
    encoder: str | None = None
    """the vision encoder that made the features (Hugging Face name or folder), noted in the weights for serving"""
    second_encoder: str | None = None
    """the same of the second tower, where the features are of two"""
    zero: ZeroConfig = field(default_factory=ZeroConfig)
    loader: LoaderConfig = field(default_factory=LoaderConfig)
    checkpoint: CheckpointConfig = field(default_factory=CheckpointConfig)
    metrics: MetricsConfig = field(default_factory=MetricsConfig)
    workers: WorkersConfig = field(default_factory=WorkersConfig)

    def __post_init__(self) -> None:
        if not self.name or "/" in self.name:
            raise ValueError(f"{self.name = } names a folder inside {self.runs}: no slash, not empty")
        if not self.phases:
            raise ValueError("phases: name at least one")
        first = next(iter(self.phases))
        if self.phases[first].init is None:
            raise ValueError(f"phases.{first}.init: the first phase needs its initial weights")
        asked = [name for name, phase in self.phases.items() if phase.validation and phase.validation.num_answers]
        if asked and self.zero.stage > 2:
            raise ValueError(
                f"phases.{asked[0]}.validation.num_answers: with {self.zero.stage = } no rank holds a whole model that"
                " could answer; choose stage 2 or lower, or num_answers: 0 and the loss alone"
            )


def with_absolute_paths(config: TrainConfig) -> TrainConfig:
    """`config` with every local path made absolute, for processes that start in other folders.

    A tokenizer or backbone stays as it is where no such folder exists: then it is a name on the hub.
    """
    phases = {
        name: replace(
            phase,
            samples=_absolute_sources(phase.samples),
            validation=phase.validation
            and replace(phase.validation, samples=_absolute_sources(phase.validation.samples)),
            init=None
            if phase.init is None
            else replace(
                phase.init,
                weights=phase.init.weights and _absolute(phase.init.weights),
                backbone=phase.init.backbone and _absolute_if_exists(phase.init.backbone),
            ),
        )
        for name, phase in config.phases.items()
    }
    return replace(
        config,
        phases=phases,
        runs=_absolute(config.runs),
        feature_store=_absolute(config.feature_store),
        tokenizer=_absolute_if_exists(config.tokenizer),
    )


def _absolute_sources(sources: tuple[SourceConfig, ...]) -> tuple[SourceConfig, ...]:
    return tuple(replace(source, uri=_absolute(source.uri)) for source in sources)


def _absolute(uri: str) -> str:
    return storage.split_uri(uri)[1] if storage.is_local(uri) else uri


def _absolute_if_exists(name: str) -> str:
    return str(Path(name).absolute()) if Path(name).is_dir() else name

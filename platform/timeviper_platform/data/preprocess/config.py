"""Configuration of the preprocessing job."""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Literal

from timeviper_platform.common.config import with_absolute_paths
from timeviper_platform.common.devices import check_gpus_are_reserved
from timeviper_platform.data.encode.frame_encoder import VisionTowerConfig
from timeviper_platform.data.media.container import ErrorType, MediaLimits
from timeviper_platform.data.plan.segments import SamplingConfig
from timeviper_platform.data.store.writer import ROW_GROUP_BYTES
from timeviper_platform.data.video_worker.frame_source import DecodeConfig


@dataclass(frozen=True, kw_only=True, slots=True)
class ExecutionConfig:
    mode: Literal["fused", "split", "auto"] = "fused"
    """fused = workers decode and encode; split = decoding has its own workers, so that GPU encoders never wait;
    auto = the faster of both, measured."""
    num_workers: int | None = None
    """Maximum encoding processes; null = one per GPU if gpus_per_worker > 0, else per CPU. They follow nodes that join
    and leave.
    """
    min_workers: int | None = None
    """Minimum encoding processes, requested even while no node has room for them; null = 1."""
    initial_workers: int | None = None
    """Encoding processes at the start; null = as many as the nodes hold."""
    num_decode_workers: int | None = None
    """Decoding processes in mode split; null = as many as the encoders need by the measured costs."""
    cpus_per_worker: float = 0.75
    """CPUs reserved per worker. Below 1, so that Ray's own tasks fit on small machines."""
    gpus_per_worker: float = 0.0
    """GPUs reserved per encoding worker."""
    num_threads: int = 1
    """Torch threads per worker."""
    frames_per_file: int = 2048
    """Approximate frames per data file; 8192 frames of 16 x 1152 are 302 MB."""
    row_group_bytes: int = ROW_GROUP_BYTES
    """Minimum feature bytes per row group, and so per read."""
    progress_seconds: float = 5.0
    """Seconds between progress lines in the log."""
    warn_repeated_share: float = 0.3
    """Share of stored frames that repeat the one before, above which the job warns and the report names media."""
    max_consecutive_failures: int | None = 100
    """Media in a row that may fail for the same reason before the job stops; null = never stop."""

    def __post_init__(self) -> None:
        if self.max_consecutive_failures is not None and self.max_consecutive_failures < 1:
            raise ValueError(f"{self.max_consecutive_failures = } must be at least 1, or null")
        if not 0 <= self.warn_repeated_share <= 1:
            raise ValueError(f"{self.warn_repeated_share = } must be within 0 and 1; 1 = never warn")
        for name in ("frames_per_file", "row_group_bytes"):
            if getattr(self, name) < 1:
                raise ValueError(f"execution.{name} = {getattr(self, name)} must be at least 1")
        bounds = (1, self.min_workers, self.initial_workers, self.num_workers)
        given = [bound for bound in bounds if bound is not None]
        if given != sorted(given):
            raise ValueError(
                f"1 <= {self.min_workers = } <= {self.initial_workers = } <= {self.num_workers = } must hold for those"
                " that are not null"
            )
        if self.num_decode_workers is not None and self.num_decode_workers < 1:
            raise ValueError(f"{self.num_decode_workers = } must be at least 1, or null")


@dataclass(frozen=True, kw_only=True, slots=True)
class PreprocessConfig:
    input: str
    """Manifest (.parquet, .jsonl, .json, .csv, .tsv), glob, folder, or single file; local path or fsspec URI."""
    feature_store: str
    """URI of the feature store: created, or extended if it has the same recipe."""
    encoder: VisionTowerConfig = field(default_factory=VisionTowerConfig)
    sampling: SamplingConfig = field(default_factory=SamplingConfig)
    decode: DecodeConfig = field(default_factory=DecodeConfig)
    limits: MediaLimits = field(default_factory=MediaLimits)
    execution: ExecutionConfig = field(default_factory=ExecutionConfig)
    bytes_column: str | None = None
    """Column of Parquet files that holds the media, such as jpg or image; null = the only column of bytes."""
    hash: Literal["none", "sha256"] = "none"
    """sha256 reads every file once more. Serving needs it to recognise uploads."""
    retry_errors: tuple[str, ...] | Literal["all"] = ()
    """Error types of segments to retry. Transient errors (RETRYABLE) are always retried."""

    def __post_init__(self) -> None:
        if unknown := sorted(set(self.errors_to_retry) - set(ErrorType)):
            raise ValueError(
                f"retry_errors: unknown error types {', '.join(unknown)}; use all, or some of {', '.join(ErrorType)}"
            )
        if self.sampling.frame_selection == "keyframes" and self.decode.backend != "pyav":
            raise ValueError(
                f"{self.sampling.frame_selection = } needs decode.backend pyav, not {self.decode.backend!r}"
            )
        mode, device = self.execution.mode, self.encoder.device
        check_gpus_are_reserved(
            device, self.execution.gpus_per_worker, device_key="encoder.device", gpus_key="execution.gpus_per_worker"
        )
        if self.decode.backend == "nvdec" and (mode != "fused" or device != "cuda"):
            raise ValueError(
                "decode.backend nvdec decodes on the encoder's GPU, which split decoders do not have: execution."
                f"{mode = } must be fused and encoder.{device = } must be cuda; or use backend pyav"
            )

    @property
    def errors_to_retry(self) -> tuple[str, ...]:
        return tuple(ErrorType) if self.retry_errors == "all" else self.retry_errors

    def resolve_paths(self) -> PreprocessConfig:
        config = with_absolute_paths(self, ("input", "feature_store"))
        return with_absolute_paths(config, ("encoder.model", "encoder.second.model"), if_exists=True)

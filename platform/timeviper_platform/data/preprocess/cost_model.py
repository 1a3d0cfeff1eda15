"""Computes the totals of a large run from unit costs, see docs/scale.md."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

from timeviper_platform.common.storage import READ_AHEAD_BYTES
from timeviper_platform.data.plan.segments import MAX_TABLE_ROWS, SEGMENT_FRAMES

BYTES_PER_VALUE = 2


@dataclass(frozen=True, kw_only=True, slots=True)
class TowerSizes:
    """A ViT, by default google/siglip-so400m-patch14-384 with layer -2."""

    num_patches: int = 729
    width: int = 1152
    mlp_width: int = 4304
    num_blocks: int = 26
    """number of blocks up to hidden_states[-2]"""

    def flops(self) -> float:
        """FLOPs per frame without patch embedding (0.2 %) and merging; multiply and add count as two."""
        per_token = 4 * self.width**2 + 2 * self.width * self.mlp_width + 2 * self.num_patches * self.width
        return 2.0 * self.num_patches * self.num_blocks * per_token


@dataclass(frozen=True, kw_only=True, slots=True)
class ScaleConfig:
    num_videos: int = 1_000_000
    seconds_per_video: float = 300.0
    fps: float = 1.0
    num_tokens_per_frame: int = 16
    dim: int = 1152
    frames_per_file: int = 512
    video_megabytes: float = 50.0
    """Size of a source file."""
    num_gpus: int = 8
    encode_frames_per_second: float = 0.0
    """Measured rate of one GPU; 0 = gpu_peak_tflops * mfu / FLOPs per frame."""
    gpu_peak_tflops: float = 989.0
    """Dense bf16 peak: 989 for an H100 SXM."""
    mfu: float = 0.4
    """Assumed share of the peak."""
    second_num_tokens_per_frame: int = 0
    """Tokens of a second tower; 0 = none."""
    second_dim: int = 0
    """Width of the second tower."""
    second_teraflops_per_frame: float = 0.0
    """Computed cost of the second tower."""
    second_encode_frames_per_second: float = 0.0
    """Measured rate of the second tower; 0 = computed."""
    decode_milliseconds: float = 17.6
    """Core time per sampled frame, by default that of Big Buck Bunny (720p)."""
    price_gpu_hour: float = 0.0
    price_core_hour: float = 0.0
    price_gigabyte_month: float = 0.0
    price_thousand_puts: float = 0.0
    price_thousand_gets: float = 0.0

    def __post_init__(self) -> None:
        for name in ("num_videos", "seconds_per_video", "fps", "frames_per_file", "num_gpus", "mfu", "gpu_peak_tflops"):
            if getattr(self, name) <= 0:
                raise ValueError(f"{name} = {getattr(self, name)} must be above 0")
        cost = self.second_encode_frames_per_second or self.second_teraflops_per_frame
        second = (self.second_num_tokens_per_frame, self.second_dim, cost)
        if min(second) < 0 or (any(second) and not all(second)):
            raise ValueError(
                f"{self.second_num_tokens_per_frame = }, {self.second_dim = } and its cost = {cost}: give all of a"
                " second tower (its cost as second_encode_frames_per_second or second_teraflops_per_frame), or none"
            )

    @property
    def has_second(self) -> bool:
        return self.second_num_tokens_per_frame > 0


@dataclass(frozen=True, kw_only=True, slots=True)
class Scale:
    frames: int
    segments: int
    files: int
    """maximum number of data files"""
    feature_bytes: int
    encode_frames_per_second: float
    """rate of one GPU"""
    gpu_hours: float
    hours: float
    core_hours: float
    cores_per_gpu: float
    puts: int
    gets: int
    money: float
    money_a_month: float


def compute_scale(config: ScaleConfig, tower: TowerSizes | None = None) -> Scale:
    frames_per_video = -(-int(config.seconds_per_video * config.fps * 1000) // 1000)
    frames = config.num_videos * frames_per_video
    segments = config.num_videos * -(-frames_per_video // SEGMENT_FRAMES)
    files = -(-segments // max(1, config.frames_per_file // SEGMENT_FRAMES))
    num_tokens = config.num_tokens_per_frame + config.second_num_tokens_per_frame
    feature_bytes = frames * num_tokens * max(config.dim, config.second_dim) * BYTES_PER_VALUE
    rate = _encode_rate(config, tower or TowerSizes())
    gpu_hours, core_hours = frames / rate / 3600, frames * config.decode_milliseconds / 1e3 / 3600
    # data files and their commit records; plan files; index, rejects, report and store.json
    puts = 2 * files + -(-segments // MAX_TABLE_ROWS) + 4
    # per video its size and read-ahead blocks; per data file a check, and the record at the end
    gets = config.num_videos * (1 + -(-int(config.video_megabytes * 1e6) // READ_AHEAD_BYTES)) + 2 * files
    compute_cost = gpu_hours * config.price_gpu_hour + core_hours * config.price_core_hour
    request_cost = (puts * config.price_thousand_puts + gets * config.price_thousand_gets) / 1000
    return Scale(
        frames=frames,
        segments=segments,
        files=files,
        feature_bytes=feature_bytes,
        encode_frames_per_second=rate,
        gpu_hours=gpu_hours,
        hours=gpu_hours / config.num_gpus,
        core_hours=core_hours,
        cores_per_gpu=rate * config.decode_milliseconds / 1e3,
        puts=puts,
        gets=gets,
        money=compute_cost + request_cost,
        money_a_month=feature_bytes / 1e9 * config.price_gigabyte_month,
    )


def _encode_rate(config: ScaleConfig, tower: TowerSizes) -> float:
    flops_per_second = config.gpu_peak_tflops * 1e12 * config.mfu
    first = config.encode_frames_per_second or flops_per_second / tower.flops()
    if not config.has_second:
        return first
    computed = config.second_teraflops_per_frame * 1e12 / flops_per_second
    measured = config.second_encode_frames_per_second
    return 1 / (1 / first + (1 / measured if measured else computed))


def _rate_source(config: ScaleConfig) -> str:
    measured = [config.encode_frames_per_second > 0]
    if config.has_second:
        measured.append(config.second_encode_frames_per_second > 0)
    if any(measured) and not all(measured):
        source = "one tower measured, the other computed from FLOPs"
    else:
        source = "measured" if all(measured) else "computed from FLOPs, not measured"
    return f"both towers, {source}" if config.has_second else source


def scale_table(configs: Sequence[ScaleConfig]) -> str:
    """The totals as a Markdown table, one column per run."""
    scales = [compute_scale(config) for config in configs]
    rows: list[tuple[str, list[str]]] = [
        ("videos", [f"{config.num_videos:,}" for config in configs]),
        ("frames", [f"{scale.frames:,}" for scale in scales]),
        ("segments", [f"{scale.segments:,}" for scale in scales]),
        ("features", [f"{scale.feature_bytes / 1e12:.2f} TB" for scale in scales]),
        ("data files, at most", [f"{scale.files:,}" for scale in scales]),
        (
            f"frames/s of a GPU ({_rate_source(configs[0])})",
            [f"{scale.encode_frames_per_second:.0f}" for scale in scales],
        ),
        ("GPU hours", [f"{scale.gpu_hours:,.0f}" for scale in scales]),
        (f"hours with {configs[0].num_gpus} GPUs", [f"{scale.hours:,.1f}" for scale in scales]),
        ("core hours to decode", [f"{scale.core_hours:,.0f}" for scale in scales]),
        ("cores that feed a GPU", [f"{scale.cores_per_gpu:.1f}" for scale in scales]),
        ("PUT requests", [f"{scale.puts:,}" for scale in scales]),
        ("GET requests", [f"{scale.gets:,}" for scale in scales]),
        ("money, once", [f"{scale.money:,.0f}" for scale in scales]),
        ("money, a month of storage", [f"{scale.money_a_month:,.0f}" for scale in scales]),
    ]
    lines = [f"| {name} | {' | '.join(values)} |" for name, values in rows]
    return "\n".join([lines[0], "| --- |" + " --- |" * len(configs), *lines[1:]])

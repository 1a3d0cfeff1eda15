"""Compares fused preprocessing with a plain Ray Data pipeline and with Daft.

All sample the same shuffled clips at 1 fps with the same encoder and write Parquet, as their documentation recommends:

    plain   ray.data.read_videos(fps=1, resize=...) -> map_batches(EncodeFrames) -> write_parquet; one file per core
    Daft    video_frames(sample_interval_seconds=1), a file per task -> batch class -> write_parquet. Its
            read_video_frames (0.7.26) hangs on two cores with several files.

Rates exclude start-up.
"""

from __future__ import annotations

import logging
import os
import statistics
import tempfile
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any, NamedTuple

import av
import numpy as np
import pyarrow as pa
import pyarrow.dataset
import torch

from timeviper_platform.benchmarks.measure import Row
from timeviper_platform.benchmarks.preprocess.share_of_ideal import make_tiny_encoder
from timeviper_platform.benchmarks.video.clips import ClipSpec, make_clip
from timeviper_platform.common.ray_cluster import connect
from timeviper_platform.data.encode.frame_encoder import FrameEncoder, VisionTowerConfig
from timeviper_platform.data.preprocess.config import ExecutionConfig, PreprocessConfig
from timeviper_platform.data.preprocess.run import run_preprocess
from timeviper_platform.data.store.writer import features_bytes
from timeviper_platform.data.synthetic.encoder import IMAGE_SIZE

logger = logging.getLogger(__name__)

CLIP_SECONDS = 24
FILM_SECONDS = 20 * 60
"""Total length of the clips; a shorter film is repeated."""
REPEATS = 5
READ_CPUS, ENCODE_CPUS, WRITE_CPUS = 0.55, 0.2, 0.1
"""CPUs of the plain pipeline: two readers, an encoder and the writer on two cores. Ray Data reserves half a CPU for
writing, so readers of more than 0.6 would run one at a time.
"""


class Pass(NamedTuple):
    frames_per_second: float
    """Steady-state rate."""
    decode_share: float | None = None
    """Share of the workers' busy time, if known."""


Pipeline = Callable[[Path, Path, VisionTowerConfig], Pass]
"""(clip folder, output folder, encoder) -> Pass."""


def pipeline_rows(film: Path | None = None, *, film_seconds: int = FILM_SECONDS, repeats: int = REPEATS) -> list[Row]:
    """Speed-ups over the other pipelines, on clips of `film` or of a synthetic clip."""
    controls: dict[str, tuple[Pipeline, str]] = {"a plain Ray Data pipeline": (run_plain, ">= 1.5")}
    if has_daft():
        controls["Daft"] = (run_daft, ">= 1.2")
    pipelines = {"ours": run_ours, **{name: run for name, (run, _) in controls.items()}}
    passes: dict[str, list[Pass]] = {name: [] for name in pipelines}
    with tempfile.TemporaryDirectory(prefix="tv-benchmark-") as folder, connect():
        root = Path(folder)
        encoder = make_tiny_encoder(root / "encoder")
        clips = make_clips(root, film, film_seconds)
        for turn in range(repeats):
            for name, run in pipelines.items():
                passes[name].append(run(clips, root / f"{name} {turn}", encoder))
                logger.info("turn %d of %d, %s: %s", turn + 1, repeats, name, passes[name][-1])
    media = f"{film.name if film else 'synthetic clip'}, {film_seconds} s in clips of {CLIP_SECONDS} s"
    return pipeline_speed_rows(
        passes, {name: bar for name, (_, bar) in controls.items()}, media, is_synthetic=film is None
    )


def pipeline_speed_rows(
    passes: dict[str, list[Pass]], bars: dict[str, str], media: str, *, is_synthetic: bool
) -> list[Row]:
    """Medians over the passes of each pipeline, and our share of decoding. Bars apply to a film only."""
    command = "python jobs/benchmark.py preprocess --only pipelines" + ("" if is_synthetic else " --film FILM")
    rates = {name: [one.frames_per_second for one in found] for name, found in passes.items()}
    rows = []
    for name, bar in bars.items():
        noise = max((max(r) - min(r)) / statistics.median(r) for r in (rates["ours"], rates[name]))
        speedup = statistics.median(rates["ours"]) / statistics.median(rates[name])
        text = f"preprocessing, times faster than {name} ({media}; median of {len(rates[name])}, noise {noise:.0%})"
        rows.append(Row(name=text, value=speedup, unit="x", bar=None if is_synthetic else bar, command=command))
    share = statistics.median(one.decode_share or 0.0 for one in passes["ours"])
    text = f"preprocessing, share of decoding in the workers' time ({media})"
    return [*rows, Row(name=text, value=share, unit="", bar=None if is_synthetic else ">= 0.7", command=command)]


def make_clips(root: Path, film: Path | None, film_seconds: int, *, clip_seconds: int = CLIP_SECONDS) -> Path:
    """Cuts a film into a folder of shuffled clips, `film_seconds` in all."""
    if film is None:
        film = root / "clip.mp4"
        make_clip(film, ClipSpec(seconds=clip_seconds))
    once, folder = root / "once", root / "clips"
    once.mkdir()
    folder.mkdir()
    cut = cut_film(film, once, clip_seconds, max_seconds=film_seconds)
    count = max(2, film_seconds // clip_seconds)
    for index, number in enumerate(np.random.default_rng(0).permutation(count)):
        (folder / f"{index:05d}.mp4").hardlink_to(cut[number % len(cut)])
    return folder


def cut_film(film: Path, folder: Path, clip_seconds: int, *, max_seconds: int) -> list[Path]:
    """Cuts the first `max_seconds` at keyframes into clips of about `clip_seconds`, by stream copy."""
    clips: list[Path] = []
    output: Any = None
    with av.open(str(film)) as container:
        stream = container.streams.video[0]
        copied: Any = None
        offset = 0
        for packet in container.demux(stream):
            if packet.pts is None or packet.dts is None:
                continue  # flushing packet
            seconds = float(packet.pts * stream.time_base)
            if packet.is_keyframe and seconds >= len(clips) * clip_seconds:
                if output is not None:
                    output.close()
                    output = None
                if seconds >= max_seconds:
                    break
                clips.append(folder / f"{len(clips):05d}.mp4")
                output, offset = av.open(str(clips[-1]), "w"), packet.pts
                copied = output.add_stream_from_template(stream)
            packet.pts, packet.dts, packet.stream = packet.pts - offset, packet.dts - offset, copied
            output.mux(packet)
    if output is not None:
        output.close()
    return clips


def steady_rate_of(times: Sequence[float]) -> float:
    """Frames per second in the middle 60 % of completion times (seconds, in any order).

    Raises:
        ValueError: if no frame lies there.
    """
    ordered = np.sort(np.asarray(times, dtype=np.float64))
    begin, end = ordered[0], ordered[-1]
    low, high = begin + 0.2 * (end - begin), end - 0.2 * (end - begin)
    count = int(np.count_nonzero((ordered > low) & (ordered <= high)))
    if not count:
        raise ValueError(
            f"{len(ordered)} frames at {len(np.unique(ordered))} times have no steady state; use a longer film"
        )
    return count / float(high - low)


# -- ours --------------------------------------------------------------------------------------------------------


def run_ours(clips: Path, output: Path, encoder: VisionTowerConfig) -> Pass:
    execution = ExecutionConfig(mode="fused", num_workers=os.cpu_count() or 1)
    report = run_preprocess(
        PreprocessConfig(input=str(clips), feature_store=str(output), encoder=encoder, execution=execution)
    )
    return Pass(report.frames_per_second, report.stage_seconds["decode"] / sum(report.stage_seconds.values()))


# -- Ray Data, plainly -------------------------------------------------------------------------------------------


class EncodeFrames:
    def __init__(self, config: VisionTowerConfig) -> None:
        torch.set_num_threads(1)
        self._encoder = FrameEncoder(config)

    def __call__(self, batch: dict[str, np.ndarray]) -> dict[str, Any]:
        return {"path": batch["path"], **self.encode(batch["frame"])}

    def encode(self, frames_FSSC: np.ndarray) -> dict[str, Any]:
        """bf16 bytes (N, dim) and completion time of each frame."""
        features = [features_bytes(tokens) for tokens in self._encoder.encode(frames_FSSC)]
        return {"features": features, "encoded_at": [time.time()] * len(features)}


def run_plain(clips: Path, output: Path, encoder: VisionTowerConfig) -> Pass:
    import ray

    with _encoder_first(ray.data.DataContext.get_current()):
        frames = ray.data.read_videos(
            str(clips), fps=1, resize=(IMAGE_SIZE, IMAGE_SIZE), include_paths=True, num_cpus=READ_CPUS
        )
        features = frames.map_batches(
            EncodeFrames,
            fn_constructor_args=(encoder,),
            batch_size=encoder.encode_batch_frames,
            compute=ray.data.ActorPoolStrategy(size=1),
            num_cpus=ENCODE_CPUS,
        )
        features.write_parquet(str(output), ray_remote_args={"num_cpus": WRITE_CPUS})
    return _rate_of(output)


@contextmanager
def _encoder_first(context: Any) -> Iterator[None]:
    """Starts the encoder first; frames read during its start would take no time."""
    before, context.wait_for_min_actors_s = context.wait_for_min_actors_s, 600
    context.enable_progress_bars = False
    try:
        yield
    finally:
        context.wait_for_min_actors_s = before


# -- Daft --------------------------------------------------------------------------------------------------------


def has_daft() -> bool:
    """Whether Daft is installed; logs how to install it otherwise."""
    os.environ.setdefault("DO_NOT_TRACK", "true")  # disables telemetry, which starts at import
    os.environ.setdefault("DAFT_PROGRESS_BAR", "0")
    logging.getLogger("tracing").setLevel(logging.WARNING)  # otherwise one line per file
    try:
        import daft  # noqa: F401
    except ImportError:
        logger.warning(
            "no row against Daft: it is not installed. It wants an older pyarrow than this project:"
            " `pip install --no-deps daft==0.7.26` leaves that one alone, and works"
        )
        return False
    return True


def run_daft(clips: Path, output: Path, encoder: VisionTowerConfig) -> Pass:
    import daft
    from daft import DataType, col
    from daft.functions import video_file, video_frames

    encoded_type = DataType.struct({"features": DataType.binary(), "encoded_at": DataType.float64()})

    @daft.cls()
    class Encode:
        def __init__(self, config: VisionTowerConfig) -> None:
            self._encode = EncodeFrames(config).encode

        @daft.method.batch(return_dtype=encoded_type, batch_size=encoder.encode_batch_frames)
        def encode(self, frames: Any) -> list[dict[str, Any]]:
            columns = self._encode(np.stack([np.asarray(frame) for frame in frames.to_pylist()]))
            return [{"features": f, "encoded_at": t} for f, t in zip(*columns.values(), strict=True)]

    files = daft.from_pydict({"path": [str(path) for path in sorted(clips.iterdir())]}).into_batches(1)
    frames = files.with_column(
        "frame",
        video_frames(video_file(col("path")), width=IMAGE_SIZE, height=IMAGE_SIZE, sample_interval_seconds=1.0),
    ).explode("frame")
    encoded = frames.with_column("encoded", Encode(encoder).encode(col("frame").get("data")))
    columns = (col("path"), *(col("encoded").get(name).alias(name) for name in ("features", "encoded_at")))
    encoded.select(*columns).write_parquet(str(output))
    return _rate_of(output)


def _rate_of(output: Path) -> Pass:
    times = pa.dataset.dataset(output).to_table(columns=["encoded_at"])["encoded_at"].to_numpy()
    logger.info("%s: %d frames in %.1f s from the first", output.name, len(times), np.ptp(times))
    return Pass(steady_rate_of(times))

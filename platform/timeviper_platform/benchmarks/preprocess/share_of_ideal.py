"""Compares the rate of preprocessing, fused and split, with the ideal rate of its costs.

A frame's CPU cost is calibrated between runs, without Ray, on all cores, because a shared machine's speed changes by a
tenth within minutes. A run's ideal is the mean of the calibrations before and after it. Its own share uses the costs of
its own frames instead, which hides overheads per frame.
"""

from __future__ import annotations

import logging
import os
import shutil
import statistics
import tempfile
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import NamedTuple

import av
import numpy as np

from timeviper_platform.benchmarks.measure import Row, StolenTime
from timeviper_platform.benchmarks.video.clips import ClipSpec, make_clip
from timeviper_platform.common.ray_cluster import connect
from timeviper_platform.data.encode.frame_encoder import EncoderDescription, VisionTowerConfig, describe_encoder
from timeviper_platform.data.encode.recipe import recipe_hash
from timeviper_platform.data.plan.segments import Segment, segments_of
from timeviper_platform.data.preprocess.calibrate import BusySlots, Calibration
from timeviper_platform.data.preprocess.config import ExecutionConfig, PreprocessConfig
from timeviper_platform.data.preprocess.ray_graph import run_on_ray
from timeviper_platform.data.preprocess.run import Runner, make_recipe, plan_tables, run_preprocess, worker_spec
from timeviper_platform.data.preprocess.worker import WorkerSpec
from timeviper_platform.data.synthetic.encoder import IMAGE_SIZE, save_encoder, train_encoder

logger = logging.getLogger(__name__)

COMMAND = "python jobs/benchmark.py preprocess --only ideal"
CLIP_SECONDS = 24
FILM_SECONDS = 10 * 60
"""Length of the synthetic film, repeated as often as a run needs."""
JPEG_QUALITY = 90
NUM_CLIPS_TRIED, NUM_IMAGES_TRIED = 32, 1024
"""Media to calibrate on, about as many frames as FILM_SECONDS."""


@dataclass(frozen=True, kw_only=True, slots=True)
class IdealSizes:
    run_seconds: float = 30.0
    """Length of a run at the ideal rate; 60 % of it is the steady state."""
    calibration_seconds: float = 15.0
    repeats: int = 5
    clip_seconds: int = CLIP_SECONDS
    film_seconds: int = FILM_SECONDS
    num_clips_tried: int = NUM_CLIPS_TRIED
    num_images_tried: int = NUM_IMAGES_TRIED


@dataclass(frozen=True, slots=True)
class Media:
    name: str
    grow: Callable[[Path, int], None]
    """Creates that many media in a folder."""
    num_tried: int
    unit: str = "frames/s"


def ideal_rows(film: Path | None = None, sizes: IdealSizes | None = None) -> list[Row]:
    """Rows for clips, a film (`film` or a synthetic one) and images, fused and split."""
    sizes = sizes or IdealSizes()
    with tempfile.TemporaryDirectory(prefix="tv-benchmark-") as folder, connect():
        root = Path(folder)
        encoder = make_tiny_encoder(root / "encoder")
        command = COMMAND + (" --film FILM" if film else "")
        kinds = make_media(root, film, sizes)
        return [row for media in kinds for row in media_rows(root, media, encoder, sizes, command=command)]


def make_media(root: Path, film: Path | None, sizes: IdealSizes) -> list[Media]:
    clip, image, synthetic_film = root / "clip.mp4", root / "image.jpg", root / "film.mp4"
    make_clip(clip, ClipSpec(seconds=sizes.clip_seconds))
    save_first_frame(clip, image)
    if film is None:
        repeat_film(clip, synthetic_film, max(1, sizes.film_seconds // sizes.clip_seconds))
    base = film or synthetic_film

    def lengthen(folder: Path, times: int) -> None:
        repeat_film(base, folder / "film.mp4", times)

    return [
        Media(f"{sizes.clip_seconds} s clips", lambda folder, count: link(clip, folder, count), sizes.num_clips_tried),
        Media("one film" + (f", {film.name} repeated" if film else ""), lengthen, 1),
        Media("images alone", lambda folder, count: link(image, folder, count), sizes.num_images_tried, "images/s"),
    ]


def media_rows(
    root: Path,
    media: Media,
    encoder: VisionTowerConfig,
    sizes: IdealSizes,
    *,
    run: Runner = run_on_ray,
    slots: Callable[[WorkerSpec, int], BusySlots] = BusySlots,
    num_cores: int | None = None,
    command: str = COMMAND,
) -> list[Row]:
    """Runs each mode in turn, with calibrations between runs; `num_cores` defaults to the machine's."""
    num_cores = num_cores or os.cpu_count() or 1
    tried = root / f"{media.name}, tried"
    tried.mkdir()
    media.grow(tried, media.num_tried)
    config = PreprocessConfig(input=str(tried), feature_store=str(root / "none"), encoder=encoder)
    description = describe_encoder(encoder)
    segments = planned(config, description)
    rates: dict[str, list[RunRate]] = {name: [] for name in executions(num_cores)}
    with slots(worker_spec(config, description, ""), num_cores) as calibration:
        costs = [calibration.measure(segments, sizes.calibration_seconds)]
        whole = root / media.name
        whole.mkdir()
        rate = costs[0].ideal_frames_per_second(num_cores, num_cores, is_fused=True, num_cores=num_cores)
        num_frames = sum(segment.num_frames for segment in segments)
        media.grow(whole, max(media.num_tried, round(sizes.run_seconds * rate * media.num_tried / num_frames)))
        for _ in range(sizes.repeats):
            for name, execution in executions(num_cores).items():
                rates[name].append(media_rate(root, whole, encoder, execution, run))
                costs.append(calibration.measure(segments, sizes.calibration_seconds))
    return speed_rows(media, rates, costs, num_cores=num_cores, command=command)


def executions(num_cores: int) -> dict[str, ExecutionConfig]:
    """Both modes. In split mode nearly all cores decode; the encoder is far cheaper."""
    share = 0.9 / (1 + 1 / num_cores)  # CPUs per decoder, so that all of them fit
    return {
        "fused": ExecutionConfig(mode="fused", num_workers=num_cores),
        "split": ExecutionConfig(
            mode="split", num_decode_workers=num_cores, num_workers=1, cpus_per_worker=round(share, 2)
        ),
    }


def speed_rows(
    media: Media,
    rates: dict[str, list[RunRate]],
    costs: Sequence[Calibration],
    *,
    num_cores: int,
    command: str,
) -> list[Row]:
    """Shares of the ideal, rates and the share of decoding; medians over runs.

    Args:
        rates: runs by mode.
        costs: calibrations before the first run and after each.
        num_cores: decoders or fused workers; the split encoder is one more process.
    """
    rows = []
    for index, (mode, runs) in enumerate(rates.items()):
        slots = (num_cores, num_cores if mode == "fused" else 1)
        ideals = [
            found.ideal_frames_per_second(*slots, is_fused=mode == "fused", num_cores=num_cores) for found in costs
        ]
        around = [ideals[number : number + 2] for number in range(index, len(costs) - 1, len(rates))]
        shares = [
            run.frames_per_second / (statistics.mean(pair) * (1.0 - run.stolen))
            for run, pair in zip(runs, around, strict=True)
        ]
        own_shares = [run.own_share / (1.0 - run.stolen) for run in runs]
        stolen = statistics.median(run.stolen for run in runs)
        about = f"{mode}, {media.name} (ideal {statistics.median(ideals):.4g} {media.unit}, stolen {stolen:.0%}"
        for text, values in (("share of the ideal", shares), ("share of the ideal by the run's own costs", own_shares)):
            noise = (max(values) - min(values)) / statistics.median(values)
            name, value = f"{text}, {about}, noise {noise:.0%})", statistics.median(values)
            rows.append(Row(name=name, value=value, unit="", bar=">= 0.90", command=command))
        text = f"its rate, {mode}, {media.name}"
        rate = statistics.median(run.frames_per_second for run in runs)
        rows.append(Row(name=text, value=rate, unit=media.unit, command=command))
    decode = sum(found.decode_seconds for found in costs)
    share = decode / (decode + sum(found.encode_seconds + found.write_seconds for found in costs))
    rows.append(
        Row(name=f"share of decoding in the cost of a frame, {media.name}", value=share, unit="", command=command)
    )
    for row in rows:
        logger.info("%s: %.4g %s", row.name, row.value, row.unit)
    return rows


def planned(config: PreprocessConfig, encoder: EncoderDescription) -> list[Segment]:
    tables = plan_tables(config, recipe_hash(make_recipe(encoder, config)))
    return [segment for table in tables for segment in segments_of(table)]


class RunRate(NamedTuple):
    frames_per_second: float
    stolen: float
    """Share of core time that the host took away."""
    own_share: float
    """Share of the ideal by the costs of its own frames, stolen time included."""


def media_rate(root: Path, media: Path, encoder: VisionTowerConfig, execution: ExecutionConfig, run: Runner) -> RunRate:
    stolen = StolenTime()
    store = root / f"{media.name}, {execution.mode}"
    report = run_preprocess(
        PreprocessConfig(input=str(media), feature_store=str(store), encoder=encoder, execution=execution), run=run
    )
    logger.info("\n".join([f"{media.name}, {execution.mode}", *report.lines()]))
    if report.media.ok < report.media.planned:
        raise RuntimeError(f"{media.name}: {report.media}: {report.errors_by_stage}")
    shutil.rmtree(store)  # the next run starts from an empty store
    return RunRate(report.frames_per_second, stolen.share(), report.share_of_ideal)


# -- inputs ------------------------------------------------------------------------------------------------------


def make_tiny_encoder(folder: Path) -> VisionTowerConfig:
    """The demo's encoder, untrained."""
    noise = np.random.default_rng(0).integers(0, 256, (64, IMAGE_SIZE, IMAGE_SIZE, 3), dtype=np.uint8)
    save_encoder(train_encoder(noise, np.zeros(len(noise), np.int64), steps=0, seed=0), folder)
    return VisionTowerConfig(model=str(folder), num_tokens_per_frame=4, merge_heads=4)


def link(source: Path, folder: Path, count: int) -> None:
    for number in range(count):
        (folder / f"{number:06d}{source.suffix}").hardlink_to(source)


def save_first_frame(film: Path, image: Path) -> None:
    with av.open(str(film)) as container:
        next(container.decode(video=0)).to_image().save(image, quality=JPEG_QUALITY)


def repeat_film(source: Path, target: Path, times: int) -> None:
    """Repeats the stream of `source` by stream copy."""
    with av.open(str(target), "w") as output:
        copied, offset = None, 0
        for _ in range(times):
            with av.open(str(source)) as container:
                stream = container.streams.video[0]
                copied = copied or output.add_stream_from_template(stream)
                end = 0
                for packet in container.demux(stream):
                    if packet.pts is None or packet.dts is None:
                        continue  # flushing packet
                    end = max(end, packet.pts + (packet.duration or 1))
                    packet.pts, packet.dts, packet.stream = packet.pts + offset, packet.dts + offset, copied
                    output.mux(packet)
                offset += end

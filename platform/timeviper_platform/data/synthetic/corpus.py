"""Generates a corpus in one folder: videos, images, samples, held-out questions, tokenizer and vision tower.

corpus/ videos/*.mp4  images/*.png|jpg  manifest.parquet  truth.parquet  corpus.json (written last)
        samples/{language,align,instruct,long_films,held_out}.parquet
        held_out/{choice,order,count,grounding,caption}.parquet
        encoder/  tokenizer/
"""

from __future__ import annotations

import json
import logging
import os
import shutil
import time
from collections.abc import Iterable, Iterator, Sequence
from concurrent.futures import Future, ProcessPoolExecutor, as_completed
from dataclasses import asdict, dataclass
from itertools import islice
from multiprocessing import get_context
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
from PIL import Image

from timeviper_platform.common import schemas, storage
from timeviper_platform.data.synthetic.backgrounds import Background, Split, film_segments, read_film
from timeviper_platform.data.synthetic.generated import mark_generated, refuse_other_files
from timeviper_platform.data.synthetic.long_films import long_film_samples
from timeviper_platform.data.synthetic.pictures import ALL_PICTURES, Picture, draw_picture
from timeviper_platform.data.synthetic.questions import (
    Question,
    conversations,
    image_question,
    listing,
    question_row,
    sample_row,
    scene_questions,
)
from timeviper_platform.data.synthetic.render import background_frames, scene_frames, write_image, write_video
from timeviper_platform.data.synthetic.scenes import Scene, SceneKind, draw_placement, draw_scenes

logger = logging.getLogger(__name__)

FINISHED_FILE = "corpus.json"
CORPUS_VERSION = 4
"""Raised when the same configuration makes different files; older corpora are then made again."""
FILM_FILE = ".film.npy"
MEDIA_CHUNK = 32
"""Media per pool task: about half a second of work."""
LANGUAGE_SEED, IMAGE_SEED, QUESTION_SEED, ENCODER_SEED, FILM_SEED = 1, 2, 3, 4, 5
"""Separate random streams of one corpus seed."""

ENCODER_FRAMES = 16384
"""Fewer than twice as many are drawn: 400 MB at the tower's size. With half as many the tiny tower overfitted."""

MAX_HELD_OUT_SAMPLES = 48
HELD_OUT_TASKS = ("choice", "order", "count", "grounding", "caption")
"""Captions are for the analysis; the evaluation has no score for them."""

TRUTH = pa.schema(
    [
        pa.field("media_id", pa.string()),
        pa.field("split", pa.string()),
        pa.field("kind", pa.string()),
        pa.field("duration_seconds", pa.float64()),
        pa.field("background_segments", pa.list_(pa.string())),
        pa.field(
            "appearances",
            pa.list_(
                pa.struct(
                    [
                        pa.field("picture", pa.string()),
                        pa.field("start_seconds", pa.float64()),
                        pa.field("end_seconds", pa.float64()),
                    ]
                )
            ),
        ),
    ]
)
"""Ground truth of every video, for people and tests; no job reads it."""


@dataclass(frozen=True, kw_only=True, slots=True)
class SceneCounts:
    needle: int
    """Videos with one picture once: 'which', grounding and caption questions."""
    order: int
    """Videos with four pictures in turn: 'first' and 'last' questions."""
    count: int
    """Videos with one picture one to four times: 'how often' questions."""

    def __post_init__(self) -> None:
        if min(self.needle, self.order, self.count) < 0 or self.needle + self.order + self.count < 1:
            raise ValueError(f"{self}: counts must not be negative, with at least one video in all")

    def by_kind(self) -> dict[SceneKind, int]:
        return {"needle": self.needle, "order": self.order, "count": self.count}


@dataclass(frozen=True, kw_only=True, slots=True)
class CorpusConfig:
    """A generated corpus. The same configuration generates the same bytes.

    Raises:
        ValueError: for sizes too small for the pictures.
    """

    output: str
    """Local folder. A finished corpus of the same configuration in it is reused, anything else replaced."""
    seed: int = 0
    train: SceneCounts = SceneCounts(needle=1000, order=600, count=400)
    held_out: SceneCounts = SceneCounts(needle=440, order=120, count=120)
    num_images: int = 640
    """Image-caption pairs for the align phase."""
    num_language_samples: int = 6000
    """Text-only samples: the same questions about videos described in words."""
    which_per_video: int = 1
    """'Which' questions per training video, each with its own options and conversation."""
    num_long_films: int = 2000
    """Samples about films of up to 256 s, each a sequence of clips of training videos."""
    duration_seconds: int = 24
    fps: int = 2
    """Frame rate of the video files."""
    side: int = 96
    """Width and height in pixels."""
    film: str | None = None
    """Path of a film from which `film_share` of the backgrounds are cut."""
    film_share: float = 0.5
    vocab_size: int = 512
    encoder_steps: int = 1000
    """Training steps of the vision tower, 64 frames each."""
    num_workers: int | None = None
    """Processes that draw and encode; null = one per core. Does not change the corpus."""

    def __post_init__(self) -> None:
        if self.duration_seconds < 20:
            raise ValueError(f"{self.duration_seconds = } must be at least 20 for four pictures")
        if self.side < 48 or self.side % 2:
            raise ValueError(f"{self.side = } must be even and at least 48 pixels")
        if self.which_per_video < 0:
            raise ValueError(f"{self.which_per_video = } must be at least 0")
        if self.num_long_films < 0:
            raise ValueError(f"{self.num_long_films = } must be at least 0")
        if self.fps < 1:
            raise ValueError(f"{self.fps = } must be at least 1")
        if not 0.0 <= self.film_share <= 1.0:
            raise ValueError(f"{self.film_share = } must lie between 0 and 1")


@dataclass(frozen=True, kw_only=True, slots=True)
class CorpusReport:
    num_videos: int
    num_images: int
    num_samples: dict[str, int]
    num_questions: dict[str, int]
    bytes: int
    seconds: float
    reused: bool
    """True if a finished corpus of this configuration was found."""


def make_corpus(config: CorpusConfig) -> CorpusReport:
    """Generates the corpus, or reuses a finished one.

    Raises:
        ValueError: if `output` is not a local path or holds other files, or `film` is not a readable video.
    """
    if not storage.is_local(config.output):
        raise ValueError(f"{config.output = } must be a local folder; copy the finished corpus to where it is needed")
    root = Path(storage.split_uri(config.output)[1])
    identity = _identity(config)
    finished = root / FINISHED_FILE
    if finished.is_file():
        found = json.loads(finished.read_text(encoding="utf-8"))
        if found["identity"] == identity:
            logger.info("corpus %s: finished, nothing to do", root)
            return CorpusReport(**{**found["report"], "reused": True})
    refuse_other_files(root, FINISHED_FILE)
    mark_generated(root, FINISHED_FILE)
    _clear(root)
    report = _make(config, root)
    storage.write_json(str(finished), {"identity": identity, "report": asdict(report)})
    return report


def _identity(config: CorpusConfig) -> dict[str, Any]:
    values = {"version": CORPUS_VERSION, **asdict(config)}
    del values["output"], values["num_workers"]
    if config.film is not None:
        film = Path(config.film)
        if not film.is_file():
            raise ValueError(f"film {config.film!r} does not exist; pass the path of a video file or leave `film` out")
        values["film_bytes"] = film.stat().st_size
    return values


def _clear(root: Path) -> None:
    for name in ("videos", "images", "samples", "held_out", "encoder", "tokenizer"):
        shutil.rmtree(root / name, ignore_errors=True)
    for name in ("manifest.parquet", "truth.parquet", FINISHED_FILE, FILM_FILE):
        (root / name).unlink(missing_ok=True)


def _make(config: CorpusConfig, root: Path) -> CorpusReport:
    started = time.monotonic()
    for name in ("videos", "images", "samples", "held_out"):
        (root / name).mkdir(parents=True)
    film, film_segments_by_split = _prepare_film(config, root)
    scenes = {split: list(_scenes(config, split, film_segments_by_split)) for split in ("train", "held_out")}
    all_scenes = [*scenes["train"], *scenes["held_out"]]
    pictures = [("png" if n % 2 else "jpg", n) for n in range(config.num_images)]
    with ProcessPoolExecutor(config.num_workers or os.cpu_count(), mp_context=get_context("spawn")) as pool:
        tasks = [
            *(pool.submit(_write_videos, chunk, root / "videos", config, film) for chunk in _chunks(all_scenes)),
            *(pool.submit(_write_images, chunk, root / "images", config) for chunk in _chunks(pictures)),
        ]
        num_samples, num_questions, texts = _write_tables(config, root, scenes)
        _make_tokenizer(config, root, texts)
        _make_encoder(config, root, scenes["train"], film)
        num_bytes = _gather(tasks, len(all_scenes) + len(pictures))
    if film:
        Path(film).unlink()
    report = CorpusReport(
        num_videos=len(all_scenes),
        num_images=len(pictures),
        num_samples=num_samples,
        num_questions=num_questions,
        bytes=num_bytes,
        seconds=round(time.monotonic() - started, 1),
        reused=False,
    )
    logger.info("corpus %s: %d videos, %d images, %.1f s", root, len(all_scenes), len(pictures), report.seconds)
    return report


def _prepare_film(config: CorpusConfig, root: Path) -> tuple[str, dict[Split, list[int]]]:
    """Path of the film's scaled frames (empty without a film), and the film segments of each split."""
    if config.film is None:
        return "", {"train": [], "held_out": []}
    frames = read_film(Path(config.film), config.fps, config.side)
    np.save(root / FILM_FILE, frames)
    return str(root / FILM_FILE), {
        "train": film_segments(len(frames), config.fps, "train"),
        "held_out": film_segments(len(frames), config.fps, "held_out"),
    }


def _scenes(config: CorpusConfig, split: Split, film_segments_by_split: dict[Split, list[int]]) -> Iterator[Scene]:
    counts = config.train if split == "train" else config.held_out
    return draw_scenes(
        split,
        counts.by_kind(),
        duration_seconds=config.duration_seconds,
        seed=config.seed,
        film_segments=film_segments_by_split[split],
        film_share=config.film_share,
    )


def _write_videos(scenes: Sequence[Scene], folder: Path, config: CorpusConfig, film: str) -> tuple[int, int]:
    num_bytes = 0
    for scene in scenes:
        path = folder / f"{scene.media_id}.mp4"
        write_video(
            path, scene_frames(scene, side=config.side, fps=config.fps, film=film), side=config.side, fps=config.fps
        )
        num_bytes += path.stat().st_size
    return len(scenes), num_bytes


def _write_images(images: Sequence[tuple[str, int]], folder: Path, config: CorpusConfig) -> tuple[int, int]:
    num_bytes = 0
    for suffix, number in images:
        rng = np.random.default_rng([config.seed, IMAGE_SEED, number])
        path = folder / f"{image_id(number)}.{suffix}"
        write_image(
            path,
            _image_picture(number),
            draw_placement(rng),
            Background(kind="generated", segments=(int(rng.integers(2**30)) * 2,)),
            side=config.side,
            fps=config.fps,
            film="",
        )
        num_bytes += path.stat().st_size
    return len(images), num_bytes


def _gather(tasks: Sequence[Future[tuple[int, int]]], total: int) -> int:
    num_done = num_bytes = 0
    next_report = total // 5
    for task in as_completed(tasks):
        done, size = task.result()
        num_done, num_bytes = num_done + done, num_bytes + size
        if num_done >= next_report:
            logger.info("corpus: %d of %d videos and images", num_done, total)
            next_report += max(1, total // 5)
    return num_bytes


def _write_tables(
    config: CorpusConfig, root: Path, scenes: dict[str, list[Scene]]
) -> tuple[dict[str, int], dict[str, int], list[str]]:
    """Writes manifest, truth, samples and questions; returns their numbers and all text for the tokenizer."""
    all_scenes = [*scenes["train"], *scenes["held_out"]]
    manifest = [{"uri": f"videos/{scene.media_id}.mp4", "media_id": scene.media_id} for scene in all_scenes]
    manifest += [
        {"uri": f"images/{image_id(n)}.{'png' if n % 2 else 'jpg'}", "media_id": image_id(n)}
        for n in range(config.num_images)
    ]
    _write_rows(root / "manifest.parquet", manifest, schemas.MANIFEST)
    _write_rows(root / "truth.parquet", [_truth(scene) for scene in all_scenes], TRUTH)
    samples = training_samples(config, scenes["train"])
    films = list(long_film_samples(scenes["train"], config.num_long_films, seed=(config.seed, FILM_SEED)))
    for name, rows in (samples | {"long_films": films}).items():
        _write_rows(root / "samples" / f"{name}.parquet", rows, schemas.SAMPLES)
    # not even the tokenizer trains on these
    held_out = _video_samples(config, scenes["held_out"])
    step = max(1, -(-len(held_out) // MAX_HELD_OUT_SAMPLES))
    _write_rows(root / "samples" / "held_out.parquet", held_out[::step], schemas.SAMPLES)
    questions: dict[str, list[dict[str, Any]]] = {task: [] for task in HELD_OUT_TASKS}
    for scene in scenes["held_out"]:
        for n, question in enumerate(scene_questions(scene, _question_rng(config, scene))):
            if question.task in questions:
                row = question_row(f"{scene.media_id}-{n}", question, media_id=scene.media_id)
                questions[question.task].append(row)
    for name, rows in questions.items():
        _write_rows(root / "held_out" / f"{name}.parquet", rows, schemas.QUESTIONS)
    texts = [turn["text"] for rows in samples.values() for row in rows for turn in row["conversation"]]
    return _lengths(samples | {"long_films": films}), _lengths(questions), texts


def training_samples(config: CorpusConfig, scenes: Sequence[Scene]) -> dict[str, list[dict[str, Any]]]:
    """SAMPLES rows of the three training phases: text, images, and the videos of `scenes`."""
    return {
        "language": _language_samples(config),
        "align": [
            sample_row(image_id(n), [image_question(_image_picture(n))], media_id=image_id(n))
            for n in range(config.num_images)
        ],
        "instruct": _video_samples(config, scenes),
    }


def _video_samples(config: CorpusConfig, scenes: Sequence[Scene]) -> list[dict[str, Any]]:
    return [
        sample_row(f"{scene.media_id}-{n}", questions, media_id=scene.media_id)
        for scene in scenes
        for n, questions in enumerate(_conversations(config, scene, num_which=config.which_per_video))
    ]


def _language_samples(config: CorpusConfig) -> list[dict[str, Any]]:
    """Questions about videos described in words, one entry per second, instead of vision tokens."""
    share = config.num_language_samples // 4
    counts: dict[SceneKind, int] = {"needle": share, "order": share, "count": share}
    scenes = draw_scenes(
        "train", counts, duration_seconds=config.duration_seconds, seed=config.seed + 1_000_003 * LANGUAGE_SEED
    )
    rows = []
    for number, scene in enumerate(scenes):
        choices = _conversations(config, scene)
        # one conversation per listing, so that listings do not repeat
        questions = choices[number % len(choices)]
        rows.append(sample_row(f"language-{scene.media_id}", questions, media_id=None, prefix=f"{listing(scene)}\n"))
    for number in range(config.num_language_samples - len(rows)):
        picture = _image_picture(number)
        prefix = f"{picture}\n"
        rows.append(sample_row(f"language-{image_id(number)}", [image_question(picture)], media_id=None, prefix=prefix))
    return rows


def _conversations(config: CorpusConfig, scene: Scene, *, num_which: int = 1) -> list[tuple[Question, ...]]:
    return conversations(scene, _question_rng(config, scene), num_which=num_which)


def _question_rng(config: CorpusConfig, scene: Scene) -> np.random.Generator:
    # seeded by the name: Python's hash() is salted
    return np.random.default_rng([config.seed, QUESTION_SEED, *scene.media_id.encode()])


def _truth(scene: Scene) -> dict[str, Any]:
    return {
        "media_id": scene.media_id,
        "split": scene.split,
        "kind": scene.kind,
        "duration_seconds": float(scene.duration_seconds),
        "background_segments": scene.background.segment_names,
        "appearances": [
            {"picture": str(a.picture), "start_seconds": a.start_seconds, "end_seconds": a.end_seconds}
            for a in scene.appearances
        ],
    }


def _make_tokenizer(config: CorpusConfig, root: Path, texts: Sequence[str]) -> None:
    from timeviper_platform.data.synthetic.tokenizer import save_tokenizer

    save_tokenizer(texts, config.vocab_size, root / "tokenizer")


def _make_encoder(config: CorpusConfig, root: Path, scenes: Sequence[Scene], film: str) -> None:
    # imported here: pool processes import this module and do not need torch or transformers (4 s each)
    import torch

    from timeviper_platform.data.synthetic import encoder as tiny_encoder

    frames, labels = [], []
    for frame, picture in _encoder_frames(config, scenes, film):
        size = (tiny_encoder.IMAGE_SIZE, tiny_encoder.IMAGE_SIZE)
        frames.append(np.asarray(Image.fromarray(frame).resize(size, Image.Resampling.BICUBIC)))
        labels.append(tiny_encoder.picture_label(picture))
    num_threads = torch.get_num_threads()
    torch.set_num_threads(1)  # the pool uses the other cores, and weights do not depend on the thread count
    try:
        model = tiny_encoder.train_encoder(
            np.stack(frames), np.array(labels), steps=config.encoder_steps, seed=config.seed
        )
    finally:
        torch.set_num_threads(num_threads)
    tiny_encoder.save_encoder(model, root / "encoder")


def _encoder_frames(
    config: CorpusConfig, scenes: Sequence[Scene], film: str
) -> Iterator[tuple[np.ndarray, Picture | None]]:
    """16 background frames from every n-th video, most with a picture drawn on them."""
    rng = np.random.default_rng([config.seed, ENCODER_SEED])
    num_frames = config.duration_seconds * config.fps
    for scene in scenes[:: max(1, len(scenes) * 16 // ENCODER_FRAMES)]:
        chosen = set(rng.choice(num_frames, size=16, replace=False).tolist())
        frames = background_frames(scene.background, num_frames, side=config.side, fps=config.fps, film=film)
        for number, frame in enumerate(frames):
            if number not in chosen:
                continue
            picture = ALL_PICTURES[int(rng.integers(len(ALL_PICTURES)))] if rng.random() < 0.8 else None
            if picture is not None:
                draw_picture(frame, picture, draw_placement(rng))
            yield frame, picture


def _write_rows(path: Path, rows: list[dict[str, Any]], schema: Any) -> None:
    table = pa.Table.from_pylist(rows, schema=schema)
    storage.write_atomic(str(path), lambda file: pq.write_table(table, file))


def _lengths(tables: dict[str, list[dict[str, Any]]]) -> dict[str, int]:
    return {name: len(rows) for name, rows in tables.items()}


def image_id(number: int) -> str:
    return f"image-{number:05d}"


def _image_picture(number: int) -> Any:
    return ALL_PICTURES[number % len(ALL_PICTURES)]


def _chunks(items: Iterable[Any]) -> Iterator[list[Any]]:
    iterator = iter(items)
    while chunk := list(islice(iterator, MEDIA_CHUNK)):
        yield chunk

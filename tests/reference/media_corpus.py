"""A synthetic corpus for whole jobs: good and bad media, an encoder and a manifest."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path

import pyarrow as pa
import pyarrow.parquet as pq
import torch
from PIL import Image

from reference.synthetic_media import make_encoder, make_sound, make_video, picture
from timeviper_platform.data.encode.frame_encoder import VisionTowerConfig
from timeviper_platform.data.preprocess.config import ExecutionConfig, PreprocessConfig
from timeviper_platform.data.preprocess.tasks import TaskResult
from timeviper_platform.data.store.reader import FeatureStore

BAD = {
    "cut.mp4": ("probe", "corrupt_file"),
    "empty.mp4": ("probe", "empty_file"),
    "nowhere.mp4": ("probe", "not_found"),
    "sound.mp4": ("probe", "no_video_stream"),
    "text.mp4": ("probe", "unknown_format"),
    "headers.jpg": ("decode_image", "corrupt_file"),
}


def make_corpus(folder: Path) -> None:
    """Writes a film of 66 s, ten clips, two images, bad files, an encoder and a manifest."""
    make_encoder(_new_folder(folder / "encoder"))
    media = _new_folder(folder / "media")
    make_video(media / "film.mp4", range(66 * 8), gop=64)
    for number in range(10):
        make_video(media / f"clip{number}.mp4", range(8 * (1 + number % 3)))
    for number in range(2):
        Image.fromarray(picture(number)).save(media / f"image{number}.jpg", quality=95)
    (media / "empty.mp4").touch()
    (media / "text.mp4").write_text("text")
    make_sound(media / "sound.mp4")
    (media / "cut.mp4").write_bytes((media / "film.mp4").read_bytes()[:3000])
    whole = (media / "image0.jpg").read_bytes()
    (media / "headers.jpg").write_bytes(whole[: whole.index(b"\xff\xda") + 14])  # up to the first coefficient
    names = sorted({path.name for path in media.iterdir()} | {"nowhere.mp4"})
    manifest = pa.table({"uri": [f"media/{name}" for name in names], "media_id": names})
    pq.write_table(manifest, folder / "manifest.parquet")


def _new_folder(folder: Path) -> Path:
    folder.mkdir()
    return folder


def make_config(corpus: Path, output: Path | str, **execution: object) -> PreprocessConfig:
    return PreprocessConfig(
        input=str(corpus / "manifest.parquet"),
        feature_store=str(output),
        encoder=VisionTowerConfig(
            model=str(corpus / "encoder"), num_tokens_per_frame=4, merge_heads=4, encode_batch_frames=8
        ),
        execution=ExecutionConfig(frames_per_file=20, progress_seconds=0.0, **execution),  # type: ignore[arg-type]
    )


def contents(store: str) -> dict[str, bytes]:
    opened = FeatureStore.open(store)
    return {m: opened.read(m).features.view(torch.int16).numpy().tobytes() for m in opened.media_ids}


def no_runner(*_: object) -> Iterator[TaskResult]:
    """A runner for jobs without missing segments."""
    raise AssertionError("there is nothing to do")

"""Every kind of bad input among good ones: one counted row each with stage and type, and no effect on the others."""

from __future__ import annotations

import contextlib
import io
import statistics
import time
from collections.abc import Iterator, Sequence
from pathlib import Path

import pyarrow.parquet as pq
import pytest
import s3fs
from PIL import Image

from reference.faulty_s3 import Faults
from reference.synthetic_media import make_encoder, make_sound, make_video
from timeviper_platform.common import storage
from timeviper_platform.data.encode.frame_encoder import VisionTowerConfig
from timeviper_platform.data.media.container import DecodeError
from timeviper_platform.data.media.probe import probe_media
from timeviper_platform.data.plan.segments import Segment
from timeviper_platform.data.preprocess.config import ExecutionConfig, PreprocessConfig
from timeviper_platform.data.preprocess.run import run_preprocess
from timeviper_platform.data.preprocess.tasks import TaskResult, WriteTask
from timeviper_platform.data.preprocess.worker import WorkerSpec, run_here
from timeviper_platform.data.store.audit import Audit, Outcomes
from timeviper_platform.data.store.reader import FeatureStore
from timeviper_platform.data.store.verify import verify_store

POISON = {
    "truncated.mp4": ("error", "probe", "corrupt_file"),
    "zero.mp4": ("error", "probe", "empty_file"),
    "text.mp4": ("error", "probe", "unknown_format"),
    "sound.mp4": ("error", "probe", "no_video_stream"),
    "lying.mkv": ("partial", "decode_video", "frames_missing"),
    "huge.png": ("error", "probe", "too_many_pixels"),
    "vanished.mp4": ("error", "decode_video", "not_found"),
    "denied.mp4": ("error", "probe", "permission_denied"),
    "unavailable.mp4": ("error", "probe", "read_failed"),
    "nowhere.mp4": ("error", "probe", "not_found"),
}


NUM_GOOD_PER_BAD = 19
"""Makes 5 % of the input bad."""

MAX_CPU_SHARE = 0.02
"""Share of all CPU seconds that bad media may take; waiting for storage takes none."""


def make_poison(folder: Path) -> None:
    film = folder / "film.mkv"
    make_video(film, range(160), gop=8)
    (folder / "lying.mkv").write_bytes(film.read_bytes()[: film.stat().st_size // 2])  # the header states 20 s
    film.unlink()
    make_video(folder / "vanished.mp4", range(16))
    whole = (folder / "vanished.mp4").read_bytes()
    for name in ("denied.mp4", "unavailable.mp4"):
        (folder / name).write_bytes(whole)
    (folder / "truncated.mp4").write_bytes(whole[: len(whole) // 2])
    (folder / "zero.mp4").touch()
    (folder / "text.mp4").write_text("text")
    make_sound(folder / "sound.mp4")
    picture = io.BytesIO()
    Image.new("1", (8192, 8192)).save(picture, "PNG")
    (folder / "huge.png").write_bytes(picture.getvalue())


@pytest.mark.parametrize("num_good", [6, pytest.param(190, marks=[pytest.mark.exhaustive, pytest.mark.timeout(1200)])])
def test_bad_inputs_are_one_row_each_and_good_ones_are_complete(
    bucket: s3fs.S3FileSystem, server: Faults, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, num_good: int
) -> None:
    monkeypatch.setenv(storage.FIRST_WAIT_VARIABLE, "0.01")
    monkeypatch.setattr(s3fs.S3FileSystem, "retries", 2)
    make_encoder(tmp_path / "encoder")
    media = tmp_path / "media"
    media.mkdir()
    make_poison(media)
    for path in media.iterdir():
        bucket.put(str(path), f"bucket/media/{path.name}")
    for number in range(3):
        make_video(tmp_path / f"{number}.mp4", range(8 * (60 + number)), size=(160, 120))
    goods = [f"good{number:03d}.mp4" for number in range(num_good)]
    for number, name in enumerate(goods):
        bucket.put(str(tmp_path / f"{number % 3}.mp4"), f"bucket/media/{name}")
    names = sorted([*(path.name for path in media.iterdir()), *goods, "nowhere.mp4"])
    bucket.pipe("bucket/manifest.csv", "".join(["uri,media_id\n", *(f"media/{n},{n}\n" for n in names)]).encode())
    server.answers = {"denied.mp4": "403 Forbidden", "unavailable.mp4": "503 Slow Down"}

    costs: dict[str, float] = {}  # CPU seconds by medium: each segment is its own task

    def while_one_vanishes(missing: Sequence[Segment], spec: WorkerSpec, _: ExecutionConfig) -> Iterator[TaskResult]:
        bucket.rm("bucket/media/vanished.mp4")
        for result in run_here((WriteTask(segment.segment_id, (segment,)) for segment in missing), spec):
            costs[result.media[0]] = result.decode_cpu_seconds + result.encode_cpu_seconds + result.write_cpu_seconds
            yield result

    config = PreprocessConfig(
        input="s3://bucket/manifest.csv",
        feature_store=str(tmp_path / "store"),
        encoder=VisionTowerConfig(
            model=str(tmp_path / "encoder"), num_tokens_per_frame=4, merge_heads=4, encode_batch_frames=8
        ),
        execution=ExecutionConfig(frames_per_file=16),
    )
    report = run_preprocess(config, run=while_one_vanishes)
    rejects = pq.read_table(tmp_path / "store" / "rejects.parquet").to_pylist()
    assert {row["media_id"]: (row["status"], row["error_stage"], row["error_type"]) for row in rejects} == POISON
    assert len(rejects) == len(POISON)
    assert report.media == Outcomes(planned=num_good + len(POISON), ok=num_good, partial=1, rejected=len(POISON) - 1)
    # planning accepts vanished.mp4 and lying.mkv
    assert report.segments == Outcomes(planned=num_good + 2, ok=num_good, partial=1, rejected=1)
    assert report.retries > 0
    num_counted = sum(number for kinds in report.errors_by_stage.values() for number in kinds.values())
    assert num_counted == len(POISON)
    stored = set(FeatureStore.open(config.feature_store).media_ids)
    assert stored == {n for n in names if n not in POISON} | {"lying.mkv"}
    checked = verify_store(config.feature_store)
    assert (checked.problems, checked.audit) == ([], Audit(report.media, report.segments))
    for name in (goods[0], "denied.mp4"):  # a process imports, and reads its credentials again, once
        with contextlib.suppress(DecodeError):
            probe_media(f"s3://bucket/media/{name}")
    for name in names:
        began = time.process_time()
        with contextlib.suppress(DecodeError):
            probe_media(f"s3://bucket/media/{name}")
        costs[name] = costs.get(name, 0.0) + time.process_time() - began
    bad = sum(costs[name] for name in POISON)
    good = statistics.median(costs[name] for name in goods) * NUM_GOOD_PER_BAD * len(POISON)
    assert bad / (good + bad) <= MAX_CPU_SHARE

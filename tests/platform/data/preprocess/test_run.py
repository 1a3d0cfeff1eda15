"""The whole job without Ray: every medium is stored, or rejected with a reason."""

from __future__ import annotations

import dataclasses
import io
import shutil
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Literal

import av
import pyarrow.parquet as pq
import pytest
import torch

from reference.media_corpus import BAD, make_config, no_runner
from reference.numbered_videos import CASES, expected_cases, numbered_video
from timeviper_platform.common import storage
from timeviper_platform.data.encode.frame_encoder import FrameEncoder, describe_encoder
from timeviper_platform.data.preprocess.config import ExecutionConfig, PreprocessConfig
from timeviper_platform.data.preprocess.estimate import estimate
from timeviper_platform.data.preprocess.run import make_recipe, run_in_process, run_preprocess
from timeviper_platform.data.preprocess.tasks import TaskResult
from timeviper_platform.data.store.inspect import inspect_store
from timeviper_platform.data.store.reader import FeatureStore
from timeviper_platform.data.store.writer import StoreWriter
from timeviper_platform.data.video.reader import read_frames
from timeviper_platform.data.video_worker.frame_source import DecodeConfig


def test_every_medium_is_stored_or_rejected_with_stage_and_type(finished: Path) -> None:
    report = storage.read_json(str(finished / "report.json"))
    rejects = pq.read_table(finished / "rejects.parquet").to_pylist()
    assert {row["media_id"]: (row["error_stage"], row["error_type"]) for row in rejects} == BAD
    assert len(rejects) == report["media"]["rejected"] == len(BAD)
    assert report["errors_by_stage"]["probe"]["empty_file"] == 1
    none = {"partial": 0, "missing": 0, "duplicate": 0}
    assert report["media"] == {"planned": 19, "ok": 13, "rejected": 6, **none}
    assert report["segments"] == {"planned": 15, "ok": 14, "rejected": 1, **none}
    assert report["frames"] == 66 + (1 + 2 + 3) * 3 + 1 + 2
    store = FeatureStore.open(str(finished))
    assert set(store.media_ids) == {"film.mp4", "image0.jpg", "image1.jpg", *(f"clip{n}.mp4" for n in range(10))}
    assert store.info("film.mp4").num_frames == 66
    assert store.info("image0.jpg").modality == "image"


def test_stored_features_equal_those_that_serving_computes(corpus: Path, finished: Path) -> None:
    encoder = FrameEncoder(make_config(corpus, "x").encoder)
    store = FeatureStore.open(str(finished))
    for name in ("film.mp4", "clip1.mp4", "image1.jpg"):
        frames = read_frames(str(corpus / "media" / name), encoder.image_size)
        stored = store.read(name)
        assert torch.equal(encoder.encode(frames.frames).view(torch.int16), stored.features.view(torch.int16))
        assert stored.pts_seconds.tolist() == frames.pts_seconds.tolist()


def test_the_job_stops_when_all_media_fail_for_one_reason_and_keeps_finished_work(corpus: Path, tmp_path: Path) -> None:
    shutil.copytree(corpus / "media", tmp_path / "media")
    config = dataclasses.replace(
        make_config(corpus, tmp_path / "store"),
        input=str(tmp_path / "media" / "clip*.mp4"),
        execution=ExecutionConfig(frames_per_file=3, max_consecutive_failures=3),
    )

    def loses_the_share(*arguments: object) -> Iterator[TaskResult]:
        for number, result in enumerate(run_in_process(*arguments)):  # type: ignore[arg-type]
            yield result
            if number == 0:
                (tmp_path / "media").rename(tmp_path / "away")

    message = r"3 media in a row failed for one reason, decode_video/not_found: check the paths.*no such file"
    with pytest.raises(RuntimeError, match=message):
        run_preprocess(config, run=loses_the_share)
    (tmp_path / "away").rename(tmp_path / "media")
    report = run_preprocess(config, run=run_in_process)
    assert 0 < report.segments_encoded < 10
    assert (report.segments.ok, report.media.rejected) == (10, 0)


def test_a_plan_of_errors_stops_the_job(tmp_path: Path, corpus: Path) -> None:
    manifest = tmp_path / "manifest.csv"
    manifest.write_text("uri\n" + "".join(f"/nowhere/{number}.mp4\n" for number in range(5)))
    config = dataclasses.replace(
        make_config(corpus, tmp_path / "store", max_consecutive_failures=5), input=str(manifest)
    )
    with pytest.raises(RuntimeError, match="5 media in a row failed for one reason, probe/not_found"):
        run_preprocess(config, run=no_runner)
    unlimited = dataclasses.replace(config, execution=ExecutionConfig(max_consecutive_failures=None))
    assert run_preprocess(unlimited, run=no_runner).media.rejected == 5


def test_failed_downloads_are_counted_and_do_not_stop_the_job(tmp_path: Path, corpus: Path) -> None:
    dead = [f"https://a.invalid/{number}.jpg,failed_to_download,HTTP Error 404" for number in range(5)]
    (tmp_path / "m.csv").write_text("\n".join(["url,status,error_message", *dead]))
    config = make_config(corpus, tmp_path / "store", max_consecutive_failures=3)
    report = run_preprocess(dataclasses.replace(config, input=str(tmp_path / "m.csv")), run=no_runner)
    assert report.errors_by_stage == {"download": {"not_found": 5}}


def test_workers_reserve_the_gpus_they_use(corpus: Path, tmp_path: Path) -> None:
    """Without, Ray would start a worker per CPU, all on the first GPU."""
    config = make_config(corpus, tmp_path)
    for device, text in (
        ("cuda", r"encoder.device = 'cuda' and execution.gpus_per_worker = 0: .* set execution.gpus_per_worker: 1 "),
        ("gpu", r"encoder.device = 'gpu' is not a device of torch; use cpu or cuda"),
    ):
        with pytest.raises(ValueError, match=text):
            dataclasses.replace(config, encoder=dataclasses.replace(config.encoder, device=device))


@pytest.mark.parametrize(("mode", "device"), [("split", "cuda"), ("auto", "cuda"), ("fused", "cpu")])
def test_nvdec_requires_the_encoders_gpu_in_the_same_worker(
    corpus: Path, tmp_path: Path, mode: Literal["fused", "split", "auto"], device: str
) -> None:
    config = make_config(corpus, tmp_path)

    def with_nvdec(mode: Literal["fused", "split", "auto"], device: str) -> PreprocessConfig:
        execution = dataclasses.replace(config.execution, mode=mode, gpus_per_worker=1.0)
        encoder = dataclasses.replace(config.encoder, device=device)
        decode = dataclasses.replace(config.decode, backend="nvdec")
        return dataclasses.replace(config, execution=execution, encoder=encoder, decode=decode)

    with pytest.raises(
        ValueError, match=rf"execution\.mode = '{mode}' must be fused .*device = '{device}' must be cuda"
    ):
        with_nvdec(mode, device)
    with_nvdec("fused", "cuda")


def test_a_missing_backend_ends_the_run_before_the_first_file(
    corpus: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setitem(sys.modules, "torchcodec.decoders", None)
    config = dataclasses.replace(make_config(corpus, tmp_path), decode=DecodeConfig(backend="torchcodec"))
    with pytest.raises(RuntimeError, match="backend torchcodec is not installed"):
        run_preprocess(config, run=run_in_process)


def test_an_estimate_writes_nothing(corpus: Path, finished: Path, tmp_path: Path) -> None:
    plan = estimate(make_config(corpus, tmp_path / "store"))
    assert (plan.media, plan.errors, plan.segments, plan.segments_missing) == (19, 5, 15, 15)
    assert plan.feature_bytes == plan.frames_missing * 4 * 16 * 2
    assert plan.errors_by_type == dict.fromkeys((kind for stage, kind in BAD.values() if stage == "probe"), 1)
    assert plan.seconds_at_last_rate is None
    assert plan.calibration is not None
    assert 0 < plan.calibration.frames <= plan.frames_missing
    assert plan.seconds
    assert not (tmp_path / "store").exists()
    done = estimate(make_config(corpus, finished))
    assert (done.segments_missing, done.seconds, done.seconds_at_last_rate) == (0, None, 0)


def test_a_store_that_cannot_be_written_is_an_error_at_the_start(corpus: Path, tmp_path: Path) -> None:
    (tmp_path / "file").write_text("not a folder")
    with pytest.raises(RuntimeError, match="cannot write"):
        run_preprocess(make_config(corpus, tmp_path / "file" / "store"), run=no_runner)


def test_a_store_for_serving_hashes_its_media(corpus: Path, tmp_path: Path) -> None:
    config = dataclasses.replace(
        make_config(corpus, tmp_path / "store"), input=str(corpus / "media" / "clip?.mp4"), hash="sha256"
    )
    run_preprocess(config, run=run_in_process)
    store = FeatureStore.open(config.feature_store)
    for media_id in store.media_ids:
        digest = store.info(media_id).sha256
        assert digest is not None
        assert store.find(digest) is not None


def test_joined_recordings_are_counted_and_read_one_after_the_other(corpus: Path, tmp_path: Path) -> None:
    media = tmp_path / "media"
    media.mkdir()
    for name in ("ts_concat2.ts", "ts_midgop_capture.ts"):
        shutil.copy(CASES / name, media)
    config = dataclasses.replace(make_config(corpus, tmp_path / "store"), input=str(media))
    report = run_preprocess(config, run=run_in_process)
    assert (report.joined_media, report.joined_parts, report.errors_by_stage) == (1, 2, {})
    assert "joined     1 videos hold 2 recordings, read one after the other" in report.lines()
    store = FeatureStore.open(config.feature_store)
    pts = {round(float(store.info(media_id).pts_seconds[-1]), 3) for media_id in store.media_ids}
    assert pts == {expected_cases()[name][-1][1] for name in ("ts_concat2.ts", "ts_midgop_capture.ts")}


def test_reported_damage_makes_a_segment_partial_with_its_frames(corpus: Path, tmp_path: Path) -> None:
    film = bytearray(numbered_video(range(200), format="mp4", gop=50, options={"bf": "0"}))
    with av.open(io.BytesIO(bytes(film))) as container:
        packets = [packet for packet in container.demux(video=0) if packet.size]
    start = packets[60].pos + 8
    film[start : start + 24] = bytes(24)
    (tmp_path / "film.mp4").write_bytes(film)
    config = dataclasses.replace(make_config(corpus, tmp_path / "store"), input=str(tmp_path / "film.mp4"))
    report = run_preprocess(config, run=run_in_process)
    assert report.segments.partial == 1
    rejects = pq.read_table(tmp_path / "store/rejects.parquet").to_pylist()
    assert [(row["status"], row["error_type"], row["frames_missing"]) for row in rejects] == [
        ("partial", "frames_damaged", 0)
    ]
    assert report.frames == 8


def test_a_store_of_an_older_recipe_says_what_changed_and_what_to_do(corpus: Path, tmp_path: Path) -> None:
    config = make_config(corpus, tmp_path / "store")
    recipe = make_recipe(describe_encoder(config.encoder), config)
    StoreWriter.create(config.feature_store, {**recipe, "recipe_version": 2})
    message = r"recipe_version 2 is older than this release's 3 \(3: .*medium's clock.*into a new feature_store"
    for refused in (run_preprocess, estimate):
        with pytest.raises(ValueError, match=message):
            refused(config)
    assert "recipe_version 2 is older" in "\n".join(inspect_store(config.feature_store).lines())
    StoreWriter.create(str(tmp_path / "now"), recipe)
    assert "older" not in "\n".join(inspect_store(str(tmp_path / "now")).lines())

"""The whole job without Ray, and once on the shared cluster: repeatable, byte-identical, and calm about bad files."""

from __future__ import annotations

import contextlib
import dataclasses
import shutil
import sys
import time
import urllib.request
from collections.abc import Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Literal

import pyarrow as pa
import pyarrow.parquet as pq
import pytest
import torch
from PIL import Image

from reference.made_media import make_encoder, make_sound, make_video, picture
from timeviper_platform import storage
from timeviper_platform.data import ray_session as session
from timeviper_platform.data.compact import compact
from timeviper_platform.data.decode import read_frames
from timeviper_platform.data.encode import EncoderConfig, FrameEncoder
from timeviper_platform.data.features import FeatureStore
from timeviper_platform.data.graph import DecodeStep, EncodeStep, ExecutionConfig, units_table
from timeviper_platform.data.media import MediaLimits
from timeviper_platform.data.pipeline import PreprocessConfig, estimate, run_in_process, run_preprocess
from timeviper_platform.data.report import steady_rate
from timeviper_platform.data.segment_frames import DecodeConfig
from timeviper_platform.data.segments import Segment, cut_units
from timeviper_platform.data.steps import UnitOutcome, WorkerSpec, run_here
from timeviper_platform.data.store_check import inspect_store, verify_store

BAD = {
    "cut.mp4": ("probe", "corrupt_file"),
    "empty.mp4": ("probe", "empty_file"),
    "nowhere.mp4": ("probe", "not_found"),
    "sound.mp4": ("probe", "no_video_stream"),
    "text.mp4": ("probe", "unknown_format"),
    "half.jpg": ("decode_image", "corrupt_file"),
}


@pytest.fixture(scope="module")
def corpus(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A film of 66 s, ten clips, two images, six bad files, an encoder and a manifest of all."""
    folder = tmp_path_factory.mktemp("corpus")
    make_encoder(_made(folder / "encoder"))
    media = _made(folder / "media")
    make_video(media / "film.mp4", range(66 * 8), gop=64)
    for number in range(10):
        make_video(media / f"clip{number}.mp4", range(8 * (1 + number % 3)))
    for number in range(2):
        Image.fromarray(picture(number)).save(media / f"image{number}.jpg", quality=95)
    (media / "empty.mp4").touch()
    (media / "text.mp4").write_text("text")
    make_sound(media / "sound.mp4")
    (media / "cut.mp4").write_bytes((media / "film.mp4").read_bytes()[:3000])
    (media / "half.jpg").write_bytes((media / "image0.jpg").read_bytes()[:700])
    names = sorted({path.name for path in media.iterdir()} | {"nowhere.mp4"})
    manifest = pa.table({"uri": [f"media/{name}" for name in names], "media_id": names})
    pq.write_table(manifest, folder / "manifest.parquet")
    return folder


def _made(folder: Path) -> Path:
    folder.mkdir()
    return folder


def make_config(corpus: Path, output: Path | str, **execution: object) -> PreprocessConfig:
    return PreprocessConfig(
        input=str(corpus / "manifest.parquet"),
        output=str(output),
        encoder=EncoderConfig(
            encoder=str(corpus / "encoder"), num_tokens_per_frame=4, merge_heads=4, encode_batch_frames=8
        ),
        execution=ExecutionConfig(frames_per_file=20, progress_seconds=0.0, **execution),  # type: ignore[arg-type]
    )


def contents(store: str) -> dict[str, bytes]:
    opened = FeatureStore.open(store)
    return {m: opened.read(m).features.view(torch.int16).numpy().tobytes() for m in opened.media_ids}


def no_runner(*_: object) -> Iterator[UnitOutcome]:
    raise AssertionError("there is nothing to do")


@pytest.fixture(scope="module")
def finished(corpus: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    output = tmp_path_factory.mktemp("finished") / "store"
    run_preprocess(make_config(corpus, output), run=run_in_process)
    return output


def test_every_medium_is_stored_or_rejected_with_stage_and_type(finished: Path) -> None:
    report = storage.read_json(str(finished / "report.json"))
    rejects = pq.read_table(finished / "rejects.parquet").to_pylist()
    assert {row["media_id"]: (row["error_stage"], row["error_type"]) for row in rejects} == BAD
    assert len(rejects) == report["errors"] == len(BAD)
    assert report["errors_by_stage"]["probe"]["empty_file"] == 1
    assert report["media"] == 19
    assert report["audit"] == {"planned": 15, "ok": 14, "partial": 0, "error": 1, "missing": 0, "duplicate": 0}
    assert report["frames"] == 66 + (1 + 2 + 3) * 3 + 1 + 2
    store = FeatureStore.open(str(finished))
    assert set(store.media_ids) == {"film.mp4", "image0.jpg", "image1.jpg", *(f"clip{n}.mp4" for n in range(10))}
    assert store.info("film.mp4").num_frames == 66
    assert store.info("image0.jpg").modality == "image"


def test_what_is_stored_is_what_serving_would_make(corpus: Path, finished: Path) -> None:
    encoder = FrameEncoder(make_config(corpus, "x").encoder)
    store = FeatureStore.open(str(finished))
    for name in ("film.mp4", "clip1.mp4", "image1.jpg"):
        frames = read_frames(str(corpus / "media" / name), encoder.image_size)
        stored = store.read(name)
        assert torch.equal(encoder.encode(frames.frames).view(torch.int16), stored.features.view(torch.int16))
        assert stored.pts_seconds.tolist() == frames.pts_seconds.tolist()


def test_run_again_nothing_is_done_and_nothing_changes(corpus: Path, finished: Path) -> None:
    before = contents(str(finished))
    report = run_preprocess(make_config(corpus, finished), run=no_runner)
    assert (report.segments_encoded, report.frames_encoded, report.segments_done) == (0, 0, 14)
    assert report.frames_per_second > 0  # of the run that did the work
    assert contents(str(finished)) == before
    assert "encoded in this run: 0" in "\n".join(report.lines())


def test_what_a_lost_data_file_held_is_done_again(corpus: Path, finished: Path, tmp_path: Path) -> None:
    shutil.copytree(finished, tmp_path / "store")
    expected = contents(str(finished))
    next((tmp_path / "store" / "data").iterdir()).unlink()
    config = make_config(corpus, tmp_path / "store")
    lost = estimate(config).segments_missing
    report = run_preprocess(config, run=run_in_process)
    assert report.segments_encoded == lost >= 1
    assert contents(config.output) == expected
    assert verify_store(config.output).problems == []


def test_a_run_that_dies_is_continued_and_ends_with_the_same_bytes(
    corpus: Path, finished: Path, tmp_path: Path
) -> None:
    output = tmp_path / "store"

    def dies_after_two(*arguments: object) -> Iterator[UnitOutcome]:
        for number, outcome in enumerate(run_in_process(*arguments)):  # type: ignore[arg-type]
            if number == 2:
                raise KeyboardInterrupt
            yield outcome

    with pytest.raises(KeyboardInterrupt):
        run_preprocess(make_config(corpus, output), run=dies_after_two)
    committed = sorted((output / "commits").iterdir())
    committed[0].unlink()  # as if killed between the data file and its commit record
    (output / "data" / ".next.parquet.0.tmp").write_bytes(b"half a file")
    report = run_preprocess(make_config(corpus, output), run=run_in_process)
    assert 0 < report.segments_encoded < 15
    assert (report.audit["missing"], report.audit["duplicate"]) == (0, 0)
    assert contents(str(output)) == contents(str(finished))
    assert len(list((output / "data").iterdir())) == len(list((output / "commits").iterdir()))


def test_new_and_changed_media_alone_are_done(corpus: Path, finished: Path, tmp_path: Path) -> None:
    shutil.copytree(corpus, tmp_path / "corpus")
    shutil.copytree(finished, tmp_path / "store")
    moved = tmp_path / "corpus"
    config = make_config(moved, tmp_path / "store")
    first = run_preprocess(config, run=run_in_process)
    make_video(moved / "media" / "clip0.mp4", range(32))
    make_video(moved / "media" / "nowhere.mp4", range(8))
    report = run_preprocess(config, run=run_in_process)
    assert report.segments_encoded == 2
    assert report.errors == first.errors - 1
    store = FeatureStore.open(config.output)
    assert (store.info("clip0.mp4").num_frames, store.info("nowhere.mp4").num_frames) == (4, 1)


def test_an_old_version_is_superseded_and_more_inputs_are_added(corpus: Path, tmp_path: Path) -> None:
    shutil.copytree(corpus / "media", tmp_path / "media")
    config = make_config(corpus, tmp_path / "store")
    some = dataclasses.replace(config, input=str(tmp_path / "media" / "clip[0-4].mp4"))
    every = dataclasses.replace(config, input=str(tmp_path / "media" / "clip?.mp4"))
    run_preprocess(some, run=run_in_process)
    old = contents(config.output)
    make_video(tmp_path / "media" / "clip0.mp4", range(40, 72))
    report = run_preprocess(every, run=run_in_process)
    assert report.segments_encoded == 6  # one changed, five added
    assert (report.segments, report.audit["missing"], report.audit["duplicate"]) == (10, 0, 0)
    new = contents(config.output)
    assert len(new) == 10
    assert sum(new[media_id] != before for media_id, before in old.items()) == 1
    assert inspect_store(config.output).segments_superseded == 1
    assert verify_store(config.output).problems == []
    assert compact(config.output).rows_dropped == 1
    assert contents(config.output) == new
    assert run_preprocess(every, run=no_runner).segments_encoded == 0


@pytest.mark.parametrize("num_workers", [1, 3, 7])
def test_another_number_of_workers_and_other_sizes_go_on_with_the_same_bytes(
    corpus: Path, finished: Path, tmp_path: Path, num_workers: int
) -> None:
    def first_half(missing: Sequence[Segment], spec: WorkerSpec, execution: ExecutionConfig) -> Iterator[UnitOutcome]:
        units = cut_units(missing, execution.frames_per_file, num_workers)
        yield from run_here(units[: len(units) // 2], spec)
        raise KeyboardInterrupt

    config = make_config(corpus, tmp_path / "store")
    with pytest.raises(KeyboardInterrupt):
        run_preprocess(config, run=first_half)
    before = set((tmp_path / "store" / "data").iterdir())
    execution = ExecutionConfig(frames_per_file=7 * num_workers, row_group_bytes=1)
    other = dataclasses.replace(config, execution=execution)
    report = run_preprocess(other, run=run_in_process)
    assert 0 < report.segments_encoded < 15
    written = [pq.read_metadata(path) for path in set((tmp_path / "store" / "data").iterdir()) - before]
    assert max(file.num_row_groups for file in written) > 1  # of a few KB each
    assert (report.audit["missing"], report.audit["duplicate"]) == (0, 0)
    assert contents(config.output) == contents(str(finished))


def test_a_file_that_is_away_for_a_moment_is_tried_again(corpus: Path, tmp_path: Path) -> None:
    shutil.copytree(corpus / "media", tmp_path / "media")
    clip, away = tmp_path / "media" / "clip0.mp4", tmp_path / "away.mp4"
    config = dataclasses.replace(make_config(corpus, tmp_path / "store"), input=str(tmp_path / "media" / "clip*.mp4"))

    def while_away(*arguments: object) -> Iterator[UnitOutcome]:
        clip.rename(away)
        yield from run_in_process(*arguments)  # type: ignore[arg-type]
        away.rename(clip)

    first = run_preprocess(config, run=while_away)
    assert first.errors_by_stage == {"decode_video": {"not_found": 1}}
    second = run_preprocess(config, run=run_in_process)
    assert (second.segments_encoded, second.errors, second.segments_done) == (1, 0, 10)
    assert second.audit["duplicate"] == 0


def test_errors_that_a_higher_limit_cures_are_tried_again_when_named(corpus: Path, tmp_path: Path) -> None:
    """The manifest tells the sizes, too small ones: so the decoder meets the limit, not the plan."""
    clips = pa.table(
        {
            **{"uri": [str(corpus / "media" / f"clip{number}.mp4") for number in range(3)], "size": [1] * 3},
            **{"duration_seconds": [1.0] * 3, "width": [8] * 3, "height": [8] * 3},
        }
    )
    pq.write_table(clips, tmp_path / "told.parquet")
    config = dataclasses.replace(
        make_config(corpus, tmp_path / "store"),
        input=str(tmp_path / "told.parquet"),
        limits=MediaLimits(max_pixels=64),
    )
    first = run_preprocess(config, run=run_in_process)
    assert first.errors_by_stage == {"decode_video": {"too_many_pixels": 3}}
    assert any("retry_errors=[too_many_pixels]" in line for line in first.lines())
    raised = dataclasses.replace(config, limits=MediaLimits())
    assert run_preprocess(raised, run=no_runner).segments_error == 3
    for kinds in (("decoder_timeout",), ("too_many_pixels",), "all"):
        again = dataclasses.replace(raised, retry_errors=kinds)
        expected = 3 if kinds == ("too_many_pixels",) else 0
        assert estimate(again).segments_missing == expected
        report = run_preprocess(again, run=run_in_process if expected else no_runner)
        assert report.segments_encoded == expected
    assert (report.segments_done, report.segments_error, report.errors) == (3, 0, 0)
    assert report.audit == {"planned": 3, "ok": 3, "partial": 0, "error": 0, "missing": 0, "duplicate": 0}
    assert not any("retry_errors" in line for line in report.lines())
    assert len(FeatureStore.open(config.output).media_ids) == 3
    assert pq.read_table(tmp_path / "store" / "rejects.parquet").num_rows == 0
    assert verify_store(config.output).problems == []
    with pytest.raises(ValueError, match=r"retry_errors: there is no to_many; name some of not_found, .*or say all"):
        dataclasses.replace(config, retry_errors=("to_many",))


def test_the_job_stops_when_every_medium_fails_for_one_reason_and_keeps_what_is_done(
    corpus: Path, tmp_path: Path
) -> None:
    shutil.copytree(corpus / "media", tmp_path / "media")
    config = dataclasses.replace(
        make_config(corpus, tmp_path / "store"),
        input=str(tmp_path / "media" / "clip*.mp4"),
        execution=ExecutionConfig(frames_per_file=3, max_consecutive_failures=3),
    )

    def loses_the_share(*arguments: object) -> Iterator[UnitOutcome]:
        for number, outcome in enumerate(run_in_process(*arguments)):  # type: ignore[arg-type]
            yield outcome
            if number == 0:
                (tmp_path / "media").rename(tmp_path / "away")

    message = r"3 media in a row failed for one reason, decode_video/not_found: are the paths right.*no such file"
    with pytest.raises(RuntimeError, match=message):
        run_preprocess(config, run=loses_the_share)
    (tmp_path / "away").rename(tmp_path / "media")
    report = run_preprocess(config, run=run_in_process)
    assert 0 < report.segments_encoded < 10
    assert (report.segments_done, report.errors) == (10, 0)


def test_a_plan_of_nothing_but_errors_stops_the_job(tmp_path: Path, corpus: Path) -> None:
    manifest = tmp_path / "manifest.csv"
    manifest.write_text("uri\n" + "".join(f"/nowhere/{number}.mp4\n" for number in range(5)))
    config = dataclasses.replace(
        make_config(corpus, tmp_path / "store", max_consecutive_failures=5), input=str(manifest)
    )
    with pytest.raises(RuntimeError, match="5 media in a row failed for one reason, probe/not_found"):
        run_preprocess(config, run=no_runner)
    calm = dataclasses.replace(config, execution=ExecutionConfig(max_consecutive_failures=None))
    assert run_preprocess(calm, run=no_runner).errors == 5


def test_links_that_a_downloader_found_dead_are_counted_and_do_not_stop_the_job(tmp_path: Path, corpus: Path) -> None:
    dead = [f"https://a.invalid/{number}.jpg,failed_to_download,HTTP Error 404" for number in range(5)]
    (tmp_path / "m.csv").write_text("\n".join(["url,status,error_message", *dead]))
    config = make_config(corpus, tmp_path / "store", max_consecutive_failures=3)
    report = run_preprocess(dataclasses.replace(config, input=str(tmp_path / "m.csv")), run=no_runner)
    assert report.errors_by_stage == {"download": {"not_found": 5}}


@pytest.mark.parametrize(("mode", "device"), [("split", "cuda"), ("auto", "cuda"), ("fused", "cpu")])
def test_nvdec_wants_the_encoders_gpu_in_the_same_worker(
    corpus: Path, tmp_path: Path, mode: Literal["fused", "split", "auto"], device: str
) -> None:
    config = make_config(corpus, tmp_path)

    def with_nvdec(mode: Literal["fused", "split", "auto"], device: str) -> PreprocessConfig:
        execution = dataclasses.replace(config.execution, mode=mode)
        encoder = dataclasses.replace(config.encoder, device=device)
        decode = dataclasses.replace(config.decode, backend="nvdec")
        return dataclasses.replace(config, execution=execution, encoder=encoder, decode=decode)

    with pytest.raises(ValueError, match=rf"execution\.mode = '{mode}' must be fused .*device = '{device}' cuda"):
        with_nvdec(mode, device)
    with_nvdec("fused", "cuda")


def test_a_run_without_its_backend_ends_before_the_first_file(
    corpus: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setitem(sys.modules, "torchcodec.decoders", None)
    config = dataclasses.replace(make_config(corpus, tmp_path), decode=DecodeConfig(backend="torchcodec"))
    with pytest.raises(RuntimeError, match="backend torchcodec is not installed"):
        run_preprocess(config, run=run_in_process)


def test_another_recipe_is_refused_with_the_difference(corpus: Path, finished: Path) -> None:
    config = make_config(corpus, finished)
    other = dataclasses.replace(config, encoder=dataclasses.replace(config.encoder, num_tokens_per_frame=2))
    with pytest.raises(ValueError, match=r"merge\.num_tokens_per_frame: the store has 4, this run 2"):
        run_preprocess(other, run=no_runner)
    with pytest.raises(ValueError, match="num_tokens_per_frame"):
        estimate(other)


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


def test_an_output_that_cannot_be_written_is_said_at_once(corpus: Path, tmp_path: Path) -> None:
    (tmp_path / "file").write_text("not a folder")
    with pytest.raises(RuntimeError, match="cannot write"):
        run_preprocess(make_config(corpus, tmp_path / "file" / "store"), run=no_runner)


def test_a_store_that_is_served_hashes_its_media(corpus: Path, tmp_path: Path) -> None:
    config = dataclasses.replace(
        make_config(corpus, tmp_path / "store"), input=str(corpus / "media" / "clip?.mp4"), hash="sha256"
    )
    run_preprocess(config, run=run_in_process)
    store = FeatureStore.open(config.output)
    for media_id in store.media_ids:
        digest = store.info(media_id).sha256
        assert digest is not None
        assert store.find(digest) is not None


@pytest.mark.parametrize(
    "bounds", [(0, None, None), (None, None, 0), (3, None, 2), (None, 3, 2), (2, 1, None), (1, 2, 1)]
)
def test_a_pool_that_cannot_be_is_refused(bounds: tuple[int | None, int | None, int | None]) -> None:
    fewest, first, most = bounds
    with pytest.raises(ValueError, match=r"<= self\.num_workers = .* must hold"):
        ExecutionConfig(min_workers=fewest, initial_workers=first, num_workers=most)
    assert ExecutionConfig(min_workers=1, initial_workers=2, num_workers=2).num_workers == 2


def test_all_rays_that_a_process_starts_have_one_token(monkeypatch: pytest.MonkeyPatch) -> None:
    started = []

    @contextlib.contextmanager
    def cluster(*, token_file: Path, **_: object) -> Iterator[dict[str, str]]:
        started.append(token_file.read_text())
        yield {}

    monkeypatch.setattr(session, "has_cluster", lambda: False)
    monkeypatch.setattr(session, "local_cluster", cluster)
    monkeypatch.setattr(session, "_connection", contextlib.nullcontext)
    for _ in range(2):
        with session.ray_session():
            pass
    assert len(started) == 2
    assert len(set(started)) == 1


def test_split_steps_hand_over_frames_errors_and_rows_unchanged(corpus: Path, finished: Path, tmp_path: Path) -> None:
    def run_split(missing: Sequence[Segment], spec: WorkerSpec, execution: ExecutionConfig) -> Iterator[UnitOutcome]:
        decode, encode = DecodeStep(spec), EncodeStep(spec)
        units = cut_units(missing, execution.frames_per_file, num_workers=1)
        with ThreadPoolExecutor(2) as pool:  # as Ray calls it
            for table in pool.map(encode, [decode(units_table([unit])) for unit in units]):
                yield from (UnitOutcome(**row) for row in table.to_pylist())

    config = make_config(corpus, tmp_path / "store")
    report = run_preprocess(config, run=run_split)
    assert (report.segments_done, report.segments_error, report.errors) == (14, 1, len(BAD))
    assert contents(config.output) == contents(str(finished))


def test_the_steady_rate_leaves_the_ends_out() -> None:
    slow_start = [made_outcome(0, 20, 0), made_outcome(20, 80, 600), made_outcome(80, 100, 0)]
    assert steady_rate(slow_start) == pytest.approx(10.0)
    assert steady_rate([]) == 0.0


def made_outcome(started: float, ended: float, num_frames: int, error_types: list[str] | None = None) -> UnitOutcome:
    return UnitOutcome(
        unit="u", num_frames=num_frames, num_ok=2 - len(error_types or []), num_partial=0,
        num_error=len(error_types or []), error_types=error_types or [], feature_bytes=0, decode_seconds=0.0,
        encode_seconds=0.0, write_seconds=0.0, started=started, ended=ended, worker="w", decoder="w", encoder="w",
        media=[], reasons=[], last_error="", retries=0,
    )  # fmt: skip


def exported(port: int, name: str, expected: float) -> float:
    """Sum of a metric's samples, waited for: Ray exports every few seconds."""
    deadline = time.monotonic() + 60
    total = 0.0
    while time.monotonic() < deadline and total != expected:
        time.sleep(0.5)
        with urllib.request.urlopen(f"http://127.0.0.1:{port}/metrics", timeout=10) as answer:
            lines = answer.read().decode().splitlines()
        total = sum(float(x.rpartition(" ")[2]) for x in lines if x.startswith((name + "{", name + "_total{")))
    return total


@pytest.mark.cluster
def test_on_ray_the_same_bytes_and_nothing_the_second_time(
    corpus: Path, finished: Path, tmp_path: Path, ray_address: str
) -> None:
    import ray

    ray.init(log_to_driver=False)  # the run leaves a connection alone that was there before
    config = make_config(corpus, tmp_path / "store", num_workers=2, min_workers=1)
    report = run_preprocess(config)
    assert report.share_of_ideal > 0
    assert report.workers["decode"] in (1, 2)  # so little work may all be done before the second has started
    port = ray.nodes()[0]["MetricsExportPort"]
    assert exported(port, "ray_timeviper_preprocess_frames", report.frames_encoded) == report.frames_encoded
    assert (report.segments_done, report.segments_error, report.errors) == (14, 1, len(BAD))
    assert report.audit["missing"] == report.audit["duplicate"] == 0
    assert contents(config.output) == contents(str(finished))
    assert run_preprocess(config, run=no_runner).segments_encoded == 0


@pytest.mark.cluster
@pytest.mark.slow
@pytest.mark.parametrize("mode", ["split", "auto"])
def test_split_steps_on_ray_give_the_same_bytes(
    corpus: Path, finished: Path, tmp_path: Path, ray_address: str, mode: str
) -> None:
    config = make_config(corpus, tmp_path / "store", mode=mode, num_workers=1, num_decode_workers=1)
    assert run_preprocess(config).segments_done == 14
    assert contents(config.output) == contents(str(finished))


@pytest.mark.parametrize("mode", ["split", "auto"])
def test_too_many_frames_for_a_split_block_are_refused(
    corpus: Path, tmp_path: Path, mode: Literal["split", "auto"]
) -> None:
    config = make_config(corpus, tmp_path / "large")
    config = dataclasses.replace(config, execution=ExecutionConfig(mode=mode, frames_per_file=10**7))
    with pytest.raises(ValueError, match="in modes split and auto at most"):
        run_preprocess(config)

"""Repeated runs: no duplicates, no losses and the same bytes, whatever ended the previous run or changed since."""

from __future__ import annotations

import dataclasses
import shutil
from collections.abc import Iterator, Sequence
from pathlib import Path

import pyarrow as pa
import pyarrow.parquet as pq
import pytest

from reference.media_corpus import contents, make_config, no_runner
from reference.synthetic_media import make_video
from timeviper_platform.data.media.container import MediaLimits
from timeviper_platform.data.plan.segments import Segment
from timeviper_platform.data.preprocess.config import ExecutionConfig
from timeviper_platform.data.preprocess.estimate import estimate
from timeviper_platform.data.preprocess.run import run_in_process, run_preprocess
from timeviper_platform.data.preprocess.tasks import TaskResult, cut_tasks
from timeviper_platform.data.preprocess.worker import WorkerSpec, run_here
from timeviper_platform.data.store.compact import compact
from timeviper_platform.data.store.inspect import inspect_store
from timeviper_platform.data.store.reader import FeatureStore
from timeviper_platform.data.store.verify import verify_store


def test_a_second_run_does_nothing_and_changes_nothing(corpus: Path, finished: Path) -> None:
    before = contents(str(finished))
    report = run_preprocess(make_config(corpus, finished), run=no_runner)
    assert (report.segments_encoded, report.frames_encoded, report.segments.ok) == (0, 0, 14)
    assert report.frames_per_second > 0  # of the previous run
    assert contents(str(finished)) == before
    assert "encoded in this run: 0" in "\n".join(report.lines())


def test_segments_of_a_lost_data_file_are_processed_again(corpus: Path, finished: Path, tmp_path: Path) -> None:
    shutil.copytree(finished, tmp_path / "store")
    expected = contents(str(finished))
    next((tmp_path / "store" / "data").iterdir()).unlink()
    config = make_config(corpus, tmp_path / "store")
    lost = estimate(config).segments_missing
    report = run_preprocess(config, run=run_in_process)
    assert report.segments_encoded == lost >= 1
    assert contents(config.feature_store) == expected
    assert verify_store(config.feature_store).problems == []


def test_a_run_after_a_crash_ends_with_the_same_bytes(corpus: Path, finished: Path, tmp_path: Path) -> None:
    output = tmp_path / "store"

    def dies_after_two(*arguments: object) -> Iterator[TaskResult]:
        for number, result in enumerate(run_in_process(*arguments)):  # type: ignore[arg-type]
            if number == 2:
                raise KeyboardInterrupt
            yield result

    with pytest.raises(KeyboardInterrupt):
        run_preprocess(make_config(corpus, output), run=dies_after_two)
    committed = sorted((output / "commits").iterdir())
    committed[0].unlink()  # as if killed between the data file and its commit record
    (output / "data" / ".next.parquet.0.tmp").write_bytes(b"half a file")
    report = run_preprocess(make_config(corpus, output), run=run_in_process)
    assert 0 < report.segments_encoded < 15
    assert (report.segments.missing, report.segments.duplicate) == (0, 0)
    assert contents(str(output)) == contents(str(finished))
    assert len(list((output / "data").iterdir())) == len(list((output / "commits").iterdir()))


def test_only_new_and_changed_media_are_processed(corpus: Path, finished: Path, tmp_path: Path) -> None:
    shutil.copytree(corpus, tmp_path / "corpus")
    shutil.copytree(finished, tmp_path / "store")
    moved = tmp_path / "corpus"
    config = make_config(moved, tmp_path / "store")
    first = run_preprocess(config, run=run_in_process)
    make_video(moved / "media" / "clip0.mp4", range(32))
    make_video(moved / "media" / "nowhere.mp4", range(8))
    report = run_preprocess(config, run=run_in_process)
    assert report.segments_encoded == 2
    assert report.media.rejected == first.media.rejected - 1
    store = FeatureStore.open(config.feature_store)
    assert (store.info("clip0.mp4").num_frames, store.info("nowhere.mp4").num_frames) == (4, 1)


def test_a_changed_medium_supersedes_its_old_version_and_inputs_can_be_added(corpus: Path, tmp_path: Path) -> None:
    shutil.copytree(corpus / "media", tmp_path / "media")
    config = make_config(corpus, tmp_path / "store")
    some = dataclasses.replace(config, input=str(tmp_path / "media" / "clip[0-4].mp4"))
    every = dataclasses.replace(config, input=str(tmp_path / "media" / "clip?.mp4"))
    run_preprocess(some, run=run_in_process)
    old = contents(config.feature_store)
    make_video(tmp_path / "media" / "clip0.mp4", range(40, 72))
    report = run_preprocess(every, run=run_in_process)
    assert report.segments_encoded == 6  # one changed, five added
    assert (report.segments.planned, report.segments.missing, report.segments.duplicate) == (10, 0, 0)
    new = contents(config.feature_store)
    assert len(new) == 10
    assert sum(new[media_id] != before for media_id, before in old.items()) == 1
    assert inspect_store(config.feature_store).segments_superseded == 1
    assert verify_store(config.feature_store).problems == []
    assert compact(config.feature_store).rows_dropped == 1
    assert contents(config.feature_store) == new
    assert run_preprocess(every, run=no_runner).segments_encoded == 0


@pytest.mark.parametrize(
    "num_workers", [pytest.param(1, marks=pytest.mark.slow), 3, pytest.param(7, marks=pytest.mark.slow)]
)
def test_a_run_with_other_workers_and_file_sizes_ends_with_the_same_bytes(
    corpus: Path, finished: Path, tmp_path: Path, num_workers: int
) -> None:
    def first_half(missing: Sequence[Segment], spec: WorkerSpec, execution: ExecutionConfig) -> Iterator[TaskResult]:
        tasks = list(cut_tasks(missing, execution.frames_per_file, num_workers))
        yield from run_here(tasks[: len(tasks) // 2], spec)
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
    assert (report.segments.missing, report.segments.duplicate) == (0, 0)
    assert contents(config.feature_store) == contents(str(finished))


def test_a_file_that_was_missing_during_a_run_is_tried_again(corpus: Path, tmp_path: Path) -> None:
    shutil.copytree(corpus / "media", tmp_path / "media")
    clip, away = tmp_path / "media" / "clip0.mp4", tmp_path / "away.mp4"
    config = dataclasses.replace(make_config(corpus, tmp_path / "store"), input=str(tmp_path / "media" / "clip*.mp4"))

    def while_away(*arguments: object) -> Iterator[TaskResult]:
        clip.rename(away)
        yield from run_in_process(*arguments)  # type: ignore[arg-type]
        away.rename(clip)

    first = run_preprocess(config, run=while_away)
    assert first.errors_by_stage == {"decode_video": {"not_found": 1}}
    second = run_preprocess(config, run=run_in_process)
    assert (second.segments_encoded, second.media.rejected, second.segments.ok) == (1, 0, 10)
    assert second.segments.duplicate == 0


def test_named_error_types_are_tried_again_after_a_limit_was_raised(corpus: Path, tmp_path: Path) -> None:
    """The manifest states sizes that are too small, so that the decoder hits the limit, not the plan."""
    clips = pa.table(
        {
            **{"uri": [str(corpus / "media" / f"clip{number}.mp4") for number in range(3)], "size": [1] * 3},
            **{"duration_seconds": [1.0] * 3, "width": [8] * 3, "height": [8] * 3},
        }
    )
    pq.write_table(clips, tmp_path / "sizes.parquet")
    config = dataclasses.replace(
        make_config(corpus, tmp_path / "store"),
        input=str(tmp_path / "sizes.parquet"),
        limits=MediaLimits(max_pixels=64),
    )
    first = run_preprocess(config, run=run_in_process)
    assert first.errors_by_stage == {"decode_video": {"too_many_pixels": 3}}
    assert any("retry_errors=[too_many_pixels]" in line for line in first.lines())
    raised = dataclasses.replace(config, limits=MediaLimits())
    assert run_preprocess(raised, run=no_runner).segments.rejected == 3
    for kinds in (("decoder_timeout",), ("too_many_pixels",), "all"):
        again = dataclasses.replace(raised, retry_errors=kinds)
        expected = 3 if kinds == ("too_many_pixels",) else 0
        assert estimate(again).segments_missing == expected
        report = run_preprocess(again, run=run_in_process if expected else no_runner)
        assert report.segments_encoded == expected
    assert (report.segments.ok, report.segments.rejected, report.media.rejected) == (3, 0, 0)
    assert str(report.segments) == "3 planned = 3 ok + 0 partial + 0 rejected"
    assert not any("retry_errors" in line for line in report.lines())
    assert len(FeatureStore.open(config.feature_store).media_ids) == 3
    assert pq.read_table(tmp_path / "store" / "rejects.parquet").num_rows == 0
    assert verify_store(config.feature_store).problems == []
    with pytest.raises(ValueError, match=r"retry_errors: unknown error types to_many; use all, or some of not_found, "):
        dataclasses.replace(config, retry_errors=("to_many",))


def test_another_recipe_is_refused_and_the_difference_named(corpus: Path, finished: Path) -> None:
    config = make_config(corpus, finished)
    other = dataclasses.replace(config, encoder=dataclasses.replace(config.encoder, num_tokens_per_frame=2))
    with pytest.raises(ValueError, match=r"merge\.num_tokens_per_frame: the store has 4, this run 2"):
        run_preprocess(other, run=no_runner)
    with pytest.raises(ValueError, match="num_tokens_per_frame"):
        estimate(other)

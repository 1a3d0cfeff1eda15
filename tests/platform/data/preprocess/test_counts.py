"""Media, segments and frames are counted once, with the same words wherever they are shown."""

from __future__ import annotations

import dataclasses
import logging
from pathlib import Path

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
import torch

from reference.media_corpus import make_config, no_runner
from reference.synthetic_media import make_video
from reference.synthetic_store import error_row, segment_row
from timeviper_platform.common import storage
from timeviper_platform.common.schemas import INDEX
from timeviper_platform.data.preprocess.repeats import NUM_NAMED, RepeatingMedium, Repeats
from timeviper_platform.data.preprocess.run import run_in_process, run_preprocess
from timeviper_platform.data.store.audit import Outcomes, audit
from timeviper_platform.data.store.inspect import inspect_store
from timeviper_platform.data.store.reader import FeatureStore
from timeviper_platform.data.store.verify import verify_store


@pytest.fixture(scope="module")
def media(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A clip, slides that change every three seconds, half of a film, and text."""
    folder = tmp_path_factory.mktemp("media")
    make_video(folder / "clip.mp4", range(24))
    make_video(folder / "slides.mkv", range(0, 10 * 24, 24), b_frames=0)
    make_video(folder / "half.mkv", range(160), gop=8)
    whole = (folder / "half.mkv").read_bytes()
    (folder / "half.mkv").write_bytes(whole[: len(whole) // 2])
    (folder / "text.mp4").write_text("text")
    return folder


def test_report_progress_metrics_and_checks_count_alike(
    media: Path, corpus: Path, tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    caplog.set_level(logging.INFO)
    config = dataclasses.replace(make_config(corpus, tmp_path / "store"), input=str(media))
    report = run_preprocess(config, run=run_in_process)
    assert str(report.media) == "4 planned = 2 ok + 1 partial + 1 rejected"
    assert str(report.segments) == "3 planned = 2 ok + 1 partial + 0 rejected"
    assert report.errors_by_stage == {"decode_video": {"frames_missing": 1}, "probe": {"unknown_format": 1}}
    text = "\n".join(report.lines())
    assert f"media      {report.media}; reasons: 1 frames_missing (decode_video), 1 unknown_format (probe)" in text
    assert f"segments   {report.segments}; " in text
    assert f"3/3 segments (100%): {report.segments.parts()} (1 frames_missing); " in caplog.text
    checked = verify_store(config.feature_store)
    assert checked.audit is not None
    assert (checked.audit.media, checked.audit.segments) == (report.media, report.segments)
    assert f"media      {report.media}" in checked.lines()
    stored = inspect_store(config.feature_store)
    assert (stored.media.parts(), stored.segments) == ("2 ok + 1 partial + 0 rejected", report.segments)
    assert stored.reasons == report.errors_by_stage
    file = storage.read_json(str(tmp_path / "store" / "report.json"))
    for name, counts in (("media", report.media), ("segments", report.segments)):
        assert file[name] == dataclasses.asdict(counts)
    store = FeatureStore.open(config.feature_store)
    assert report.frames == sum(store.info(media_id).num_frames for media_id in store.media_ids)
    missing = pq.read_table(tmp_path / "store" / "index.parquet")["frames_missing"].to_pylist()
    assert report.frames_missing == sum(missing) > 0


def test_frames_that_repeat_the_one_before_are_counted_named_and_warned_of(
    media: Path, corpus: Path, tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    config = dataclasses.replace(make_config(corpus, tmp_path / "store"), input=str(media / "*.m*"))
    report = run_preprocess(config, run=run_in_process)
    store = FeatureStore.open(config.feature_store)
    repeated = {m: int((np.diff(store.info(m).pts_seconds) == 0).sum()) for m in store.media_ids}
    (slides,) = [media_id for media_id, count in repeated.items() if count]
    assert repeated[slides] >= 18  # two of three frames
    assert (report.frames_repeated, report.media_repeating) == (repeated[slides], 1)
    share = repeated[slides] / store.info(slides).num_frames
    assert [(medium.media_id, medium.repeated) for medium in report.most_repeating] == [(slides, repeated[slides])]
    expected = f"repeats    {repeated[slides]} frames ({repeated[slides] / report.frames:.0%}) repeat the one before"
    assert f"{expected}; 1 media repeat most, such as {media / 'slides.mkv'} ({share:.0%})" in report.lines()
    warning = f"{repeated[slides]} of {report.frames} stored frames repeat the one before: "
    assert warning in caplog.text
    caplog.clear()
    resumed = run_preprocess(config, run=no_runner)  # by the rows, not by what this run saw
    assert (resumed.frames_repeated, resumed.most_repeating) == (report.frames_repeated, report.most_repeating)
    assert warning in caplog.text
    caplog.clear()
    quiet = dataclasses.replace(config, execution=dataclasses.replace(config.execution, warn_repeated_share=0.9))
    assert run_preprocess(quiet, run=no_runner).most_repeating == []
    assert "repeat the one before" not in caplog.text


def test_a_share_of_repeated_frames_is_within_0_and_1(corpus: Path, tmp_path: Path) -> None:
    with pytest.raises(ValueError, match=r"warn_repeated_share = 1.5 must be within 0 and 1"):
        make_config(corpus, tmp_path, warn_repeated_share=1.5)


def index_of(*rows: dict[str, object]) -> pa.Table:
    place = {"file": "f", "row_group": 0, "row_in_group": 0}
    return pa.Table.from_pylist([{**row, **place} for row in rows], schema=INDEX)


def with_pts(media_id: str, index: int, pts: list[float]) -> dict[str, object]:
    return segment_row(media_id, index, 2, torch.zeros(len(pts), 2, 4), frame_pts_seconds=pts)


def test_repeats_are_counted_across_segments_but_not_across_media() -> None:
    repeats = Repeats(max_share=0.3)
    repeats.add(
        index_of(
            with_pts("a", 0, [0.0, 0.0, 1.0]),
            with_pts("a", 1, [1.0, 2.0]),  # its first repeats the last of segment 0
            with_pts("b", 0, [2.0, 3.0, 4.0, 4.0]),  # its first shows another medium
            error_row("c"),
        )
    )
    assert (repeats.frames, repeats.media) == (3, 1)
    assert repeats.worst == [RepeatingMedium(2, 5, "a", "/a.mp4")]
    for number in range(9):
        repeats.add(index_of(with_pts(f"m{number}", 0, [0.0] * (number + 1))))
    assert [medium.media_id for medium in repeats.worst] == ["m8", "m7", "m6", "m5", "m4"]
    assert (len(repeats.worst), repeats.media) == (NUM_NAMED, 1 + 8)


@pytest.mark.parametrize(
    ("statuses", "expected"),
    [
        (["ok", "ok"], "1 ok + 0 partial + 0 rejected"),
        (["ok", "partial"], "0 ok + 1 partial + 0 rejected"),
        (["ok", "error"], "0 ok + 1 partial + 0 rejected"),
        (["error", "error"], "0 ok + 0 partial + 1 rejected"),
        (["ok", None], "0 ok + 0 partial + 0 rejected + 1 missing"),
    ],
)
def test_a_medium_is_rejected_only_if_nothing_of_it_is_stored(statuses: list[str | None], expected: str) -> None:
    planned = pa.table({"media_id": ["m", "m"], "segment_id": ["0", "1"], "status": ["planned", "planned"]})
    there = [(str(number), status) for number, status in enumerate(statuses) if status is not None]
    committed = pa.table({"segment_id": [name for name, _ in there], "status": [status for _, status in there]})
    found = audit(planned, committed)
    assert found.media.parts() == expected
    assert found.segments == Outcomes.of(statuses)


def test_a_repaired_segment_replaces_its_error_and_two_good_ones_are_a_duplicate() -> None:
    planned = pa.table({"media_id": ["m"], "segment_id": ["0"], "status": ["planned"]})
    repaired = audit(planned, pa.table({"segment_id": ["0", "0"], "status": ["error", "partial"]}))
    assert repaired.segments == Outcomes(planned=1, partial=1)
    twice = audit(planned, pa.table({"segment_id": ["0", "0"], "status": ["partial", "ok"]}))
    assert twice.segments == Outcomes(planned=1, ok=1, duplicate=1)
    assert str(twice.segments) == "1 planned = 1 ok + 0 partial + 0 rejected; 1 duplicate"

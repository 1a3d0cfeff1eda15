"""Every case of tests/reference/cases through the whole job: the right frames at the right times, or a reject."""

from __future__ import annotations

import dataclasses
import json
from collections import defaultdict
from collections.abc import Iterator, Sequence
from pathlib import Path

import numpy as np
import pyarrow.parquet as pq
import pytest
import torch

from reference.painted_numbers import read_number
from reference.synthetic_media import make_encoder
from timeviper_platform.data.encode.frame_encoder import VisionTowerConfig
from timeviper_platform.data.media.container import DecodeError
from timeviper_platform.data.plan.segments import Segment
from timeviper_platform.data.preprocess.config import ExecutionConfig, PreprocessConfig
from timeviper_platform.data.preprocess.report import PreprocessReport
from timeviper_platform.data.preprocess.run import run_in_process, run_preprocess
from timeviper_platform.data.preprocess.segment_rows import SegmentDecoder
from timeviper_platform.data.store.reader import FeatureStore, MediaInfo
from timeviper_platform.data.video_worker.frame_source import DecodeResult

CASES = Path(__file__).parents[3] / "reference" / "cases"
EXPECTED: dict[str, list[tuple[float, float, int]]] = json.loads((CASES / "media" / "expected.json").read_text())


@pytest.fixture(scope="module")
def encoder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return make_encoder(tmp_path_factory.mktemp("encoder"))


def config_of(source: Path, encoder: Path, store: Path) -> PreprocessConfig:
    return PreprocessConfig(
        input=str(source),
        feature_store=str(store),
        encoder=VisionTowerConfig(model=str(encoder), num_tokens_per_frame=4, merge_heads=4, encode_batch_frames=8),
        execution=ExecutionConfig(num_workers=2, frames_per_file=64),
    )


@pytest.fixture
def decoded(monkeypatch: pytest.MonkeyPatch) -> dict[str, list[np.ndarray]]:
    """File name -> frames that the job decoded, in order."""
    found: dict[str, list[np.ndarray]] = defaultdict(list)
    decode = SegmentDecoder.decode

    def noted(self: SegmentDecoder, segments: Sequence[Segment]) -> Iterator[DecodeResult]:
        for segment, result in zip(segments, decode(self, segments), strict=True):
            if not isinstance(result.frames, DecodeError):
                found[Path(segment.uri).name] += list(result.frames.frames)
            yield result

    monkeypatch.setattr(SegmentDecoder, "decode", noted)
    return found


def stored_media(config: PreprocessConfig) -> dict[str, MediaInfo]:
    """File name -> medium, all of whose features are there."""
    store = FeatureStore.open(config.feature_store)
    for media_id in store.media_ids:
        features = store.read(media_id).features
        assert features.shape == (store.info(media_id).num_frames, 4, 16)
        assert bool(torch.isfinite(features.float()).all())
        assert bool((features.float().abs().sum(dim=(1, 2)) > 0).all())
    return {Path(info.uri).name: info for info in map(store.info, store.media_ids)}


def assert_expected_times(report: PreprocessReport, media: dict[str, MediaInfo]) -> None:
    assert str(report.media) == f"{len(EXPECTED)} planned = {len(EXPECTED)} ok + 0 partial + 0 rejected"
    assert media.keys() == EXPECTED.keys()
    for name, rows in EXPECTED.items():
        times, pts = [row[0] for row in rows], [row[1] for row in rows]
        assert media[name].times_seconds.tolist() == pytest.approx(times), name
        assert media[name].pts_seconds.tolist() == pytest.approx(pts, abs=1e-3), name


def test_every_media_case_is_stored_frame_by_frame(
    encoder: Path, tmp_path: Path, decoded: dict[str, list[np.ndarray]]
) -> None:
    config = config_of(CASES / "media", encoder, tmp_path / "store")
    report = run_preprocess(config, run=run_in_process)
    assert_expected_times(report, stored_media(config))
    for name, rows in EXPECTED.items():
        assert [read_number(frame) for frame in decoded[name]] == [row[2] for row in rows], name


@pytest.mark.cluster
@pytest.mark.slow
def test_every_media_case_is_stored_through_ray(encoder: Path, tmp_path: Path, ray_address: str) -> None:
    config = config_of(CASES / "media", encoder, tmp_path / "store")
    assert_expected_times(run_preprocess(config), stored_media(config))


def test_every_picture_case_is_stored(encoder: Path, tmp_path: Path, decoded: dict[str, list[np.ndarray]]) -> None:
    config = config_of(CASES / "pictures", encoder, tmp_path / "store")
    report = run_preprocess(config, run=run_in_process)
    names = {path.name for path in (CASES / "pictures").iterdir() if path.suffix != ".md"}
    assert str(report.media) == f"{len(names)} planned = {len(names)} ok + 0 partial + 0 rejected"
    media = stored_media(config)
    assert media.keys() == names
    for name in names:
        assert media[name].pts_seconds.tolist() == [0.0]
        assert decoded[name][0].std() > 0


@pytest.mark.parametrize(
    ("name", "num_ok", "reject"),
    [
        ("concatenated.tar", 16, None),
        ("bad_header.tar", 7, "bad_header.tar: broken at byte 8192"),
        ("trunc_header_boundary.tar", 4, "trunc_header_boundary.tar: broken at byte 8192"),
        ("bytes_int_id.parquet", 1, None),
        ("hf_video_paths.parquet", 2, None),
        ("two_bytes.parquet", 0, "two_bytes.parquet: the columns image, mask all hold bytes"),
    ],
)
def test_every_input_case_is_read_or_one_counted_reject(
    encoder: Path, tmp_path: Path, name: str, num_ok: int, reject: str | None
) -> None:
    config = config_of(CASES / "inputs" / name, encoder, tmp_path / "store")
    report = run_preprocess(config, run=run_in_process)
    num_rejected = int(reject is not None)
    assert str(report.media) == f"{num_ok + num_rejected} planned = {num_ok} ok + 0 partial + {num_rejected} rejected"
    rejects = pq.read_table(tmp_path / "store" / "rejects.parquet")["error_message"].to_pylist()
    assert [reject in message for message in rejects if reject is not None] == [True] * num_rejected
    assert len(stored_media(config)) == num_ok


def test_a_setting_chooses_between_two_columns_of_bytes(encoder: Path, tmp_path: Path) -> None:
    config = config_of(CASES / "inputs" / "two_bytes.parquet", encoder, tmp_path / "store")
    report = run_preprocess(dataclasses.replace(config, bytes_column="image"), run=run_in_process)
    assert report.media.ok == report.media.planned > 0

"""Writing a store and reading it back."""

from __future__ import annotations

import threading
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import numpy as np
import pyarrow.parquet as pq
import pytest
import torch

from reference.hiccups import HiccupFileSystem
from reference.synthetic_store import RECIPE, error_row, read_committed, segment_row, write_files
from timeviper_platform.common import storage
from timeviper_platform.common.schemas import FEATURES, INDEX, check_version
from timeviper_platform.data.encode.recipe import recipe_hash
from timeviper_platform.data.plan.stored_plan import finished_segments
from timeviper_platform.data.store import row_groups
from timeviper_platform.data.store.commits import best_rows
from timeviper_platform.data.store.compact import compact
from timeviper_platform.data.store.index import StoreIndex
from timeviper_platform.data.store.layout import read_header
from timeviper_platform.data.store.reader import FeatureStore
from timeviper_platform.data.store.verify import verify_store
from timeviper_platform.data.store.writer import StoreWriter, write_store
from timeviper_platform.data.video.sampling import select_frames


def synthetic_media(count: int = 30) -> dict[str, torch.Tensor]:
    generator = torch.Generator().manual_seed(0)
    return {
        f"m{number:03d}": torch.randn(1 + number % 7, 2, 4, generator=generator).bfloat16() for number in range(count)
    }


def test_every_medium_reads_back_bit_for_bit(tmp_path: Path) -> None:
    media = synthetic_media()
    write_store(str(tmp_path), media, recipe=RECIPE)
    store = FeatureStore.open(str(tmp_path), cache_bytes=1)
    assert list(store.media_ids) == sorted(media)
    for media_id, expected in media.items():
        got = store.read(media_id)
        assert got.features.dtype == torch.bfloat16
        assert torch.equal(got.features.view(torch.int16), expected.view(torch.int16))
        assert got.info.num_frames == len(expected)
        assert got.info.modality == ("image" if len(expected) == 1 else "video")
        assert got.pts_seconds.tolist() == list(range(len(expected)))
    assert store.recipe == RECIPE
    assert store.recipe_hash == recipe_hash(RECIPE)
    assert "m000" in store
    assert "nobody" not in store


def test_frames_are_read_across_segments(tmp_path: Path) -> None:
    writer = StoreWriter.create(str(tmp_path), RECIPE)
    parts = [torch.randn(length, 3, 5).bfloat16() for length in (64, 64, 10)]
    rows = [segment_row("film", index, 3, part) for index, part in enumerate(parts)]
    other = segment_row("other", 0, 1, torch.zeros(2, 3, 5).bfloat16())
    writer.write_file("one", [rows[1], other, rows[0]])
    writer.write_file("two", [rows[2]])
    writer.write_index()
    store = FeatureStore.open(str(tmp_path))
    whole = torch.cat(parts)
    frames = [0, 63, 64, 64, 127, 128, 137]
    got = store.read("film", frames)
    assert torch.equal(got.features, whole[frames])
    assert np.allclose(got.pts_seconds, np.array(frames) - 0.01)
    assert store.info("film").times_seconds.tolist() == list(range(138))
    assert torch.equal(store.read("film").features, whole)
    assert store.find("sha-film") == "film"
    assert store.find("sha-nobody") is None
    got.features.zero_()  # a copy: the cache stays intact
    assert torch.equal(store.read("film", frames).features, whole[frames])
    assert store.read("film", []).features.shape == (0, 3, 5)
    for bad in ([138], [-1], [5, 4]):
        with pytest.raises(ValueError, match=r"ascend within 0\.\.137"):
            store.read("film", bad)
    with pytest.raises(KeyError):
        store.info("nobody")


def test_a_clip_reads_the_frames_sampled_in_it(tmp_path: Path) -> None:
    parts = [torch.randn(length, 3, 5).bfloat16() for length in (64, 64, 10)]
    write_files(str(tmp_path), {"film": [segment_row("film", n, 3, part) for n, part in enumerate(parts)]})
    store = FeatureStore.open(str(tmp_path))
    info = store.info("film")
    got = store.read("film", info.select(start_seconds=63.0, end_seconds=65.5))
    assert torch.equal(got.features, torch.cat(parts)[[63, 64, 65]])
    assert got.pts_seconds.tolist() == [62.99, 63.99, 64.99]
    assert info.select(end_seconds=2.0) == [0, 1]
    assert info.select(start_seconds=137.0) == [137]
    assert store.read("film", info.select(start_seconds=900.0)).features.shape == (0, 3, 5)


def test_a_segment_without_frames_is_empty(tmp_path: Path) -> None:
    write_files(str(tmp_path), {"film": [segment_row("film", 0, 1, torch.zeros(0, 3, 5))]})
    store = FeatureStore.open(str(tmp_path))
    assert store.read("film").features.shape == (0, 3, 5)


def test_rows_in_error_between_others_are_left_out(tmp_path: Path) -> None:
    media = {m: [torch.randn(3 + n, 2, 4).bfloat16() for n in range(4)] for m in ("a", "c", "\u00e9", "\U0001f600")}
    rows = [segment_row(media_id, n, 4, part) for media_id, parts in media.items() for n, part in enumerate(parts)]
    for media_id in media:
        rows.append(error_row(media_id, segment_index=4, segment_id=f"{media_id}-4"))
    rows += [error_row("b"), error_row("z")]
    write_files(str(tmp_path), {"one": rows[::2], "two": rows[1::2]}, index=False)
    StoreWriter.open(str(tmp_path), index_row_group_rows=2).write_index()  # lookups cross row groups
    index = StoreIndex.open(str(tmp_path / "index.parquet"), details_cache_bytes=1)
    store = FeatureStore(str(tmp_path), read_header(str(tmp_path)), index)
    assert list(store.media_ids) == sorted(media) == store.media_ids[:]
    assert store.media_ids[-1] == "\U0001f600"
    for media_id, parts in media.items():
        got = store.read(media_id)
        assert torch.equal(got.features, torch.cat(parts))
        assert got.info.times_seconds.tolist() == [64.0 * n + k for n in range(len(parts)) for k in range(3 + n)]
        assert got.info.uri == f"/{media_id}.mp4"
        assert store.find(f"sha-{media_id}") == media_id
    assert not {"b", "z", "", 5} & set(store.media_ids)
    assert "b" not in store
    assert 5 not in store
    assert store.find("sha-b") is None
    with pytest.raises(IndexError):
        store.media_ids[4]


def test_clips_and_media_with_gaps_are_not_found_by_sha256(tmp_path: Path) -> None:
    film = torch.randn(2, 4, 2, 2).bfloat16()
    whole = [segment_row("whole", index, 2, features, sha256="sha-file") for index, features in enumerate(film)]
    clip = segment_row("a-clip", 0, 1, film[0], sha256="sha-file", source_version="sha-file#t=3.0,7.0")
    other = segment_row("other-clip", 0, 1, film[0], sha256="sha-other", source_version="sha-other#t=None,7.0")
    gap = segment_row("gap", 1, 2, film[0])
    write_files(str(tmp_path), {"a": [clip, *whole, other, gap]})
    store = FeatureStore.open(str(tmp_path))
    assert store.find("sha-file") == "whole"
    assert store.find("sha-other") is None
    assert store.find("sha-gap") is None
    assert store.find_uri("/whole.mp4") == "whole"
    for partial in ("/a-clip.mp4", "/gap.mp4", "/none.mp4", ""):
        assert store.find_uri(partial) is None


def test_threads_share_a_store(tmp_path: Path) -> None:
    media = synthetic_media(60)
    write_store(str(tmp_path), media, recipe=RECIPE)
    store = FeatureStore.open(str(tmp_path), cache_bytes=1)
    wrong: list[str] = []

    def read(offset: int) -> None:
        for number in range(200):
            media_id = f"m{(number * 7 + offset) % 60:03d}"
            if not torch.equal(store.read(media_id).features, media[media_id]):
                wrong.append(media_id)

    threads = [threading.Thread(target=read, args=(offset,)) for offset in range(4)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert wrong == []


def test_one_file_that_is_slow_to_open_holds_up_no_other(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    write_files(str(tmp_path), {name: [segment_row(name, 0, 1, torch.zeros(2, 3, 5))] for name in "ab"})
    both, opened = threading.Barrier(2, timeout=30), row_groups.open_data_file

    def meets(uri: str) -> object:
        both.wait()  # broken unless the other file is being opened as well
        return opened(uri)

    monkeypatch.setattr(row_groups, "open_data_file", meets)
    store = FeatureStore.open(str(tmp_path))
    with ThreadPoolExecutor(2) as pool:
        assert len(list(pool.map(store.read, "ab"))) == 2


def test_features_are_stored_plain_last_and_with_checksums(tmp_path: Path) -> None:
    writer = StoreWriter.create(str(tmp_path), RECIPE)
    rows = [segment_row("film", index, 20, torch.randn(64, 16, 128).bfloat16()) for index in range(20)]
    writer.write_file("film", rows)
    metadata = pq.read_metadata(tmp_path / "data" / "film.parquet")
    column = metadata.row_group(0).column(metadata.num_columns - 1)
    assert FEATURES.names[-1] == column.path_in_schema == "features"
    assert (column.compression, column.is_stats_set, column.has_dictionary_page) == ("UNCOMPRESSED", False, False)
    assert [metadata.row_group(i).num_rows for i in range(metadata.num_row_groups)] == [2] * 10
    size = (tmp_path / "data" / "film.parquet").stat().st_size
    assert size < 1.02 * 20 * 64 * 16 * 128 * 2
    with pq.ParquetFile(tmp_path / "data" / "film.parquet", page_checksum_verification=True) as file:
        check_version(file.schema_arrow, FEATURES, source="film")
        assert file.read_row_group(9).num_rows == 2
        with pytest.raises(ValueError, match="schema is features"):
            check_version(file.schema_arrow, INDEX, source="film")


def test_a_row_group_ends_with_the_row_that_fills_it(tmp_path: Path) -> None:
    StoreWriter.create(str(tmp_path), RECIPE)
    writer = StoreWriter.open(str(tmp_path), row_group_bytes=600)
    sizes = [10, 10, 10, 30, 40, 5, 5]  # frames of 20 bytes
    rows = [segment_row("film", index, 7, torch.randn(size, 2, 5).bfloat16()) for index, size in enumerate(sizes)]
    written = writer.write_file("film", rows)
    assert [row["row_group"] for row in written] == [0, 0, 0, 1, 2, 3, 3]


def test_neighbouring_row_groups_come_with_one_read(tmp_path: Path, monkeypatch) -> None:
    StoreWriter.create(str(tmp_path), RECIPE)
    writer = StoreWriter.open(str(tmp_path), row_group_bytes=1)
    parts = [torch.randn(64, 2, 5).bfloat16() for _ in range(5)]
    rows = [segment_row("film", index, 5, part) for index, part in enumerate(parts)]
    writer.write_file("film", rows)
    writer.write_index()
    features = torch.cat(parts)
    asked: list[list[int]] = []
    read = pq.ParquetFile.read_row_groups
    monkeypatch.setattr(
        pq.ParquetFile, "read_row_groups", lambda self, groups, **k: asked.append(groups) or read(self, groups, **k)
    )
    store = FeatureStore.open(str(tmp_path))
    assert torch.equal(store.read("film", [70, 319]).features, features[[70, 319]])
    assert torch.equal(store.read("film").features, features)
    assert asked == [[1], [4], [0], [2, 3]]  # cached row groups are not read again
    asked.clear()
    small = FeatureStore.open(str(tmp_path), cache_bytes=8 * 64 * 2 * 5)  # two row groups ahead are half of it
    assert torch.equal(small.read("film").features, features)
    assert asked == [[0, 1, 2], [3, 4]]
    asked.clear()
    forgetful = FeatureStore.open(str(tmp_path), cache_bytes=1)
    assert torch.equal(forgetful.read("film").features, features)
    assert asked == [[0], [1], [2], [3], [4]]


def test_uncommitted_files_are_ignored_and_removed(tmp_path: Path) -> None:
    write_store(str(tmp_path), synthetic_media(4), recipe=RECIPE)
    (tmp_path / "data" / "orphan.parquet").write_bytes(b"half")
    (tmp_path / "data" / ".x.parquet.123.tmp").write_bytes(b"half")
    (tmp_path / "commits" / ".x.parquet.123.tmp").write_bytes(b"half")
    assert len(FeatureStore.open(str(tmp_path)).media_ids) == 4
    assert StoreWriter.open(str(tmp_path)).remove_uncommitted() == 3
    assert len(list((tmp_path / "data").iterdir())) == 1
    assert StoreWriter.open(str(tmp_path)).remove_uncommitted() == 0


@pytest.mark.parametrize("broken", ["/commits", "/data"])
def test_storage_that_does_not_answer_costs_no_committed_row(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, broken: str
) -> None:
    """Without the commit records every data file is a leftover, and without the data files every record is lost."""
    monkeypatch.setenv(storage.FIRST_WAIT_VARIABLE, "0")
    write_store(str(tmp_path), synthetic_media(4), recipe=RECIPE)
    store = StoreWriter.open(f"hiccup://{tmp_path}")
    monkeypatch.setattr(HiccupFileSystem, "broken", {broken})
    for clean in (store.remove_uncommitted, store.commits.remove_lost):
        with pytest.raises(storage.StorageUnavailableError, match="hiccups"):
            clean()
    monkeypatch.setattr(HiccupFileSystem, "broken", set())
    assert store.remove_uncommitted() == 0
    assert len(FeatureStore.open(str(tmp_path)).read("m003").features) == 4


def test_a_writer_that_dies_leaves_no_data_file(tmp_path: Path) -> None:
    writer = StoreWriter.create(str(tmp_path), RECIPE)

    def rows():
        yield segment_row("film", 0, 2, torch.randn(2, 2, 2).bfloat16())
        raise InterruptedError("killed")

    with pytest.raises((InterruptedError, RuntimeError)):
        writer.write_file("film", rows())
    assert list((tmp_path / "data").iterdir()) == []
    assert read_committed(str(tmp_path)).num_rows == 0


def test_the_index_holds_the_current_version_and_the_best_outcome(tmp_path: Path) -> None:
    writer = StoreWriter.create(str(tmp_path), RECIPE)
    old, new = torch.zeros(1, 1, 2).bfloat16(), torch.ones(1, 1, 2).bfloat16()
    failed = {"status": "error", "features": None, "num_frames": 0}
    writer.write_file(
        "a",
        [
            segment_row("a", 0, 1, old, segment_id="a1"),
            segment_row("b", 0, 1, old, segment_id="b1") | failed,
            segment_row("gone", 0, 1, old),
        ],
    )
    writer.write_index()
    assert list(FeatureStore.open(str(tmp_path)).media_ids) == ["a", "gone"]
    writer.write_file(
        "b",
        [
            segment_row("a", 0, 1, new, segment_id="a2", source_version="v2"),
            segment_row("b", 0, 1, new, segment_id="b1"),
        ],
    )
    committed = read_committed(str(tmp_path))
    writer.write_index({"a": "v2", "b": "v1"})
    store = FeatureStore.open(str(tmp_path))
    assert [store.read(m).features.sum().item() for m in store.media_ids] == [2, 2, 0]
    assert best_rows(committed).num_rows == 4  # a1, a2, b1 once, gone


def test_two_recipes_do_not_mix_and_the_error_lists_the_differences(tmp_path: Path) -> None:
    created = StoreWriter.create(str(tmp_path), RECIPE)
    assert StoreWriter.create(str(tmp_path), dict(reversed(RECIPE.items()))).recipe_hash == created.recipe_hash
    changed = {"encoder": {"weights_hash": "abc", "layer": -1}, "sampling": {"fps": 1.0}, "more": 1}
    with pytest.raises(ValueError, match=r"encoder\.layer: the store has -2, this run -1\n  more:"):
        StoreWriter.create(str(tmp_path), changed)


def test_missing_unfinished_and_foreign_stores_are_named(tmp_path: Path) -> None:
    with pytest.raises(ValueError, match="no feature store"):
        FeatureStore.open(str(tmp_path))
    StoreWriter.create(str(tmp_path), RECIPE)
    with pytest.raises(ValueError, match="without an index"):
        FeatureStore.open(str(tmp_path))
    write_store(str(tmp_path), synthetic_media(2), recipe=RECIPE)


@pytest.mark.parametrize("version", [1, 99])
def test_a_store_of_another_version_is_refused_with_advice(tmp_path: Path, version: int) -> None:
    write_store(str(tmp_path), synthetic_media(2), recipe=RECIPE)
    header = storage.read_json(str(tmp_path / "store.json"))
    storage.write_json(str(tmp_path / "store.json"), header | {"schema_version": version})
    for use in (FeatureStore.open, lambda uri: StoreWriter.create(uri, RECIPE), compact, verify_store):
        with pytest.raises(ValueError, match=f"schema_version = {version}.*preprocess the media again"):
            use(str(tmp_path))


def test_a_lost_or_damaged_data_file_is_named(tmp_path: Path) -> None:
    write_store(str(tmp_path), synthetic_media(2), recipe=RECIPE)
    store = FeatureStore.open(str(tmp_path))
    (path,) = (tmp_path / "data").iterdir()
    path.unlink()
    with pytest.raises(RuntimeError, match="not in the store"):
        store.read("m000")
    with pytest.raises(ValueError, match="must be"):
        write_store(str(tmp_path), {"flat": torch.zeros(3, 4)}, recipe=RECIPE)


@pytest.mark.parametrize("damage", ["a flipped bit", "a cut file", "an empty file"])
def test_features_that_are_not_as_written_are_never_returned(tmp_path: Path, damage: str) -> None:
    write_store(str(tmp_path), {"film": torch.arange(64.0).view(4, 2, 8)}, recipe=RECIPE)
    (path,) = (tmp_path / "data").iterdir()
    data = bytearray(path.read_bytes())
    if damage == "a flipped bit":
        data[bytes(data).index(torch.arange(64.0).bfloat16().view(torch.int16).numpy().tobytes()) + 100] ^= 1
    path.write_bytes({"a flipped bit": data, "a cut file": data[:-20], "an empty file": b""}[damage])
    with pytest.raises(RuntimeError, match=f"cannot read row group 0 of {path.name} in {tmp_path}/data: "):
        FeatureStore.open(str(tmp_path)).read("film")


def test_every_damaged_file_of_a_store_is_named_with_its_remedy(tmp_path: Path) -> None:
    write_store(str(tmp_path), synthetic_media(2), recipe=RECIPE)
    storage.write_bytes(f"{tmp_path}/plan/part-000000.parquet", b"")
    record = f"commits/{next(StoreWriter.open(str(tmp_path)).commits.names())}"
    opened: dict[str, Callable[[], object]] = {
        "store.json": lambda: FeatureStore.open(str(tmp_path)),
        "index.parquet": lambda: FeatureStore.open(str(tmp_path)),
        record: lambda: finished_segments(str(tmp_path)),
        "plan/part-000000.parquet": lambda: verify_store(str(tmp_path)),
    }
    for name, use in opened.items():
        whole = (tmp_path / name).read_bytes()
        for damaged in (whole[: len(whole) // 2], b"", b"[1]"):
            (tmp_path / name).write_bytes(damaged)
            with pytest.raises(RuntimeError, match=rf"{tmp_path}/{name} is damaged \(.*\); .*(jobs/|folder)"):
                use()
        (tmp_path / name).write_bytes(whole)
    (tmp_path / "index.parquet").write_bytes(b"half")
    with pytest.raises(RuntimeError, match=r"index.parquet is damaged .*; remove it and run"):
        StoreWriter.open(str(tmp_path)).write_index()
    (tmp_path / "index.parquet").unlink()
    StoreWriter.open(str(tmp_path)).write_index()
    assert len(FeatureStore.open(str(tmp_path)).media_ids) == 2


@pytest.mark.parametrize(
    ("count", "arguments", "expected"),
    [
        (5, {"max_frames": None}, [0, 1, 2, 3, 4]),
        (5, {"max_frames": 9}, [0, 1, 2, 3, 4]),
        (5, {"max_frames": 3}, [0, 2, 4]),
        (5, {"max_frames": 3, "frame_selection": "first"}, [0, 1, 2]),
        (5, {"max_frames": 1}, [2]),
        (5, {"max_frames": 2, "start_seconds": 1}, [1, 4]),
        (5, {"max_frames": None, "start_seconds": 1, "end_seconds": 3}, [1, 2]),
        (5, {"max_frames": 4, "start_seconds": 9}, []),
        (0, {"max_frames": 4}, []),
    ],
)
def test_frames_are_thinned(count: int, arguments: dict, expected: list[int]) -> None:
    assert select_frames(np.arange(count), **arguments) == expected


def test_uniform_thinning_keeps_both_ends_and_even_steps() -> None:
    for count in (257, 300, 600, 3601):
        chosen = select_frames(range(count), max_frames=256)
        assert (len(chosen), chosen[0], chosen[-1]) == (256, 0, count - 1)
        steps = np.diff(chosen)
        assert steps.max() - steps.min() <= 1


def test_impossible_selections_are_refused() -> None:
    with pytest.raises(ValueError, match="max_frames"):
        select_frames([0.0], max_frames=0)
    with pytest.raises(ValueError, match="end_seconds"):
        select_frames([0.0], max_frames=None, start_seconds=2, end_seconds=2)

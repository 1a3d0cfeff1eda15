"""Folders, globs, tars, Parquet bytes and full manifests all give the same media."""

from __future__ import annotations

import io
import json
import tarfile
from collections import Counter
from fractions import Fraction
from pathlib import Path
from urllib.parse import parse_qs

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
import s3fs
import torch
from hypothesis import given
from hypothesis import strategies as st
from PIL import Image

from reference.faulty_s3 import Faults
from reference.synthetic_media import make_encoder, make_video, picture
from timeviper_platform.common.hash_table import HashTable
from timeviper_platform.data.encode.frame_encoder import VisionTowerConfig
from timeviper_platform.data.inputs.readers import read_pages
from timeviper_platform.data.media.container import ErrorType, open_binary
from timeviper_platform.data.media.locations import CellLocation, RangeLocation, parse_location
from timeviper_platform.data.media.medium import Medium, media_id_of
from timeviper_platform.data.media.probe import file_version
from timeviper_platform.data.plan.segments import PlanSpec, plan_page
from timeviper_platform.data.preprocess.config import PreprocessConfig
from timeviper_platform.data.preprocess.run import run_in_process, run_preprocess
from timeviper_platform.data.store.reader import FeatureStore
from timeviper_platform.data.video.reader import read_frames
from timeviper_platform.data.video_worker.frame_source import DecodeConfig

SPEC = PlanSpec(fps=Fraction(1), recipe_hash="r", decode=DecodeConfig(isolation="none"))


def items_of(source: object, page_rows: int = 3) -> list[Medium]:
    return [item for page in read_pages(str(source), page_rows) for item in page]


def plan_of(items: list[Medium]) -> list[dict[str, object]]:
    return pa.concat_tables(plan_page(items, SPEC)).to_pylist()


@pytest.fixture(scope="module")
def media() -> dict[str, bytes]:
    """A video and two images, as bytes."""
    clip = io.BytesIO()
    make_video(clip, range(24), format="mp4")
    media = {"clip.mp4": clip.getvalue()}
    for number in range(2):
        image = io.BytesIO()
        Image.fromarray(picture(number)).save(image, "JPEG", quality=95)
        media[f"image{number}.jpg"] = image.getvalue()
    return media


def write_tar(path: Path, files: dict[str, bytes]) -> None:
    with tarfile.open(path, "w") as tar:
        for name, data in files.items():
            member = tarfile.TarInfo(name)
            member.size = len(data)
            tar.addfile(member, io.BytesIO(data))


def test_members_of_a_tar_are_read_in_place(tmp_path: Path, media: dict[str, bytes]) -> None:
    write_tar(tmp_path / "00000.TAR", {**media, "image0.txt": b"a caption", "image0.json": b"{}"})
    items = items_of(tmp_path)
    assert [item.media_id for item in items] == [media_id_of(f"/r/00000.TAR/{name}", "/r") for name in media]
    for item, data in zip(items, media.values(), strict=True):
        with open_binary(item.uri) as file:
            assert file.read() == data
        assert item.version == file_version(item.uri)  # the same from the listing and the file
    rows = plan_of(items)
    assert [(row["modality"], row["num_frames"], row["size"]) for row in rows] == [
        ("video", 3, len(media["clip.mp4"])),
        ("image", 1, len(media["image0.jpg"])),
        ("image", 1, len(media["image1.jpg"])),
    ]
    frames = read_frames(items[0].uri, 32)
    assert np.array_equal(frames.frames, read_frames(media["clip.mp4"], 32).frames)


def test_a_folder_of_media_and_tars_becomes_features(
    tmp_path: Path, media: dict[str, bytes], caplog: pytest.LogCaptureFixture
) -> None:
    caplog.set_level("INFO")
    (tmp_path / "in").mkdir()
    for name in ("a.txt", "b.TXT", ".hidden", "c.x-very-long-suffix"):
        (tmp_path / "in" / name).touch()
    write_tar(tmp_path / "in" / "a.tar", {**media, "clip.json": b"{}"})
    (tmp_path / "in" / "clip.mp4").write_bytes(media["clip.mp4"])
    encoder = VisionTowerConfig(model=str(make_encoder(tmp_path / "encoder")), num_tokens_per_frame=4, merge_heads=4)
    config = PreprocessConfig(input=str(tmp_path / "in"), feature_store=str(tmp_path / "out"), encoder=encoder)
    report = run_preprocess(config, run=run_in_process)
    assert (report.segments.ok, report.frames, report.media.rejected) == (4, 8, 0)
    assert report.files_left_out == {".txt": 2, "without a suffix": 1, "others": 1, ".json": 1}
    assert "left out   2 .txt, 1 .json, 1 others, 1 without a suffix, by their names" in report.lines()
    assert caplog.text.count("files left out because of their names: 2 .txt, ") == 1
    store = FeatureStore.open(config.feature_store)
    whole, member = (media_id_of(name, "") for name in ("clip.mp4", "a.tar/clip.mp4"))
    assert torch.equal(store.read(whole).features, store.read(member).features)
    assert run_preprocess(config, run=run_in_process).segments_encoded == 0


def test_a_truncated_tar_keeps_its_complete_members_and_one_error(tmp_path: Path, media: dict[str, bytes]) -> None:
    write_tar(tmp_path / "a.tar", media)
    with tarfile.open(tmp_path / "a.tar") as tar:
        middle_of_the_last = tar.getmembers()[-1].offset_data + 100
    (tmp_path / "a.tar").write_bytes((tmp_path / "a.tar").read_bytes()[:middle_of_the_last])
    (tmp_path / "b.tar").write_bytes(b"\x1f\x8b\x08" + b"x" * 5000)
    rows = plan_of(items_of(tmp_path))
    found = [(row["error_stage"], row["error_type"]) for row in rows]
    assert found == [(None, None)] * 2 + [("list", ErrorType.CORRUPT_FILE)] * 2
    assert "a.tar: broken at byte " in str(rows[2]["error_message"])
    assert "'image1.jpg' would end at byte" in str(rows[2]["error_message"])
    assert "b.tar: not a tar but a gzip archive; unpack it; only uncompressed" in str(rows[3]["error_message"])


def test_cells_of_a_parquet_file_are_read_in_place(tmp_path: Path, media: dict[str, bytes]) -> None:
    rows = [{"caption": name, "image": {"bytes": data, "path": name}} for name, data in media.items()]
    pq.write_table(pa.Table.from_pylist(rows), tmp_path / "nested.parquet", row_group_size=2)
    flat = pa.table({"media_id": list(media), "data": list(media.values())})
    pq.write_table(flat, tmp_path / "flat.parquet", row_group_size=2)
    for name in ("flat.parquet", "nested.parquet"):
        items = items_of(tmp_path / name)
        for item, data in zip(items, media.values(), strict=True):
            with open_binary(item.uri) as file:
                assert file.read() == data
            assert item.version is not None
            assert item.version.text == file_version(item.uri).text
        assert [row["num_frames"] for row in plan_of(items)] == [3, 1, 1]
    assert [item.media_id for item in items_of(tmp_path / "flat.parquet")] == list(media)


def test_a_location_in_a_changed_file_is_an_error_row(tmp_path: Path, media: dict[str, bytes]) -> None:
    pq.write_table(pa.table({"data": list(media.values())}), tmp_path / "a.parquet")
    items = items_of(tmp_path / "a.parquet")
    pq.write_table(pa.table({"data": [media["clip.mp4"]]}), tmp_path / "a.parquet")
    assert plan_of(items[2:])[0]["error_type"] == ErrorType.READ_FAILED
    (tmp_path / "a.parquet").unlink()
    assert plan_of([Medium(f"{tmp_path}/a.parquet#offset=0&size=9", "x")])[0]["error_type"] == ErrorType.NOT_FOUND


def test_failed_downloads_of_img2dataset_are_counted_by_reason(tmp_path: Path, media: dict[str, bytes]) -> None:
    failures = [
        ("failed_to_download", "HTTP Error 404: Not Found", ErrorType.NOT_FOUND),
        ("failed_to_download", "<urlopen error [Errno -2] Name or service not known>", ErrorType.UNKNOWN_HOST),
        ("failed_to_download", "The read operation timed out", ErrorType.TIMED_OUT),
        ("failed_to_download", "[Errno 104] Connection reset by peer", ErrorType.READ_FAILED),
        ("failed_to_resize", "image decoding error", ErrorType.CORRUPT_FILE),
    ]
    rows = [{"key": "000000000", "url": "https://a.invalid/0.jpg", "status": "success", "error_message": None}]
    rows += [
        {"key": f"00000000{number}", "url": f"https://a.invalid/{number}.jpg", "status": status, "error_message": text}
        for number, (status, text, _) in enumerate(failures, start=1)
    ]
    webdataset, parquet = tmp_path / "webdataset", tmp_path / "parquet"
    webdataset.mkdir()
    parquet.mkdir()
    write_tar(webdataset / "00000.tar", {"000000000.jpg": media["image0.jpg"], "000000000.json": b"{}"})
    pq.write_table(pa.Table.from_pylist(rows), webdataset / "00000.parquet")
    (webdataset / "00000_stats.json").write_text("{}")
    with_bytes = [{**row, "jpg": media["image0.jpg"] if row["status"] == "success" else None} for row in rows]
    pq.write_table(pa.Table.from_pylist(with_bytes), parquet / "00000.parquet")
    for source in (webdataset, parquet / "*.parquet"):
        planned = plan_of(items_of(source))
        errors = [(row["error_stage"], row["error_type"]) for row in planned if row["status"] == "error"]
        assert errors == [("download", kind) for _, _, kind in failures], source
        assert [row["modality"] for row in planned if row["status"] == "planned"] == ["image"]


def test_full_rows_are_planned_without_their_files(tmp_path: Path) -> None:
    rows = [
        {"uri": "/nowhere/a.mp4", "size": 5, "duration_seconds": 130.5, "width": 640, "height": 360, "sha256": "ab"},
        {"uri": "/nowhere/b.jpg", "size": 6, "modality": "image"},
        {"uri": "/nowhere/c.mp4", "size": 7, "duration_seconds": 10.0, "start_seconds": 4.0},
        {"uri": "/nowhere/d.mp4", "size": 7, "duration_seconds": 1.0, "width": 9000, "height": 9000},
        {"uri": "/nowhere/e.mp4", "duration_seconds": 1.0},
    ]
    (tmp_path / "m.jsonl").write_text("\n".join(json.dumps(row) for row in rows))
    planned = plan_of(items_of(tmp_path / "m.jsonl"))
    assert [row["num_frames"] for row in planned] == [64, 64, 3, 1, 6, None, None]
    assert [row["error_type"] for row in planned[-2:]] == [ErrorType.TOO_MANY_PIXELS, ErrorType.NOT_FOUND]
    assert planned[0]["source_version"] == "ab"


def test_pages_have_the_requested_size_and_repeats_are_found_across_them(tmp_path: Path) -> None:
    names = [f"{number}.mp4" for number in range(10)]
    (tmp_path / "m.csv").write_text("\n".join(["uri", *names, *names]))
    pages = list(read_pages(str(tmp_path / "m.csv"), page_rows=4))
    assert [len(page) for page in pages] == [4, 4, 2]
    (tmp_path / "clash.csv").write_text("uri,media_id\n" + "".join(f"{name},{name}\n" for name in names) + "x,0.mp4\n")
    *others, last = items_of(tmp_path / "clash.csv", page_rows=4)
    assert [item.media_id for item in others] == names
    assert last.error is not None
    assert "media_id '0.mp4' names more than one medium" in last.error.message


def test_a_repeated_name_in_a_tar_is_an_error_row(tmp_path: Path, media: dict[str, bytes]) -> None:
    with tarfile.open(tmp_path / "a.tar", "w") as tar:
        for name in ("clip.mp4", "image0.jpg", "clip.mp4"):
            member = tarfile.TarInfo(name)
            member.size = len(media[name])
            tar.addfile(member, io.BytesIO(media[name]))
    rows = plan_of(items_of(tmp_path))
    assert [(row["status"], row["error_type"]) for row in rows] == [
        ("planned", None),
        ("planned", None),
        ("error", ErrorType.BAD_ROW),
    ]


def test_a_url_column_replaces_the_uri_column(tmp_path: Path) -> None:
    pq.write_table(pa.table({"url": ["https://a.invalid/1.jpg"], "caption": ["one"]}), tmp_path / "cc12m.parquet")
    (item,) = items_of(tmp_path / "cc12m.parquet")
    assert (item.uri, item.media_id) == ("https://a.invalid/1.jpg", media_id_of("https://a.invalid/1.jpg", ""))


def test_column_types_are_not_guessed_from_the_first_block(tmp_path: Path) -> None:
    rows = [f"{number}.mp4,{number:0500}," for number in range(3000)] + ["last.mp4,word,name"]
    (tmp_path / "m.csv").write_text("\n".join(["uri,note,media_id", *rows]))
    last = None
    for page in read_pages(str(tmp_path / "m.csv")):
        last = page[-1]
    assert last is not None
    assert last.media_id == "name"


def test_addresses_of_locations_are_parsed_back() -> None:
    for location in (RangeLocation("s3://b/a#1.tar", 512, 7), CellLocation("/x/y.parquet", "image.bytes", 3, 41)):
        assert parse_location(location.address()) == location
    assert parse_location("/videos/a#1.mp4") is None


@given(st.lists(st.lists(st.tuples(st.integers(0, 40), st.integers(0, 9)), max_size=30), max_size=8))
def test_the_hash_table_is_a_dict(batches: list[list[tuple[int, int]]]) -> None:
    table, expected = HashTable(), {}
    for batch in batches:
        pairs = np.array(batch, dtype=np.uint64).reshape(-1, 2)
        table.add(pairs[:, 0], pairs[:, 1])
        for key, value in batch:
            expected.setdefault(key, value)
    found, values = table.find(np.arange(41, dtype=np.uint64))
    assert {int(key): int(values[key]) for key in np.flatnonzero(found)} == expected
    assert len(table) == len(expected)


def test_a_prefix_of_many_objects_is_listed_page_by_page(bucket: s3fs.S3FileSystem, server: Faults) -> None:
    """s3fs's `isdir` would list all of them first, and keep the listing."""
    for number in range(5):
        bucket.pipe(f"bucket/in/{number}.jpg", b"-")
    bucket.invalidate_cache()
    del server.requests[:]
    assert len(items_of("s3://bucket/in")) == 5
    sizes = [parse_qs(query).get("max-keys") for _, _, query in server.requests if "list-type" in query]
    assert sizes == [["1"], ["1"], ["1000"]]  # is it a folder, asked twice, then its pages
    assert not bucket.dircache


def test_a_damaged_tar_is_read_on_from_disk_and_from_s3(
    bucket: s3fs.S3FileSystem, tmp_path: Path, media: dict[str, bytes]
) -> None:
    with tarfile.open(tmp_path / "a.tar", "w") as tar:
        for name in (*media, "gone.jpg", *(f"more-{name}" for name in media)):
            member = tarfile.TarInfo(name)
            member.size = len(media.get(name.removeprefix("more-"), b"gone"))
            tar.addfile(member, io.BytesIO(media.get(name.removeprefix("more-"), b"gone")))
    with tarfile.open(tmp_path / "a.tar") as tar:
        start = tar.getmember("gone.jpg").offset
    data = bytearray((tmp_path / "a.tar").read_bytes())
    data[start + 148 : start + 156] = b"checksum"
    (tmp_path / "a.tar").write_bytes(data)
    bucket.pipe("bucket/in/a.tar", bytes(data))
    for source in (str(tmp_path), "s3://bucket/in"):
        items = items_of(source)
        (broken,) = (item for item in items if item.error)
        assert broken.error is not None
        assert f"a.tar: broken at byte {start}: it is not a tar header; members continue at byte {start + 1024}" in str(
            broken.error
        )
        assert broken.media_id == media_id_of(f"/r/a.tar#byte={start}", "/r")
        found = [item for item in items if not item.error]
        assert [item.media_id for item in found] == [
            media_id_of(f"/r/a.tar/{name}", "/r") for name in (*media, *(f"more-{name}" for name in media))
        ]
        with open_binary(found[-1].uri) as file:
            assert file.read() == list(media.values())[-1]


def test_links_and_sparse_members_of_a_tar_are_counted(tmp_path: Path, media: dict[str, bytes]) -> None:
    with tarfile.open(tmp_path / "a.tar", "w", format=tarfile.GNU_FORMAT) as tar:
        member = tarfile.TarInfo("clip.mp4")
        member.size = len(media["clip.mp4"])
        tar.addfile(member, io.BytesIO(media["clip.mp4"]))
        link = tarfile.TarInfo("again.mp4")
        link.type, link.linkname = tarfile.LNKTYPE, "clip.mp4"
        tar.addfile(link)
        folder = tarfile.TarInfo("folder.mp4")
        folder.type = tarfile.DIRTYPE
        tar.addfile(folder)
        sparse = tarfile.TarInfo("holes.mp4")
        sparse.type = tarfile.GNUTYPE_SPARSE
        tar.addfile(sparse)
    left_out = Counter[str]()
    items = [item for page in read_pages(str(tmp_path), left_out=left_out) for item in page]
    assert [item.error is None for item in items] == [True, False]
    assert "'holes.mp4' is stored as a sparse file" in str(items[1].error)
    assert left_out == {"links in tars": 1}

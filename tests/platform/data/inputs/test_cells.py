"""Parquet files that hold media: as bytes, as paths, as lists of both, in every type that Arrow has for them."""

from __future__ import annotations

import io
from pathlib import Path
from typing import Any

import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from PIL import Image

from reference.synthetic_media import make_encoder, picture
from timeviper_platform.data.encode.frame_encoder import VisionTowerConfig
from timeviper_platform.data.inputs import cells
from timeviper_platform.data.inputs.readers import read_pages
from timeviper_platform.data.media.container import ErrorType, open_binary
from timeviper_platform.data.media.medium import Medium, media_id_of
from timeviper_platform.data.media.probe import file_version
from timeviper_platform.data.preprocess.config import PreprocessConfig
from timeviper_platform.data.preprocess.run import run_in_process, run_preprocess

CASES = Path(__file__).parents[3] / "reference" / "cases" / "inputs"

BYTES_AND_PATH = pa.struct([("bytes", pa.binary()), ("path", pa.string())])


def media_in(source: Path, **options: Any) -> list[Medium]:
    return [medium for page in read_pages(str(source), 3, **options) for medium in page]


def content(medium: Medium) -> bytes:
    with open_binary(medium.uri) as file:
        return bytes(file.read())


def written(path: Path, columns: dict[str, Any], **options: Any) -> Path:
    pq.write_table(pa.table(columns), path, **options)
    return path


@pytest.mark.parametrize(
    "column",
    [
        pa.array([b"0", b"1", b"0"], pa.binary()),
        pa.array([b"0", b"1", b"0"], pa.large_binary()),
        pa.array([b"0", b"1", b"0"], pa.binary_view()),
        pa.array([b"0", b"1", b"0"]).dictionary_encode(),
        pa.array([{"bytes": value, "path": "x"} for value in (b"0", b"1", b"0")], BYTES_AND_PATH),
        pa.array(
            [{"bytes": value, "path": None} for value in (b"0", b"1", b"0")],
            pa.struct([("bytes", pa.large_binary()), ("path", pa.large_string())]),
        ),
        pa.array([{"bytes": value} for value in (b"0", b"1", b"0")], pa.struct([("bytes", pa.binary_view())])),
    ],
    ids=lambda column: str(column.type),
)
def test_bytes_of_every_type_are_read_in_place(tmp_path: Path, column: pa.Array) -> None:
    labels = pa.array([5, 6, 7])
    # pyarrow cannot slice views inside structs
    rows = 3 if "struct<bytes: binary_view>" in str(column.type) else 2
    path = written(tmp_path / "a.parquet", {"Media_ID": labels, "image": column}, row_group_size=rows)
    media = media_in(path)
    assert [content(medium) for medium in media] == [b"0", b"1", b"0"]
    assert [medium.media_id for medium in media] == ["5", "6", "7"]
    assert [medium.version for medium in media] == [file_version(medium.uri) for medium in media]


@pytest.mark.parametrize("list_type", [pa.list_, pa.large_list, pa.list_view])
@pytest.mark.parametrize("with_stats", [True, False])
def test_lists_give_a_medium_per_item(tmp_path: Path, list_type: Any, with_stats: bool) -> None:
    (tmp_path / "p.jpg").write_bytes(b"p")
    rows = [
        [{"bytes": b"a", "path": None}, {"bytes": b"b", "path": "x"}],
        [],
        None,
        [{"bytes": None, "path": "p.jpg"}, None],
    ]
    for is_whole in (True, False):
        own = rows[:3] if is_whole else rows
        path = written(
            tmp_path / "a.parquet",
            {"images": pa.array(own, list_type(BYTES_AND_PATH)), "key": [f"k{n}" for n in range(len(own))]},
            write_statistics=with_stats,
        )
        media = media_in(path)
        ids = [media_id_of(f"/r/a.parquet/k0/{item}", "/r") for item in range(2)]
        assert [medium.media_id for medium in media[:2]] == ids
        assert [content(medium) for medium in media[:2]] == [b"a", b"b"]
        assert [medium.version for medium in media[:2]] == [file_version(medium.uri) for medium in media[:2]]
        if not is_whole:
            assert (media[2].uri, content(media[2])) == (f"{tmp_path}/p.jpg", b"p")
            assert media[3].error is not None
            assert "row 4: images.bytes has neither bytes nor a path" in media[3].error.message
        assert len(media) == (2 if is_whole else 4)


def test_lists_of_plain_bytes_and_chosen_ids(tmp_path: Path) -> None:
    path = written(tmp_path / "a.parquet", {"frames": [[b"0", b"1"], [b"2"]], "media_id": ["x", "y"]})
    media = media_in(path)
    assert [(medium.media_id, content(medium)) for medium in media] == [("x/0", b"0"), ("x/1", b"1"), ("y/0", b"2")]


@pytest.mark.parametrize("bytes_type", [pa.binary(), pa.null()])
@pytest.mark.parametrize("with_stats", [True, False])
def test_paths_without_bytes_are_followed(tmp_path: Path, bytes_type: Any, with_stats: bool) -> None:
    (tmp_path / "media").mkdir()
    (tmp_path / "media" / "a.jpg").write_bytes(b"a")
    rows = [
        {"bytes": None, "path": "media/a.jpg"},
        {"bytes": None, "path": f"{tmp_path}/media/a.jpg"},
        {"bytes": None, "path": "s3://bucket/b.jpg"},
        {"bytes": None, "path": "foo://b.jpg"},
        {"bytes": None, "path": None},
        None,
    ]
    column = pa.array(rows, pa.struct([("bytes", bytes_type), ("path", pa.string())]))
    path = written(tmp_path / "a.parquet", {"image": column}, write_statistics=with_stats)
    media = media_in(path)
    assert [medium.uri for medium in media[:2]] == [f"{tmp_path}/media/a.jpg", "s3://bucket/b.jpg"]  # a repeat is one
    assert content(media[0]) == b"a"
    assert media[0].media_id == media_id_of("/r/media/a.jpg", "/r")
    errors = [medium.error for medium in media[2:]]
    assert all(error is not None and error.error_type == ErrorType.BAD_ROW for error in errors)
    assert [str(error).partition("a.parquet: ")[2] for error in errors] == [
        "row 4: foo://b.jpg has an unknown scheme; fix the part before ://",
        "row 5: image.bytes has neither bytes nor a path",
        "row 6: image.bytes has neither bytes nor a path",
    ]


def test_bytes_and_paths_may_alternate(tmp_path: Path) -> None:
    (tmp_path / "p.jpg").write_bytes(b"p")
    rows = [{"bytes": b"%d" % n, "path": "x"} if n % 3 else {"bytes": None, "path": "p.jpg"} for n in range(40)]
    path = written(tmp_path / "a.parquet", {"image": pa.array(rows, BYTES_AND_PATH)}, row_group_size=17)
    media = media_in(path)
    wanted = [b"%d" % n if n % 3 else b"p" for n in range(40)]
    assert [content(medium) for medium in media] == [value for n, value in enumerate(wanted) if n % 3 or n == 0]


def test_bytes_are_not_read_where_statistics_tell(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(cells, "BATCH_ROWS_WITH_BYTES", 0)  # reading bytes would fail
    rows = [[{"bytes": bytes(10), "path": "x"}], [], [{"bytes": bytes(10), "path": None}] * 2]
    path = written(tmp_path / "a.parquet", {"images": pa.array(rows, pa.list_(BYTES_AND_PATH))})
    assert len(media_in(path)) == 3


def test_several_columns_of_bytes_are_a_reject_until_one_is_chosen(tmp_path: Path) -> None:
    (bad,) = media_in(CASES / "two_bytes.parquet")
    assert bad.error is not None
    assert bad.error.message.endswith(
        "two_bytes.parquet: the columns image, mask all hold bytes; choose one with bytes_column=image"
    )
    (image,) = media_in(CASES / "two_bytes.parquet", bytes_column="image")
    (mask,) = media_in(CASES / "two_bytes.parquet", bytes_column="MASK")
    assert len(content(image)) > len(content(mask)) > 0
    (wrong,) = media_in(CASES / "two_bytes.parquet", bytes_column="picture")
    assert wrong.error is not None
    assert "bytes_column=picture is not a column of bytes; it has image, mask" in wrong.error.message
    both = {"uri": ["x.mp4"], "image": pa.array([{"bytes": b"i", "path": None}], BYTES_AND_PATH)}
    path = written(tmp_path / "a.parquet", both)
    assert [medium.uri for medium in media_in(path)] == [f"{tmp_path}/x.mp4"]
    (cell,) = media_in(path, bytes_column="image")
    assert content(cell) == b"i"


def test_the_layouts_of_the_cases_become_features(tmp_path: Path) -> None:
    encoder = VisionTowerConfig(model=str(make_encoder(tmp_path / "encoder")), num_tokens_per_frame=4, merge_heads=4)
    report = run_preprocess(
        PreprocessConfig(input=str(CASES / "*.parquet"), feature_store=str(tmp_path / "out"), encoder=encoder),
        run=run_in_process,
    )
    # bytes_int_id: 1; hf_video_paths: bytes and a path; two_bytes: the reject
    assert (report.media.planned, report.media.ok, report.media.rejected) == (4, 3, 1)
    assert report.errors_by_stage == {"list": {"bad_row": 1}}


def test_a_broken_file_among_many_is_one_reject(tmp_path: Path) -> None:
    picture_bytes = io.BytesIO()
    Image.fromarray(picture(1)).save(picture_bytes, "PNG")
    good = written(tmp_path / "a.parquet", {"png": [picture_bytes.getvalue()] * 2})
    (tmp_path / "b.parquet").write_bytes(good.read_bytes()[:-20])
    (tmp_path / "c.parquet").touch()
    written(tmp_path / "d.parquet", {"caption": ["no media"]})
    written(tmp_path / "e.parquet", {"png": [b"x"], "media_id": [[1]]})
    found = [
        (Path(medium.uri.partition("#")[0]).name, medium.error and medium.error.error_type)
        for medium in media_in(tmp_path / "*.parquet")
    ]
    assert found == [
        *[("a.parquet", None)] * 2,
        ("b.parquet", ErrorType.CORRUPT_FILE),
        ("c.parquet", ErrorType.CORRUPT_FILE),
        ("d.parquet", ErrorType.BAD_ROW),
        ("e.parquet", ErrorType.BAD_ROW),
    ]


def test_a_damaged_row_group_of_cells_is_one_reject(tmp_path: Path) -> None:
    path = tmp_path / "a.parquet"
    pq.write_table(
        pa.table({"key": [f"{n:06}" for n in range(30)], "png": [b"%d" % n for n in range(30)]}),
        path,
        row_group_size=10,
        use_dictionary=False,
        compression="zstd",
    )
    column = pq.ParquetFile(path).metadata.row_group(1).column(0)
    data = bytearray(path.read_bytes())
    start = column.data_page_offset
    data[start : start + column.total_compressed_size] = bytes(column.total_compressed_size)
    path.write_bytes(data)
    media = media_in(path)
    assert [content(medium) for medium in media if not medium.error] == [
        b"%d" % n for n in (*range(10), *range(20, 30))
    ]
    (bad,) = (medium.error for medium in media if medium.error)
    assert bad is not None
    assert "a.parquet: row group 1 (10 rows) is damaged" in bad.message

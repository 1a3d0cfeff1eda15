"""The same rows give the same media in every format, whatever wrote them."""

from __future__ import annotations

import csv
import gzip
import io
import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pyarrow as pa
import pyarrow.parquet as pq
import pytest

from timeviper_platform.data.inputs import tables
from timeviper_platform.data.inputs.readers import read_pages
from timeviper_platform.data.inputs.tables import json_values, read_rows
from timeviper_platform.data.media.container import ErrorType
from timeviper_platform.data.media.medium import Medium, media_id_of

NAN = float("nan")

LFS_POINTER = (
    b"version https://git-lfs.github.com/spec/v1\noid sha256:4d7a214614ab2935c943f9e0ff69d22eadbb8f32\nsize 12\n"
)

Row = dict[str, Any]


def jsonl(rows: list[Row]) -> bytes:
    return "".join(json.dumps(row) + "\n" for row in rows).encode()


def json_array(rows: list[Row]) -> bytes:
    return json.dumps(rows, indent=1).encode()


def delimited(rows: list[Row], delimiter: str = ",") -> bytes:
    names = list(dict.fromkeys(name for row in rows for name in row))
    text = io.StringIO()
    writer = csv.writer(text, delimiter=delimiter)
    writer.writerow(names)
    writer.writerows([[row.get(name) for name in names] for row in rows])
    return text.getvalue().encode()


def parquet(rows: list[Row]) -> bytes:
    names = list(dict.fromkeys(name for row in rows for name in row))
    file = io.BytesIO()
    pq.write_table(pa.table({name: pa.array([row.get(name) for row in rows]) for name in names}), file)
    return file.getvalue()


WRITERS: dict[str, Callable[[list[Row]], bytes]] = {
    "m.jsonl": jsonl,
    "m.ndjson": jsonl,
    "m.json": json_array,
    "lines.json": jsonl,
    "array.jsonl": json_array,
    "m.csv": delimited,
    "m.tsv": lambda rows: delimited(rows, "\t"),
    "m.parquet": parquet,
    "m.jsonl.gz": lambda rows: gzip.compress(jsonl(rows), mtime=0),
    "m.json.gz": lambda rows: gzip.compress(json_array(rows), mtime=0),
    "m.CSV.GZ": lambda rows: gzip.compress(delimited(rows), mtime=0),
    "bom.csv": lambda rows: b"\xef\xbb\xbf" + delimited(rows),
    "bom.jsonl": lambda rows: b"\xef\xbb\xbf" + jsonl(rows),
    "utf16.csv": lambda rows: delimited(rows).decode().encode("utf-16"),
    "crlf.jsonl": lambda rows: jsonl(rows).replace(b"\n", b"\r\n\r\n"),
}


def media_in(folder: Path, name: str, rows: list[Row]) -> list[Medium]:
    (folder / name).write_bytes(WRITERS[name](rows))
    return [medium for page in read_pages(str(folder / name)) for medium in page]


@pytest.mark.parametrize(
    ("rows", "expected"),
    [
        ([{"uri": "a.mp4", "media_id": 7}, {"uri": "b.mp4", "media_id": 123456789012}], ["7", "123456789012"]),
        ([{"URI": "a.mp4", "Media_ID": "x"}], ["x"]),
        ([{" uri ": " a.mp4 ", "media_id ": " x"}], ["x"]),
        ([{"uri": "a.mp4", "media_id": "x", "note": "n"}], ["x"]),
        ([{"url": "a.mp4", "media_id": "x"}], ["x"]),
        ([{"uri": "a.mp4", "media_id": None}, {"uri": "b.mp4", "media_id": "y"}], [None, "y"]),
        ([{"uri": "ü, b.mp4", "media_id": 'say "ü"'}], ['say "ü"']),
        ([{"uri": "a\nb.mp4", "media_id": "two\nlines"}], ["two\nlines"]),
    ],
)
def test_ids_and_names_are_read_alike(tmp_path: Path, rows: list[Row], expected: list[str | None]) -> None:
    uris = [next(value for name, value in row.items() if name.strip().lower() in ("uri", "url")) for row in rows]
    wanted = [
        (f"{tmp_path}/{uri.strip()}", own_id or media_id_of(f"{tmp_path}/{uri.strip()}", str(tmp_path)))
        for uri, own_id in zip(uris, expected, strict=True)
    ]
    for name in WRITERS:
        media = media_in(tmp_path, name, rows)
        assert [medium.error for medium in media] == [None] * len(rows), name
        assert [(medium.uri, medium.media_id) for medium in media] == wanted, name


@pytest.mark.parametrize(
    ("values", "expected"),
    [
        ([1.5, 2.0], [1.5, 2.0]),
        (["1.5", " 2"], [1.5, 2.0]),
        ([3, 4], [3.0, 4.0]),
        ([NAN, 2.0], [None, 2.0]),
        (["NaN", "2"], [None, 2.0]),
        (["", "2e1"], [None, 20.0]),
        (["NA", "null"], [None, None]),
        (["soon", "1"], [ErrorType.BAD_ROW, 1.0]),
        (["1_000", "1"], [ErrorType.BAD_ROW, 1.0]),
        ([float("inf"), 1.0], [ErrorType.BAD_ROW, 1.0]),
        ([-1.0, 1.0], [ErrorType.BAD_ROW, 1.0]),
    ],
)
def test_numbers_are_read_alike(tmp_path: Path, values: list[Any], expected: list[Any]) -> None:
    rows = [{"uri": f"{index}.mp4", "start_seconds": value} for index, value in enumerate(values)]
    for name in WRITERS:
        media = media_in(tmp_path, name, rows)
        found = [medium.error.error_type if medium.error else medium.start_seconds for medium in media]
        assert found == expected, name


@pytest.mark.parametrize(
    ("values", "expected"),
    [
        ([5, 6], [5, 6]),
        (["5", "6"], [5, 6]),
        ([5.0, NAN], [5, None]),  # pandas writes whole numbers with a gap as floats
        (["5.0", ""], [5, None]),
        ([9007199254740993, 1], [9007199254740993, 1]),  # above 2^53
        (["9007199254740993", "1"], [9007199254740993, 1]),
        ([1.5, 2.0], [ErrorType.BAD_ROW, 2]),
        (["9223372036854775808", "1"], [ErrorType.BAD_ROW, 1]),
    ],
)
def test_whole_numbers_are_read_alike(tmp_path: Path, values: list[Any], expected: list[Any]) -> None:
    rows = [{"uri": f"{index}.mp4", "size": value} for index, value in enumerate(values)]
    for name in WRITERS:
        media = media_in(tmp_path, name, rows)
        found = [
            medium.error.error_type if medium.error else medium.version and medium.version.size for medium in media
        ]
        assert found == expected, name


def test_a_row_without_a_value_is_one_bad_row(tmp_path: Path) -> None:
    for name in WRITERS:
        media = media_in(tmp_path, name, [{"uri": "a.mp4", "size": 1}, {}, {"uri": "b.mp4", "size": 2}])
        assert [medium.error is None for medium in media] == [True, False, True], name
        error = media[1].error
        assert error is not None
        assert f"{name}: row 2: it has no uri" in error.message, name
    (tmp_path / "m.jsonl").write_text("{}\n{}\n")
    (page,) = read_pages(str(tmp_path / "m.jsonl"))
    assert [medium.error is None for medium in page] == [False, False]


def test_blanks_after_commas_and_quotes_behind_them(tmp_path: Path) -> None:
    (tmp_path / "m.csv").write_text('uri, media_id, size\n"a, b.mp4", "x, y", 5\n\n   \nc.mp4, z, 6\n')
    (page,) = read_pages(str(tmp_path / "m.csv"))
    assert [(Path(medium.uri).name, medium.media_id) for medium in page] == [("a, b.mp4", "x, y"), ("c.mp4", "z")]


def test_long_fields_of_csv_are_read(tmp_path: Path) -> None:
    (tmp_path / "m.csv").write_text(f"uri,caption\na.mp4,{'x' * 500_000}\nb.mp4,y\n")
    (page,) = read_pages(str(tmp_path / "m.csv"))
    assert [Path(medium.uri).name for medium in page] == ["a.mp4", "b.mp4"]


@pytest.mark.parametrize(
    "column",
    [
        pa.array(["a.mp4", None, "b.mp4"], pa.string_view()),
        pa.array(["a.mp4", None, "b.mp4"], pa.large_string()),
        pa.array(["a.mp4", None, "b.mp4"]).dictionary_encode(),
        pa.array([b"a.mp4", None, b"b.mp4"], pa.large_binary()),
    ],
    ids=lambda column: str(column.type),
)
def test_all_text_types_of_parquet_are_read(tmp_path: Path, column: pa.Array) -> None:
    pq.write_table(pa.table({"uri": column}), tmp_path / "m.parquet")
    (page,) = read_pages(str(tmp_path / "m.parquet"))
    assert [Path(medium.uri).name if medium.error is None else None for medium in page] == ["a.mp4", None, "b.mp4"]


def test_invalid_utf8_in_any_text_type_is_one_bad_row(tmp_path: Path) -> None:
    raw = pa.array([b"a.mp4", b"caf\xe9.mp4"], pa.binary())
    for column in (raw.view(pa.string()), raw.cast(pa.large_binary()).view(pa.large_string())):
        for values in (column, column.dictionary_encode()):
            pq.write_table(pa.table({"uri": values}), tmp_path / "m.parquet")
            (page,) = read_pages(str(tmp_path / "m.parquet"))
            assert [medium.error is None for medium in page] == [True, False], values.type


@pytest.mark.parametrize("name", ["m.jsonl.gz", "m.CSV.GZ", "m.json.gz"])
def test_a_cut_gzip_file_gives_its_rows_and_one_error(tmp_path: Path, name: str) -> None:
    rows = [{"uri": f"{index * 7919 % 100_003}.mp4"} for index in range(5000)]
    data = WRITERS[name](rows)
    (tmp_path / name).write_bytes(data[: len(data) // 2])
    media = [medium for page in read_pages(str(tmp_path / name)) for medium in page]
    errors = [medium for medium in media if medium.error]
    assert len(errors) == 1
    assert 1000 < len(media) < 4500
    assert [Path(medium.uri).name for medium in media[:-1]] == [row["uri"] for row in rows[: len(media) - 1]]
    assert errors[0].error is not None
    assert f"row {len(media)}: " in errors[0].error.message


def test_a_damaged_row_group_costs_its_rows_alone(tmp_path: Path) -> None:
    uris = [f"{number:06}.mp4" for number in range(300)]
    pq.write_table(
        pa.table({"uri": uris}), tmp_path / "m.parquet", row_group_size=100, use_dictionary=False, compression="zstd"
    )
    column = pq.ParquetFile(tmp_path / "m.parquet").metadata.row_group(1).column(0)
    data = bytearray((tmp_path / "m.parquet").read_bytes())
    start = column.data_page_offset
    data[start : start + column.total_compressed_size] = bytes(column.total_compressed_size)
    (tmp_path / "m.parquet").write_bytes(data)
    media = [medium for page in read_pages(str(tmp_path / "m.parquet")) for medium in page]
    (bad,) = (medium for medium in media if medium.error)
    assert bad.error is not None
    assert "m.parquet: row 101: row group 1 is damaged" in bad.error.message
    assert [Path(medium.uri).name for medium in media if not medium.error] == uris[:100] + uris[200:]


@pytest.mark.parametrize(
    ("name", "content", "message"),
    [
        (
            "m.parquet",
            b"PAR1 but no footer PAR1",
            "it is a Parquet file without its end: it was cut",
        ),
        ("m.parquet", b"", "is 0 bytes; write or fetch it again"),
        ("m.parquet", b"uri\na.mp4\n", r"it is text; name it \*.csv, \*.tsv, \*.json or \*.jsonl"),
        ("m.parquet", LFS_POINTER, "it is a Git LFS pointer, not the file; run git lfs pull"),
        ("m.csv", LFS_POINTER, "it is a Git LFS pointer, not the file; run git lfs pull"),
        ("m.csv", b"<html>\n</html>", "it is an HTML page"),
        ("m.csv", parquet([{"uri": "a.mp4"}]), r"it is a Parquet file; name it \*.parquet"),
        ("m.csv", gzip.compress(b"uri\na.mp4\n", mtime=0), r"it is a gzip archive; name it \*.csv.gz"),
        ("m.csv", bytes(500), "it is zero bytes, as of a download that never finished"),
        ("m.csv", b"\x01\x02 of no format", "it is binary data; fetch it again"),
        ("m.csv", "größe,path\n1,a.mp4\n".encode("latin-1"), "needs the column 'uri'; it has"),
        ("m.jsonl.gz", b"no gzip at all", "Not a gzipped file .*; write or fetch it again"),
        ("m.jsonl", b"<html>\n</html>", "it is an HTML page"),
        ("m.jsonl", b"hello world\n", "not JSON: .*; write or fetch it again"),
        ("m.json", b'{\n "data": [\n {"uri": "a.mp4"}]}', "needs the column 'uri'; it has data"),
        ("m.jsonl", b'{"path": "a.mp4"}\n{"file": "b.mp4"}\n', "needs the column 'uri'; it has file, path"),
        ("m.csv", b"", "needs the column 'uri'; it has none"),
    ],
)
def test_a_manifest_without_readable_rows_is_an_error_alone_and_a_reject_among_others(
    tmp_path: Path, name: str, content: bytes, message: str
) -> None:
    (tmp_path / name).write_bytes(content)
    with pytest.raises(ValueError, match=message):
        list(read_pages(str(tmp_path / name)))
    (tmp_path / "n.csv").write_text("uri\na.mp4\n")
    (page,) = read_pages(str(tmp_path / "?.*"))
    bad, good = page
    assert bad.error is not None
    assert bad.error.message.startswith(f"{tmp_path}/{name}")
    assert good.error is None


def test_what_follows_a_json_array_is_a_reject(tmp_path: Path) -> None:
    (tmp_path / "m.json").write_text('[{"uri": "a.mp4"}]\n[{"uri": "b.mp4"}]\n')
    (good, bad), *_ = read_pages(str(tmp_path / "m.json"))
    assert good.error is None
    assert bad.error is not None
    assert "not JSON from here on: something follows the array" in bad.error.message


def test_json_arrays_are_streamed(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    rows = [{"uri": f"{index}.mp4", "caption": "x" * 100, "n": index} for index in range(1000)]
    (tmp_path / "m.json").write_text(json.dumps(rows))
    monkeypatch.setattr(tables, "HEAD_ROWS", 1)
    reads = []

    def read(size: int) -> str:
        reads.append(size)
        return text.read(size)

    text = io.StringIO(json.dumps(rows))
    values = json_values(read, chunk_chars=1000)
    assert [next(values)["n"] for _ in range(20)] == list(range(20))
    assert len(reads) < 6
    assert [value["n"] for value in values] == list(range(20, 1000))
    pages = read_rows(str(tmp_path / "m.json"), ("uri",), ("uri",), page_rows=300)
    assert [len(page) for page in pages] == [300, 300, 300, 100]


def test_a_json_array_that_breaks_keeps_its_first_rows(tmp_path: Path) -> None:
    (tmp_path / "m.json").write_text('[{"uri": "a.mp4"}, 7, {"uri": "b.mp4"}, {"uri": oops}, {"uri": "c.mp4"}]')
    (page,) = read_pages(str(tmp_path / "m.json"))
    assert [(medium.error is None, Path(medium.uri).name) for medium in page] == [
        *[(True, "a.mp4"), (False, ""), (True, "b.mp4"), (False, "")]
    ]
    assert page[-1].error is not None
    assert "row 4: not JSON from here on" in page[-1].error.message

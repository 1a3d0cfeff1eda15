"""What a job is pointed at becomes media with ids, or an error that says what is wrong."""

from __future__ import annotations

import errno
import json
import os
import re
from fractions import Fraction
from pathlib import Path
from typing import Any

import fsspec
import pyarrow as pa
import pyarrow.parquet as pq
import pytest

from timeviper_platform.data.inputs.manifest import read_manifest
from timeviper_platform.data.inputs.readers import read_pages
from timeviper_platform.data.media.container import ErrorType
from timeviper_platform.data.media.medium import Medium, media_id_of
from timeviper_platform.data.plan.segments import PlanSpec, plan_page
from timeviper_platform.data.video_worker.frame_source import DecodeConfig


def list_media(source: str) -> list[Medium]:
    return [item for page in read_pages(source, page_rows=3) for item in page]


def test_three_kinds_of_manifest_say_the_same(tmp_path: Path) -> None:
    rows = [
        {"uri": "a.mp4", "media_id": "first", "start_seconds": None, "end_seconds": None, "note": "x"},
        {"uri": "s3://bucket/b.mp4", "media_id": None, "start_seconds": 2.0, "end_seconds": 5.0, "note": "y"},
    ]
    pq.write_table(pa.Table.from_pylist(rows), tmp_path / "m.parquet")
    (tmp_path / "m.jsonl").write_text("\n".join(json.dumps(row) for row in rows))
    (tmp_path / "m.csv").write_text(
        "uri,media_id,start_seconds,end_seconds,note\na.mp4,first,,,x\ns3://bucket/b.mp4,,2.0,5.0,y\n"
    )
    expected = [
        Medium(f"{tmp_path}/a.mp4", "first"),
        Medium("s3://bucket/b.mp4", media_id_of("s3://bucket/b.mp4", "", 2.0, 5.0), 2.0, 5.0),
    ]
    for suffix in ("parquet", "jsonl", "csv"):
        assert list_media(str(tmp_path / f"m.{suffix}")) == expected, suffix


def test_folder_glob_and_file_give_the_same_ids(tmp_path: Path) -> None:
    (tmp_path / "sub").mkdir()
    for name in ("b.mp4", "sub/a.png", "notes.txt"):
        (tmp_path / name).touch()
    folder = list_media(str(tmp_path))
    assert [item.uri for item in folder] == [f"{tmp_path}/b.mp4", f"{tmp_path}/sub/a.png"]
    assert folder[0] == list_media(str(tmp_path / "*.mp4"))[0] == list_media(str(tmp_path / "b.mp4"))[0]
    assert folder[0].media_id == media_id_of(f"{tmp_path}/b.mp4", str(tmp_path))
    assert folder[0].media_id == media_id_of("/elsewhere/b.mp4", "/elsewhere")  # ids move with the root


def test_globs_mean_what_fsspec_says_they_mean(tmp_path: Path) -> None:
    for name in ("a/b/c/1.mp4", "a/b/2.mp4", "a/x1.mp4", "a/.hidden.mp4", "b.mp4"):
        (tmp_path / name).parent.mkdir(parents=True, exist_ok=True)
        (tmp_path / name).touch()
    for pattern in ("*.mp4", "a/*", "a/**/*.mp4", "**/*.mp4", "a/x?.mp4", "a/[xy]1.mp4", "*/b/*"):
        found = fsspec.filesystem("file").glob(str(tmp_path / pattern))
        expected = sorted(name for name in found if Path(name).is_file())
        assert sorted(item.uri for item in list_media(str(tmp_path / pattern))) == expected, pattern


def test_existing_names_win_over_globs(tmp_path: Path) -> None:
    (tmp_path / "film [1080p]").mkdir()
    (tmp_path / "film [1080p]" / "a::b.mp4").touch()
    (tmp_path / "film [1080p]" / "what?.mp4").touch()
    (tmp_path / "film [1080p]" / "[m].CSV").write_text("uri\na::b.mp4\n")
    folder = tmp_path / "film [1080p]"
    both = [f"{folder}/a::b.mp4", f"{folder}/what?.mp4"]
    for source, expected in (("", both), ("what?.mp4", both[1:]), ("a::b.mp4", both[:1]), ("[m].CSV", both[:1])):
        items = list_media(str(folder / source))
        assert [item.uri for item in items] == expected, source
        (table,) = plan_page(items, PlanSpec(fps=Fraction(1), recipe_hash="r", decode=DecodeConfig(isolation="none")))
        assert set(table["error_type"].to_pylist()) == {ErrorType.EMPTY_FILE}  # found but empty
    assert [Path(item.uri).name for item in list_media(str(tmp_path / "*" / "*.mp4"))] == ["a::b.mp4", "what?.mp4"]


def test_folders_that_cannot_be_listed_are_error_rows(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    """They may hold a million videos. Links to themselves or a parent hold none."""
    for name in ("a/1.mp4", "gone/2.mp4", "z.mp4"):
        (tmp_path / name).parent.mkdir(exist_ok=True)
        (tmp_path / name).touch()
    (tmp_path / "a" / "up").symlink_to(tmp_path)
    (tmp_path / "self").symlink_to("self")
    scandir = os.scandir

    def refuse(folder: str) -> Any:  # root may read every folder
        if folder.endswith("/gone"):
            raise PermissionError(errno.EACCES, "Permission denied", folder)
        return scandir(folder)

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(os, "scandir", refuse)
        for pattern in ("", "/*/*.mp4", "/**/*.mp4"):
            found = list_media(f"{tmp_path}{pattern}")
            assert [Path(item.uri).name for item in found if not item.error][:1] == ["1.mp4"]
            (gone,) = (item for item in found if item.error)
            assert (
                str(gone.error)
                == f"list: permission_denied: {tmp_path}/gone: [Errno 13] Permission denied: {str(tmp_path / 'gone')!r}"
            )
            assert gone.media_id == media_id_of("gone", "")
        assert [item.uri for item in list_media(f"{tmp_path}/*.mp4")] == [f"{tmp_path}/z.mp4"], "it cannot match there"
        with pytest.raises(PermissionError, match="gone"):
            list_media(str(tmp_path / "gone"))
    assert f"skipping {tmp_path}/a/up: a link back" in caplog.text


def test_a_name_that_is_not_utf8_is_an_error_row(tmp_path: Path) -> None:
    (tmp_path / "caf\udce9.mp4").touch()
    (tmp_path / "z.mp4").touch()
    bad, good = list_media(str(tmp_path))
    (table,) = plan_page([bad], PlanSpec(fps=Fraction(1), recipe_hash="r"))
    (row,) = table.to_pylist()
    assert (row["error_stage"], row["error_type"]) == ("list", ErrorType.BAD_URI)
    assert row["uri"] == f"{tmp_path}/caf\\udce9.mp4"
    assert good.error is None


@pytest.mark.parametrize("page_rows", [1, 4, 1000])
def test_ragged_csv_rows_keep_their_positions(tmp_path: Path, page_rows: int) -> None:
    ragged = {0, 7, 8, 2999}
    rows = [f"{n}.mp4,{n}" + ",x" * (n in ragged) for n in range(3000)]
    rows[5] = '5.mp4,"5\n"'  # a caption of two lines
    padding = "," + "z" * 1000  # makes Arrow read several blocks
    lines = ["uri,media_id,caption", *(row + padding for row in rows)]
    (tmp_path / "m.csv").write_text("\n".join(lines))
    items = [item for page in read_manifest(str(tmp_path / "m.csv"), page_rows) for item in page]
    assert [number for number, item in enumerate(items) if item.error] == sorted(ragged)
    assert [Path(item.uri).stem for item in items if not item.error] == [str(n) for n in range(3000) if n not in ragged]
    assert all(len(page) <= page_rows for page in read_manifest(str(tmp_path / "m.csv"), page_rows))


@pytest.mark.parametrize("suffix", ["parquet", "jsonl", "csv"])
@pytest.mark.parametrize("bad", [{0}, {2, 3}, {0, 1, 2, 3, 4, 5, 6}])
def test_a_value_of_the_wrong_type_is_one_bad_row(tmp_path: Path, suffix: str, bad: set[int]) -> None:
    rows = [
        {"uri": f"{n}.mp4", "end_seconds": "soon" if n in bad else f" {n + 1}.5 ", "start_seconds": None}
        for n in range(7)
    ]
    if suffix == "jsonl":
        rows = [row | {"end_seconds": n + 1.5 if n not in bad else "soon"} for n, row in enumerate(rows)]
        (tmp_path / "m.jsonl").write_text("\n".join(json.dumps(row) for row in rows))
    elif suffix == "csv":
        lines = [f"{row['uri']},{row['end_seconds']},NA" for row in rows]
        (tmp_path / "m.csv").write_text("\n".join(["uri,end_seconds,start_seconds", *lines]))
    else:
        texts = [row | {"end_seconds": str(row["end_seconds"]).strip()} for row in rows]
        pq.write_table(pa.Table.from_pylist(texts), tmp_path / "m.parquet")
    items = [item for page in read_manifest(str(tmp_path / f"m.{suffix}"), 5) for item in page]
    assert {number for number, item in enumerate(items) if item.error} == bad
    assert [(item.start_seconds, item.end_seconds) for item in items if not item.error] == [
        (None, n + 1.5) for n in range(7) if n not in bad
    ]
    messages = [item.error.message for item in items if item.error]
    assert all("soon" in text and f"row {n + 1}: " in text for n, text in zip(sorted(bad), messages, strict=True))


def test_a_column_of_the_wrong_type_is_an_error_of_its_rows(tmp_path: Path) -> None:
    pq.write_table(pa.table({"uri": ["a.mp4", "b.mp4"], "start_seconds": [[1.0, 2.0], None]}), tmp_path / "m.parquet")
    bad, good = list_media(str(tmp_path / "m.parquet"))
    assert bad.error is not None
    assert "row 1: start_seconds: [1.0, 2.0] is not a number" in bad.error.message
    assert good.error is None


def test_repeated_rows_count_once_and_clips_differ(tmp_path: Path) -> None:
    (tmp_path / "m.csv").write_text("uri,start_seconds\na.mp4,\na.mp4,\na.mp4,3\n")
    items = list_media(str(tmp_path / "m.csv"))
    assert len(items) == len({item.media_id for item in items}) == 2


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("path\na.mp4\n", "needs the column 'uri'; it has path"),
        ("uri\n", "no rows"),
    ],
)
def test_invalid_manifests_are_errors(tmp_path: Path, text: str, message: str) -> None:
    (tmp_path / "m.csv").write_text(text)
    with pytest.raises(ValueError, match=message):
        list_media(str(tmp_path / "m.csv"))


@pytest.mark.parametrize(
    ("columns", "row", "message"),
    [
        ("uri,media_id", ",x", "row 2: it has no uri"),
        ("uri,start_seconds,end_seconds", "b.mp4,5,5", r"end_seconds = 5.0 must be after start_seconds = 5.0"),
        ("uri,end_seconds", "b.mp4,0", "must be after"),
        ("uri,start_seconds", "b.mp4,-1", "start_seconds = -1.0 must"),
        ("uri,end_seconds", "b.mp4,inf", "end_seconds = inf must"),
        ("uri,width", "b.mp4,4294967296", "width: '4294967296' is not a whole number of at most 2147483647"),
        ("uri,size", "b.mp4,-5", "size = -5 must"),
        ("uri,size", "foo://b.mp4,5", "foo://b.mp4 has an unknown scheme"),
        ("uri,size", "caf\udce9.mp4,5", "it is not UTF-8"),
        ("uri,start_seconds", "b.mp4,soon", "row 2: start_seconds: 'soon' is not a number"),
        ("uri,size", "b.mp4,1.5", "row 2: size: '1.5' is not a whole number"),
        ("uri,size", "b.mp4", "row 2: it has 1 values for 2 columns"),
        ("uri,size", "b.mp4,5,", "row 2: it has 3 values for 2 columns"),
        ("uri,media_id", "b.mp4,a", "media_id 'a' names more than one medium: .*b.mp4 is not the first"),
    ],
)
def test_an_invalid_row_is_an_error_row(tmp_path: Path, columns: str, row: str, message: str) -> None:
    commas = "," * (columns.count(",") - ("media_id" in columns))
    good = ["a.mp4,a" if "media_id" in columns else "a.mp4", "c.mp4,c" if "media_id" in columns else "c.mp4"]
    text = "\n".join([columns, good[0] + commas, row, good[1] + commas])
    (tmp_path / "m.csv").write_text(text, errors="surrogateescape")
    items = list_media(str(tmp_path / "m.csv"))
    assert len({item.media_id for item in items}) == 3
    assert [Path(item.uri).name for item in items if item.error is None] == ["a.mp4", "c.mp4"]
    (bad,) = (item for item in items if item.error is not None)
    spec = PlanSpec(fps=Fraction(1), recipe_hash="r")
    (planned,) = plan_page([bad], spec)
    (error,) = planned.to_pylist()
    assert (error["error_stage"], error["error_type"]) == ("list", ErrorType.BAD_ROW)
    assert re.search(message, error["error_message"])


def test_invalid_lines_and_strings_in_jsonl_and_parquet_are_error_rows(tmp_path: Path) -> None:
    lines = [
        b'{"uri": "a.mp4"}',
        b"{",
        b"7",
        b'{"uri": "b.mp4", "size": "big"}',
        b'{"uri": "caf\xe9.mp4"}',
        b'{"uri": "c.mp4", "end_seconds": Infinity}',
        b'{"uri": "d.mp4", "end_seconds": true}',
        b"[" * 100_000,
        b'{"uri": {"path": "e.mp4"}}',
        b'{"uri": "f.mp4", "size": 1' + b"0" * 400 + b"}",
    ]
    (tmp_path / "m.jsonl").write_bytes(b"\n".join([*lines, b'{"uri": "\\ud800.mp4"}', b'{"uri": "z.mp4"}']))
    names = pa.array([b"a.mp4", b"caf\xe9.mp4", None], pa.binary()).view(pa.string())
    pq.write_table(pa.table({"uri": names}), tmp_path / "m.parquet")
    for name, kinds in (
        ("m.jsonl", [True, *[False] * 10, True]),
        ("m.parquet", [True, False, False]),
    ):
        assert [item.error is None for item in list_media(str(tmp_path / name))] == kinds, name


def test_repeats_with_other_columns_are_the_same_medium(tmp_path: Path) -> None:
    (tmp_path / "m.csv").write_text("uri,size\na.mp4,5\na.mp4,6\nb.mp4,\nc.mp4,\na.mp4,7\n")
    items = list_media(str(tmp_path / "m.csv"))  # the last repeat is on another page
    assert [(Path(item.uri).name, item.error) for item in items] == [
        ("a.mp4", None),
        ("b.mp4", None),
        ("c.mp4", None),
    ]


def test_missing_inputs_are_named(tmp_path: Path) -> None:
    for name, message in (
        ("m.parquet", "no manifest at"),
        ("none", "no manifest, folder or file"),
        ("*.x", "no medium"),
    ):
        with pytest.raises(ValueError, match=message):
            list_media(str(tmp_path / name))

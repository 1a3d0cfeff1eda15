"""Files of a feature store.

store.json         schema version, recipe, recipe_hash
index.parquet      INDEX rows, sorted by media_id, segment_index
data/*.parquet     FEATURES rows
commits/*.parquet  INDEX rows of each data file
plan/*.parquet     PLAN rows of the last run
rejects.parquet    REJECTS rows of the last run
"""

from __future__ import annotations

import json
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import pyarrow as pa
import pyarrow.parquet as pq

from timeviper_platform.common import schemas, storage

STORE_FILE = "store.json"
INDEX_FILE = "index.parquet"
REJECTS_FILE = "rejects.parquet"
DATA_FOLDER = "data"
COMMITS_FOLDER = "commits"
PLAN_FOLDER = "plan"

PLAN_WAY_OUT = "run jobs/preprocess.py again, which rewrites the plan"
INDEX_WAY_OUT = "remove it and run jobs/preprocess.py again, which writes it from the commit records"
COMMIT_WAY_OUT = "remove it and run jobs/preprocess.py again, which repeats its segments"


@contextmanager
def damage_named(uri: str, way_out: str) -> Iterator[None]:
    """Raises RuntimeError with the file's name for a file that does not parse; errors of the storage pass."""
    try:
        yield
    except (pa.ArrowException, json.JSONDecodeError, UnicodeDecodeError, TypeError, OSError) as error:
        if isinstance(error, OSError) and (type(error) is not OSError or error.errno):  # pyarrow's have no errno
            raise
        raise RuntimeError(
            f"{storage.shown_uri(uri)} is damaged ({storage.shown_text(str(error))}); {way_out}"
        ) from error


def find_header(uri: str) -> dict[str, Any] | None:
    """Reads `store.json`; None if there is no store. Raises ValueError for another schema version."""
    path = storage.join_uri(uri, STORE_FILE)
    if (data := storage.read_bytes_or_none(path)) is None:
        return None
    with damage_named(path, "restore it from a copy, or preprocess into another folder"):
        header: Any = json.loads(data)
        if not isinstance(header, dict):
            raise TypeError(f"it holds a {type(header).__name__}, not an object")
    if header.get("schema_version") != schemas.STORE_VERSION:
        raise ValueError(
            f"{path}: schema_version = {header.get('schema_version')!r}, but this release reads"
            f" {schemas.STORE_VERSION} only; preprocess the media again into another folder, or use the release that"
            " wrote this store"
        )
    return header


def read_header(uri: str) -> dict[str, Any]:
    """As `find_header`, but raises ValueError if there is no store."""
    header = find_header(uri)
    if header is None:
        raise ValueError(f"no feature store at {uri!r}; run jobs/preprocess.py with feature_store: {uri}")
    return header


def read_plan_file(uri: str) -> pa.Table:
    with damage_named(uri, PLAN_WAY_OUT), storage.open_file(uri) as file:
        table = pq.ParquetFile(file, page_checksum_verification=True).read()
    for field in schemas.PLAN:
        if field.name not in table.column_names:  # a plan of an earlier release
            table = table.append_column(field, pa.nulls(len(table), field.type))
    return table.select(schemas.PLAN.names).cast(schemas.PLAN)

"""."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

import pyarrow as pa

from timeviper_platform.common import schemas, storage

if TYPE_CHECKING:
    pass

import pyarrow.parquet as pq

from timeviper_platform.common.schemas import PLAN
from timeviper_platform.common.storage import open_file

STORE_FILE = "store.json"


INDEX_FILE = "index.parquet"


DATA_FOLDER = "data"


COMMITS_FOLDER = "commits"


def read_header(uri: str) -> dict[str, Any] | None:
    """`store.json` of the store at `uri`, or None when there is none.

    Raises:
        ValueError: when the store was written under another schema version.
    """
    path = storage.join_uri(uri, STORE_FILE)
    if not storage.exists(path):
        return None
    header: dict[str, Any] = storage.read_json(path)
    if header.get("schema_version") != schemas.STORE_VERSION:
        raise ValueError(
            f"{path}: schema_version = {header.get('schema_version')!r}, but this release reads"
            f" {schemas.STORE_VERSION} only; preprocess the media again into another folder, or use the release that"
            " wrote this store"
        )
    return header


PLAN_FOLDER = "plan"


def read_part(uri: str) -> pa.Table:
    """PLAN rows of one file of a plan."""
    with open_file(uri) as file:
        return pq.ParquetFile(file).read().cast(PLAN)

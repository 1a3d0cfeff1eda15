"""Captioned images: CC12M, PixelProse and WebDataset tars (also img2dataset's).

CC12M has lines of `url TAB caption`. PixelProse has columns uid, url, status (of the captioning model), vlm_caption. In
a tar, KEY.txt or `caption` in KEY.json belongs to KEY.jpg.
"""

from __future__ import annotations

import json
import tarfile
from collections.abc import Iterable, Iterator
from itertools import groupby
from pathlib import PurePosixPath
from typing import Any

import pyarrow.parquet as pq

from timeviper_platform.common import storage
from timeviper_platform.common.listing import FileEntry, list_files
from timeviper_platform.common.storage import open_file
from timeviper_platform.data.annotations.rows import BadRow, Labels, Row, read_lines
from timeviper_platform.data.inputs.tables import text_rows
from timeviper_platform.data.inputs.tar_scan import TarBreak, scan_tar
from timeviper_platform.data.media.container import MEDIA_SUFFIXES

INSTRUCTION = "Describe the image."
DENSE_INSTRUCTION = "Describe the image in detail."

_CAPTION_SUFFIXES = (".txt", ".json")


def convert_cc12m(uri: str, labels: Labels) -> Iterator[Row | BadRow]:
    """The URL is the medium."""
    for index, line in enumerate(read_lines(uri)):
        url, tab, caption = line.partition("\t")
        if not tab or "://" not in url:
            yield BadRow(index, "bad_row", f"not a URL, tab and caption: {line!r:.80}")
        else:
            yield _captioned(index, "", url, caption, INSTRUCTION, labels)


def convert_pixelprose(uri: str, labels: Labels) -> Iterator[Row | BadRow]:
    """The URL is the medium."""
    index = 0
    columns = ["uid", "url", "status", "vlm_caption"]
    for found in _readable(list_files(uri).files):
        with open_file(found.uri) as file:
            for batch in pq.ParquetFile(file).iter_batches(columns=columns):
                for row in text_rows(batch):
                    yield _convert_pixelprose(index, row, labels)
                    index += 1


def convert_webdataset(uri: str, labels: Labels) -> Iterator[Row | BadRow]:
    """Yields one sample per medium, named TAR/MEMBER."""
    root, files = list_files(uri)
    index = 0
    for found in _readable(files):
        if not found.uri.lower().endswith(".tar"):
            continue
        for group in _groups(found.uri):
            if isinstance(group, TarBreak):
                yield BadRow(index, "bad_row", f"{storage.shown_uri(found.uri)}: {group}")
                index += 1
                continue
            key, texts, members = group
            caption = texts.get(".txt") or _json_caption(texts.get(".json"))
            for member in members:
                name = f"{found.uri[len(root) :].lstrip('/')}/{member}"
                yield _captioned(index, key, name, caption, INSTRUCTION, labels)
                index += 1


def _readable(files: Iterable[FileEntry]) -> Iterator[FileEntry]:
    """Raises OSError at a folder that cannot be listed."""
    for file in files:
        if file.fault is not None:
            raise file.fault
        yield file


def _convert_pixelprose(index: int, row: dict[str, Any], labels: Labels) -> Row | BadRow:
    if row["status"] != "success":
        return BadRow(index, "not_captioned", f"the captioning model's status is {row['status']!r}")
    if not row["url"]:
        return BadRow(index, "no_media", "no url")
    # published captions start with a blank
    return _captioned(index, row["uid"] or "", row["url"], row["vlm_caption"], DENSE_INSTRUCTION, labels)


def _captioned(index: int, key: str, name: str, caption: str | None, instruction: str, labels: Labels) -> Row | BadRow:
    text = (caption or "").strip()
    if not text:
        return BadRow(index, "no_caption", f"{key or storage.shown_uri(name)} has no caption")
    return labels.sample(index, key, [labels.medium(name)], [("user", instruction), ("assistant", text)])


def _groups(uri: str) -> Iterator[tuple[str, dict[str, str], list[str]] | TarBreak]:
    """Yields key, texts by suffix, and media names of members with one key; and where the tar is damaged."""
    with open_file(uri) as file:
        members = (member for member in scan_tar(file) if isinstance(member, TarBreak) or member.isreg())
        for key, group in groupby(members, key=lambda found: None if isinstance(found, TarBreak) else _key(found.name)):
            texts, media = {}, []
            for member in group:
                if isinstance(member, TarBreak):
                    if not member.start and member.is_last:
                        raise tarfile.ReadError(str(member))
                    yield member
                    continue
                suffix = PurePosixPath(member.name).suffix.lower()
                if suffix in _CAPTION_SUFFIXES:
                    file.seek(member.offset_data)
                    texts[suffix] = file.read(member.size).decode("utf-8", "surrogateescape")
                elif suffix in MEDIA_SUFFIXES:
                    media.append(member.name)
            if key is not None:
                yield key, texts, media


def _key(name: str) -> str:
    """Returns the name up to the first dot of its last part."""
    folder, slash, last = name.rpartition("/")
    return folder + slash + last.partition(".")[0]


def _json_caption(text: str | None) -> str | None:
    try:
        value = json.loads(text or "null")
    except ValueError:
        return None
    caption = value.get("caption") if isinstance(value, dict) else None
    return caption if isinstance(caption, str) else None

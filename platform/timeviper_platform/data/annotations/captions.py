"""Images with captions: CC12M's table, PixelProse's Parquet, and WebDataset tars (img2dataset's too).

CC12M is `url TAB caption` without a header. PixelProse has the columns uid, url, status (of the captioning model) and
vlm_caption. In a tar KEY.txt, or `caption` of KEY.json, is the caption of the image KEY.jpg beside it.
"""

from __future__ import annotations

import json
import tarfile
from collections.abc import Iterator
from itertools import groupby
from pathlib import PurePosixPath
from typing import Any

import pyarrow.parquet as pq

from timeviper_platform.common import storage
from timeviper_platform.common.listing import list_files
from timeviper_platform.common.storage import open_file
from timeviper_platform.data.annotations.rows import Labels, Reject, Row, read_lines
from timeviper_platform.data.inputs.manifest import text_rows
from timeviper_platform.data.media.container import MEDIA_SUFFIXES

INSTRUCTION = "Describe the image."
DENSE_INSTRUCTION = "Describe the image in detail."

_CAPTION_SUFFIXES = (".txt", ".json")


def convert_cc12m(uri: str, labels: Labels) -> Iterator[Row | Reject]:
    """A sample a line; the medium is the URL, as in a manifest with the column url."""
    for number, line in enumerate(read_lines(uri)):
        url, tab, caption = line.partition("\t")
        if not tab or "://" not in url:
            yield Reject(number, "bad_row", f"no URL, tab and caption: {line!r:.80}")
        else:
            yield _captioned(number, "", url, caption, INSTRUCTION, labels)


def convert_pixelprose(uri: str, labels: Labels) -> Iterator[Row | Reject]:
    """A sample a row of one Parquet file, or of all that a glob names; the medium is the URL."""
    number = 0
    columns = ["uid", "url", "status", "vlm_caption"]
    for found in list_files(uri).files:
        with open_file(found.uri) as file:
            for batch in pq.ParquetFile(file).iter_batches(columns=columns):
                for row in text_rows(batch):
                    yield _of_pixelprose(number, row, labels)
                    number += 1


def convert_webdataset(uri: str, labels: Labels) -> Iterator[Row | Reject]:
    """A sample a medium of one tar, or of all that a folder or glob names; the medium is TAR/MEMBER as preprocessed."""
    root, files = list_files(uri)
    number = 0
    for found in files:
        if not found.uri.lower().endswith(".tar"):
            continue
        for key, texts, members in _groups(found.uri):
            caption = texts.get(".txt") or _json_caption(texts.get(".json"))
            for member in members:
                name = f"{found.uri[len(root) :].lstrip('/')}/{member}"
                yield _captioned(number, key, name, caption, INSTRUCTION, labels)
                number += 1


def _of_pixelprose(number: int, row: dict[str, Any], labels: Labels) -> Row | Reject:
    if row["status"] != "success":
        return Reject(number, "not_captioned", f"the captioning model's status is {row['status']!r}")
    if not row["url"]:
        return Reject(number, "no_media", "no url")
    # the release opens captions with a stock phrase and a blank: " This image displays: ..."
    return _captioned(number, row["uid"] or "", row["url"], row["vlm_caption"], DENSE_INSTRUCTION, labels)


def _captioned(number: int, key: str, name: str, caption: str | None, instruction: str, labels: Labels) -> Row | Reject:
    text = (caption or "").strip()
    if not text:
        return Reject(number, "no_caption", f"{key or storage.shown_uri(name)} has no caption")
    return labels.sample(number, key, [labels.medium(name)], [("user", instruction), ("assistant", text)])


def _groups(uri: str) -> Iterator[tuple[str, dict[str, str], list[str]]]:
    """Key, texts by suffix, and names of the media of each run of members that share a key."""
    with open_file(uri) as file, tarfile.open(fileobj=file, mode="r:") as tar:
        for key, members in groupby(_members(tar), key=lambda member: _key(member.name)):
            texts, media = {}, []
            for member in members:
                suffix = PurePosixPath(member.name).suffix.lower()
                if suffix in _CAPTION_SUFFIXES:
                    content = tar.extractfile(member)
                    texts[suffix] = content.read().decode("utf-8", "surrogateescape") if content is not None else ""
                elif suffix in MEDIA_SUFFIXES:
                    media.append(member.name)
            yield key, texts, media


def _members(tar: tarfile.TarFile) -> Iterator[tarfile.TarInfo]:
    while (member := tar.next()) is not None:
        tar.members = []  # type: ignore[attr-defined]  # not in typeshed; it would keep every header
        if member.isreg():
            yield member


def _key(name: str) -> str:
    """WebDataset's: all before the first point of the last part of the name."""
    folder, slash, last = name.rpartition("/")
    return folder + slash + last.partition(".")[0]


def _json_caption(text: str | None) -> str | None:
    try:
        value = json.loads(text or "null")
    except ValueError:
        return None
    caption = value.get("caption") if isinstance(value, dict) else None
    return caption if isinstance(caption, str) else None

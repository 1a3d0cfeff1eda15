"""The tables that jobs exchange, with name and version in their metadata."""

from __future__ import annotations

from typing import Any

import pyarrow as pa

STORE_VERSION = 2
"""Version of the feature store: folders, FEATURES and INDEX."""

CLIP_MARK = "#t="
"""Part of a clip's source_version: #t=START,END."""

NAME_KEY = b"timeviper.schema"
VERSION_KEY = b"timeviper.schema_version"


def _schema(name: str, version: int, fields: list[pa.Field]) -> pa.Schema:
    return pa.schema(fields, metadata={NAME_KEY: name.encode(), VERSION_KEY: str(version).encode()})


def _required(name: str, data_type: Any) -> pa.Field:
    return pa.field(name, data_type, nullable=False)


MANIFEST = _schema(
    "manifest",
    1,
    [
        _required("uri", pa.string()),  # absolute, or relative to the manifest's folder
        pa.field("media_id", pa.string()),
        pa.field("start_seconds", pa.float64()),
        pa.field("end_seconds", pa.float64()),
        # rows with size, and duration_seconds or modality image, are planned without opening the file
        pa.field("size", pa.int64()),  # bytes
        pa.field("etag", pa.string()),
        pa.field("sha256", pa.string()),
        pa.field("modality", pa.string()),  # video | image
        pa.field("duration_seconds", pa.float64()),
        pa.field("source_fps", pa.float64()),
        pa.field("width", pa.int32()),
        pa.field("height", pa.int32()),
        pa.field("codec", pa.string()),
        # img2dataset's; failed_to_download and failed_to_resize are rejected
        pa.field("status", pa.string()),
        pa.field("error_message", pa.string()),
    ],
)
"""One row per medium to preprocess. Only `uri` is required; extra columns are ignored."""

_MEDIUM = [
    pa.field("uri", pa.string()),  # without a URL's query, user and password, except in plans
    pa.field("size", pa.int64()),  # bytes
    pa.field("etag", pa.string()),
    pa.field("sha256", pa.string()),  # of the file's bytes, if hashed
    pa.field("modality", pa.string()),  # video | image
]
_STREAM = [
    pa.field("duration_seconds", pa.float64()),  # end of the last frame on the source's clock; 0 for an image
    pa.field("source_fps", pa.float64()),  # average, never used for sampling
    pa.field("width", pa.int32()),
    pa.field("height", pa.int32()),
    pa.field("codec", pa.string()),
]
_IDENTITY = [
    _required("segment_id", pa.string()),
    _required("media_id", pa.string()),
    _required("source_version", pa.string()),
    pa.field("segment_index", pa.int32()),
    pa.field("num_segments", pa.int32()),
]
_OUTCOME = [
    _required("status", pa.string()),  # ok | partial | error; in a plan: planned | error
    pa.field("error_stage", pa.string()),
    pa.field("error_type", pa.string()),
    pa.field("error_message", pa.string()),
]

PLAN = _schema(
    "plan",
    4,
    [
        *_IDENTITY,
        *_MEDIUM,
        *_STREAM,
        pa.field("joined_parts", pa.int32()),  # recordings in one file; null = unknown, or an image
        pa.field("grid_start_seconds", pa.float64()),  # frame k is sampled at grid_start_seconds + k x step
        pa.field("step_seconds", pa.float64()),  # null = 1 / fps
        pa.field("first_frame", pa.int32()),
        pa.field("num_frames", pa.int32()),
        *_OUTCOME,
    ],
)
"""One row per segment of at most 64 frames; an image is one frame. A medium in error has one row without segment_id."""

_SEGMENT = [
    *_IDENTITY,
    *_MEDIUM,
    pa.field("start_seconds", pa.float64()),  # from the first sampling time to one step after the last
    pa.field("end_seconds", pa.float64()),
    *_STREAM,
    pa.field("frame_times_seconds", pa.list_(pa.float64())),  # sampling times t of the stored frames
    pa.field("frame_pts_seconds", pa.list_(pa.float64())),  # PTS of the frame on screen at t
    pa.field("num_frames", pa.int32()),
    pa.field("num_tokens_per_frame", pa.int32()),
    pa.field("dim", pa.int32()),
    pa.field("dtype", pa.string()),
    *_OUTCOME,
    pa.field("frames_missing", pa.int32()),
    pa.field("decode_ms", pa.float64()),
    pa.field("encode_ms", pa.float64()),
    pa.field("features_xxh64", pa.uint64()),
]

FEATURES = _schema("features", STORE_VERSION, [*_SEGMENT, pa.field("features", pa.large_binary())])
"""One row per segment. `features`: little-endian bf16 (num_frames, num_tokens_per_frame, dim), C order.

A uint16 column would have twice the bytes and read 24 times slower.
"""

INDEX = _schema(
    "index",
    STORE_VERSION,
    [
        *_SEGMENT,
        _required("file", pa.string()),  # name of the data file, without folder
        _required("row_group", pa.int32()),
        _required("row_in_group", pa.int32()),
    ],
)
"""FEATURES rows with a location instead of features. A commit record holds those of one data file."""

REJECTS = _schema(
    "rejects",
    1,
    [
        _required("media_id", pa.string()),
        _required("uri", pa.string()),
        *_OUTCOME,
        _required("num_segments", pa.int32()),  # segments that this row stands for
        _required("frames_missing", pa.int32()),
    ],
)
"""Media with errors: one row per medium, stage and type."""

SAMPLES = _schema(
    "samples",
    1,
    [
        _required("sample_id", pa.string()),
        pa.field(
            "media",
            pa.list_(
                pa.struct(
                    [
                        pa.field("media_id", pa.string()),
                        pa.field("start_seconds", pa.float64()),
                        pa.field("end_seconds", pa.float64()),
                    ]
                )
            ),
        ),
        pa.field(
            "conversation",
            pa.list_(pa.struct([pa.field("role", pa.string()), pa.field("text", pa.string())])),
        ),
        pa.field("source", pa.string()),
        pa.field("weight", pa.float64()),
        pa.field("kind", pa.string()),  # "temporal" if the sample is about times; files of old releases lack it
    ],
)
"""Training samples, joined with features by media_id."""

QUESTIONS = _schema(
    "questions",
    1,
    [
        _required("sample_id", pa.string()),
        SAMPLES.field("media"),
        _required("question", pa.string()),
        _required("answer", pa.string()),
        pa.field("choices", pa.list_(pa.string())),  # empty for a free answer
        pa.field("start_seconds", pa.float64()),  # temporal grounding: the expected interval on the source's clock
        pa.field("end_seconds", pa.float64()),
        pa.field("source", pa.string()),
    ],
)
"""Evaluation questions with answers."""


def check_version(schema: pa.Schema, expected: pa.Schema, *, source: str) -> None:
    """Raises ValueError unless name and version are those of `expected`."""
    found = schema.metadata or {}
    for key, what in ((NAME_KEY, "schema"), (VERSION_KEY, "schema version")):
        if found.get(key) != expected.metadata[key]:
            value = found.get(key)
            raise ValueError(
                f"{source}: {what} is {value.decode() if value else 'not stated'}, this release reads"
                f" {expected.metadata[key].decode()}; write it again, or read it with the release that wrote it"
            )

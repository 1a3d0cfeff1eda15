"""JSON schemas of the server itself. Imports no torch."""

from __future__ import annotations

import json
from collections.abc import Sequence

from timeviper_platform.serving.messages import FeatureReference

SEGMENTS = "segments"
"""Name of the built-in schema of time spans, {"segments": [{"start_seconds", "end_seconds", "label"?}, ...]}."""
MAX_SEGMENTS = 64
MAX_LABEL_CHARACTERS = 200


def segments_schema(media: Sequence[FeatureReference]) -> str:
    """Returns the schema of time spans, whose seconds are on the media's clock: from 0 to the longest one's end."""
    end = max((medium.duration_seconds for medium in media), default=0.0)
    seconds = {"type": "number", "minimum": 0, "multipleOf": 0.01}
    if end > 0:
        seconds["maximum"] = int(end * 100) / 100  # rounded down: not after the end
    segment = {
        "type": "object",
        "properties": {
            "start_seconds": seconds,
            "end_seconds": seconds,
            "label": {"type": "string", "minLength": 1, "maxLength": MAX_LABEL_CHARACTERS},
        },
        "required": ["start_seconds", "end_seconds"],
        "additionalProperties": False,
    }
    schema = {
        "type": "object",
        "properties": {SEGMENTS: {"type": "array", "items": segment, "maxItems": MAX_SEGMENTS}},
        "required": [SEGMENTS],
        "additionalProperties": False,
    }
    return json.dumps(schema)

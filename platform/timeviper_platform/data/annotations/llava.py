"""LLaVA-style instruction data (LLaVA-Video, LLaVA-OneVision): {id, image | video, conversations: [{from, value}]}.

`<image>` or `<video>` marks a medium; without markers the media come first. Rows may have no media.
"""

from __future__ import annotations

import re
from collections.abc import Iterator
from typing import Any

from timeviper_model.batching.prompt import MEDIA_MARKER
from timeviper_platform.data.annotations.rows import BadRow, Labels, Row, read_objects

ROLES = {"human": "user", "user": "user", "gpt": "assistant", "assistant": "assistant", "system": "system"}

_MARKER = re.compile(r"<image>|<video>")


def convert_llava(uri: str, labels: Labels) -> Iterator[Row | BadRow]:
    for index, entry in enumerate(read_objects(uri)):
        yield _convert(index, entry, labels)


def _convert(index: int, entry: Any, labels: Labels) -> Row | BadRow:
    if not isinstance(entry, dict) or not isinstance(entry.get("conversations"), list):
        return BadRow(index, "bad_row", "not an object with a list of conversations")
    names = [name for key in ("image", "images", "video", "videos") for name in _as_list(entry.get(key))]
    if not all(isinstance(name, str) and name for name in names):
        return BadRow(index, "no_media", f"image or video must name files, not {names!r:.80}")
    turns: list[tuple[str, str]] = []
    for turn in entry["conversations"]:
        role = ROLES.get(str(turn.get("from"))) if isinstance(turn, dict) else None
        if role is None or not isinstance(turn.get("value"), str):
            return BadRow(index, "bad_turns", f"a turn needs from (one of {', '.join(ROLES)}) and value: {turn!r:.80}")
        text = turn["value"]
        turns.append((role, _MARKER.sub(MEDIA_MARKER, text) if role == "user" else text))
    roles = [role for role, _ in turns]
    dialogue = roles[1:] if roles[:1] == ["system"] else roles
    if not dialogue or dialogue != ["user", "assistant"] * (len(dialogue) // 2):
        return BadRow(index, "bad_turns", f"turns must alternate user, assistant and end with an answer, not {roles}")
    if not all(text.strip() for role, text in turns if role == "assistant"):
        return BadRow(index, "no_answer", "an answer is empty")
    num_markers = sum(text.count(MEDIA_MARKER) for role, text in turns if role == "user")
    if num_markers not in (0, len(names)):
        return BadRow(index, "marker_mismatch", f"{num_markers} markers for {len(names)} media")
    return labels.sample(index, str(entry.get("id", "")), [labels.medium(name) for name in names], turns)


def _as_list(value: Any) -> list[Any]:
    if value is None:
        return []
    return value if isinstance(value, list) else [value]

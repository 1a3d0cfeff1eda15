"""Conversations about media: LLaVA's rows (also LLaVA-Video, LLaVA-OneVision), and `messages` of ms-swift and OpenAI.

    llava      {"id", "conversations": [{"from": "human", "value": "<image>\\nWhat?"}, ...], "image": "a.jpg", "video"}
    messages   {"messages": [{"role": "user", "content": "<video>What?"}, ...], "images": [], "videos": ["a.mp4"]}

The i-th <image> is the i-th image and the i-th <video> the i-th video; a row with media of one kind may mark them by
either name, as LLaVA-Video does. Without markers, media come first. `content` may be a list of OpenAI's parts. `start`
and `end` (or `video_start` and `video_end`), in seconds, make a clip: a number for one video, or a list.
"""

from __future__ import annotations

import re
from collections.abc import Iterator
from typing import Any, Literal, NamedTuple

from timeviper_model.batching.prompt import MEDIA_MARKER
from timeviper_platform.data.annotations.rows import BadRow, Labels, RejectReason, Row, check_clip, read_objects

Kind = Literal["image", "video"]

ROLES = {
    "human": "user",
    "user": "user",
    "gpt": "assistant",
    "assistant": "assistant",
    "system": "system",
    "developer": "system",
}

_MARKER = re.compile("<(image|video)>")
_NAME_KEYS = ("image", "image_url", "video", "video_url", "path", "url")
_START_KEYS, _END_KEYS = ("start", "video_start"), ("end", "video_end")
_CLIP_FIELDS = {*_START_KEYS, *_END_KEYS}
_ROW_FIELDS = {"id", "system", "image", "images", "video", "videos", *_CLIP_FIELDS}
_PART_FIELDS = {"type", "text", *_NAME_KEYS, *_CLIP_FIELDS}


class _Layout(NamedTuple):
    turns: str
    role: str
    text: str


class _Medium(NamedTuple):
    name: str
    start_seconds: float | None = None
    end_seconds: float | None = None


class _Marker(NamedTuple):
    kind: Kind
    medium: _Medium | None = None
    """None = the next one of the row's list."""


class _Turn(NamedTuple):
    role: str
    pieces: list[str | _Marker]

    @property
    def text(self) -> str:
        return "".join(piece if isinstance(piece, str) else MEDIA_MARKER for piece in self.pieces)


class _Rejected(Exception):
    def __init__(self, reason: RejectReason, detail: str) -> None:
        super().__init__(detail)
        self.reason, self.detail = reason, detail


def convert_llava(uri: str, labels: Labels) -> Iterator[Row | BadRow]:
    return _convert(uri, _Layout("conversations", "from", "value"), labels)


def convert_messages(uri: str, labels: Labels) -> Iterator[Row | BadRow]:
    return _convert(uri, _Layout("messages", "role", "content"), labels)


def _convert(uri: str, layout: _Layout, labels: Labels) -> Iterator[Row | BadRow]:
    for index, entry in enumerate(read_objects(uri)):
        try:
            yield _sample(index, entry, layout, labels)
        except _Rejected as reject:
            yield BadRow(index, reject.reason, reject.detail)


def _sample(index: int, entry: Any, layout: _Layout, labels: Labels) -> Row | BadRow:
    if not isinstance(entry, dict) or not isinstance(entry.get(layout.turns), list):
        raise _Rejected("bad_row", f"not an object with a list of {layout.turns}")
    labels.ignore_fields(entry, {layout.turns, *_ROW_FIELDS})
    media: dict[Kind, list[_Medium]] = {
        "image": _media(entry, "image"),
        "video": _with_clips(_media(entry, "video"), entry),
    }
    turns = _with_system([_turn(turn, layout, labels) for turn in entry[layout.turns]], entry.get("system"))
    roles = [turn.role for turn in turns]
    dialogue = roles[1:] if roles[:1] == ["system"] else roles
    if not dialogue or dialogue != ["user", "assistant"] * (len(dialogue) // 2):
        raise _Rejected("bad_turns", f"turns must alternate user, assistant and end with an answer, not {roles}")
    if not all(turn.text.strip() for turn in turns if turn.role == "assistant"):
        raise _Rejected("no_answer", "an answer is empty")
    placed = _place([piece for turn in turns for piece in turn.pieces if isinstance(piece, _Marker)], media)
    name = entry.get("id")
    return labels.sample(
        index,
        "" if name is None else str(name),
        [labels.medium(*medium) for medium in placed],
        [(turn.role, turn.text) for turn in turns],
    )


def _place(markers: list[_Marker], media: dict[Kind, list[_Medium]]) -> list[_Medium]:
    """Returns the media in the order of their markers."""
    listed = media["image"] + media["video"]
    open_kinds = [marker.kind for marker in markers if marker.medium is None]
    if not markers:
        return listed
    if all(open_kinds.count(kind) == len(own) for kind, own in media.items()):
        rest = {kind: iter(own) for kind, own in media.items()}
        return [marker.medium or next(rest[marker.kind]) for marker in markers]
    if len(open_kinds) == len(listed) and not (media["image"] and media["video"]):
        only = iter(listed)
        return [marker.medium or next(only) for marker in markers]
    counts = ", ".join(f"{open_kinds.count(kind)} <{kind}> for {len(own)} {kind}s" for kind, own in media.items())
    raise _Rejected("marker_mismatch", counts)


def _turn(turn: Any, layout: _Layout, labels: Labels) -> _Turn:
    role = ROLES.get(str(turn.get(layout.role))) if isinstance(turn, dict) else None
    if role is None or not isinstance(turn.get(layout.text), str | list):
        needs = f"a turn needs {layout.role} (one of {', '.join(ROLES)}) and {layout.text}"
        raise _Rejected("bad_turns", f"{needs}: {turn!r:.80}")
    labels.ignore_fields(turn, {layout.role, layout.text}, where=f"{layout.turns}.")
    content = turn[layout.text]
    if isinstance(content, list):
        pieces = _parts(content, f"{layout.turns}.{layout.text}.", labels)
    else:
        pieces = _marked(content) if role == "user" else [content]
    texts = [piece for piece in pieces if isinstance(piece, str)]
    if role != "user" and len(texts) < len(pieces):
        raise _Rejected("bad_turns", f"only a user's turn may hold media, not one of {role}")
    if role == "user" and any(MEDIA_MARKER in text for text in texts):
        raise _Rejected("marker_mismatch", f"a user's text contains {MEDIA_MARKER}, the mark of a medium; remove it")
    return _Turn(role, pieces)


def _marked(text: str) -> list[str | _Marker]:
    """a <image> b -> "a ", marker, " b" """
    pieces: list[str | _Marker] = []
    for index, piece in enumerate(_MARKER.split(text)):
        if index % 2:
            pieces.append(_Marker("image" if piece == "image" else "video"))
        elif piece:
            pieces.append(piece)
    return pieces


def _parts(parts: list[Any], where: str, labels: Labels) -> list[str | _Marker]:
    """Texts are lines, as in serving."""
    pieces: list[str | _Marker] = []
    last_text: int | None = None
    for part in parts:
        kind = str(part.get("type", "")).removeprefix("input_").removesuffix("_url") if isinstance(part, dict) else ""
        if kind == "text" and isinstance(part.get("text"), str):
            if last_text is not None:
                pieces[last_text] = f"{pieces[last_text]}\n"
            last_text = len(pieces)
            pieces.append(part["text"])
        elif kind in ("image", "video"):
            has_name = any(part.get(key) is not None for key in _NAME_KEYS)
            pieces.append(_Marker("image" if kind == "image" else "video", _medium(part) if has_name else None))
        else:
            raise _Rejected("bad_turns", f"a part must be text, image, image_url, video or video_url: {part!r:.80}")
        labels.ignore_fields(part, _PART_FIELDS, where=where)
    return pieces


def _with_system(turns: list[_Turn], system: Any) -> list[_Turn]:
    if system is None or system == "":
        return turns
    if not isinstance(system, str):
        raise _Rejected("bad_turns", f"system must be text, not {system!r:.80}")
    if turns and turns[0].role == "system":
        if turns[0].text != system:
            raise _Rejected("bad_turns", "`system` and the first turn are different system texts; keep one")
        return turns
    return [_Turn("system", [system]), *turns]


def _media(entry: dict[str, Any], kind: str) -> list[_Medium]:
    return [_medium(value) for key in (kind, f"{kind}s") for value in _as_list(entry.get(key))]


def _medium(value: Any) -> _Medium:
    """Takes a name, or an object that holds one and perhaps a clip."""
    clip = _clip(_one(value, _START_KEYS), _one(value, _END_KEYS)) if isinstance(value, dict) else (None, None)
    while isinstance(value, dict):
        value = next((value[key] for key in _NAME_KEYS if value.get(key) is not None), None)
    if not isinstance(value, str) or not value:
        raise _Rejected("no_media", f"image or video must name a file, not {value!r:.80}")
    if value.startswith("data:"):
        raise _Rejected("no_media", "a medium is embedded as data:; write it to a file and name that")
    return _Medium(value, *clip)


def _with_clips(videos: list[_Medium], entry: dict[str, Any]) -> list[_Medium]:
    bounds = []
    for keys in (_START_KEYS, _END_KEYS):
        value = _one(entry, keys)
        values = [] if value is None else _as_list(value)
        if values and len(values) != len(videos):
            raise _Rejected("bad_times", f"{len(values)} values of {' or '.join(keys)} for {len(videos)} videos")
        bounds.append(values or [None] * len(videos))
    return [
        video if start is None and end is None else _Medium(video.name, *_clip(start, end))
        for video, start, end in zip(videos, *bounds, strict=True)
    ]


def _clip(start: Any, end: Any) -> tuple[float | None, float | None]:
    if fault := check_clip(start, end):
        raise _Rejected("bad_times", fault)
    return start, end


def _one(entry: dict[str, Any], keys: tuple[str, str]) -> Any:
    """Returns the value of the first key; both may be given if they are equal."""
    first, second = (entry.get(key) for key in keys)
    if first is not None and second is not None and first != second:
        raise _Rejected("bad_times", f"{keys[0]} = {first!r} and {keys[1]} = {second!r} differ; keep one")
    return second if first is None else first


def _as_list(value: Any) -> list[Any]:
    if value is None:
        return []
    return value if isinstance(value, list) else [value]

"""Writes HEIC pictures of one item or a grid of tiles, with HEVC from libx265."""

from __future__ import annotations

import io
import struct

import av
import numpy as np


def write_heic(
    pixels: np.ndarray, *, tile: int | None = None, turns: int = 0, flip: int | None = None, version: int = 0
) -> bytes:
    """A HEIC of (H, W, 3) uint8.

    Args:
        tile: side of square tiles; None = a single item.
        turns: quarter turns counterclockwise that viewers apply.
        flip: axis of the mirror that viewers apply afterwards.
        version: 0 or 1, of the boxes: identifiers of 16 or 32 bits.
    """
    height, width = pixels.shape[:2]
    if tile is None:
        parts = [pixels]
    else:
        padded = np.pad(pixels, ((0, -height % tile), (0, -width % tile), (0, 0)), "edge")
        rows, columns = padded.shape[0] // tile, padded.shape[1] // tile
        parts = [
            padded[tile * r : tile * (r + 1), tile * c : tile * (c + 1)] for r in range(rows) for c in range(columns)
        ]
    encoded = [_hevc(part) for part in parts]
    number = ">I" if version else ">H"
    ids = list(range(1, len(parts) + 1))
    primary = 1 if tile is None else len(parts) + 1
    properties = [_box(b"hvcC", encoded[0][0]), _full(b"ispe", struct.pack(">II", *parts[0].shape[1::-1]))]
    shown = []
    if tile is not None:
        properties.append(_full(b"ispe", struct.pack(">II", width, height)))
        shown.append(3)
    if turns:
        properties.append(_box(b"irot", bytes([turns])))
        shown.append(len(properties))
    if flip is not None:
        properties.append(_box(b"imir", bytes([flip])))
        shown.append(len(properties))
    associated = {item: [0x81, 2] for item in ids}
    associated[primary] = ([0x81, 2] if tile is None else []) + shown
    kinds = dict.fromkeys(ids, b"hvc1") | ({} if tile is None else {primary: b"grid"})
    grid = b"" if tile is None else struct.pack(">BBBBHH", 0, 0, rows - 1, columns - 1, width, height)

    def meta(data_offset: int) -> bytes:
        places = []
        for item, (_, data) in zip(ids, encoded, strict=True):
            places.append((item, 0, data_offset, len(data)))
            data_offset += len(data)
        if tile is not None:
            places.append((primary, 1, 0, len(grid)))
        iloc = struct.pack(">HH", 0x4400, len(places)) + b"".join(
            struct.pack(">HHHHII", item, method, 0, 1, offset, length) for item, method, offset, length in places
        )
        infe = b"".join(
            _full(b"infe", struct.pack(number, item) + b"\0\0" + kind + b"\0", 3 if version else 2)
            for item, kind in kinds.items()
        )
        ipma = struct.pack(">I", len(associated)) + b"".join(
            struct.pack(number, item) + bytes([len(numbers), *numbers]) for item, numbers in associated.items()
        )
        content = [
            _full(b"hdlr", bytes(4) + b"pict" + bytes(13)),
            _full(b"pitm", struct.pack(number, primary), version),
            _full(b"iinf", struct.pack(number, len(kinds)) + infe, version),
            _full(b"iloc", iloc, 1),
            _box(b"iprp", _box(b"ipco", b"".join(properties)) + _full(b"ipma", ipma, version)),
        ]
        if tile is not None:
            tiles = (
                struct.pack(number, primary)
                + struct.pack(">H", len(ids))
                + b"".join(struct.pack(number, item) for item in ids)
            )
            content += [_full(b"iref", _box(b"dimg", tiles), version), _box(b"idat", grid)]
        return _full(b"meta", b"".join(content))

    head = _box(b"ftyp", b"heic" + bytes(4) + b"mif1heic")
    offset = len(head) + len(meta(0)) + 8
    return head + meta(offset) + _box(b"mdat", b"".join(data for _, data in encoded))


def _hevc(pixels: np.ndarray) -> tuple[bytes, bytes]:
    """Returns hvcC and the picture's data."""
    content = io.BytesIO()
    with av.open(content, "w", format="mp4") as container:
        stream = container.add_stream(
            "libx265", rate=1, options={"x265-params": "log-level=none:crf=4:keyint=1:pools=none:frame-threads=1"}
        )
        stream.height, stream.width = pixels.shape[:2]
        stream.pix_fmt = "yuv420p"
        container.mux(stream.encode(av.VideoFrame.from_ndarray(np.ascontiguousarray(pixels), format="rgb24")))
        container.mux(stream.encode(None))
    content.seek(0)
    with av.open(content) as container:
        (stream,) = container.streams.video
        packet = next(packet for packet in container.demux(stream) if packet.size)
        return bytes(stream.codec_context.extradata or b""), bytes(packet)


def _box(kind: bytes, content: bytes) -> bytes:
    return struct.pack(">I", len(content) + 8) + kind + content


def _full(kind: bytes, content: bytes, version: int = 0) -> bytes:
    return _box(kind, bytes([version, 0, 0, 0]) + content)

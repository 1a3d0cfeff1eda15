"""Folders of JPEG frames to video files, which preprocessing reads like others."""

from __future__ import annotations

import io
import re
from fractions import Fraction

import av
from PIL import Image

from timeviper_platform.common import storage

FRAMES_FPS = 3
"""Rate of MVBench's frames (tvqa/frames_fps3_hq)."""


def is_frame_folder(uri: str) -> bool:
    return bool(_frames_in(uri))


def write_frames_as_video(folder: str, output: str, *, fps: int = FRAMES_FPS) -> int:
    """Puts the JPEG files of `folder`, by the numbers in their names, into a Matroska file without encoding them again.

    Returns:
        the number of frames.

    Raises:
        ValueError: if the first frame is not a JPEG, or numbers are missing between the first and the last.
    """
    files = _frames_in(folder)
    numbers = [_number(uri) for uri in files]
    if numbers != list(range(numbers[0], numbers[0] + len(files))):
        gap = next(number for number in range(numbers[0], numbers[-1] + 1) if number not in set(numbers))
        raise ValueError(f"{folder} lacks frame {gap}; copy the folder again")
    first = storage.read_bytes(files[0])
    buffer = io.BytesIO()
    with (
        Image.open(io.BytesIO(first), formats=("JPEG",)) as image,
        av.open(buffer, "w", format="matroska") as container,
    ):
        stream = container.add_stream("mjpeg", rate=fps)
        stream.width, stream.height = image.size
        stream.pix_fmt = "yuvj420p"
        stream.time_base = Fraction(1, fps)
        for index, uri in enumerate(files):
            packet = av.Packet(first if index == 0 else storage.read_bytes(uri))
            packet.stream, packet.time_base = stream, Fraction(1, fps)
            packet.pts = packet.dts = index
            packet.duration = 1
            packet.is_keyframe = True
            container.mux(packet)
    storage.write_bytes(output, buffer.getvalue())
    return len(files)


def _frames_in(folder: str) -> list[str]:
    """JPEG files with a number in their names, in its order."""
    if not storage.exists(folder):
        return []
    files = [uri for suffix in (".jpg", ".jpeg") for uri in storage.files_in(folder, suffix)]
    return sorted((uri for uri in files if _number(uri) >= 0), key=_number)


def _number(uri: str) -> int:
    """The last number in the file's name, -1 without one."""
    found = re.findall(r"\d+", uri.rpartition("/")[2].rpartition(".")[0])
    return int(found[-1]) if found else -1

"""One untrusted medium decoded in a process of its own: `python -m timeviper_platform.serving.decode_worker`.

Limits itself, says that it is ready, reads one job from standard input, writes frames (or why there are none) to
standard output, and ends. Knows data/decode.py; nothing of services, models or Ray. The other side is sandbox.py.

    stdin    {"uri", "num_bytes", "image_size", "fps", "max_frames", "max_pixels", "max_samples"}\\n  num_bytes bytes
    stdout   ready\\n  {"shape", "pts_seconds", "num_missing", "end_seconds"}\\n  frames, or {"error_type", ...}\\n
"""

from __future__ import annotations

import json
import resource
import sys
from fractions import Fraction
from typing import Any, BinaryIO

READY = b"ready\n"
MAX_OPEN_FILES = 64
MAX_WRITTEN_BYTES = 4 * 2**20
"""of any file; what is decoded goes through a pipe"""


def limit_resources(memory_bytes: int, cpu_seconds: int) -> None:
    """From here on the process cannot take more than this, whatever it is made to decode."""
    # DATA and not AS: what counts is memory written, and libraries map far more address space than they use
    resource.setrlimit(resource.RLIMIT_DATA, (memory_bytes, memory_bytes))
    resource.setrlimit(resource.RLIMIT_CPU, (cpu_seconds, cpu_seconds + 1))
    resource.setrlimit(resource.RLIMIT_NOFILE, (MAX_OPEN_FILES, MAX_OPEN_FILES))
    resource.setrlimit(resource.RLIMIT_FSIZE, (MAX_WRITTEN_BYTES, MAX_WRITTEN_BYTES))
    resource.setrlimit(resource.RLIMIT_CORE, (0, 0))


def decode_job(job: dict[str, Any], data: bytes) -> tuple[dict[str, Any], bytes]:
    """The answer's header and its frames."""
    from timeviper_platform.data.decode import DecodeError, MediaLimits, probe_media, read_frames

    source: str | bytes = job["uri"] if job["uri"] is not None else data
    limits = MediaLimits(max_pixels=job["max_pixels"], max_samples=job["max_samples"])
    try:
        probe = probe_media(source, limits)
        batch = read_frames(
            source, job["image_size"], fps=Fraction(job["fps"]), max_frames=job["max_frames"], limits=limits
        )
    except DecodeError as error:
        return {"error_type": str(error.error_type), "stage": error.stage}, b""
    except MemoryError:
        return {"error_type": "out_of_memory", "stage": "decode_video"}, b""
    header = {
        "shape": list(batch.frames.shape),
        "pts_seconds": batch.pts_seconds.tolist(),
        "num_missing": batch.num_missing,
        "end_seconds": float(probe.end_seconds),
    }
    return header, batch.frames.tobytes()


def main(stdin: BinaryIO, stdout: BinaryIO) -> None:
    """One job."""
    import timeviper_platform.data.decode  # noqa: F401 - loaded before the job, so that the job does not wait for it

    stdout.write(READY)
    stdout.flush()
    line = stdin.readline()
    if not line:  # the service has gone, or needs no more workers
        return
    job = json.loads(line)
    header, frames = decode_job(job, stdin.read(job["num_bytes"]))
    stdout.write(json.dumps(header).encode() + b"\n")
    stdout.write(frames)
    stdout.flush()


if __name__ == "__main__":
    limit_resources(memory_bytes=int(sys.argv[1]), cpu_seconds=int(sys.argv[2]))
    main(sys.stdin.buffer, sys.stdout.buffer)

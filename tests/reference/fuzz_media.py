"""Damaged media through probing and decoding as a job does them, compared with a plain decode of the same bytes.

    PYTHONPATH=tests python -m reference.fuzz_media --files 10000 --seed 1
    PYTHONPATH=tests python -m reference.fuzz_media --seed 1 --only 7539 9372

Prints the seed; file INDEX of a seed is `damaged_file(seed, INDEX)`.
"""

from __future__ import annotations

import argparse
import contextlib
import gc
import random
import sys
import tempfile
import time
import traceback
from collections import Counter
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, field
from fractions import Fraction
from pathlib import Path
from typing import Any
from unittest import mock

from reference.damaged_files import damaged_file, make_originals
from reference.plain_decode import IMAGE_SIZE, PILLOW_READS_IT, PlainDecodes, merged, not_in
from timeviper_platform.data.media.container import DecodeError, ErrorType, MediaLimits
from timeviper_platform.data.media.medium import Medium
from timeviper_platform.data.plan.segments import PlanSpec, Segment, plan_page, segments_of
from timeviper_platform.data.preprocess.segment_rows import SegmentDecoder
from timeviper_platform.data.video_worker.child_process import DecodeChild
from timeviper_platform.data.video_worker.frame_source import DecodeConfig
from timeviper_platform.data.video_worker.isolated import IsolatedProbes

FPS = Fraction(2)
PAGE_FILES = 50
DEADLINE_SECONDS = 20.0
SLACK_SECONDS = 2.0
"""A busy machine's delay in killing a child."""
LIMITS = MediaLimits(max_pixels=1 << 22, max_frames=192)
RAW_SUFFIXES = (".m2v", ".h264")
"""Elementary streams, whose packets have no PTS."""
PICTURE_SUFFIXES = (".jpg", ".png", ".webp", ".gif", ".bmp", ".tiff", ".avif")


@dataclass
class FuzzResult:
    seed: int
    files: int = 0
    frames: int = 0
    outcomes: Counter[str] = field(default_factory=Counter)
    """ok, partial or error type -> files"""
    job_ends: list[str] = field(default_factory=list)
    overdue: list[str] = field(default_factory=list)
    """replies that took longer than their deadline"""
    alive: list[int] = field(default_factory=list)
    """children that were not ended"""
    invented: list[str] = field(default_factory=list)
    """frames that the plain decode does not have"""
    exceptions: list[str] = field(default_factory=list)
    """exceptions of a library that are not a reason of their own"""
    salvaged: int = 0
    """frames of damaged animations that Pillow refuses, other than those of the undamaged file"""
    uncompared: int = 0
    """files whose plain decode itself crashed or hung"""

    def lines(self) -> list[str]:
        return [
            f"seed {self.seed}: {self.files} files, {self.frames} frames; "
            + ", ".join(f"{count} {name}" for name, count in self.outcomes.most_common()),
            f"job ends {len(self.job_ends)}, replies past their deadline {len(self.overdue)}, children alive"
            f" {len(self.alive)}, frames that a plain decode does not have {len(self.invented)},"
            f" unknown exceptions {len(self.exceptions)}, salvaged {self.salvaged}, not compared {self.uncompared}",
            *self.job_ends,
            *self.overdue,
            *self.invented,
            *self.exceptions,
        ]

    def label(self, kind: str, message: str) -> str:
        """Returns the error type; notes an exception that no reason stands for."""
        if kind == ErrorType.DECODER_CRASHED and not message.endswith("twice"):
            self.exceptions.append(message)
        return kind

    @property
    def is_good(self) -> bool:
        return not (self.job_ends or self.overdue or self.alive or self.invented or self.exceptions)


class Fuzz:
    """Damaged files of one seed."""

    def __init__(
        self, folder: Path, seed: int, damaged: Callable[[int, int], tuple[str, bytes]] = damaged_file
    ) -> None:
        self._folder, self._seed, self._damaged = folder, seed, damaged

    def run(self, indices: Sequence[int], *, progress: Callable[[FuzzResult], None] | None = None) -> FuzzResult:
        result = FuzzResult(self._seed)
        with _watched_children(result):
            plain = PlainDecodes()
            probes = IsolatedProbes(LIMITS, _CONFIG)
            decoder = _new_decoder()
            for start in range(0, len(indices), PAGE_FILES):
                page = indices[start : start + PAGE_FILES]
                paths = [self._write(index) for index in page]
                try:
                    self._run_page(paths, probes, decoder, plain, result)
                except Exception:  # noqa: BLE001 - whatever it is, it would end a job
                    result.job_ends.append(f"files {page[0]}..{page[-1]}: {traceback.format_exc()}")
                    decoder = _new_decoder()
                plain.clear()
                for path in paths:
                    path.unlink()
                result.files += len(paths)
                if progress is not None:
                    progress(result)
            plain.close()
            del probes, decoder
        return result

    def _original(self, name: str) -> str:
        path = self._folder / name.partition("-")[2]
        path.write_bytes(make_originals()[path.name])
        return str(path)

    def _write(self, index: int) -> Path:
        name, data = self._damaged(self._seed, index)
        path = self._folder / name
        path.write_bytes(data)
        return path

    def _run_page(
        self,
        paths: list[Path],
        probes: IsolatedProbes,
        decoder: SegmentDecoder,
        plain: PlainDecodes,
        result: FuzzResult,
    ) -> None:
        spec = PlanSpec(fps=FPS, recipe_hash="", limits=LIMITS, decode=_CONFIG)
        media = [Medium(str(path), path.name) for path in paths]
        segments: list[Segment] = []
        for table in plan_page(media, spec, probes):
            segments += segments_of(table)
            for kind, message in zip(table["error_type"].to_pylist(), table["error_message"].to_pylist(), strict=True):
                if kind:
                    result.outcomes[result.label(kind, message)] += 1
        for segment in segments:
            plain.start(segment.uri)
        outcomes: dict[str, set[str]] = {}
        for segment, decoded in zip(segments, decoder.decode(segments), strict=True):
            frames, labels = decoded.frames, outcomes.setdefault(segment.uri, set())
            if isinstance(frames, DecodeError):
                labels.add(result.label(frames.error_type.value, frames.message))
                continue
            labels.add("partial" if frames.num_missing else "ok")
            result.frames += len(frames.frames)
            expected = plain.frames(segment.uri)
            if expected is None:
                result.uncompared += 1
                continue
            name = Path(segment.uri).name
            is_picture = name.endswith(PICTURE_SUFFIXES)
            timing = {"is_timed": not name.endswith(RAW_SUFFIXES), "num_parts": segment.joined_parts or 1}
            foreign = not_in(frames, expected, **timing)
            if foreign and is_picture:  # salvaged from an animation of which Pillow shows nothing
                foreign = not_in(frames, merged(expected, plain.frames(self._original(name))))
                if PILLOW_READS_IT not in expected:
                    result.salvaged += len(foreign)
                    foreign = []
            elif foreign:
                foreign = not_in(frames, plain.entered(segment.uri) or {}, **timing)
            result.invented += [f"seed {self._seed}, {name}: {what}" for what in foreign]
        result.outcomes.update("+".join(sorted(kinds)) for kinds in outcomes.values())


_CONFIG = DecodeConfig(deadline_seconds=DEADLINE_SECONDS, probe_deadline_seconds=DEADLINE_SECONDS)


def _new_decoder() -> SegmentDecoder:
    return SegmentDecoder(IMAGE_SIZE, FPS, LIMITS, _CONFIG)


@contextlib.contextmanager
def _watched_children(result: FuzzResult) -> Iterator[None]:
    """Notes late replies, and children that still run at the end."""
    pids: list[int] = []
    start, reply = DecodeChild.__init__, DecodeChild.reply

    def watched_start(self: DecodeChild, *arguments: Any, **named: Any) -> None:
        start(self, *arguments, **named)
        pids.append(self.pid)

    def watched_reply(self: DecodeChild, deadline_seconds: float, *arguments: Any) -> dict[str, Any]:
        began = time.monotonic()
        try:
            return reply(self, deadline_seconds, *arguments)
        finally:
            seconds = time.monotonic() - began
            if seconds > deadline_seconds + SLACK_SECONDS:
                result.overdue.append(f"a reply took {seconds:.1f} s")

    with mock.patch.multiple(DecodeChild, __init__=watched_start, reply=watched_reply):
        yield
    gc.collect()
    result.alive = [pid for pid in pids if Path(f"/proc/{pid}").exists()]


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--files", type=int, default=10_000)
    parser.add_argument("--seed", type=int, default=random.SystemRandom().randrange(1 << 32))
    parser.add_argument("--only", type=int, nargs="+", metavar="INDEX", help="these files instead of the first --files")
    options = parser.parse_args()
    num_shown = 0

    def show(result: FuzzResult) -> None:
        nonlocal num_shown
        counts, problems, *details = result.lines()
        sys.stdout.write("\n".join([counts, problems, *details[num_shown:], ""]))
        sys.stdout.flush()
        num_shown = len(details)

    with tempfile.TemporaryDirectory(prefix="fuzz-") as folder:
        result = Fuzz(Path(folder), options.seed).run(options.only or range(options.files), progress=show)
    sys.stdout.write("\n".join(result.lines()) + "\n")
    return 0 if result.is_good else 1


if __name__ == "__main__":
    sys.exit(main())

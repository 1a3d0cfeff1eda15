"""A question of a benchmark."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any, Literal

from timeviper_platform.common import storage
from timeviper_platform.data.media.medium import media_id_of
from timeviper_platform.evaluation.scoring.letters import LETTERS
from timeviper_platform.evaluation.scoring.spans import Span

QuestionKind = Literal["choice", "span", "windows", "caption", "dense"]
"""choice    one of `options`
span      one interval of time
windows   several intervals, best first
caption   free text, judged by question-answer pairs
dense     sentences with intervals
"""


@dataclass(frozen=True, kw_only=True, slots=True)
class Clip:
    path: str
    """Video file, or folder of frames, below the benchmark's folder of videos."""
    start_seconds: float | None = None
    end_seconds: float | None = None

    @property
    def is_part(self) -> bool:
        return self.start_seconds is not None or self.end_seconds is not None

    def media_ids(self, prefix: str) -> tuple[str, str]:
        """Ids of the clip and of its whole video, as preprocessing makes them from paths below `prefix`."""
        path = storage.join_uri(prefix, self.path).lstrip("/") if prefix else self.path
        return media_id_of(path, "", self.start_seconds, self.end_seconds), media_id_of(path, "")


@dataclass(frozen=True, kw_only=True, slots=True)
class BenchmarkQuestion:
    question_id: str
    """Unique in its benchmark."""
    kind: QuestionKind
    clip: Clip
    text: str
    """Question, query or instruction, without options."""
    options: tuple[str, ...] = ()
    """Texts in the order of their labels."""
    labels: tuple[str, ...] = ()
    """Names of options; () = letters."""
    answers: tuple[str, ...] = ()
    """Right labels. Empty if no option is right, several if options have equal texts."""
    spans: tuple[Span, ...] = ()
    """True intervals in seconds."""
    duration: str = ""
    """Seconds as written in the annotations; "" = not given."""
    groups: Mapping[str, tuple[str, ...]] = field(default_factory=dict)
    """Values of each breakdown."""
    subtitles: str = ""
    """URI of a subtitle file, "" = none."""
    subtitles_start_seconds: float = 0.0
    """Time of the subtitles' 0 on the video's clock, subtracted from theirs."""
    details: Mapping[str, Any] = field(default_factory=dict)
    """What only this benchmark's scorer needs, as JSON values."""

    def __post_init__(self) -> None:
        labels = self.labels or tuple(LETTERS[: len(self.options)])
        object.__setattr__(self, "labels", labels)
        if len(labels) != len(self.options) or not set(self.answers) <= set(labels):
            raise ValueError(f"{self.question_id}: {self.answers = } must be among the labels {labels} of the options")
        try:
            _ = self.duration_seconds
        except ValueError as error:  # now, not when all answers are scored
            raise ValueError(f"{self.question_id}: {self.duration = } must be seconds, such as 612.3") from error

    @property
    def duration_seconds(self) -> float | None:
        return float(self.duration) if self.duration else None


def question_of(row: Mapping[str, Any]) -> BenchmarkQuestion:
    """Inverse of `dataclasses.asdict`, after JSON."""
    values = dict(row)
    values["clip"] = Clip(**row["clip"])
    values["spans"] = tuple(Span(*span) for span in row["spans"])
    values["groups"] = {name: tuple(group) for name, group in row["groups"].items()}
    for name in ("options", "labels", "answers"):
        values[name] = tuple(row[name])
    return BenchmarkQuestion(**values)

"""Configuration of a published benchmark."""

from __future__ import annotations

from dataclasses import dataclass

from timeviper_platform.evaluation.benchmarks.prompts import PromptStyle
from timeviper_platform.evaluation.benchmarks.registry import BenchmarkName
from timeviper_platform.evaluation.protocols import Protocol


@dataclass(frozen=True, kw_only=True, slots=True)
class BenchmarkConfig:
    name: BenchmarkName
    folder: str
    """URI of the data set in its owner's layout, see docs/evaluate.md."""
    videos: str | None = None
    """Folder of the videos below `folder`; null = as in the owner's layout."""
    media_prefix: str = ""
    """Path from the preprocessed folder to `folder`, if videos were preprocessed without the benchmark's manifest."""
    protocols: tuple[Protocol, ...] = ("paper", "whole", "without_video")
    """paper = the first 256 frames, as in the public code; whole = `answering.max_frames` over the whole video;
    without_video = the question alone."""
    prompts: PromptStyle = "paper"
    """paper = the prompts of the paper's evaluation; owner = those of the benchmark's own script."""
    subtitles: bool = False
    """Whether prompts hold the subtitles on screen at the sampled frames."""
    scores_options: bool = True
    """Whether to score options by likelihood too, as a separate number."""
    num_examples: int = 6
    """Questions shown with frames in the HTML report, half of them answered wrong."""

    def __post_init__(self) -> None:
        if not self.protocols or len(set(self.protocols)) != len(self.protocols):
            raise ValueError(f"{self.protocols = } must name each protocol once, and at least one")
        if self.num_examples < 0:
            raise ValueError(f"{self.num_examples = } must be at least 0")

"""Reader of VDC: captions that a judge examines with question-answer pairs.

VDC   VDC_1k.jsonl, post_eval/{detailed, camera, background, main_object, short}.jsonl, videos/{uuid}.mp4
"""

from __future__ import annotations

import random

from timeviper_platform.common import storage
from timeviper_platform.evaluation.benchmarks.annotation_files import Fields, read_json_rows
from timeviper_platform.evaluation.benchmarks.question import BenchmarkQuestion, Clip

VDC_PROMPTS: dict[str, tuple[str, ...]] = {
    "detailed": (
        "Describe everything that happens in this video, faithfully and in more than three sentences.",
        "Describe this video in detail: its setting, its subjects, what they do, and how the camera shows it.",
    ),
    "camera": (
        "Describe the camera's movements and angles throughout the video.",
        "Describe any camera zooms, pans, or angle changes.",
    ),
    "background": (
        "Describe the background of the video: objects, location, weather and time of day.",
        "Summarize the setting behind the main subjects of this video.",
    ),
    "main_object": (
        "Describe the main subject's actions and movements.",
        "Describe the main subject, including their attributes and movements throughout the video.",
    ),
    "short": (
        "Write a one-sentence summary of the video.",
        "What is happening in the video? Provide a one-sentence summary.",
    ),
}
"""Instructions, of which each video gets one by its id. The owners draw from about 20 without a seed."""


def read_vdc(folder: str, *, videos: str = "videos", subtitles: bool = False) -> list[BenchmarkQuestion]:
    """One question a video and aspect."""
    questions = []
    for aspect, prompts in VDC_PROMPTS.items():
        for row in read_json_rows(storage.join_uri(folder, "post_eval", f"{aspect}.jsonl")):
            for video in row.values:
                pairs = [
                    {"question": pair.text("question"), "answer": pair.text("answer")} for pair in row.objects(video)
                ]
                if not pairs:
                    raise row.error(video, "a list with at least one question-answer pair")
                questions.append(_question(row, video, aspect, prompts, f"{videos}/{video}.mp4", pairs))
    return questions


def _question(
    row: Fields, video: str, aspect: str, prompts: tuple[str, ...], path: str, pairs: list[dict[str, str]]
) -> BenchmarkQuestion:
    return BenchmarkQuestion(
        question_id=f"{aspect}/{video}",
        kind="caption",
        clip=Clip(path=path),
        text=random.Random(f"{aspect}/{video}").choice(prompts),
        groups={"aspect": (aspect,)},
        details={"pairs": pairs},
    )

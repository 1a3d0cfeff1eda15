"""Readers of captions that a judge examines.

VDC                     post_eval/{detailed, camera, background, main_object, short}.jsonl, videos/{uuid}.mp4
MLVU generation         MLVU/json/{8_sub_scene, 9_summary}.json, MLVU/video/{8_sub_scene, 9_summary}/
TempCompass captioning  questions/captioning.json, videos/{id}.mp4
"""

from __future__ import annotations

import random

from timeviper_platform.common import storage
from timeviper_platform.evaluation.benchmarks.annotation_files import Fields, read_json_object, read_json_rows
from timeviper_platform.evaluation.benchmarks.options import split_options
from timeviper_platform.evaluation.benchmarks.question import BenchmarkQuestion, Clip
from timeviper_platform.evaluation.scoring.letters import LETTERS

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
"""Instructions; each video's id chooses one. The owners draw from about 20 without a seed."""


def read_vdc(folder: str, *, videos: str = "videos", subtitles: bool = False) -> list[BenchmarkQuestion]:
    """One question per video and aspect."""
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
        details={"judge": "pairs", "pairs": pairs},
    )


MLVU_GENERATION_TASKS = ("sub_scene", "summary")


def read_mlvu_generation(
    folder: str, *, videos: str = "MLVU/video", subtitles: bool = False
) -> list[BenchmarkQuestion]:
    """Scenes are graded by `scoring_points`, or the answer where a row has none; summaries by the answer."""
    questions = []
    for number, task in enumerate(MLVU_GENERATION_TASKS, start=8):
        name = f"{number}_{task}"
        for index, row in enumerate(read_json_rows(storage.join_uri(folder, "MLVU", "json", f"{name}.json"))):
            reference = row.text("answer")
            if task == "sub_scene" and (points := row.values.get("scoring_points")):
                reference = points if isinstance(points, str) else "\n".join(row.texts("scoring_points"))
            questions.append(
                BenchmarkQuestion(
                    question_id=f"{task}/{index}",
                    kind="caption",
                    clip=Clip(path=f"{videos}/{name}/{row.text('video')}"),
                    text=row.text("question"),
                    duration=row.text("duration", ""),
                    groups={"task": (task,)},
                    details={"judge": f"mlvu_{task}", "reference": reference},
                )
            )
    return questions


def read_tempcompass_captioning(
    folder: str, *, videos: str = "videos", subtitles: bool = False
) -> list[BenchmarkQuestion]:
    by_video = read_json_object(storage.join_uri(folder, "questions", "captioning.json"))
    questions = []
    for video in by_video.values:
        aspects = Fields(by_video.values[video], f"{by_video.where}, {video}")
        for aspect in aspects.values:
            for number, row in enumerate(aspects.objects(aspect)):
                _, options = split_options(row.text("mc_question"))
                if len(options) < 2:
                    raise row.error("mc_question", "a text with at least two options on lines of their own")
                if (right := row.text("mc_answer")[:1]) not in LETTERS[: len(options)]:
                    raise row.error("mc_answer", f"a text that starts with one of {len(options)} letters")
                questions.append(
                    BenchmarkQuestion(
                        question_id=f"captioning/{video}/{aspect}/{number}",
                        kind="caption",
                        clip=Clip(path=f"{videos}/{video}.mp4"),
                        text=row.text("question"),
                        groups={"aspect": (aspect,)},
                        details={
                            "judge": "tempcompass",
                            "question": row.text("mc_question"),
                            "options": list(options),
                            "answer": right,
                        },
                    )
                )
    return questions

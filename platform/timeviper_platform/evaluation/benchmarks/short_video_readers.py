"""Readers of multiple-choice benchmarks about short clips.

MVBench       json/{task}.json, video/{root of the task}/..
TempCompass   questions/{multi-choice, yes_no, caption_matching}.json, meta_info.json, videos/{id}.mp4
"""

from __future__ import annotations

from dataclasses import dataclass

from timeviper_platform.common import storage
from timeviper_platform.evaluation.benchmarks.annotation_files import (
    AnnotationError,
    Fields,
    read_json_object,
    read_json_rows,
)
from timeviper_platform.evaluation.benchmarks.options import split_options
from timeviper_platform.evaluation.benchmarks.question import BenchmarkQuestion, Clip
from timeviper_platform.evaluation.scoring.letters import LETTERS


@dataclass(frozen=True, slots=True)
class _Task:
    root: str
    has_clip: bool = False


MVBENCH_TASKS: dict[str, _Task] = {
    "action_sequence": _Task("star/Charades_v1_480", True),
    "action_prediction": _Task("star/Charades_v1_480", True),
    "action_antonym": _Task("ssv2_video"),
    "fine_grained_action": _Task("Moments_in_Time_Raw/videos"),
    "unexpected_action": _Task("FunQA_test/test"),
    "object_existence": _Task("clevrer/video_validation"),
    "object_interaction": _Task("star/Charades_v1_480", True),
    "object_shuffle": _Task("perception/videos"),
    "moving_direction": _Task("clevrer/video_validation"),
    "action_localization": _Task("sta/sta_video", True),
    "scene_transition": _Task("scene_qa/video"),
    "action_count": _Task("perception/videos"),
    "moving_count": _Task("clevrer/video_validation"),
    "moving_attribute": _Task("clevrer/video_validation"),
    "state_change": _Task("perception/videos"),
    "fine_grained_pose": _Task("nturgbd"),
    "character_order": _Task("perception/videos"),
    "egocentric_navigation": _Task("vlnqa"),
    "episodic_reasoning": _Task("tvqa/frames_fps3_hq", True),
    "counterfactual_inference": _Task("clevrer/video_validation"),
}
"""Folder of each task's videos below `video`, and whether its rows bound a clip of them."""


def read_mvbench(folder: str, *, videos: str = "video", subtitles: bool = False) -> list[BenchmarkQuestion]:
    if subtitles:
        raise ValueError("MVBench ships no subtitles; set benchmark.subtitles: false")
    questions = []
    for name, task in MVBENCH_TASKS.items():
        for number, row in enumerate(read_json_rows(storage.join_uri(folder, "json", f"{name}.json"))):
            options, answer = row.texts("candidates", at_least=2), row.text("answer")
            start = row.number("start") if task.has_clip else None
            questions.append(
                BenchmarkQuestion(
                    question_id=f"{name}/{number}",
                    kind="choice",
                    clip=Clip(
                        path=f"{videos}/{task.root}/{row.text('video')}",
                        start_seconds=start,
                        end_seconds=row.number("end") if task.has_clip else None,
                    ),
                    text=row.text("question"),
                    options=options,
                    answers=tuple(LETTERS[n] for n, option in enumerate(options) if option == answer),
                    groups={"task": (name,)},
                )
            )
    return questions


TEMPCOMPASS_TASKS = ("multi-choice", "yes_no", "caption_matching")
"""`captioning` is scored only by a judge."""


def read_tempcompass(folder: str, *, videos: str = "videos", subtitles: bool = False) -> list[BenchmarkQuestion]:
    if subtitles:
        raise ValueError("TempCompass ships no subtitles; set benchmark.subtitles: false")
    fine_aspects = read_json_object(storage.join_uri(folder, "meta_info.json"))
    questions = []
    for task in TEMPCOMPASS_TASKS:
        by_video = read_json_object(storage.join_uri(folder, "questions", f"{task}.json"))
        for video in by_video.values:
            aspects = Fields(by_video.values[video], f"{by_video.where}, {video}")
            for aspect in aspects.values:
                for number, row in enumerate(aspects.objects(aspect)):
                    text, labels, options, answer = _tempcompass_options(row, task)
                    questions.append(
                        BenchmarkQuestion(
                            question_id=f"{task}/{video}/{aspect}/{number}",
                            kind="choice",
                            clip=Clip(path=f"{videos}/{video}.mp4"),
                            text=text,
                            options=options,
                            labels=labels,
                            answers=(answer,),
                            groups={
                                "task": (task,),
                                "aspect": (aspect,),
                                "fine_aspect": _fine_aspects(fine_aspects, video, aspect),
                            },
                            details={"tempcompass": task, "answer": row.text("answer")},
                        )
                    )
    return questions


def _tempcompass_options(row: Fields, task: str) -> tuple[str, tuple[str, ...], tuple[str, ...], str]:
    """Returns question, labels, options and the right label."""
    answer = row.text("answer")
    if task == "yes_no":
        if answer not in ("yes", "no"):
            raise row.error("answer", "'yes' or 'no'")
        return row.text("question"), ("yes", "no"), ("yes", "no"), answer
    if task == "multi-choice":
        text, options = split_options(row.text("question"))
        labels = tuple(LETTERS[: len(options)])
        right = answer[:1]
    else:  # one per line: 'Sentence A: ..', 'Option 1: ..'
        text, *lines = row.text("question").splitlines()
        if not all(": " in line for line in lines):
            raise row.error("question", "a text with options 'Sentence A: ..' on lines of their own")
        labels, options = zip(*(line.split(": ", 1) for line in lines), strict=True) if lines else ((), ())
        right = answer.split(":")[0]
    if len(options) < 2:
        raise row.error("question", "a text with at least two options on lines of their own")
    if right not in labels:
        raise row.error("answer", f"a text that starts with one of {', '.join(labels)}")
    return text, tuple(labels), tuple(options), right


def _fine_aspects(meta: Fields, video: str, aspect: str) -> tuple[str, ...]:
    """Fine aspects of a video's aspect; meta_info.json may lack a video."""
    known = meta.values.get(video, {})
    found = known.get("eval_dim", {}).get(aspect, {}) if isinstance(known, dict) else {}
    types = found.get("type", "none") if isinstance(found, dict) else "none"
    if not isinstance(types, str | list):
        raise AnnotationError(
            f"{meta.where}, {video}", f"field 'type' of {aspect} is {types!r:.80}, not a text or list"
        )
    return (types,) if isinstance(types, str) else tuple(map(str, types))

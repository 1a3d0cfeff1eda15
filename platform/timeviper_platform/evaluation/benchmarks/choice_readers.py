"""Readers of multiple-choice benchmarks about long videos.

VideoMME         videomme/test-*.parquet, data/{videoID}.mp4, subtitle/{videoID}.srt
VideoMME-v2      test.parquet, {video_id}.mp4, subtitle/{video_id}.jsonl
LVBench          video_info.meta.jsonl, videos/{key}.mp4
MLVU             MLVU/json/1_plotQA.json .., MLVU/video/1_plotQA/*.mp4
MLVU test        test*.parquet with video_name, question with its options, answer, task_type
LongVideoBench   lvb_val.json, videos/, subtitles/
EgoSchema        questions.json, subset_answers.json, videos/{q_uid}.mp4
"""

from __future__ import annotations

import re

from timeviper_platform.common import storage
from timeviper_platform.evaluation.benchmarks.annotation_files import (
    AnnotationError,
    parquet_files,
    read_json_object,
    read_json_rows,
    read_parquet_rows,
)
from timeviper_platform.evaluation.benchmarks.options import split_options
from timeviper_platform.evaluation.benchmarks.question import BenchmarkQuestion, Clip
from timeviper_platform.evaluation.scoring.groups import structure_of
from timeviper_platform.evaluation.scoring.letters import LETTERS, bare_option

MLVU_CHOICE_TASKS = ("plotQA", "needle", "ego", "count", "order", "anomaly_reco", "topic_reasoning")
"""The tasks of M-Avg; sub_scene and summary are free text."""


def read_videomme(folder: str, *, videos: str = "data", subtitles: bool = False) -> list[BenchmarkQuestion]:
    rows = read_parquet_rows(*parquet_files(storage.join_uri(folder, "videomme"), "test"))
    return [
        BenchmarkQuestion(
            question_id=row.text("question_id"),
            kind="choice",
            clip=Clip(path=f"{videos}/{row.text('videoID')}.mp4"),
            text=row.text("question"),
            options=(options := tuple(bare_option(option) for option in row.texts("options", at_least=2))),
            answers=(row.letter("answer", len(options)),),
            groups={
                "duration": (row.text("duration"),),
                "domain": (row.text("domain"),),
                "sub_category": (row.text("sub_category"),),
                "task_type": (row.text("task_type"),),
            },
            subtitles=storage.join_uri(folder, "subtitle", f"{row.text('videoID')}.srt") if subtitles else "",
            details={"videoID": row.text("videoID"), "video_id": row.text("video_id", "")},
        )
        for row in rows
    ]


def read_videomme_v2(folder: str, *, videos: str = "", subtitles: bool = False) -> list[BenchmarkQuestion]:
    questions = []
    for row in read_parquet_rows(*parquet_files(folder, "test")):
        video = row.text("video_id")
        _, options = split_options(row.text("options"))
        if len(options) < 2:
            raise row.error("options", "a text with options 'A. ..' on lines of their own")
        if row.text("group_type", "none") != "relevance" and structure_of(row.text("group_structure", "")) is None:
            raise row.error("group_structure", "an order of four questions, such as '[1, [2, 3], 4]'")
        questions.append(
            BenchmarkQuestion(
                question_id=row.text("question_id"),
                kind="choice",
                clip=Clip(path=f"{videos}/{video}.mp4".lstrip("/")),
                text=row.text("question"),
                options=options,
                answers=(row.letter("answer", len(options)),),
                groups={
                    name: (row.text(name, "none"),) for name in ("group_type", "level", "second_head", "third_head")
                },
                subtitles=storage.join_uri(folder, "subtitle", f"{video}.jsonl") if subtitles else "",
                details={"group": video, "group_structure": row.text("group_structure", "")},
            )
        )
    return questions


def read_lvbench(folder: str, *, videos: str = "videos", subtitles: bool = False) -> list[BenchmarkQuestion]:
    """Questions without an answer are left out, as in the owners' script."""
    _no_subtitles(subtitles, "LVBench")
    questions = []
    for row in read_json_rows(storage.join_uri(folder, "video_info.meta.jsonl")):
        for entry in row.objects("qa"):
            text, options = split_options(entry.text("question"))
            if len(options) < 2:
                raise entry.error("question", "a text with options '(A) ..' on lines of their own")
            if not entry.text("answer", ""):
                continue
            questions.append(
                BenchmarkQuestion(
                    question_id=entry.text("uid"),
                    kind="choice",
                    clip=Clip(path=f"{videos}/{row.text('key')}.mp4"),
                    text=text,
                    options=options,
                    answers=(entry.letter("answer", len(options)),),
                    groups={"question_type": entry.texts("question_type"), "video_type": (row.text("type", "none"),)},
                )
            )
    return questions


def read_mlvu(folder: str, *, videos: str = "MLVU/video", subtitles: bool = False) -> list[BenchmarkQuestion]:
    """The seven multiple-choice tasks. Answers are matched by text, so that equal candidates are all right."""
    _no_subtitles(subtitles, "MLVU")
    files = {
        match[1]: uri
        for uri in storage.files_in(storage.join_uri(folder, "MLVU", "json"), ".json")
        if (match := re.fullmatch(r"\d+_(\w+)\.json", uri.rpartition("/")[2]))
    }
    if missing := [task for task in MLVU_CHOICE_TASKS if task not in files]:
        raise ValueError(f"{folder}/MLVU/json has no N_{missing[0]}.json; set benchmark.folder to the data set")
    questions = []
    for task in MLVU_CHOICE_TASKS:
        name = files[task].rpartition("/")[2].removesuffix(".json")
        for number, row in enumerate(read_json_rows(files[task])):
            options, answer = row.texts("candidates", at_least=2), row.text("answer")
            questions.append(
                BenchmarkQuestion(
                    question_id=f"{task}/{number}",
                    kind="choice",
                    clip=Clip(path=f"{videos}/{name}/{row.text('video')}"),
                    text=row.text("question"),
                    options=options,
                    answers=_labels_of(answer, options),
                    duration=row.text("duration", ""),
                    groups={"task": (task,)},
                )
            )
    return questions


def read_mlvu_test(folder: str, *, videos: str = "video", subtitles: bool = False) -> list[BenchmarkQuestion]:
    _no_subtitles(subtitles, "MLVU test")
    questions = []
    for number, row in enumerate(read_parquet_rows(*parquet_files(folder, "test"))):
        text, options = split_options(row.text("question"))
        if len(options) < 2:
            raise row.error("question", "a text with options '(A) ..' on lines of their own")
        questions.append(
            BenchmarkQuestion(
                question_id=row.text("question_id", f"{row.text('task_type')}/{number}"),
                kind="choice",
                clip=Clip(path=f"{videos}/{row.text('video_name')}".lstrip("/")),
                text=text,
                options=options,
                answers=(row.letter("answer", len(options)),),
                groups={"task": (row.text("task_type"),)},
            )
        )
    return questions


def read_longvideobench(folder: str, *, videos: str = "videos", subtitles: bool = False) -> list[BenchmarkQuestion]:
    return [
        BenchmarkQuestion(
            question_id=row.text("id"),
            kind="choice",
            clip=Clip(path=f"{videos}/{row.text('video_path')}"),
            text=row.text("question"),
            options=(options := row.texts("candidates", at_least=2)),
            answers=(row.letter("correct_choice", len(options)),),
            duration=row.text("duration", ""),
            groups={
                "duration_group": (row.text("duration_group"),),
                "question_category": (row.text("question_category"),),
                "topic_category": (row.text("topic_category", "none"),),
            },
            subtitles=storage.join_uri(folder, "subtitles", row.text("subtitle_path")) if subtitles else "",
            subtitles_start_seconds=row.number("starting_timestamp_for_subtitles", 0.0),
        )
        for row in read_json_rows(storage.join_uri(folder, "lvb_val.json"))
    ]


def read_egoschema(folder: str, *, videos: str = "videos", subtitles: bool = False) -> list[BenchmarkQuestion]:
    """The 500 questions whose answers are public."""
    _no_subtitles(subtitles, "EgoSchema")
    answers = read_json_object(storage.join_uri(folder, "subset_answers.json"))
    by_id = {row.text("q_uid"): row for row in read_json_rows(storage.join_uri(folder, "questions.json"))}
    questions = []
    for uid in answers.values:
        if uid not in by_id:
            raise AnnotationError(answers.where, f"{uid!r} has an answer, but questions.json has no such q_uid")
        row = by_id[uid]
        options = tuple(row.text(f"option {number}") for number in range(5))
        questions.append(
            BenchmarkQuestion(
                question_id=uid,
                kind="choice",
                clip=Clip(path=f"{videos}/{uid}.mp4"),
                text=row.text("question"),
                options=options,
                answers=(answers.letter(uid, 5),),
            )
        )
    return questions


def _labels_of(answer: str, options: tuple[str, ...]) -> tuple[str, ...]:
    return tuple(LETTERS[index] for index, option in enumerate(options) if option == answer)


def _no_subtitles(wanted: bool, name: str) -> None:
    if wanted:
        raise ValueError(f"{name} ships no subtitles; set benchmark.subtitles: false")

"""Readers of benchmarks about when something happens.

Charades-STA         charades_sta_test.txt, Charades_v1_test.csv, Charades_v1_480/{id}.mp4
ActivityNet          val_2.json (or val_1), videos/{id}.mp4
TimeLens-Bench       {split}*.parquet, video files by their paths
ExtremeWhenBench     test*.parquet, {corpus}/{video}.mp4
QVHighlights         highlight_val_release.jsonl, videos/{vid}.mp4
YouCook2             youcookii_annotations_trainval.json, videos/{id}.mp4
"""

from __future__ import annotations

import csv
from collections.abc import Iterator
from io import StringIO

from timeviper_platform.common import storage
from timeviper_platform.evaluation.benchmarks.annotation_files import (
    AnnotationError,
    Fields,
    parquet_files,
    read_json_object,
    read_json_rows,
    read_parquet_rows,
    read_text_lines,
)
from timeviper_platform.evaluation.benchmarks.question import BenchmarkQuestion, Clip
from timeviper_platform.evaluation.scoring.spans import Span

DENSE_QUESTION = "Describe the events of the video in order, each with its start and end time."


def read_charades_sta(
    folder: str, *, videos: str = "Charades_v1_480", subtitles: bool = False
) -> list[BenchmarkQuestion]:
    """Ends are cut at the video's length, except for the official score."""
    lengths = _charades_lengths(storage.join_uri(folder, "Charades_v1_test.csv"))
    questions = []
    for number, (where, line) in enumerate(read_text_lines(storage.join_uri(folder, "charades_sta_test.txt"))):
        head, marks, sentence = line.partition("##")
        try:
            video, start, end = head.split()
            span = Span(float(start), float(end))
        except ValueError as error:
            raise AnnotationError(where, f"{line!r:.80} is not 'ID START END##sentence'") from error
        if not marks or not sentence.strip():
            raise AnnotationError(where, f"{line!r:.80} has no sentence after '##'")
        if video not in lengths:
            raise AnnotationError(where, f"video {video} is not in Charades_v1_test.csv, which has its length")
        questions.append(
            BenchmarkQuestion(
                question_id=f"{video}/{number}",
                kind="span",
                clip=Clip(path=f"{videos}/{video}.mp4"),
                text=sentence.strip(),
                spans=(Span(span.start_seconds, min(span.end_seconds, float(lengths[video]))),),
                duration=lengths[video],
                details={"key": f"{video}>>>{sentence.strip()}>>>{list(span)}", "uncut_span": list(span)},
            )
        )
    return questions


def _charades_lengths(uri: str) -> dict[str, str]:
    try:
        text = storage.read_bytes(uri).decode("utf-8-sig")
    except FileNotFoundError as error:
        raise ValueError(f"{uri} does not exist; set benchmark.folder to the downloaded data set") from error
    lengths = {}
    for number, row in enumerate(csv.DictReader(StringIO(text)), start=2):
        fields = Fields(row, f"{uri} line {number}")
        try:
            lengths[fields.text("id")] = f"{float(fields.text('length')):g}"
        except ValueError as error:
            raise error if isinstance(error, AnnotationError) else fields.error("length", "a number") from error
    return lengths


def read_activitynet(folder: str, *, videos: str = "videos", subtitles: bool = False) -> list[BenchmarkQuestion]:
    """val_2, the usual test split; each sentence is a query."""
    return [
        BenchmarkQuestion(
            question_id=f"{video}/{number}",
            kind="span",
            clip=Clip(path=f"{videos}/{video}.mp4"),
            text=sentence,
            spans=(span,),
            duration=duration,
            details={"key": f"{video}>>>{sentence}>>>{list(span)}"},
        )
        for video, duration, spans, sentences in _activitynet(storage.join_uri(folder, "val_2.json"))
        for number, (span, sentence) in enumerate(zip(spans, sentences, strict=True))
    ]


def read_activitynet_dense(folder: str, *, videos: str = "videos", subtitles: bool = False) -> list[BenchmarkQuestion]:
    """One question per video, with the events of each annotator."""
    references: dict[str, list[dict[str, object]]] = {}
    durations = {}
    for name in ("val_1.json", "val_2.json"):
        for video, duration, spans, sentences in _activitynet(storage.join_uri(folder, name)):
            durations[video] = duration
            references.setdefault(video, []).append({"spans": [list(s) for s in spans], "sentences": list(sentences)})
    return [
        _dense_question(video, f"{videos}/{video}.mp4", durations[video], references[video]) for video in references
    ]


def _activitynet(uri: str) -> Iterator[tuple[str, str, tuple[Span, ...], tuple[str, ...]]]:
    by_video = read_json_object(uri)
    for video in by_video.values:
        row = Fields(by_video.values[video], f"{uri}, {video}")
        spans, sentences = row.spans("timestamps"), row.texts("sentences", at_least=0)
        if len(spans) != len(sentences):
            raise row.error("sentences", f"a list of {len(spans)} texts, one for each of `timestamps`")
        yield video, row.text("duration"), spans, sentences


def read_youcook2_dense(folder: str, *, videos: str = "videos", subtitles: bool = False) -> list[BenchmarkQuestion]:
    """The validation split."""
    uri = storage.join_uri(folder, "youcookii_annotations_trainval.json")
    database = read_json_object(uri)
    by_video = Fields(database.values.get("database"), f"{uri}, database")
    questions = []
    for video in by_video.values:
        row = Fields(by_video.values[video], f"{by_video.where}, {video}")
        if row.text("subset") != "validation":
            continue
        events = list(row.objects("annotations"))
        reference = {
            "spans": [list(e.span("segment")) for e in events],
            "sentences": [e.text("sentence") for e in events],
        }
        questions.append(_dense_question(video, f"{videos}/{video}.mp4", row.text("duration"), [reference]))
    return questions


def _dense_question(video: str, path: str, duration: str, references: list[dict[str, object]]) -> BenchmarkQuestion:
    return BenchmarkQuestion(
        question_id=video,
        kind="dense",
        clip=Clip(path=path),
        text=DENSE_QUESTION,
        duration=duration,
        details={"references": references},
    )


def read_timelens(folder: str, *, videos: str = "", subtitles: bool = False) -> list[BenchmarkQuestion]:
    questions = []
    for split in ("activitynet", "charades", "qvhighlights"):
        for number, row in enumerate(read_parquet_rows(*parquet_files(folder, split))):
            spans = row.spans("span")
            if not spans:
                raise row.error("span", "a list with a pair of seconds")
            path, query = row.text("video_path"), row.text("query")
            questions.append(
                BenchmarkQuestion(
                    question_id=f"{split}/{number}",
                    kind="span",
                    clip=Clip(path=f"{videos}/{path}".lstrip("/")),
                    text=query,
                    spans=spans[:1],
                    duration=row.text("duration", ""),
                    groups={"split": (split,)},
                    details={"key": f"{path}>>>{query}>>>{row.values['span']}"},
                )
            )
    return questions


def read_extremewhen(folder: str, *, videos: str = "", subtitles: bool = False) -> list[BenchmarkQuestion]:
    return [
        BenchmarkQuestion(
            question_id=row.text("qid"),
            kind="span",
            clip=Clip(path=f"{videos}/{row.text('source_corpus')}/{row.text('video_id')}.mp4".lstrip("/")),
            text=row.text("question"),
            spans=(row.span("correct_interval"),),
            duration=row.text("video_duration_s"),
            groups={"source_corpus": (row.text("source_corpus"),)},
        )
        for row in read_parquet_rows(*parquet_files(folder, "test"))
    ]


def read_qvhighlights(folder: str, *, videos: str = "videos", subtitles: bool = False) -> list[BenchmarkQuestion]:
    return [
        BenchmarkQuestion(
            question_id=row.text("qid"),
            kind="windows",
            clip=Clip(path=f"{videos}/{row.text('vid')}.mp4"),
            text=row.text("query"),
            spans=row.spans("relevant_windows"),
            duration=row.text("duration"),
        )
        for row in read_json_rows(storage.join_uri(folder, "highlight_val_release.jsonl"))
    ]

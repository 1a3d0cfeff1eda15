"""Reader of timeviper-synth, see `timeviper_platform.data.synthetic.benchmark`.

timeviper-synth   test.parquet, videos/
"""

from __future__ import annotations

from dataclasses import replace

from timeviper_platform.evaluation.benchmarks.annotation_files import parquet_files, read_parquet_rows
from timeviper_platform.evaluation.benchmarks.question import BenchmarkQuestion, Clip
from timeviper_platform.evaluation.scoring.letters import bare_option


def read_synth_choices(folder: str, *, videos: str = "videos", subtitles: bool = False) -> list[BenchmarkQuestion]:
    """Tasks choice, order and count."""
    questions = []
    for row in read_parquet_rows(*parquet_files(folder, "test")):
        if not row.values.get("options"):
            continue
        options = tuple(bare_option(option) for option in row.texts("options", at_least=2))
        questions.append(
            BenchmarkQuestion(
                question_id=row.text("question_id"),
                kind="choice",
                clip=Clip(path=f"{videos}/{row.text('video')}"),
                text=row.text("question"),
                options=options,
                answers=(row.letter("answer", len(options)),),
                groups={"task": (row.text("task"),), "seconds": (row.text("seconds"),)},
            )
        )
    return questions


def read_synth_words(folder: str, *, videos: str = "videos", subtitles: bool = False) -> list[BenchmarkQuestion]:
    """The same questions, with options as words: a small model learns to name a picture long before a letter."""
    return [replace(question, details={"form": "words"}) for question in read_synth_choices(folder, videos=videos)]


def read_synth_grounding(folder: str, *, videos: str = "videos", subtitles: bool = False) -> list[BenchmarkQuestion]:
    return [
        BenchmarkQuestion(
            question_id=row.text("question_id"),
            kind="span",
            clip=Clip(path=f"{videos}/{row.text('video')}"),
            text=row.text("question"),
            spans=(row.span("span"),),
            duration=row.text("seconds"),
            groups={"seconds": (row.text("seconds"),)},
        )
        for row in read_parquet_rows(*parquet_files(folder, "test"))
        if row.text("task") == "grounding"
    ]

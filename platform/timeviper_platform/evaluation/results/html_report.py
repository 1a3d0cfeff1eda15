"""The report of a benchmark as one HTML file without links to other files."""

from __future__ import annotations

import base64
import io
from collections.abc import Iterable, Mapping, Sequence
from fractions import Fraction
from html import escape
from typing import Any

import numpy as np
from PIL import Image

from timeviper_platform.common import storage
from timeviper_platform.data.media.container import DecodeError
from timeviper_platform.data.store.reader import FeatureStore
from timeviper_platform.data.video.reader import open_video
from timeviper_platform.evaluation.benchmark_answers import BenchmarkAnswer
from timeviper_platform.evaluation.benchmarks.prompts import option_lines
from timeviper_platform.evaluation.benchmarks.question import BenchmarkQuestion
from timeviper_platform.evaluation.benchmarks.registry import BENCHMARKS, BenchmarkName
from timeviper_platform.evaluation.results.rows import answer_rows
from timeviper_platform.evaluation.results.scores import Replies

FRAME_SIDE = 128
"""Width and height of shown frames in pixels."""

BAR_PIXELS = 260
_ROUNDING = Fraction(1, 1_000_000)
MAX_BREAKDOWN_ROWS = 40

_STYLE = """
body{font:15px/1.45 system-ui,sans-serif;max-width:1100px;margin:2em auto;padding:0 1em;color:#1c1c1c;background:#fff}
h1,h2,h3{line-height:1.2}table{border-collapse:collapse;margin:.6em 0 1.4em}
table.scores{width:100%}table.scores td:last-child,table.scores th:last-child{width:280px}
th,td{padding:.25em .7em;border-bottom:1px solid #ddd;text-align:left;vertical-align:middle}
td.number,th.number{text-align:right;font-variant-numeric:tabular-nums}
.bar{position:relative;height:12px;background:#eee;border-radius:2px}
.bar i{position:absolute;height:12px;background:#3f7fbf;border-radius:2px}
.bar b{position:absolute;top:5px;height:2px;background:#123}
.published .bar i{background:#b8b8b8}.warn{color:#8a3b00}.right{color:#146c2e}.wrong{color:#a11}
.frames{display:flex;flex-wrap:wrap;gap:4px}.frames figure{margin:0}.frames img{border-radius:3px;display:block}
figcaption,.label{font-size:13px;color:#666}.example{border-top:1px solid #ccc;padding:.6em 0}
pre{white-space:pre-wrap;background:#f6f6f6;padding:.6em;border-radius:4px;margin:.3em 0}
@media(prefers-color-scheme:dark){body{color:#e4e4e4;background:#161616}th,td{border-color:#383838}
.bar{background:#2c2c2c}.bar b{background:#fff}pre{background:#222}
figcaption,.label{color:#aaa}.warn{color:#f0a868}.right{color:#76c893}.wrong{color:#ff8a8a}}
"""

_COUNTS = (
    ("num_missing_videos", "videos are not in the feature store; their {num_missing} questions are in no score"),
    ("num_no_frames", "clips have no frame"),
    ("num_failed", "questions failed"),
    ("num_unjudged", "captions are not judged"),
    ("num_empty", "answers are empty"),
)


def html_report(
    report: Mapping[str, Any],
    answers: Sequence[BenchmarkAnswer],
    *,
    feature_store: str,
    num_examples: int,
    replies: Replies | None = None,
) -> str:
    """Returns the page: scores, published ones for comparison, breakdowns, and examples with frames of their videos.

    Args:
        report: of `score_answers`.
        feature_store: names the video files, from which the examples' frames are decoded.
    """
    title = f"{report['title']}: scores"
    settings = ("weights", "feature_store", "prompts", "subtitles", "max_frames")
    facts = [(name, storage.shown_uri(str(report[name]))) for name in settings if name in report]
    parts = [
        f"<h1>{escape(title)}</h1>",
        "<table>" + "".join(f"<tr><th>{escape(k)}</th><td>{escape(v)}</td></tr>" for k, v in facts) + "</table>",
        _headlines(report),
        *(_protocol(name, found) for name, found in report["protocols"].items()),
        _examples(report["benchmark"], answers, feature_store, num_examples, replies),
    ]
    return (
        f'<!doctype html>\n<html lang="en"><head><meta charset="utf-8"><title>{escape(title)}</title>'
        f"<style>{_STYLE}</style></head><body>\n" + "\n".join(parts) + "\n</body></html>\n"
    )


def _headlines(report: Mapping[str, Any]) -> str:
    """First metric of each scorer under each protocol, above the published scores."""
    rows = []
    for protocol, found in report["protocols"].items():
        for scorer, summary in found["scorers"].items():
            metric, score = next(iter(summary["metrics"].items()))
            rows.append(_score_row((protocol, scorer, metric), score))
    for model, value in report["published"].items():
        rows.append(_score_row(("published", model, ""), {"score": value}, "published"))
    return f"<h2>Overview</h2>{_table(('protocol', 'scorer', 'metric'), rows)}"


def _protocol(name: str, found: Mapping[str, Any]) -> str:
    parts = [
        f"<h2>Protocol {escape(name)}</h2>",
        f"<p>{found['num_questions']} questions about {found['num_videos']} videos.</p>",
        *(
            f'<p class="warn">{found[key]} {escape(words.format(num_missing=found["num_missing"]))}.</p>'
            for key, words in _COUNTS
            if found[key]
        ),
    ]
    rows = []
    for scorer, summary in found["scorers"].items():
        rows += [_score_row((scorer, metric), score) for metric, score in summary["metrics"].items()]
        if summary["num_unparsable"]:
            note = f"{summary['num_unparsable']} answers without a choice or interval"
            rows.append(f'<tr><td>{escape(scorer)}</td><td class="warn" colspan="5">{note}</td></tr>')
    parts.append(_table(("scorer", "metric"), rows))
    scorer = "strict" if "strict" in found["scorers"] else next(iter(found["scorers"]), "")
    for group, values in found["scorers"].get(scorer, {}).get("breakdowns", {}).items():
        lines = [_score_row((value,), score) for value, score in list(values.items())[:MAX_BREAKDOWN_ROWS]]
        parts.append(f"<h3>{escape(scorer)}, by {escape(group)}</h3>{_table((group,), lines)}")
    return "\n".join(parts)


def _table(names: Sequence[str], rows: Iterable[str]) -> str:
    heads = "".join(f"<th>{escape(name)}</th>" for name in names)
    numbers = '<th class="number">score</th><th>95 % interval</th><th class="number">questions</th><th></th>'
    return f'<table class="scores"><tr>{heads}{numbers}</tr>{"".join(rows)}</table>'


def _score_row(names: Sequence[str], score: Mapping[str, Any], css_class: str = "") -> str:
    low, high = score.get("interval_95", (score["score"], score["score"]))
    interval = f"{low:.1f} - {high:.1f}" if "interval_95" in score else ""
    pixels = BAR_PIXELS / 100
    bar = (
        f'<div class="bar" style="width:{BAR_PIXELS}px"><i style="width:{score["score"] * pixels:.1f}px"></i>'
        f'<b style="left:{low * pixels:.1f}px;width:{max(1.0, (high - low) * pixels):.1f}px"></b></div>'
    )
    cells = "".join(f"<td>{escape(str(name))}</td>" for name in names)
    return (
        f'<tr class="{css_class}">{cells}<td class="number">{score["score"]:.2f}</td><td>{interval}</td>'
        f'<td class="number">{score.get("num_questions", "")}</td><td>{bar}</td></tr>'
    )


def _examples(
    benchmark: BenchmarkName,
    answers: Sequence[BenchmarkAnswer],
    feature_store: str,
    num_examples: int,
    replies: Replies | None,
) -> str:
    """Half right and half wrong answers of the first protocol with a video, evenly over the benchmark."""
    shown = [answer for answer in answers if answer.status == "ok" and answer.media_id]
    shown = [answer for answer in shown if answer.protocol == shown[0].protocol]
    if not shown or not num_examples:
        return ""
    rows = answer_rows(benchmark, shown, replies)
    scored = list(zip(shown, rows, strict=True))
    wrong = [pair for pair in scored if (_score(pair[1])[1] or 0.0) < 0.5]
    right = [pair for pair in scored if (_score(pair[1])[1] or 0.0) >= 0.5]
    half = max(num_examples // 2, num_examples - len(wrong))
    chosen = [*_spread(right, half), *_spread(wrong, num_examples - min(half, len(right)))]
    store = FeatureStore.open(feature_store)
    return "<h2>Examples</h2>" + "\n".join(_example(benchmark, answer, row, store) for answer, row in chosen)


def _score(row: Mapping[str, Any]) -> tuple[str, float | None]:
    """Name and value of the score that decides whether an example is right."""
    return ("judge", row["judge_score"]) if "judge_score" in row else ("strict", row.get("strict_score"))


def _spread(pairs: Sequence[Any], count: int) -> list[Any]:
    count = min(count, len(pairs))
    return [pairs[index * len(pairs) // count] for index in range(count)]


def _example(benchmark: BenchmarkName, answer: BenchmarkAnswer, row: Mapping[str, Any], store: FeatureStore) -> str:
    question = answer.asked()
    options = "\n".join(option_lines(question))
    verdict = ""
    scorer, score = _score(row)
    if score is not None:
        css_class = "right" if score >= 0.5 else "wrong"
        found = f"{scorer}: {row.get('strict') or 'nothing'}, score" if scorer == "strict" else scorer
        verdict = f'<p class="{css_class}">{escape(found)} {score:.2f}</p>'
    right = [f"{label} ({text})" for label, text in zip(question.labels, question.options, strict=True)]
    right = [text for label, text in zip(question.labels, right, strict=True) if label in question.answers]
    expected = ", ".join(right) or row["expected"]
    expected = f"<p>Expected: {escape(expected)}</p>" if expected else ""
    return (
        f'<div class="example"><h3>{escape(BENCHMARKS[benchmark].title)} {escape(question.question_id)}</h3>'
        f'<div class="frames">{_frames(answer, question, store)}</div>'
        f'<div class="label">Question</div><pre>{escape(question.text)}\n{escape(options)}</pre>'
        f'<div class="label">Answer</div><pre>{escape(answer.answer) or "(empty)"}</pre>{expected}{verdict}</div>'
    )


def _frames(answer: BenchmarkAnswer, question: BenchmarkQuestion, store: FeatureStore) -> str:
    if answer.media_id not in store:
        return f"<p>{escape(question.clip.path)} is no longer in the feature store</p>"
    uri = store.info(answer.media_id).uri
    try:
        reader = open_video(uri, FRAME_SIDE)
        try:
            batch = reader.sample([Fraction(seconds) + _ROUNDING for seconds in answer.frame_seconds])
        finally:
            reader.close()
    except (DecodeError, OSError, ValueError, RuntimeError) as error:  # a report needs no pictures
        return f"<p>{escape(storage.shown_uri(uri))}: no frames to show ({escape(storage.shown_text(str(error)))})</p>"
    return "".join(
        f'<figure><img src="data:image/jpeg;base64,{_jpeg(pixels)}" width="{FRAME_SIDE}" height="{FRAME_SIDE}"'
        f' alt="frame at {seconds:.1f} s"><figcaption>{seconds:.1f} s</figcaption></figure>'
        for pixels, seconds in zip(batch.frames, batch.pts_seconds, strict=True)
    )


def _jpeg(pixels: np.ndarray) -> str:
    buffer = io.BytesIO()
    Image.fromarray(pixels).save(buffer, "JPEG", quality=80)
    return base64.b64encode(buffer.getvalue()).decode()

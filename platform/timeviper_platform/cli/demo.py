"""Runs the whole platform on one machine, from synthetic videos to answers over HTTP.

    timeviper demo                         everything
    timeviper demo --quick                 a small corpus and too few steps to learn
    timeviper demo --film path/to/film.mp4 half of the backgrounds from a film, which is preprocessed too
    timeviper demo --until preprocess      stop after that step

Every step is a job with its configuration in ray_configs/tiny, on a private local Ray. A finished corpus and its
features are reused.
"""

from __future__ import annotations

import argparse
import contextlib
import json
import logging
import os
import shutil
import signal
import subprocess
import time
import urllib.error
import urllib.request
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import openai
import pyarrow as pa
import pyarrow.parquet as pq

from timeviper_platform.common.config import load_config
from timeviper_platform.common.job import (
    USAGE_EXIT_CODE,
    JobError,
    JobParser,
    JobResult,
    config_folder,
    job_command,
    run_job,
)
from timeviper_platform.common.ray_cluster import free_port, local_cluster
from timeviper_platform.data.synthetic.corpus import FINISHED_FILE, CorpusConfig, make_corpus
from timeviper_platform.data.synthetic.generated import is_generated, refuse_other_files
from timeviper_platform.evaluation.scoring.spans import parse_span, temporal_iou

DEFAULT_FOLDER = "outputs/demo"
"""Folder named in ray_configs/tiny; for another one those files are copied and changed."""
STEPS = ("corpus", "preprocess", "train", "export", "evaluate", "serve")
MANIFEST_WITH_FILM = ("corpus", "manifest-with-film.parquet")
NUM_LOGICAL_CPUS = 4
"""Two training workers and small actors; the machine may have only two cores."""
MODEL_NAME = "timeviper-tiny"
QUICK = {
    "corpus": [
        "train={needle: 160, order: 40, count: 40}",
        "held_out={needle: 40, order: 10, count: 10}",
        "num_images=64",
        "num_language_samples=400",
        "encoder_steps=100",
    ],
    "train": ["phases.language.steps=20", "phases.align.steps=10", "phases.instruct.steps=30"],
}
NUM_ASKED = {"choice": 4, "order": 2, "count": 2, "grounding": 4}
"""Questions over HTTP by task."""
OUTPUTS = ("features", "runs", "weights")
"""Folders that fit one corpus."""
RIGHT_IOU = 0.5
"""Minimum intersection over union of a right interval."""


@dataclass(frozen=True, kw_only=True, slots=True)
class Demo:
    folder: Path
    film: Path | None
    quick: bool
    corpus: tuple[str, ...] = ()

    def path(self, *parts: str) -> str:
        return str(self.folder.joinpath(*parts))

    def config(self, name: str) -> Path:
        original = config_folder() / "tiny" / f"{name}.yaml"
        if self.folder == Path.cwd() / DEFAULT_FOLDER:
            return original
        copy = self.folder / "configs" / original.name
        copy.parent.mkdir(parents=True, exist_ok=True)
        copy.write_text(original.read_text().replace(DEFAULT_FOLDER, str(self.folder)))
        return copy

    def overrides(self, name: str) -> list[str]:
        values = list(QUICK.get(name, [])) if self.quick else []
        if name == "corpus":
            values += self.corpus
        if name == "corpus" and self.film is not None:
            values.append(f"film={self.film}")
        if name == "preprocess" and self.film is not None:
            values.append(f"input={self.path(*MANIFEST_WITH_FILM)}")
        return values


def main(arguments: Sequence[str] | None = None) -> int:
    parser = JobParser(__doc__)
    parser.add_argument("--film", type=Path, help="a film for the backgrounds, preprocessed and asked about as well")
    parser.add_argument("--quick", action="store_true", help="a small corpus and few steps")
    parser.add_argument("--until", choices=STEPS, default=STEPS[-1], help="the last step to do")
    parser.add_argument("--folder", type=Path, help=f"output folder (default {DEFAULT_FOLDER}, with -quick, -film)")
    parser.add_argument(
        "--corpus", action="append", default=[], metavar="KEY=VALUE", help="a key of ray_configs/tiny/corpus.yaml"
    )
    return run_job(parser, run_demo, arguments)


def run_demo(options: argparse.Namespace) -> JobResult:
    """Runs the steps, writes report.json and reports the table."""
    demo, steps = _plan(options)
    logging.getLogger("httpx2").setLevel(logging.WARNING)  # otherwise one line per request
    started = time.monotonic()
    if not is_generated(Path(demo.path("corpus")), FINISHED_FILE):
        for name in OUTPUTS:
            refuse_other_files(Path(demo.path(name)), FINISHED_FILE)
    _announce("corpus", "videos, questions, tokenizer and encoder")
    corpus = make_corpus(load_config(CorpusConfig, demo.config("corpus"), demo.overrides("corpus")))
    if not corpus.reused:  # both jobs would refuse features and runs of another corpus
        for name in OUTPUTS:
            shutil.rmtree(demo.path(name), ignore_errors=True)
    if demo.film is not None:
        write_manifest_with_film(demo, demo.film)
    report: dict[str, Any] = {}
    if steps[1:]:
        with local_cluster(num_cpus=NUM_LOGICAL_CPUS) as cluster:
            report = _run_jobs(demo, steps, {**os.environ, **cluster})
    report = {"seconds": round(time.monotonic() - started, 1), **report}
    if steps != STEPS:
        return JobResult()
    Path(demo.path("report.json")).write_text(json.dumps(report, indent=2) + "\n")
    return JobResult([format_report(report), "", f"report: {demo.path('report.json')}"])


def _plan(options: argparse.Namespace) -> tuple[Demo, tuple[str, ...]]:
    if options.film is not None and not options.film.is_file():
        raise JobError(f"there is no film at {str(options.film)!r}", exit_code=USAGE_EXIT_CODE)
    suffix = ("-film" if options.film else "") + ("-quick" if options.quick else "")
    folder = options.folder or Path(DEFAULT_FOLDER + suffix)
    demo = Demo(
        folder=folder.resolve(),
        film=options.film and options.film.resolve(),
        quick=options.quick,
        corpus=tuple(options.corpus),
    )
    return demo, STEPS[: STEPS.index(options.until) + 1]


def _run_jobs(demo: Demo, steps: Sequence[str], environment: dict[str, str]) -> dict[str, Any]:
    report: dict[str, Any] = {}
    if "preprocess" in steps:
        _announce("preprocess", "decode and encode all media once")
        _job(demo, "preprocess", environment)
        summary = _read_json(demo.path("features", "report.json"))
        report["preprocess"] = {
            "media": summary["media"]["planned"],
            "media rejected": summary["media"]["rejected"],
            "segments": summary["segments"]["planned"],
            **{key: summary[key] for key in ("frames", "frames_per_second")},
        }
    if "train" in steps:
        _announce("train", "language, align, instruct (TransV on)")
        _job(demo, "train", environment)
        phases = _read_json(demo.path("runs", "tiny", "report.json"))
        report["train"] = {
            name: {key: phase[key] for key in ("steps", "loss_first", "loss_last")} for name, phase in phases.items()
        }
    if "export" in steps:
        _announce("export", "checkpoint to weights")
        _run("export", environment, "--config", str(demo.config("train")), "--output", demo.path("weights"))
    if "evaluate" in steps:
        _announce("evaluate", "held-out videos, with and without the video")
        _job(demo, "evaluate", environment)
        report["evaluate"] = _read_json(demo.path("evaluation.json"))
    if "serve" in steps:
        _announce("serve", "questions over HTTP")
        with _endpoint(demo, environment) as url:
            answers = _ask(demo, url)
        report["serve"] = {"answers": answers, "num_right": sum(bool(answer["right"]) for answer in answers)}
    return report


def write_manifest_with_film(demo: Demo, film: Path) -> None:
    table = pq.read_table(demo.path("corpus", "manifest.parquet"))
    row = dict.fromkeys(table.schema.names) | {"uri": str(film), "media_id": film.stem}
    rows = pa.Table.from_pylist([*table.to_pylist(), row], schema=table.schema)
    pq.write_table(rows, demo.path(*MANIFEST_WITH_FILM))


def _job(demo: Demo, name: str, environment: dict[str, str]) -> None:
    _run(name, environment, "--config", str(demo.config(name)), *demo.overrides(name))


def _run(name: str, environment: dict[str, str], *arguments: str) -> None:
    subprocess.run(job_command(name, *arguments), env=environment, check=True)


@contextlib.contextmanager
def _endpoint(demo: Demo, environment: dict[str, str]) -> Iterator[str]:
    port = free_port()
    url = f"http://127.0.0.1:{port}"
    command = job_command("serve", "--config", str(demo.config("serve")), "--port", str(port))
    process = subprocess.Popen(command, env=environment)
    try:
        _wait_until_ready(url, process)
        yield url
    finally:
        process.send_signal(signal.SIGINT)
        process.wait(timeout=60)


def _wait_until_ready(url: str, process: subprocess.Popen[bytes], timeout_s: float = 180.0) -> None:
    deadline = time.monotonic() + timeout_s
    while time.monotonic() < deadline:
        if process.poll() is not None:
            raise RuntimeError(f"the endpoint ended with exit code {process.returncode} before it was ready")
        with contextlib.suppress(urllib.error.URLError, OSError):
            if urllib.request.urlopen(f"{url}/health/ready", timeout=5).status == 200:
                return
        time.sleep(0.5)
    raise RuntimeError(f"{url}/health/ready did not answer 200 within {timeout_s:.0f} s")


def _ask(demo: Demo, url: str) -> list[dict[str, Any]]:
    client = openai.OpenAI(base_url=f"{url}/v1", api_key="unused")
    answers = []
    for name, number in NUM_ASKED.items():
        for row in pq.read_table(demo.path("corpus", "held_out", f"{name}.parquet")).slice(0, number).to_pylist():
            answer = _answer(client, row["media"][0]["media_id"], row["question"])
            right = is_right(answer, row["answer"])
            answers.append({"question": row["question"], "expected": row["answer"], "answer": answer, "right": right})
    if demo.film is not None:
        question = "Describe the video."
        answer = _answer(client, demo.film.stem, question)
        name = f"{question} ({demo.film.name})"
        answers.append({"question": name, "expected": "(no such film in training)", "answer": answer, "right": None})
    return answers


def is_right(answer: str, expected: str) -> bool:
    """Compares a free-text answer with the expected one."""
    span = parse_span(expected)
    if span is None:
        return answer.strip() == expected
    answered = parse_span(answer)
    return answered is not None and temporal_iou(answered, span) >= RIGHT_IOU


def _answer(client: openai.OpenAI, media_id: str, question: str) -> str:
    video = {"type": "video_url", "video_url": {"url": f"feature://{media_id}"}}  # not one of OpenAI's types
    messages: Any = [{"role": "user", "content": [video, {"type": "text", "text": question}]}]
    completion = client.chat.completions.create(model=MODEL_NAME, temperature=0.0, messages=messages)
    return completion.choices[0].message.content or ""


def format_report(report: dict[str, Any]) -> str:
    lines = ["", "=== report", f"{'seconds':32}{report['seconds']}"]
    lines += [f"{'preprocess ' + key:32}{value}" for key, value in report["preprocess"].items()]
    for phase, values in report["train"].items():
        losses = f"loss {values['loss_first']:.3f} -> {values['loss_last']:.3f}"
        lines.append(f"{'train ' + phase:32}{values['steps']} steps, {losses}")
    for task, scores in report["evaluate"].items():
        lines.append(f"{'evaluate ' + task:32}" + ", ".join(f"{key} {_short(value)}" for key, value in scores.items()))
    answers = report["serve"]["answers"]
    num_known = sum(answer["right"] is not None for answer in answers)
    lines.append(f"{'serve':32}{report['serve']['num_right']} of {num_known} questions over HTTP answered right")
    for answer in answers:
        verdict = {True: "right: ", False: "wrong: ", None: ""}[answer["right"]]
        lines += [
            f"{'':32}{answer['question']}",
            f"{'':32}  {verdict}expected {answer['expected']!r}, answered {answer['answer']!r}",
        ]
    return "\n".join(lines)


def _short(value: Any) -> str:
    if isinstance(value, list | tuple):
        return "[" + ", ".join(_short(item) for item in value) + "]"
    return f"{value:.3f}" if isinstance(value, float) else str(value)


def _announce(step: str, what: str) -> None:
    print(f"\n=== {step}: {what}", flush=True)


def _read_json(path: str) -> Any:
    return json.loads(Path(path).read_text())

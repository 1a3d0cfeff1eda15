"""Measures every figure of the documents: `timeviper benchmark SUITE [--only GROUP,...] [--record docs/benchmarks.md]`.

Both sides of a ratio take turns in one process. A row is the median of five or more turns, or of three if a turn takes
over a minute. `all` runs every group that this machine can run, each in a separate process.
"""

from __future__ import annotations

import argparse
import gc
import json
import logging
import subprocess
import tempfile
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

from timeviper_platform.benchmarks.measure import Row, StolenTime, format_rows
from timeviper_platform.benchmarks.record import record
from timeviper_platform.common.job import USAGE_EXIT_CODE, JobError, JobParser, JobResult, job_command, run_job

logger = logging.getLogger("benchmark")

EVERY_SUITE = "all"

Groups = dict[str, Callable[[Path | None], list[Row]]]
"""Groups of rows by key; few of them use the film."""


def main(arguments: Sequence[str] | None = None) -> int:
    parser = JobParser(__doc__)
    parser.add_argument("suite", choices=[*sorted(SUITES), EVERY_SUITE])
    parser.add_argument("--only", help="comma-separated groups of the suite's rows")
    parser.add_argument("--json", type=Path, help="also write the rows to this file")
    parser.add_argument("--record", type=Path, metavar="FILE.md", help="replace these rows in its tables and its .json")
    parser.add_argument("--film", type=Path, help="a film to measure on as well, such as Big Buck Bunny")
    return run_job(parser, benchmark, arguments)


def benchmark(options: argparse.Namespace) -> JobResult:
    """Runs a suite and reports its table; returns 1 if a row misses its bar.

    Raises:
        JobError: for an unknown film or group, or a machine that lacks what the suite needs.
    """
    if options.film is not None and not options.film.is_file():
        raise JobError(f"there is no film at {str(options.film)!r}", exit_code=USAGE_EXIT_CODE)
    if options.record is not None and not options.record.is_file():
        raise JobError(f"there is no document at {str(options.record)!r}", exit_code=USAGE_EXIT_CODE)
    if options.suite == EVERY_SUITE:
        return _every_group(options)
    groups = SUITES[options.suite]()
    chosen = options.only.split(",") if options.only else list(groups)
    if unknown := sorted(set(chosen) - set(groups)):
        message = f"the {options.suite} suite has no rows {', '.join(unknown)}; it has {', '.join(groups)}"
        raise JobError(message, exit_code=USAGE_EXIT_CODE)
    rows, stolen = [], StolenTime()
    for key in chosen:
        meanwhile = StolenTime()
        found = groups[key](options.film)
        rows += found
        if len(chosen) > 1:  # shown even if the suite is stopped later
            logger.info("%s %s:\n%s", options.suite, key, format_rows(found))
        if options.record is not None:
            record(options.record, options.suite, key, found, stolen=meanwhile.share())
        gc.collect()  # frees the models of a group before the next one starts
    if options.json is not None:
        options.json.write_text(json.dumps([row.as_dict() for row in rows], indent=2) + "\n")
    note = f"CPU time taken by other machines on this host meanwhile (steal): {stolen.share():.0%}"
    return JobResult([format_rows(rows), note], exit_code=1 if any(row.holds is False for row in rows) else 0)


def _every_group(options: argparse.Namespace) -> JobResult:
    """Runs one group after the other; a group that fails leaves the others' rows as they are."""
    if options.only is not None or options.json is not None:
        raise JobError("--only and --json go with one suite", exit_code=USAGE_EXIT_CODE)
    shared = [f"--{name}={getattr(options, name)}" for name in ("record", "film") if getattr(options, name)]
    failed = []
    for suite in sorted(SUITES):
        try:
            keys = list(SUITES[suite]())
        except RuntimeError as error:  # the gpu suite without a CUDA device
            logger.warning("no rows of %s: %s", suite, error)
            continue
        for key in keys:
            logger.info("%s %s", suite, key)
            if subprocess.run(job_command("benchmark", suite, "--only", key, *shared), check=False).returncode:
                failed.append(f"{suite} --only {key}")
    lines = [f"failed, or misses its bar: {group}" for group in failed]
    return JobResult(lines or ["every bar is met"], exit_code=1 if failed else 0)


def demo_suite(film: Path | None) -> list[Row]:
    with tempfile.TemporaryDirectory() as folder:
        subprocess.run(job_command("demo", "--folder", folder, *(["--film", str(film)] if film else [])), check=True)
        report = json.loads(Path(folder, "report.json").read_text())
    return demo_rows(report, "python jobs/benchmark.py demo" + (" --film FILM" if film else ""))


def demo_rows(report: dict[str, Any], command: str) -> list[Row]:
    scores = report["evaluate"]
    num_asked = sum(answer["right"] is not None for answer in report["serve"]["answers"])
    values: list[tuple[str, float, str, str | None]] = [
        ("held-out 'which' questions", scores["choice"]["num_questions"], "", ">= 400"),
        ("'which' accuracy (chance 0.25)", scores["choice"]["accuracy"], "", ">= 0.90"),
        ("'which' accuracy without the video", scores["choice"]["accuracy_without_video"], "", "<= 0.35"),
        ("'order' accuracy (chance 0.25)", scores["order"]["accuracy"], "", None),
        ("'count' accuracy (chance 0.25)", scores["count"]["accuracy"], "", None),
        ("grounding mIoU", scores["grounding"]["miou"], "", ">= 0.5"),
        (
            "grounding mIoU above the model without video",
            scores["grounding"]["miou"] - scores["grounding"]["miou_without_video"],
            "",
            ">= 0.25",
        ),
        (f"right answers over HTTP, of {num_asked}", report["serve"]["num_right"], "", None),
        ("demo after installation", report["seconds"] / 60, "min", None),
    ]
    return [Row(name=name, value=value, unit=unit, bar=bar, command=command) for name, value, unit, bar in values]


def _decode_groups() -> Groups:
    from timeviper_platform.benchmarks.video.suite import DECODE_GROUPS

    return dict(DECODE_GROUPS)


def _evaluation_groups() -> Groups:
    from timeviper_platform.benchmarks.evaluation.questions import question_rows
    from timeviper_platform.benchmarks.model.suite import on_one_thread

    return {"questions": lambda film: on_one_thread(question_rows)()}


def _gpu_groups() -> Groups:
    from timeviper_platform.benchmarks.gpu.suite import gpu_groups, require_cuda

    return gpu_groups(require_cuda())


def _model_groups() -> Groups:
    from timeviper_platform.benchmarks.model.suite import MODEL_GROUPS

    return {key: lambda film, rows=rows: rows() for key, rows in MODEL_GROUPS.items()}  # type: ignore[misc]


def _preprocess_groups() -> Groups:
    from timeviper_platform.benchmarks.preprocess.backpressure import backpressure_rows
    from timeviper_platform.benchmarks.preprocess.driver import driver_rows
    from timeviper_platform.benchmarks.preprocess.other_pipelines import pipeline_rows
    from timeviper_platform.benchmarks.preprocess.share_of_ideal import ideal_rows

    return {
        "ideal": ideal_rows,
        "backpressure": backpressure_rows,
        "pipelines": pipeline_rows,
        "driver": driver_rows,
    }


def _serving_groups() -> Groups:
    from timeviper_platform.benchmarks.serving.suite import SERVING_GROUPS

    return {key: lambda film, rows=rows: rows() for key, rows in SERVING_GROUPS.items()}  # type: ignore[misc]


def _store_groups() -> Groups:
    from timeviper_platform.benchmarks.store.open_and_read import opening_rows, reading_rows
    from timeviper_platform.benchmarks.store.scale import dry_run_rows, finalize_rows, upkeep_rows

    groups = {
        "opening": opening_rows,
        "reading": reading_rows,
        "finalize": finalize_rows,
        "upkeep": upkeep_rows,
        "dryrun": dry_run_rows,
    }
    return {key: lambda film, rows=rows: rows() for key, rows in groups.items()}  # type: ignore[misc]


def _training_groups() -> Groups:
    from timeviper_platform.benchmarks.training.suite import TRAINING_GROUPS

    return {key: lambda film, rows=rows: rows() for key, rows in TRAINING_GROUPS.items()}  # type: ignore[misc]


SUITES: dict[str, Callable[[], Groups]] = {
    "decode": _decode_groups,
    "demo": lambda: {"demo": demo_suite},
    "evaluation": _evaluation_groups,
    "gpu": _gpu_groups,
    "model": _model_groups,
    "preprocess": _preprocess_groups,
    "serving": _serving_groups,
    "store": _store_groups,
    "training": _training_groups,
}
"""Suites import lazily: a GPU machine may have neither Ray nor video decoders."""

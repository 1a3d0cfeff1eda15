"""Scores weights on questions: `timeviper evaluate --config ray_configs/tiny/evaluate.yaml [key=value ...]`.

Answers validation questions with and without their video, or a published benchmark (ray_configs/eval/*.yaml); writes
the report and every outcome.
"""

from __future__ import annotations

import argparse
from collections.abc import Sequence

from timeviper_platform.common.config import load_config
from timeviper_platform.common.job import JobParser, JobResult, run_job
from timeviper_platform.common.ray_cluster import connect
from timeviper_platform.data.synthetic.benchmark import SynthBenchmarkConfig, make_benchmark
from timeviper_platform.evaluation.benchmark_run import judge, rescore, run_benchmark, write_manifest
from timeviper_platform.evaluation.harness.task_files import write_task_files
from timeviper_platform.evaluation.report import report_lines
from timeviper_platform.evaluation.results.scores import score_lines
from timeviper_platform.evaluation.run import EvaluateConfig, run_evaluation


def main(arguments: Sequence[str] | None = None) -> int:
    parser = JobParser(
        __doc__,
        config_class=EvaluateConfig,
        config_file="ray_configs/evaluate.yaml",
        override="max_questions=40 weights=outputs/weights",
    )
    task = parser.add_mutually_exclusive_group()
    task.add_argument("--rescore", action="store_true", help="score stored answers again, without a model")
    task.add_argument("--judge", action="store_true", help="ask the configured judge about stored captions")
    task.add_argument("--write-manifest", metavar="FILE", help="list a benchmark's videos for jobs/preprocess.py")
    task.add_argument("--make-synth", metavar="N", type=int, help="generate timeviper-synth, N videos per kind")
    return run_job(parser, evaluate, arguments)


def evaluate(options: argparse.Namespace) -> JobResult:
    config = load_config(EvaluateConfig, options.config, options.overrides)
    if config.benchmark is not None:
        return _evaluate_benchmark(config, options)
    if options.rescore or options.judge or options.write_manifest or options.make_synth:
        raise ValueError("this option needs a configuration with `benchmark`, see ray_configs/eval")
    with connect():
        report = run_evaluation(config)
    return JobResult([*report_lines(report), f"report: {config.output}"])


def _evaluate_benchmark(config: EvaluateConfig, options: argparse.Namespace) -> JobResult:
    if options.make_synth:
        if config.benchmark is None or not config.benchmark.name.startswith("synth"):
            raise ValueError("--make-synth needs a configuration such as ray_configs/eval/synth.yaml")
        synth = SynthBenchmarkConfig(output=config.benchmark.folder, videos_per_kind=options.make_synth)
        lines = [f"{make_benchmark(synth)} questions: {synth.output}"]
        return JobResult([*lines, f"lmms-eval: --include_path {write_task_files(synth.output)}"])
    if options.write_manifest:
        num_media, missing = write_manifest(config, options.write_manifest)
        lines = [f"{num_media} videos and clips, {len(missing)} videos missing", *missing[:10]]
        return JobResult([*lines, f"manifest: {options.write_manifest}"])
    if options.rescore:
        report = rescore(config)
    elif options.judge:
        report = judge(config)
    else:
        with connect():
            report = run_benchmark(config)
    return JobResult([*score_lines(report), f"report: {config.output.removesuffix('.json')}.html"])

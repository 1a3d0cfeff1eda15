"""TransV ablations on synthetic corpora, each as one table below FOLDER.

timeviper ablation                                 all rows of the demo's plan
timeviper ablation --rows attention                one row, and the steps that all rows share
timeviper ablation --plan uni_1_0.5-attn_8_0.9     another plan than the demo's, in the paper's drop rates
timeviper ablation --study one-site                transfer where it is needed, three seeds; needs `timeviper demo`
"""

from __future__ import annotations

import argparse
from collections.abc import Sequence
from pathlib import Path

from timeviper_platform.benchmarks.ablation.one_site import DEFAULT_SITE, run_one_site
from timeviper_platform.benchmarks.ablation.plans import DEMO_FOLDER, DEMO_PLAN, run_plans
from timeviper_platform.common.job import JobParser, JobResult, run_job


def main(arguments: Sequence[str] | None = None) -> int:
    parser = JobParser(__doc__)
    parser.add_argument("--study", choices=("plans", "one-site"), default="plans", help="default: plans")
    parser.add_argument("--rows", help="comma-separated (default: all)")
    parser.add_argument(
        "--plan", default=DEMO_PLAN, help="plans: in the paper's notation, drop rates (default: the demo's own)"
    )
    parser.add_argument("--site", type=int, default=DEFAULT_SITE, help=f"one-site: its block (default {DEFAULT_SITE})")
    parser.add_argument("--seeds", default="0,1,2", help="one-site: comma-separated (default 0,1,2)")
    parser.add_argument(
        "--demo", type=Path, default=Path(DEMO_FOLDER), help=f"one-site: a finished demo (default {DEMO_FOLDER})"
    )
    parser.add_argument(
        "--folder", type=Path, help="output folder (default: outputs/ablation, outputs/ablation-one-site)"
    )
    parser.add_argument("--quick", action="store_true", help="a small corpus, and too few steps to learn")
    return run_job(parser, run_study, arguments)


def run_study(options: argparse.Namespace) -> JobResult:
    return run_one_site(options) if options.study == "one-site" else run_plans(options)

"""The TransV ablation on the synthetic corpus, as one table in FOLDER/ablation.md.

timeviper ablation                                 all rows
timeviper ablation --rows attention                one row, with what all rows share
timeviper ablation --plan uni_1_0.5-attn_8_0.9     another plan than the demo's, in the paper's drop rates
"""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

from timeviper_platform.benchmarks.ablation import DEMO_PLAN, ROWS, run_ablation
from timeviper_platform.common.job import JobParser, run_job


def main(arguments: Sequence[str] | None = None) -> int:
    parser = JobParser(__doc__)
    parser.add_argument("--rows", default=",".join(ROWS), help="with commas between them (default: all)")
    parser.add_argument(
        "--plan", default=DEMO_PLAN, help="in the paper's notation: drop rates (default: the demo's own)"
    )
    parser.add_argument("--folder", type=Path, help="where everything goes (default: outputs/ablation)")
    parser.add_argument("--quick", action="store_true", help="a small corpus and few steps: the path, nothing learned")
    return run_job(parser, run_ablation, arguments)

"""The paper's Figures 3 to 6: `python jobs/analyze.py --config ray_configs/tiny/analyze.yaml [key=value ...]`.

Blocks the flow of information, drops tokens at every depth and averages who reads from whom, on held-out questions.
Writes each figure's numbers as JSON and CSV and a picture as SVG. One process, no Ray.
"""

from __future__ import annotations

import sys
from collections.abc import Sequence

from timeviper_platform.common.config import run_command
from timeviper_platform.evaluation.analyze import AnalyzeConfig, run_analysis


def main(arguments: Sequence[str] | None = None) -> int:
    """Parses, runs, prints; returns the exit code."""
    result = run_command(
        arguments,
        AnalyzeConfig,
        lambda config: [f"written    {uri}" for uri in run_analysis(config)],
        description=__doc__,
        config_file="ray_configs/analyze.yaml",
        override="figures=[maps] max_questions=8",
    )
    print(result.text, file=sys.stderr if result.exit_code else sys.stdout)
    return result.exit_code


if __name__ == "__main__":
    sys.exit(main())

"""Annotations to samples: `python jobs/convert.py --config ray_configs/convert.yaml [key=value ...]`.

Turns LLaVA-style JSON, captions, dense captions and temporal grounding into the table that training reads, with the
media ids that preprocessing gave. Rows that cannot be used are counted by reason, and none takes their place.
"""

from __future__ import annotations

import sys
from collections.abc import Sequence

from timeviper_platform.common.config import run_command
from timeviper_platform.data.annotations.convert import ConvertConfig, convert


def main(arguments: Sequence[str] | None = None) -> int:
    """Parses, runs, prints; returns the exit code."""
    result = run_command(
        arguments,
        ConvertConfig,
        lambda config: [f"written    {config.output}", *convert(config).lines()],
        description=__doc__,
        config_file="ray_configs/convert.yaml",
        override="format=didemo input=train_data.json",
    )
    print(result.text, file=sys.stderr if result.exit_code else sys.stdout)
    return result.exit_code


if __name__ == "__main__":
    sys.exit(main())

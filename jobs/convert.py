"""Annotations to samples: `python jobs/convert.py --config ray_configs/convert.yaml [key=value ...]`.

Turns LLaVA-style JSON, captions, dense captions and temporal grounding into the table that training reads, with the
media ids that preprocessing gave. Rows that cannot be used are counted by reason, and none takes their place.
"""

from __future__ import annotations

import argparse
import sys
from collections.abc import Sequence

from timeviper_platform.config import load_config
from timeviper_platform.data.sources.convert import ConvertConfig, convert
from timeviper_platform.logs import setup_logging


def main(arguments: Sequence[str] | None = None) -> int:
    """Parses, runs, prints; returns the exit code."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--config", required=True, help="YAML file, see ray_configs/convert.yaml")
    parser.add_argument("overrides", nargs="*", help="key=value, e.g. format=didemo input=train_data.json")
    options = parser.parse_args(arguments)
    setup_logging()
    try:
        config = load_config(ConvertConfig, options.config, options.overrides)
        print("\n".join([f"written    {config.output}", *convert(config).lines()]))
    except (ValueError, RuntimeError) as error:
        print(f"error: {error}", file=sys.stderr)
        return 1
    return 0


if __name__ == "__main__":
    sys.exit(main())

"""`python jobs/benchmark.py` is `timeviper benchmark`: see timeviper_platform/cli/benchmark.py."""

import sys

from timeviper_platform.cli.benchmark import main

if __name__ == "__main__":
    sys.exit(main())

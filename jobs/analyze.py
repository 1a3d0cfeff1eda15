"""`python jobs/analyze.py` is `timeviper analyze`: see timeviper_platform/cli/analyze.py."""

import sys

from timeviper_platform.cli.analyze import main

if __name__ == "__main__":
    sys.exit(main())

"""`python jobs/evaluate.py` is `timeviper evaluate`: see timeviper_platform/cli/evaluate.py."""

import sys

from timeviper_platform.cli.evaluate import main

if __name__ == "__main__":
    sys.exit(main())

"""`python jobs/preprocess.py` is `timeviper preprocess`: see timeviper_platform/cli/preprocess.py."""

import sys

from timeviper_platform.cli.preprocess import main

if __name__ == "__main__":
    sys.exit(main())

"""`python jobs/train.py` is `timeviper train`: see timeviper_platform/cli/train.py."""

import sys

from timeviper_platform.cli.train import main

if __name__ == "__main__":
    sys.exit(main())

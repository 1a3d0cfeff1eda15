"""`python jobs/ablation.py` is `timeviper ablation`: see timeviper_platform/cli/ablation.py."""

import sys

from timeviper_platform.cli.ablation import main

if __name__ == "__main__":
    sys.exit(main())

"""`python jobs/serve.py` is `timeviper serve`: see timeviper_platform/cli/serve.py."""

import sys

from timeviper_platform.cli.serve import main

if __name__ == "__main__":
    sys.exit(main())

"""`python jobs/demo.py` is `timeviper demo`: see timeviper_platform/cli/demo.py."""

import sys

from timeviper_platform.cli.demo import main

if __name__ == "__main__":
    sys.exit(main())

"""`python jobs/export.py` is `timeviper export`: see timeviper_platform/cli/export.py."""

import sys

from timeviper_platform.cli.export import main

if __name__ == "__main__":
    sys.exit(main())

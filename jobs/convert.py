"""`python jobs/convert.py` is `timeviper convert`: see timeviper_platform/cli/convert.py."""

import sys

from timeviper_platform.cli.convert import main

if __name__ == "__main__":
    sys.exit(main())

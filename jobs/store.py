"""`python jobs/store.py` is `timeviper store`: see timeviper_platform/cli/store.py."""

import sys

from timeviper_platform.cli.store import main

if __name__ == "__main__":
    sys.exit(main())

"""``python -m slimming`` is the command ``slimming``."""

import sys

from slimming.cli import main

if __name__ == "__main__":
    sys.exit(main())

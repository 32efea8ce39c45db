"""``python -m diffopt``."""

import sys

from diffopt.cli import main

if __name__ == "__main__":
    sys.exit(main())

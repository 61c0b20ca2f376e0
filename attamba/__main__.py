"""python -m attamba: the command, where its script is not on the path."""

import sys

from attamba.cli import main

if __name__ == "__main__":
    sys.exit(main())

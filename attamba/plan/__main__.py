"""Write the tables of the documentation's page anew: python -m attamba.plan [PAGE]."""

import argparse
from pathlib import Path

from attamba.plan.pages import write

if __name__ == "__main__":
    parser = argparse.ArgumentParser(prog="python -m attamba.plan", description=__doc__)
    parser.add_argument("page", nargs="?", type=Path, default=Path("docs/scaling.md"))
    write(parser.parse_args().page)

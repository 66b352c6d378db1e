"""`python -m fastfill.cli`, the same as `python -m fastfill`."""

import sys

from fastfill.__main__ import program

if __name__ == "__main__":
    sys.exit(program())

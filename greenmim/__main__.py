"""`python -m greenmim`, the same as the console script (for torchrun)."""

import sys

from greenmim.cli import main

if __name__ == "__main__":
    sys.exit(main())

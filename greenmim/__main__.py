"""`python -m greenmim` (for torchrun), and the console script."""

import signal
import sys

from greenmim.guards import leave


def main() -> int:
    """Run the command line; Ctrl-C ends it in one line from its first moment on."""
    if signal.getsignal(signal.SIGINT) is signal.default_int_handler:
        signal.signal(signal.SIGINT, leave)  # until a run or a tool has its own
    from greenmim.cli import main as run

    return run()


if __name__ == "__main__":
    sys.exit(main())

"""`python -m greenmim` (for torchrun), and the console script."""

import signal
import sys
import threading

from greenmim.guards import end_of_imports, leave


def main() -> int:
    """Run the command line; Ctrl-C ends it in one line from its first moment on."""
    is_plain = signal.getsignal(signal.SIGINT) is signal.default_int_handler
    if is_plain and threading.current_thread() is threading.main_thread():
        signal.signal(signal.SIGINT, leave)  # until a run or a tool has begun
    from greenmim.cli import main as run

    try:
        return run()
    finally:
        end_of_imports()


if __name__ == "__main__":
    sys.exit(main())

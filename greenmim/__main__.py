"""`python -m greenmim` (for torchrun), and the console script."""

import contextlib
import os
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
        code = run()
    finally:
        end_of_imports()
    processes = sys.modules.get("greenmim.processes")
    if processes is not None and processes.Processes.joined:
        # Threads of Gloo live as long as a model that DDP or FSDP wrapped, or caches of PyTorch.
        # One that drops a tensor while the interpreter goes ends the process with SIGABRT.
        for stream in (sys.stdout, sys.stderr):
            with contextlib.suppress(OSError, ValueError):
                stream.flush()
        os._exit(code)
    return code


if __name__ == "__main__":
    sys.exit(main())

"""`python -m greenmim` (for torchrun), and the console script."""

import contextlib
import os
import signal
import sys
import threading
from typing import NoReturn

from greenmim.guards import end_of_imports, exit_code, leave


def main() -> int:
    """Run the command line; Ctrl-C ends it in one line from its first moment on."""
    is_plain = signal.getsignal(signal.SIGINT) is signal.default_int_handler
    if is_plain and threading.current_thread() is threading.main_thread():
        signal.signal(signal.SIGINT, leave)  # until a run or a tool has begun
    try:
        return exit_code(_run)
    finally:
        end_of_imports()


def _run() -> int:
    try:
        from greenmim.cli import main
    except ModuleNotFoundError:
        if sys.argv[1:] != ["doctor"]:
            raise
        from greenmim.tools.doctor import report  # of the kernels, which need nothing else

        print(report())
        return 0
    return main()


def script() -> NoReturn:
    """`main`, and the end of the process."""
    try:
        code = main()
    except Exception:
        if not _joined():
            raise
        sys.excepthook(*sys.exc_info())
        code = 1
    if _joined():
        # Threads of Gloo live as long as a model that DDP or FSDP wrapped, or caches of PyTorch.
        # One that drops a tensor while the interpreter goes ends the process with SIGABRT.
        for stream in (sys.stdout, sys.stderr):
            with contextlib.suppress(OSError, ValueError):
                stream.flush()
        os._exit(code)
    sys.exit(code)


def _joined() -> bool:
    """Whether this process was one of several."""
    processes = sys.modules.get("greenmim.processes")  # there if a command needed it
    return processes is not None and processes.Processes.joined


if __name__ == "__main__":
    script()

"""`python -m greenmim` (for torchrun), and the console script."""

import contextlib
import os
import signal
import sys
import threading
from typing import NoReturn

from greenmim.guards import EXIT_BAD_INPUT, end_of_imports, leave, missing_package


def main() -> int:
    """Run the command line; Ctrl-C ends it in one line from its first moment on."""
    is_plain = signal.getsignal(signal.SIGINT) is signal.default_int_handler
    if is_plain and threading.current_thread() is threading.main_thread():
        signal.signal(signal.SIGINT, leave)  # until a run or a tool has begun
    try:
        try:
            from greenmim.cli import main as run
        except ModuleNotFoundError as error:
            return _without_extra(error)
        return run()
    finally:
        end_of_imports()


def _without_extra(error: ModuleNotFoundError) -> int:
    """What there is to do and to say where the kernels alone are installed."""
    said = missing_package(error)
    if said is None:
        raise error
    if [argument for argument in sys.argv[1:] if argument != "--debug"] == ["doctor"]:
        from greenmim.tools.doctor import report

        print(report())
        return 0
    print(f"greenmim: error: {said}", file=sys.stderr)
    return EXIT_BAD_INPUT


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

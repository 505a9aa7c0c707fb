"""When one process of a run dies, the others end too, and say which one it was and why.

PyTorch's collectives alone wait for a dead process for ten minutes or more, and then name a
symptom. Here every process tells the store it is alive from a thread; the main process watches them
all, the others watch the main process.
"""

from __future__ import annotations

import os
import socket
import sys
import threading
import time

import torch.distributed as dist

from greenmim.guards import EXIT_PEER

BEAT_SECONDS = 1.0


class PeerWatch:
    """Tells the others that this process is alive and ends it when one of them is not.

    Args:
        store: The store of the process group, in a connection of its own (`TCPStore.clone`).
        rank, size: Of this process, and how many there are.
    """

    # A process is taken for dead when it is not heard of for so long: enough for one that holds the
    # interpreter's lock (a large read, a compile step).
    silent_seconds = 30.0
    # What the process itself has to say comes first: time to raise its own error and end.
    grace_seconds = 5.0

    def __init__(self, store: dist.Store, rank: int, size: int) -> None:
        self.store, self.rank, self.size = store, rank, size
        self.cause: str | None = None
        self._found = threading.Event()
        self._left = threading.Event()
        self._heard: dict[int, tuple[bytes, float]] = {}
        self._answered = time.monotonic()

    def start(self) -> None:
        """Begin to watch: one thread talks to the store, one judges, for the store may hang."""
        for target in (self._talk, self._judge):
            threading.Thread(target=target, name="peer watch", daemon=True).start()

    def report(self, reason: str) -> None:
        """Tell the others why this process ends."""
        if self.leave():
            try:
                text = f"process {self.rank} on {socket.gethostname()} ended: {reason}"
                self.store.compare_set("failed", "", text)
                if self.rank == 0:  # the store may end with this process: let the others read it
                    time.sleep(2 * BEAT_SECONDS)
            except RuntimeError:
                pass  # the store is gone, and with it who would read this

    def leave(self) -> bool:
        """This process ends in good order; False if it was told already why another did not."""
        if self._found.is_set():
            self._left.set()
            return False
        self._left.set()
        try:
            self.store.set(f"alive/{self.rank}", "done")
        except RuntimeError:
            pass
        return True

    def wait_for_cause(self) -> str | None:
        """Why a collective failed: the process that died, or None when all are alive."""
        self._found.wait(self.silent_seconds + 3 * BEAT_SECONDS)
        return self.cause

    def _talk(self) -> None:
        beat, host = 0, socket.gethostname()
        while not self._left.is_set() and not self.cause:
            beat += 1
            try:
                self.store.set(f"alive/{self.rank}", f"{beat} {host}")
                self.cause = self._failed() or self._silent()
            except RuntimeError:  # torch's errors of the store's connection are its subclasses
                self.cause = "process 0, where the others meet, is gone"
            self._answered = time.monotonic()
            self._left.wait(BEAT_SECONDS)

    def _judge(self) -> None:
        while not self._left.wait(BEAT_SECONDS / 4):
            if not self.cause and time.monotonic() - self._answered > self.silent_seconds:
                self.cause = (
                    "process 0 (or its machine), where the others meet, has not answered for"
                    f" {self.silent_seconds:.0f} s"
                )
            if self.cause:
                break
        else:
            return
        self._found.set()
        if not self._left.wait(self.grace_seconds):
            text = f"greenmim: error: {self.cause}; process {self.rank} ends too."
            print(text, file=sys.stderr, flush=True)
            os._exit(EXIT_PEER)  # the main thread waits in a collective that never ends

    def _failed(self) -> str | None:
        if self.store.check(["failed"]):
            return self.store.get("failed").decode()
        return None

    def _silent(self) -> str | None:
        now = time.monotonic()
        for rank in range(1, self.size) if self.rank == 0 else (0,):
            key = f"alive/{rank}"
            told = self.store.get(key) if self.store.check([key]) else b""
            before, since = self._heard.get(rank, (None, now))
            if told != before:
                self._heard[rank] = (told, now)
            elif told != b"done" and now - since > self.silent_seconds:
                where = told.decode().partition(" ")[2]
                cause = (
                    f"process {rank}{f' on {where}' if where else ''} has not been heard of for"
                    f" {self.silent_seconds:.0f} s: it was killed (out of memory?) or its machine"
                    " is down"
                )
                self.store.compare_set("failed", "", cause)
                return cause
        return None

"""When one process of a run dies or hangs, the others end too, and say which one it was and why.

PyTorch's collectives alone wait for a dead process for ten minutes or more, and then name a
symptom. Here every process tells the store from a thread that it is alive, and how far its main
thread is; the main process watches them all, the others watch the main process.
"""

from __future__ import annotations

import contextlib
import faulthandler
import os
import socket
import sys
import threading
import time
from collections.abc import Iterator

import torch.distributed as dist

from greenmim.guards import EXIT_PEER

BEAT_SECONDS = 1.0
# What may take longer than an update, as multiples of the patience with an update: the first one
# compiles; a start counts images, a save waits for disks.
PHASES = {"starting": 6, "first update": 3, "loading": 1, "computing": 1, "saving": 3, "drawing": 3}


class AwakeClock:
    """Seconds in which this process ran: time that it was stopped (a suspended job) is left out.

    Args:
        longest: A longer time between two readings counts as so much.
    """

    def __init__(self, longest: float) -> None:
        self.longest, self.now, self._last = longest, 0.0, time.monotonic()

    def read(self) -> float:
        """The time, of which the least part since the last reading counts."""
        last, self._last = self._last, time.monotonic()
        self.now += min(self._last - last, self.longest)
        return self.now


class PeerWatch:
    """Tells the others that this process is alive and ends it when one of them is not.

    Args:
        store: The store of the process group, in a connection of its own (`TCPStore.clone`).
        rank, size: Of this process, and how many there are.
        hang_minutes: A process that the others have waited for so long in an update hangs (see
            `PHASES`); None never says so.
    """

    # A process is taken for dead when it is not heard of for so long: enough for one that holds the
    # interpreter's lock (a large read, a compile step). With the grace below it is less than the
    # 30 s that torchrun leaves the others, so that they can say what happened.
    silent_seconds = 20.0
    # What the process itself has to say comes first: time to raise its own error and end.
    grace_seconds = 5.0
    # How long the end waits for a checkpoint that this process alone still has to finish.
    finish_seconds = 300.0

    def __init__(
        self, store: dist.Store, rank: int, size: int, hang_minutes: float | None = None
    ) -> None:
        self.store, self.rank, self.size = store, rank, size
        self.hang_seconds = None if hang_minutes is None else 60 * hang_minutes
        self.cause: str | None = None
        self._lock = threading.Lock()
        self._found = threading.Event()
        self._left = threading.Event()
        self._may_end = threading.Event()
        self._may_end.set()
        self._ending = False
        self._place = (0, 0, "starting")
        self._hung: set[int] = set()
        self._told: dict[int, bytes] = {}
        self._since: dict[int, float] = {}
        self._least = ((-1, 0, ""), 0.0)
        # Each thread has its own clock; a reply of the store that comes late is no silence.
        self._talking = AwakeClock(2 * BEAT_SECONDS)
        self._judging = AwakeClock(BEAT_SECONDS)
        self._answered = 0.0

    def start(self) -> None:
        """Begin to watch: one thread talks to the store, one judges, for the store may hang."""
        for target in (self._talk, self._judge):
            threading.Thread(target=target, name="peer watch", daemon=True).start()

    def at(self, step: int, phase: str) -> None:
        """The main thread comes to a phase of an update; all processes come to the same ones."""
        self._place = (self._place[0] + 1, step, phase)

    @contextlib.contextmanager
    def finishing(self) -> Iterator[None]:
        """Inside, the main thread needs nobody: another's death ends it only afterwards."""
        self._may_end.clear()
        try:
            yield
        finally:
            self._may_end.set()

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
        if self._ending:  # told already, and over in a moment
            time.sleep(10 * BEAT_SECONDS)
        return self.cause

    def _find(self, cause: str | None) -> None:
        """Keep the first cause."""
        with self._lock:
            self.cause = self.cause or cause

    def _talk(self) -> None:
        beat, host = 0, socket.gethostname()
        while not self._left.is_set() and not self.cause:
            beat += 1
            place = " ".join(map(str, self._place))
            try:
                self.store.set(f"alive/{self.rank}", f"{beat} {host} {place}")
                now = self._talking.read()
                self._find(self._failed() or self._silent(now) or self._hanging(now))
            except RuntimeError:  # torch's errors of the store's connection are its subclasses
                self._find("process 0, where the others meet, is gone")
            self._answered = self._judging.now
            self._left.wait(BEAT_SECONDS)

    def _judge(self) -> None:
        while not self._left.wait(BEAT_SECONDS / 4):
            if self._judging.read() - self._answered > self.silent_seconds:
                self._find(
                    "process 0 (or its machine), where the others meet, has not answered for"
                    f" {self.silent_seconds:.0f} s"
                )
            if self.cause:
                break
        else:
            return
        self._found.set()
        self._may_end.wait(self.finish_seconds)
        if not self._left.wait(self.grace_seconds):
            self._end()

    def _end(self) -> None:
        """The main thread waits for what never comes; nor may this one, in a pipe nobody reads."""
        self._ending = True
        text = f"greenmim: error: {self.cause}; process {self.rank} ends too."
        threading.Thread(
            target=lambda: print(text, file=sys.stderr, flush=True), daemon=True
        ).start()
        if self.rank in self._hung:
            time.sleep(BEAT_SECONDS / 2)
            faulthandler.dump_traceback_later(BEAT_SECONDS / 10, file=2)
        time.sleep(BEAT_SECONDS)
        os._exit(EXIT_PEER)

    def _failed(self) -> str | None:
        if not self.store.check(["failed"]):
            return None
        if self.store.check(["hung"]):
            self._hung = set(map(int, self.store.get("hung").decode().split()))
        return self.store.get("failed").decode()

    def _silent(self, now: float) -> str | None:
        for rank in range(self.size) if self.rank == 0 else (0,):
            key = f"alive/{rank}"
            told = self.store.get(key) if self.store.check([key]) else b""
            if told != self._told.get(rank):
                self._told[rank], self._since[rank] = told, now
            elif told != b"done" and now - self._since[rank] > self.silent_seconds:
                where = told.decode().split()[1:2]
                return self._tell(
                    f"process {rank}{f' on {where[0]}' if where else ''} has not been heard of for"
                    f" {self.silent_seconds:.0f} s: it was killed (out of memory?) or its machine"
                    " is down"
                )
        return None

    def _hanging(self, now: float) -> str | None:
        """In the main process: whether those that are least far have long been where they are."""
        if self.rank != 0 or self.hang_seconds is None:
            return None
        places, hosts = {}, {}
        for rank, told in self._told.items():
            if told in (b"", b"done"):
                return None  # before it starts and after its end
            _, hosts[rank], count, step, phase = told.decode().split(" ", 4)
            places[rank] = (int(count), int(step), phase)
        least = min(places.values())
        if least != self._least[0]:
            self._least = (least, now)
        _, step, phase = least
        if now - self._least[1] <= PHASES[phase] * self.hang_seconds:
            return None
        late = sorted(rank for rank, place in places.items() if place == least)
        self._hung = set(late)
        self.store.set("hung", " ".join(map(str, late)))
        minutes = PHASES[phase] * self.hang_seconds / 60
        where = phase if phase in ("starting", "first update") else f"update {step}, {phase}"
        if len(late) == self.size:
            who = "no process gets on: all have been"
        else:
            names = ", ".join(f"{rank} on {hosts[rank]}" for rank in late)
            who = f"process {names} hangs while the others wait: it has been"
        return self._tell(f"{who} at the same place ({where}) for {minutes:g} min (--hang-minutes)")

    def _tell(self, cause: str) -> str:
        self.store.compare_set("failed", "", cause)
        return cause

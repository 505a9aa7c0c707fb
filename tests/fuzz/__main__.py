"""Read thousands of damaged files, as `python -m tests.fuzz --files 10000 --seed 0`.

What a file may do is to be read, or to be refused in a sentence. It must not raise anything else,
crash the process, run code that is in it, or take much memory or time.
"""

from __future__ import annotations

import argparse
import ctypes
import dataclasses
import json
import os
import random
import resource
import shutil
import signal
import sys
import tempfile
import time
import traceback
from collections import Counter
from collections.abc import Iterator
from pathlib import Path

# Before PyTorch: children are forked, and threads of their parent are none of theirs.
os.environ.update(OMP_NUM_THREADS="1", MKL_NUM_THREADS="1", CUDA_VISIBLE_DEVICES="")

import torch

from greenmim.guards import UserError

from .kinds import KINDS, Kind, Refused
from .mutations import mutations

MOST_BYTES = 3 * 2**28  # of memory that a file may ask for, and of more than before that it may use
MOST_SECONDS = 20
SEEDS = 16  # cases of a child


@dataclasses.dataclass
class Outcome:
    """What came of a file."""

    number: int
    kind: str
    word: str  # "read", "refused", or what must not be
    detail: str = ""
    seconds: float = 0.0

    @property
    def is_finding(self) -> bool:
        return self.word not in ("read", "refused")


class Fuzz:
    """Cases by number: the same for a seed, whichever of them are run."""

    def __init__(self, seed: int, folder: Path, kinds: dict[str, Kind] = KINDS) -> None:
        self.seed, self.folder, self.kinds = seed, folder, kinds
        self.marker = folder / "code_ran"
        self.order = [name for name, kind in kinds.items() for _ in range(kind.share)]
        for name, kind in kinds.items():
            sample = folder / "samples" / name.replace(" ", "_")
            sample.mkdir(parents=True)
            kind.make(sample)

    def prepare(self, number: int) -> tuple[str, Path]:
        """A damaged copy of a sample: its kind and its folder."""
        rng = random.Random(f"{self.seed} {number}")
        name = self.order[number % len(self.order)]
        kind = self.kinds[name]
        case = self.folder / "case"
        shutil.rmtree(case, ignore_errors=True)
        sample = self.folder / "samples" / name.replace(" ", "_")
        shutil.copytree(sample, case, symlinks=True)
        found = sorted(p for p in case.glob(kind.broken) if p.is_file() and not p.is_symlink())
        path = rng.choice(found)
        data = path.read_bytes()
        for _ in range(rng.choice((1, 1, 1, 2, 3))):
            try:
                data = rng.choice(mutations(path, self.marker))(data, rng)
            except Exception:  # what was damaged before is no file of its kind
                data = data[: rng.randrange(len(data) + 1)]
        path.write_bytes(data)
        self.marker.unlink(missing_ok=True)  # to break a file twice may read it as it was trusted
        return name, case

    def run(self, numbers: list[int]) -> Iterator[Outcome]:
        """What comes of these cases; a child that ends before its time is followed by another."""
        left = list(numbers)
        while left:
            reader, writer = os.pipe()
            child = os.fork()
            if child == 0:
                os.close(reader)
                try:
                    self._be_child(left[:SEEDS], writer)
                finally:
                    os._exit(1)
            os.close(writer)
            with open(reader) as lines:
                told = [Outcome(**json.loads(line)) for line in lines]
            status = os.waitpid(child, 0)[1]
            yield from told
            done = len(told)
            if done < min(len(left), SEEDS):
                name = self.order[left[done] % len(self.order)]
                yield Outcome(left[done], name, *_how_it_ended(status))
                done += 1
            left = left[done:]

    def _be_child(self, numbers: list[int], writer: int) -> None:
        silent = os.open(os.devnull, os.O_RDWR)
        for stream in (0, 1, 2):
            os.dup2(silent, stream)
        for number in numbers:
            resource.setrlimit(resource.RLIMIT_AS, (resource.RLIM_INFINITY,) * 2)
            name, case = self.prepare(number)
            used = int(Path("/proc/self/statm").read_text().split()[0]) * resource.getpagesize()
            # The soft limit alone can be raised again.
            resource.setrlimit(resource.RLIMIT_AS, (used + MOST_BYTES, resource.RLIM_INFINITY))
            signal.alarm(MOST_SECONDS)
            begun = time.monotonic()
            outcome = Outcome(number, name, *self._read(self.kinds[name], case))
            outcome.seconds = round(time.monotonic() - begun, 3)
            signal.alarm(0)
            os.write(writer, (json.dumps(dataclasses.asdict(outcome)) + "\n").encode())
        os._exit(0)

    def _read(self, kind: Kind, case: Path) -> tuple[str, str]:
        before = _forgotten_peak()
        begun = time.monotonic()
        try:
            kind.read(case)
            found = "read", ""
        except (UserError, Refused) as error:
            found = "refused", str(error)[:300]
            if not 10 < len(str(error)) < 5000:
                found = "no sentence", repr(str(error)[:300])
        except BaseException:
            trace = traceback.format_exc().strip().splitlines()
            ours = [line.strip() for line in trace if "greenmim" in line]
            found = "raised", f"{trace[-1][:300]} | {' | '.join(ours[-3:])[-500:]}"
        more = _peak() - before
        if self.marker.exists():
            self.marker.unlink()
            return "ran code", found[1]
        if more > MOST_BYTES // 3:
            return "memory", f"{more / 2**20:.0f} MiB more, then {' '.join(found)}"
        if time.monotonic() - begun > MOST_SECONDS / 2:
            return "slow", f"{time.monotonic() - begun:.0f} s, then {' '.join(found)}"
        return found


def _forgotten_peak() -> int:
    """The peak from here on: what was freed before, and kept for later, would hide as much."""
    if hasattr(libc := ctypes.CDLL(None), "malloc_trim"):
        libc.malloc_trim(0)
    Path("/proc/self/clear_refs").write_text("5")
    return _peak()


def _peak() -> int:
    """The most memory that this process had since its peak was forgotten, in bytes."""
    (line,) = (x for x in Path("/proc/self/status").read_text().splitlines() if "VmHWM" in x)
    return int(line.split()[1]) * 1024


def _how_it_ended(status: int) -> tuple[str, str]:
    if os.WIFSIGNALED(status):
        number = os.WTERMSIG(status)
        return ("hangs" if number == signal.SIGALRM else "crashed"), signal.Signals(number).name
    return "ended", f"the process ended with exit code {os.waitstatus_to_exitcode(status)}"


def table(outcomes: list[Outcome]) -> str:
    """Counts by kind and outcome."""
    words = sorted({outcome.word for outcome in outcomes} | {"read", "refused"})
    counts = Counter((outcome.kind, outcome.word) for outcome in outcomes)
    kinds = sorted({outcome.kind for outcome in outcomes})
    rows = [("kind", *words), *((k, *(str(counts[k, w]) for w in words)) for k in kinds)]
    rows.append(("all", *(str(sum(o.word == word for o in outcomes)) for word in words)))
    return "\n".join("  ".join(f"{cell:>13}" for cell in row) for row in rows)


def main() -> int:
    parser = argparse.ArgumentParser(prog="python -m tests.fuzz", description=__doc__)
    parser.add_argument("--files", type=int, default=10_000)
    parser.add_argument("--first", type=int, default=0, help="number of the first case")
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--json", type=Path, help="write what came of every file here")
    parser.add_argument("--keep", type=Path, help="write the last case here, to look at")
    options = parser.parse_args()
    torch.set_num_threads(1)
    begun = time.monotonic()
    outcomes = []
    with tempfile.TemporaryDirectory(prefix="greenmim_fuzz_") as folder:
        fuzz = Fuzz(options.seed, Path(folder))
        for outcome in fuzz.run(list(range(options.first, options.first + options.files))):
            outcomes.append(outcome)
            if outcome.is_finding:
                print(f"seed {options.seed}, file {outcome.number}, {outcome.kind}:"
                      f" {outcome.word}: {outcome.detail}", flush=True)  # fmt: skip
        if options.keep:
            fuzz.prepare(options.first + options.files - 1)
            shutil.copytree(fuzz.folder / "case", options.keep)
    if options.json:
        options.json.write_text(json.dumps([dataclasses.asdict(o) for o in outcomes]))
    print(table(outcomes))
    print(f"{len(outcomes)} files in {time.monotonic() - begun:.0f} s")
    return int(any(outcome.is_finding for outcome in outcomes))


if __name__ == "__main__":
    sys.exit(main())

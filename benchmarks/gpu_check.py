"""Everything that only a GPU can tell, in three commands of five to eight minutes.

    make gpu-check         # build; are the kernels right; a first table of what they cost
    make gpu-check-more    # what failed then; tune, choose; steps, counters, sanitizers
    make gpu-check-steps   # steps of all encoders and variants; the convolution, other shapes; swap

A part is a process, started when those that it waits for have ended, however they ended. Those that
measure nothing run beside each other and beside the build; those that measure run alone. A part may
run until the moment at which it would end if all took their time; then it gets SIGINT, at which
pytest tells what failed so far, and SIGKILL ten seconds later. What it had written stays, and the
table of parts is written anew after each. It needs no network and nothing but torch, triton, timm,
pytest-benchmark, hypothesis and the CUDA toolkit; pytest-xdist is used where it is there.

    make gpu-check ARGS=--dry-run              # what would run, and for how long
    GPU_CHECK_PARTS=stress-triton make gpu-check   # only these
    GPU_CHECK_MINUTES=20 make gpu-check        # more time for each part, where one ran out of it;
                                               # what does not fit into less is left out, and said
    OUT=somewhere make gpu-check               # the results there as well, in two files
"""

from __future__ import annotations

import argparse
import contextlib
import dataclasses
import importlib.util
import io
import json
import os
import pathlib
import re
import shutil
import signal
import subprocess
import sys
import tarfile
import tempfile
import threading
import time
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor

import torch

from . import tables
from .environment import RESULTS, ROOT, describe, driver, first_line, folder_of, write_json

GRACE = 10.0  # seconds from SIGINT to SIGKILL
START = 10.0  # seconds until the first part starts, and for the last lines
# Exit code of a part that had nothing to do, for the reason in its last line.
SKIPPED_CODE = 77
PASSED, FAILED, SKIPPED, NOT_REACHED = "passed", "failed", "skipped", "not reached"
OUT_OF_TIME = "ran out of time"  # earlier files: "failed: ran out of time"
# Files that parts change beside their results.
WRITTEN = (
    "greenmim_kernels/automatic_table.json",
    "greenmim_kernels/_triton/launch_table.json",
)


@dataclasses.dataclass(frozen=True)
class Part:
    """A command of the interpreter.

    Attributes:
        arguments: "{seconds}" and "{minutes}" in them are what it may take but for imports.
        seconds: the most it may take, where those before it took theirs.
        after: those that it waits for.
        needs_gpu: it does nothing without one.
        variables: of its environment.
        nice: it leaves the processor to others, the build, where both want it.
    """

    name: str
    arguments: tuple[str, ...]
    seconds: int
    after: tuple[str, ...] = ()
    needs_gpu: bool = True
    variables: tuple[tuple[str, str], ...] = ()
    nice: bool = False


IMPORTS = 15  # seconds of a part that are for imports and its end
PYTEST = ("-m", "pytest", "-v", "-rfE", "-p", "no:cacheprovider")
WORKERS = ("-n", "6") if importlib.util.find_spec("xdist") else ()
REPORT = "from greenmim.tools.doctor import report; print(report())"
KERNELS = "tests/kernels/test_gpu_kernels.py"
WINDOWS = "tests/kernels/test_gpu_windows.py"
LONG_GROUPS = "tests/kernels/test_gpu_long_groups.py"
PROGRAMS = "tests/kernels/test_cuda_on_gpu.py"
STEPS = ("-m", "benchmarks.steps", "--at-once", "--minutes", "{minutes}", "--problem")
SWAP = ("-m", "benchmarks.swap", "--device", "cuda", "--batch", "64", "--problem")
UNCOMPILED = "cuda-graphed, not compiled"
LESS = "cuda-graphed, pointwise recomputed"  # memory


def build(name: str, module: str, seconds: int) -> Part:
    """A compiled module, in a folder of its own so that all are built at the same time."""
    return Part(
        name,
        ("setup.py", "build_ext", "--inplace", "--build-temp", f"build/{module}"),
        seconds,
        variables=(("MODULES", module), ("USE_CUDA", str(int(module == "_C_cuda")))),
    )


def stress(backend: str, seconds: int, after: tuple[str, ...]) -> Part:
    arguments = ("-m", "tests.kernels.stress", "--backend", backend, "--seconds", "{seconds}")
    return Part(f"stress-{backend}", arguments, seconds, after, nice=True)


BUILDS = (
    # Nothing of ours can be imported without it.
    build("partition", "_C_partition", 30),
    build("build-cuda", "_C_cuda", 120),
    build("build-cpu", "_C", 110),
)
BUILT = ("partition", "build-cuda", "build-cpu")
FIRST = (
    *BUILDS,
    # Triton needs no build: its checks run meanwhile, and compile what comes later.
    stress("triton", 60, ("partition",)),
    Part("conformance", (*PYTEST, PROGRAMS, "-k", "primitive or emulation"), 90, ("partition",),
         nice=True),
    # Drawn shapes are 54 kernels to compile, one after the other.
    Part("tests-triton", (*PYTEST, *WORKERS, "-m", "gpu", KERNELS, "-k", "triton and not drawn"),
         90, ("partition",), nice=True),
    Part("warm", ("-m", "benchmarks.warm", "table"), 90, ("partition",), nice=True),
    Part("environment", ("-c", REPORT), 30, BUILT, needs_gpu=False),
    stress("cuda", 45, BUILT),
    Part("tests-cuda", (*PYTEST, *WORKERS, "-m", "gpu", KERNELS, WINDOWS, "-k", "not triton"), 45,
         (*BUILT, "tests-triton")),
    Part(
        "operators",
        (*PYTEST, "benchmarks", "--selection", "table", "--minutes", "{minutes}"),
        70,
        (*BUILT, "stress-triton", "conformance", "tests-triton", "warm", "environment",
         "stress-cuda", "tests-cuda"),
    ),
    Part("steps", (*STEPS, "base-224", "--variant", "naive", UNCOMPILED, "cuda"), 45,
         ("operators",)),
)  # fmt: skip
SECOND = (
    *BUILDS,
    Part("warm", ("-m", "benchmarks.warm", "tune"), 65, ("partition",), nice=True),
    Part("sanitizer-cuda", (*PYTEST, PROGRAMS, "-k", "sanitizer and not triton or bit"), 65,
         ("partition",), nice=True),
    Part("sanitizer-triton", (*PYTEST, PROGRAMS, "-k", "sanitizer and triton"), 65,
         ("partition",), nice=True),
    Part("windows-triton",
         (*PYTEST, *WORKERS, "-m", "gpu", WINDOWS, "-k", "triton and not every_kind"), 65,
         ("partition",), nice=True),
    # Triton's alone, so it need not wait for the build.
    Part("tune", ("-m", "benchmarks.tune", "--only=-32-16bit", "--minutes", "{minutes}"), 50,
         ("warm", "sanitizer-cuda", "sanitizer-triton", "windows-triton")),
    Part("model", (*PYTEST, *WORKERS, "-m", "gpu", "tests/model", "tests/integrations"), 35,
         (*BUILT, "tune")),
    # Of the launches that were chosen.
    stress("triton", 35, (*BUILT, "tune")),
    Part("choose", ("-m", "benchmarks.choose", "--minutes", "{minutes}"), 25,
         ("model", "stress-triton")),
    Part("steps", (*STEPS, "base-224", "--variant", "naive", "simmim", "cuda-graphed", LESS), 115,
         ("choose",)),
    Part("counters", ("-m", "benchmarks.counters"), 20, ("steps",)),
    Part("steps-512", (*STEPS, "base-512", "--variant", UNCOMPILED, "naive"), 60, ("counters",)),
    # Of programs that were compiled with those of the sanitizer.
    Part("switches", (*PYTEST, PROGRAMS, "-k", "switches_cost"), 15, ("steps-512",)),
    Part("swap", (*SWAP, "timm-swin-b-224"), 30, ("switches",)),
)  # fmt: skip
THIRD = (
    *BUILDS,
    Part("warm", ("-m", "benchmarks.warm", "rest"), 60, ("partition",), nice=True),
    Part("tests-convolution", (*PYTEST, "-m", "gpu", KERNELS, "-k", "conv"), 45, BUILT),
    Part("long-groups-triton", (*PYTEST, *WORKERS, "-m", "gpu", LONG_GROUPS), 60, ("partition",),
         nice=True),
    # Six at once keep sixteen cores busy; of twenty, none was ready after two minutes.
    Part("steps-encoders",
         (*STEPS, "base-224", "swinv2-base-256", "twins-large-224", "--variant", "naive",
          "cuda-graphed"),
         125, ("warm", "tests-convolution", "long-groups-triton")),
    Part("steps",
         (*STEPS, "base-224", "--variant", LESS, "simmim-compiled", UNCOMPILED,
          "naive, planning in the step", "naive, rows spread"),
         100, ("steps-encoders",)),
    Part("operators",
         (*PYTEST, "benchmarks", "--selection", "rest", "--minutes", "{minutes}"), 60,
         ("steps",)),
    Part("swap", (*SWAP, "timm-swin-b-224"), 30, ("operators",)),
)  # fmt: skip
CALLS = {"first": (FIRST, 5.0), "second": (SECOND, 8.0), "third": (THIRD, 8.5)}


_running: set[subprocess.Popen] = set()


def run_part(part: Part, seconds: float, **variables: str) -> dict:
    """Run one part for so long at most; how it ended and the end of what it said."""
    start = time.monotonic()
    inner = max(1.0, seconds - IMPORTS)
    arguments = [text.replace("{seconds}", f"{inner:.0f}").replace("{minutes}", f"{inner / 60:.2f}")
                 for text in part.arguments]  # fmt: skip
    # In a group that can be ended whole; not in a session of its own, which would outlive a caller.
    group = {"process_group": 0} if sys.version_info >= (3, 11) else {"start_new_session": True}
    process = subprocess.Popen(
        [*(("nice",) if part.nice else ()), sys.executable, *arguments],
        cwd=ROOT,
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        text=True,
        errors="replace",
        env={**os.environ, **variables, **dict(part.variables)},
        **group,
    )
    _running.add(process)
    try:
        said, late = _hear(process, seconds)
    finally:
        _running.discard(process)
    lines = said.splitlines()
    state = {0: PASSED, SKIPPED_CODE: f"{SKIPPED}: {lines[-1] if lines else ''}"}
    row = {
        "state": OUT_OF_TIME if late else state.get(process.returncode, FAILED),
        "seconds": round(time.monotonic() - start, 1),
        "said": [_without_folders(line) for line in lines[-80:]],
    }
    found = re.findall(r"(?:FAILED|ERROR) +(\S+::\S+)|(\S+::\S+) +(?:FAILED|ERROR)", said)
    if failed := sorted({one or other for one, other in found}):
        row["failed"] = failed
    found = re.findall(r"PASSED +(\S+::\S+)|(\S+::\S+) +PASSED", said)
    if passed := sorted({one or other for one, other in found}):
        row["passed"] = passed
    return row


def _without_folders(line: str) -> str:
    """What is committed says nothing of where this machine keeps things."""
    for folder in (ROOT, sys.prefix):
        line = line.replace(f"{folder}/", "").replace(str(folder), ".")
    return line


def _hear(process: subprocess.Popen, seconds: float) -> tuple[str, bool]:
    """What it says until its end, and whether it had to be ended, with all that it started."""
    try:
        return process.communicate(timeout=seconds)[0], False
    except subprocess.TimeoutExpired:
        said = ""
    # What it started may not hear the first, and would share the GPU with others.
    for number in (signal.SIGINT, signal.SIGKILL):
        _signal(process, number)
        with contextlib.suppress(subprocess.TimeoutExpired):
            said = process.communicate(timeout=GRACE)[0]
    return said, True


def _signal(process: subprocess.Popen, number: int) -> None:
    with contextlib.suppress(ProcessLookupError):
        os.killpg(process.pid, number)


def check(
    parts: tuple[Part, ...],
    minutes: float,
    has_gpu: bool,
    save: Callable[[dict], None],
    stretch: float = 1.0,
    **variables: str,
) -> dict[str, dict]:
    """Run the parts, each after those it waits for, while there is time.

    Args:
        save: called with the table after each.
        stretch: how many times their seconds the parts may take.
        variables: of the environment.
    """
    begin = time.monotonic()
    end = begin + 60 * minutes - GRACE
    times = plan(parts)
    table = {part.name: {"state": NOT_REACHED} for part in parts}
    ended = {part.name: threading.Event() for part in parts}
    lock = threading.Lock()

    def run(part: Part) -> None:
        for name in part.after:
            if name in ended:
                ended[name].wait()
        left = min(end, begin + stretch * times[part.name][1]) - time.monotonic()
        if part.needs_gpu and not has_gpu:
            row = {"state": f"{NOT_REACHED}: needs a GPU"}
        elif left < min(IMPORTS, part.seconds / 2):
            row = {"state": f"{NOT_REACHED}: no time left"}
        else:
            row = run_part(part, left, **variables)
        with lock:
            table[part.name] = row
            print(f"{part.name:<18}{row['state']}  {row.get('seconds', '')}", flush=True)
            if is_bad(row):
                print("\n".join(row["said"]), flush=True)
            try:
                save(table)
            except Exception as error:  # the next part may still be told
                print(f"the table was not saved: {first_line(error)}", flush=True)

    def run_and_tell(part: Part) -> None:
        try:
            run(part)
        finally:
            ended[part.name].set()

    with ThreadPoolExecutor(len(parts)) as pool:
        try:
            list(pool.map(run_and_tell, parts))
        except BaseException:  # interrupted: it ends what it started, and starts nothing more
            end = begin
            for process in list(_running):
                _signal(process, signal.SIGKILL)
            raise
    return table


def is_bad(row: dict) -> bool:
    """Whether a part of a table failed, or did not come to its end."""
    return row.get("state", "").startswith((FAILED, OUT_OF_TIME))


def again(earlier: dict[str, dict]) -> tuple[Part, ...]:
    """What failed in a first call and does not measure: stress, tests that did not pass."""
    found = []
    for part in FIRST:
        row = earlier.get(part.name, {})
        repeated = part.name.partition("-")[0] in ("stress", "tests", "conformance")
        if not repeated or not is_bad(row):
            continue
        arguments = part.arguments
        if row["state"].endswith(OUT_OF_TIME):  # what it did not reach, too
            arguments = (*arguments, *(f"--deselect={name}" for name in row.get("passed", ())))
        elif failed := row.get("failed"):
            arguments = (*PYTEST, *failed)
        # Beside the build where it does not need it, else after the search, which measures.
        early = part.after == ("partition",)
        after = part.after if early else (*BUILT, "tune")
        found.append(Part(f"{part.name}-again", arguments, 65 if early else 35, after, nice=True))
    return tuple(found)


def parts_of(call: str, earlier: dict[str, dict]) -> tuple[Part, ...]:
    """The parts of a call; the second has what failed in the first, before anything but tuning."""
    parts, _ = CALLS[call]
    if call == "first" or not (repeated := again(earlier)):
        return parts
    early = tuple(part for part in repeated if "tune" not in part.after)
    late = tuple(part for part in repeated if "tune" in part.after)
    found: list[Part] = []
    for part in parts:
        before = {"tune": early, "choose": late}.get(part.name, ())
        names = tuple(one.name for one in before)
        found += [*before, dataclasses.replace(part, after=(*part.after, *names))]
    return tuple(found)


def plan(parts: tuple[Part, ...]) -> dict[str, tuple[float, float]]:
    """From when to when each runs if all take as long as they may."""
    times: dict[str, tuple[float, float]] = {}
    for part in parts:
        start = max((times[name][1] for name in part.after if name in times), default=0.0)
        times[part.name] = start, start + part.seconds
    return times


def chosen(parts: tuple[Part, ...], names: str) -> tuple[Part, ...]:
    """The parts named, with commas between, and the modules that they wait for, also through parts
    that are left out; all if empty.

    Raises:
        ValueError: a name that is not a part.
    """
    wanted = [name for name in names.split(",") if name]
    known = {part.name: part for part in parts}
    if unknown := [name for name in wanted if name not in known]:
        raise ValueError(
            f"GPU_CHECK_PARTS names {', '.join(unknown)}; the parts are {', '.join(known)}"
        )
    needed = set(wanted)
    for part in reversed(parts):  # none waits for a later one
        needed |= set(part.after) if part.name in needed else set()
    builds = [part for part in BUILDS if part.name in needed]
    return tuple(p for p in parts if p.name in wanted or not wanted or p in builds)


def calls_so_far(folder: pathlib.Path) -> dict[str, dict]:
    """The tables of earlier calls on this device."""
    file = folder / "gpu_check.json"
    return json.loads(file.read_text())["calls"] if file.exists() else {}


def first_parts(folder: pathlib.Path) -> dict[str, dict]:
    """The table of the first call on this device, else on any: a fault is one elsewhere too."""
    for one in (folder, *sorted(RESULTS.iterdir())):
        if "first" in (calls := calls_so_far(one)):
            return calls["first"]["parts"]
    return {}


def why_no_gpu() -> str | None:
    """One sentence that says why there is no GPU to check; None if there is one."""
    if torch.cuda.is_available():
        return None
    if torch.version.cuda is None:
        return f"torch {torch.__version__} was built without CUDA: install a CUDA build of it"
    if (number := driver()) is None:
        return "no NVIDIA driver was found: it needs a machine with an NVIDIA GPU"
    return (
        f"torch {torch.__version__} (CUDA {torch.version.cuda}) finds no GPU with driver {number}:"
        " see nvidia-smi, and whether the driver is new enough for this CUDA"
    )


def pack(folder: pathlib.Path, out: pathlib.Path) -> None:
    """The results in one archive, to unpack in the repository's root; the table beside it."""
    out.mkdir(parents=True, exist_ok=True)
    beside = out / "results.tmp"
    found = [*folder.glob("*.json"), *(ROOT / name for name in WRITTEN)]
    with tarfile.open(beside, "w:gz") as archive:
        for file in found:
            content = file.read_bytes()  # whole, whoever replaces the file meanwhile
            entry = tarfile.TarInfo(str(file.relative_to(ROOT)))
            entry.size = len(content)
            archive.addfile(entry, io.BytesIO(content))
    beside.replace(out / "results.tar.gz")
    write_json(out / "gpu_check.json", json.loads((folder / "gpu_check.json").read_text()))


def figures(folder: pathlib.Path) -> str:
    """The tables of what was measured, short enough for the end of a log."""
    from . import predicted  # which needs a module that is not there when the first call starts

    parts = []
    if (file := folder / "operators.json").exists():
        result = json.loads(file.read_text())
        for which in ("forward", "backward", "both"):
            parts.append(f"{which}\n{tables.stages_table(result, which)}")
        parts += [predicted.beside_table(result), tables.reasons_table(result)]
    if (file := folder / "steps.json").exists():
        result = json.loads(file.read_text())
        parts += [tables.steps_table(result), tables.reasons_table(result)]
    return "\n".join(parts)


def main(argv: list[str] | None = None) -> int:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("call", choices=CALLS)
    parser.add_argument("--dry-run", action="store_true", help="say what would run")
    options = parser.parse_args(argv)
    has_gpu = torch.cuda.is_available()
    device = torch.cuda.get_device_name() if has_gpu else "no GPU"
    folder, usual = folder_of(device), CALLS[options.call][1]
    calls = calls_so_far(folder)
    try:
        parts = parts_of(options.call, first_parts(folder))
        parts = chosen(parts, os.environ.get("GPU_CHECK_PARTS", ""))
        minutes = float(os.environ.get("GPU_CHECK_MINUTES", usual))
    except ValueError as error:
        print(f"gpu-check: {error}", file=sys.stderr)
        return 2
    if options.dry_run:
        for name, (begin, finish) in plan(parts).items():
            part = next(part for part in parts if part.name == name)
            words = [word for word in part.arguments if not word.startswith("--deselect")]
            left_out = len(part.arguments) - len(words)
            more = f" (without {left_out} that passed)" if left_out else ""
            print(f"{name:<20}{begin:4.0f} to {finish:3.0f} s  python {' '.join(words)}{more}")
        return 0
    if problem := why_no_gpu():
        print(f"gpu-check: {problem}.", file=sys.stderr)
        return 2
    out = os.environ.get("OUT")

    def save(table: dict) -> None:
        environment = describe(torch.get_num_threads(), "cuda")
        calls[options.call] = {"environment": environment, "parts": table}
        write_json(folder / "gpu_check.json", {"environment": environment, "calls": calls})
        if out:
            pack(folder, pathlib.Path(out))

    # For this GPU alone, which takes a fifth of the time of all architectures.
    variables = {"TORCH_CUDA_ARCH_LIST": ".".join(map(str, torch.cuda.get_device_capability()))}
    if not os.environ.get("CUDA_HOME") and shutil.which("nvcc") is None:
        from torch.utils.cpp_extension import CUDA_HOME  # where toolkits usually are

        variables["CUDA_HOME"] = CUDA_HOME or ""
    programs = tempfile.TemporaryDirectory(prefix="greenmim_programs_")
    variables["GREENMIM_PROGRAMS"] = programs.name
    # Where this runs in the background it may be ignored, and parts would inherit that.
    signal.signal(signal.SIGINT, signal.default_int_handler)
    # Ended, it ends what it started.
    signal.signal(signal.SIGTERM, lambda *_: sys.exit(128 + signal.SIGTERM))
    stretch = max(1.0, minutes / usual)
    table = check(parts, minutes - START / 60, True, save, stretch, **variables)
    print(f"\n{device}, torch {torch.__version__}")
    try:
        print(figures(folder))
    except Exception as error:  # the table of parts is worth more
        print(f"no figures: {first_line(error)}")
    for name, row in table.items():
        print(f"  {name:<20} {row['state']:<28} {row.get('seconds', ''):>8}")
    if any(row["state"].endswith((OUT_OF_TIME, "no time left")) for row in table.values()):
        print(
            f"GPU_CHECK_MINUTES={2 * minutes:.0f} before the same command: more time for each part"
        )
    return int(any(map(is_bad, table.values())))


if __name__ == "__main__":
    sys.exit(main())

"""Everything that only a GPU can tell, in one command: make gpu-check.

Parts run in order of worth, each in a process of its own: first whether the kernels are right,
then what they cost. What a part wrote is kept, and the table of parts is written anew after each,
so that a run cut short leaves what it had. Where the compiled modules do not work with this GPU and
interpreter they are built for it first. It needs no network and nothing but torch, triton, timm,
pytest-benchmark and the CUDA toolkit. Without a GPU the parts are listed and those that need none
run.

    GPU_CHECK_PARTS=conformance,tests make gpu-check    # only these
    GPU_CHECK_MINUTES=20 make gpu-check                 # nine if not given; what does not fit is
                                                        # left out, and said
    OUT=somewhere make gpu-check                        # also copy the results there
"""

from __future__ import annotations

import dataclasses
import os
import pathlib
import shutil
import signal
import subprocess
import sys
import time

import torch

from .environment import ROOT, describe, folder_of, write_json

PYTEST = ("-m", "pytest", "-q", "-rfE", "-p", "no:cacheprovider")


@dataclasses.dataclass(frozen=True)
class Part:
    """A command of the interpreter.

    Attributes:
        seconds: the most it may take.
        needs_gpu: it does nothing without one.
        reserved: seconds that those before it leave to it.
    """

    name: str
    arguments: tuple[str, ...]
    seconds: int
    needs_gpu: bool = True
    reserved: int = 0


REPORT = "from greenmim.tools.doctor import report; print(report())"
ON_GPU = "tests/kernels/test_cuda_on_gpu.py"
PARTS = (
    Part("environment", ("-c", REPORT), 60, needs_gpu=False),
    Part("conformance", (*PYTEST, ON_GPU, "-k", "primitive or emulation"), 120),
    Part("tests", (*PYTEST, "-m", "gpu", "tests/kernels/test_gpu_kernels.py"), 240),
    # The first problem alone is the one of the aims; energy is counted there.
    Part(
        "steps",
        ("-m", "benchmarks.steps", "--problem", "base-224", "--minutes", "3"),
        300,
        reserved=240,
    ),
    Part("operators", (*PYTEST, "benchmarks", "--selection", "default", "--minutes", "2"), 180),
    Part("model", (*PYTEST, "-m", "gpu", "tests/model"), 180),
    Part("sanitizer", (*PYTEST, ON_GPU, "-k", "sanitizer"), 120),
    Part("choose", ("-m", "benchmarks.choose"), 120),
    Part("tune", ("-m", "benchmarks.tune"), 300),
    Part("more-steps", ("-m", "benchmarks.steps", "--others", "--minutes", "8"), 600),
    Part("emulator", (*PYTEST, "tests/kernels/test_cuda_emulated.py", "-x"), 180, needs_gpu=False),
)
BUILD = Part("build", ("setup.py", "build_ext", "--inplace"), 300, needs_gpu=False)
USABLE = """
from greenmim_kernels import available_backends
found = available_backends()
raise SystemExit(found["cuda"] or found["cpp"] or 0)
"""
TRY = Part("try", ("-c", USABLE), 60, needs_gpu=False)
PASSED, FAILED, NOT_REACHED = "passed", "failed", "not reached"


def run_part(part: Part, seconds: float, **variables: str) -> dict:
    """Run one part for so long at most; how it ended and the end of what it said."""
    start = time.monotonic()
    process = subprocess.Popen(
        [sys.executable, *part.arguments],
        cwd=ROOT,
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        text=True,
        errors="replace",
        env={**os.environ, **variables},
        start_new_session=True,
    )
    try:
        said, _ = process.communicate(timeout=max(1.0, min(seconds, part.seconds)))
        state = PASSED if process.returncode == 0 else FAILED
    except subprocess.TimeoutExpired:
        # With what it started, which would share the GPU with the next part.
        os.killpg(process.pid, signal.SIGKILL)
        said, _ = process.communicate()
        state = f"{FAILED}: ran out of time"
    taken = round(time.monotonic() - start, 1)
    return {"state": state, "seconds": taken, "said": said.splitlines()[-40:]}


def is_built() -> bool:
    """Whether the compiled modules work here, tried in a process that can be started anew."""
    return run_part(TRY, TRY.seconds)["state"] == PASSED


def architecture() -> str:
    """Of the GPU, as TORCH_CUDA_ARCH_LIST has it."""
    return ".".join(map(str, torch.cuda.get_device_capability()))


def check(parts: tuple[Part, ...], minutes: float, has_gpu: bool, save) -> dict[str, dict]:
    """Run the parts that fit into the minutes; `save` is called with the table after each."""
    end = time.monotonic() + 60 * minutes
    table = {part.name: {"state": NOT_REACHED} for part in parts}
    for number, part in enumerate(parts):
        kept_back = sum(later.reserved for later in parts[number + 1 :])
        if part.needs_gpu and not has_gpu:
            table[part.name] = {"state": f"{NOT_REACHED}: needs a GPU"}
        elif (left := end - time.monotonic() - kept_back) < 5:
            table[part.name] = {"state": f"{NOT_REACHED}: no time left"}
        else:
            print(f"{part.name} ...", flush=True)
            table[part.name] = run_part(part, left)
            if table[part.name]["state"] != PASSED:
                print("\n".join(table[part.name]["said"]), flush=True)
        save(table)
    return table


def chosen_parts(names: str) -> tuple[Part, ...]:
    """The parts named, with commas between; all if empty.

    Raises:
        ValueError: a name that is not a part.
    """
    wanted = [name for name in names.split(",") if name]
    known = {part.name: part for part in PARTS}
    if unknown := [name for name in wanted if name not in known]:
        raise ValueError(
            f"GPU_CHECK_PARTS names {', '.join(unknown)}; the parts are {', '.join(known)}"
        )
    return tuple(known[name] for name in wanted) if wanted else PARTS


def main() -> int:
    try:
        parts = chosen_parts(os.environ.get("GPU_CHECK_PARTS", ""))
        minutes = float(os.environ.get("GPU_CHECK_MINUTES", "9"))
    except ValueError as error:
        print(f"gpu-check: {error}", file=sys.stderr)
        return 2
    start = time.monotonic()
    has_gpu = torch.cuda.is_available()
    if has_gpu and not is_built():
        print("build ...", flush=True)
        # For this GPU alone, which takes a fifth of the time of all architectures.
        variables = {"TORCH_CUDA_ARCH_LIST": architecture(), **os.environ}
        built = run_part(BUILD, 60 * minutes, **variables)
        if built["state"] != PASSED:  # the other backends may work all the same
            print("\n".join(built["said"]), flush=True)
    minutes -= (time.monotonic() - start) / 60
    device = torch.cuda.get_device_name() if has_gpu else "no GPU"
    environment = {**describe(torch.get_num_threads()), "device": device}
    folder = folder_of(device)
    out = os.environ.get("OUT")

    def save(table: dict) -> None:
        if not has_gpu:
            return  # nothing that is worth a file
        write_json(folder / "gpu_check.json", {"environment": environment, "parts": table})
        if out:
            shutil.copytree(folder, pathlib.Path(out), dirs_exist_ok=True)
            for written in ("greenmim_kernels/automatic_table.json",
                            "greenmim_kernels/_triton/launch_table.json"):  # fmt: skip
                shutil.copy(ROOT / written, out)

    table = check(parts, minutes, has_gpu, save)
    print(f"\n{device}, torch {torch.__version__}, commit {environment['commit']}")
    for name, row in table.items():
        print(f"  {name:<12} {row['state']:<28} {row.get('seconds', ''):>8}")
    return int(any(row["state"].startswith(FAILED) for row in table.values()))


if __name__ == "__main__":
    sys.exit(main())

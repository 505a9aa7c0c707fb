"""Everything that only a GPU can tell, in one command: make gpu-check.

Parts run in order of worth, each in a process of its own: first whether the kernels are right,
then what they cost. What a part wrote is kept, and the table of parts is written anew after each,
so that a run cut short leaves what it had. Where the compiled modules are missing they are built
first. It needs no network and nothing but torch, triton, timm, pytest-benchmark and the CUDA
toolkit. Without a GPU the parts are listed and those that need none run.

    GPU_CHECK_PARTS=conformance,tests make gpu-check    # only these
    GPU_CHECK_MINUTES=20 make gpu-check                 # nine if not given; what does not fit is
                                                        # left out, and said
    OUT=somewhere make gpu-check                        # also copy the results there
"""

from __future__ import annotations

import dataclasses
import importlib.util
import os
import pathlib
import shutil
import subprocess
import sys
import time

import torch

from .environment import ROOT, describe, folder_of, write_json

PYTEST = ("-m", "pytest", "-q", "-rfE", "-p", "no:cacheprovider")


@dataclasses.dataclass(frozen=True)
class Part:
    """A command of the interpreter, the most seconds it may take, and whether it needs a GPU."""

    name: str
    arguments: tuple[str, ...]
    seconds: int
    needs_gpu: bool = True


REPORT = "from greenmim.tools.doctor import report; print(report())"
ON_GPU = "tests/kernels/test_cuda_on_gpu.py"
PARTS = (
    Part("environment", ("-c", REPORT), 60, needs_gpu=False),
    Part("conformance", (*PYTEST, ON_GPU, "-k", "primitive or emulation"), 120),
    Part("tests", (*PYTEST, "-m", "gpu", "tests/kernels/test_gpu_kernels.py"), 240),
    # The first problem alone is the one of the aims; energy is counted there.
    Part("steps", ("-m", "benchmarks.steps", "--problem", "base-224", "--minutes", "3"), 240),
    Part("operators", (*PYTEST, "benchmarks", "--selection", "default", "--minutes", "2"), 180),
    Part("model", (*PYTEST, "-m", "gpu", "tests/model"), 180),
    Part("sanitizer", (*PYTEST, ON_GPU, "-k", "sanitizer"), 120),
    Part("choose", ("-m", "benchmarks.choose"), 120),
    Part("tune", ("-m", "benchmarks.tune"), 300),
    Part("more-steps", ("-m", "benchmarks.steps", "--others", "--minutes", "8"), 600),
    Part("emulator", (*PYTEST, "tests/kernels/test_cuda_emulated.py", "-x"), 180, needs_gpu=False),
)
BUILD = Part("build", ("setup.py", "build_ext", "--inplace"), 300, needs_gpu=False)
PASSED, FAILED, NOT_REACHED = "passed", "failed", "not reached"


def run_part(part: Part, seconds: float) -> dict:
    """Run one part for so long at most; how it ended and the end of what it said."""
    start = time.monotonic()
    try:
        done = subprocess.run(
            [sys.executable, *part.arguments],
            cwd=ROOT,
            stdout=subprocess.PIPE,
            stderr=subprocess.STDOUT,
            text=True,
            timeout=max(1.0, min(seconds, part.seconds)),
        )
        state, said = PASSED if done.returncode == 0 else FAILED, done.stdout
    except subprocess.TimeoutExpired as error:
        said = error.stdout or b""
        said = said.decode(errors="replace") if isinstance(said, bytes) else said
        state = f"{FAILED}: ran out of time"
    taken = round(time.monotonic() - start, 1)
    return {"state": state, "seconds": taken, "said": said.splitlines()[-40:]}


def is_built() -> bool:
    """Whether the compiled modules are there for this interpreter, the one for GPUs included."""
    found = {path.name.split(".")[0] for path in (ROOT / "greenmim_kernels").glob("*.so")}
    if {"_C", "_C_cuda", "_partition"} <= found:
        return True
    try:
        installed = importlib.util.find_spec("greenmim_kernels._C_cuda")
    except ImportError:
        return False
    return installed is not None


def check(parts: tuple[Part, ...], minutes: float, has_gpu: bool, save) -> dict[str, dict]:
    """Run the parts that fit into the minutes; `save` is called with the table after each."""
    end = time.monotonic() + 60 * minutes
    table = {part.name: {"state": NOT_REACHED} for part in parts}
    for part in parts:
        if part.needs_gpu and not has_gpu:
            table[part.name] = {"state": f"{NOT_REACHED}: needs a GPU"}
        elif (left := end - time.monotonic()) < 5:
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
        built = run_part(BUILD, 60 * minutes)
        if built["state"] != PASSED:
            print("\n".join(built["said"]))
            return 1
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

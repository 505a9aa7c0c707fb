"""The CPU module built with the sanitizers of addresses and of undefined behaviour, as a file."""

from __future__ import annotations

import functools
import hashlib
import os
import pathlib
import re
import shutil
import subprocess
import sys
from concurrent.futures import ThreadPoolExecutor

import torch
from filelock import FileLock
from torch.utils import cpp_extension

ROOT = pathlib.Path(__file__).resolve().parents[2]
BUILDS = ROOT / "build" / "tests" / "sanitized_cpu"
CXX = os.environ.get("CXX", "g++")
# Without optimisation: with it, compiling takes five times as long.
FLAGS = ["-std=c++20", "-O0", "-g1", "-fPIC", "-fvisibility=hidden", "-Wno-psabi"]
FLAGS += ["-fsanitize=address,undefined", "-fno-sanitize-recover=undefined"]


@functools.cache
def preload() -> str | None:
    """What a program has to load first; None where there is no compiler or no such library.

    The library of C++ beside the sanitizer's: Python is without, and exceptions would be unknown.
    """
    if shutil.which(CXX) is None:
        return None
    found = [
        subprocess.run([CXX, f"-print-file-name={name}"], capture_output=True, text=True)
        for name in ("libasan.so", "libstdc++.so.6")
    ]
    files = [one.stdout.strip() for one in found]
    return " ".join(files) if all(map(os.path.isabs, files)) else None


def build(root: pathlib.Path = ROOT) -> pathlib.Path:
    """Compile csrc/cpu under `root`. Objects of the same sources are taken from before."""
    abi = re.search(r'STABLE_ABI = "(.+)"', (ROOT / "setup.py").read_text())[1]
    command = [CXX, *FLAGS, abi, "-DTORCH_EXTENSION_NAME=_C"]
    for folder in cpp_extension.include_paths():
        command += ["-isystem", folder]
    headers = hashlib.sha256(repr((command, torch.__version__)).encode())
    for file in sorted([root / "csrc" / "checks.h", *(root / "csrc" / "cpu").glob("*.h")]):
        headers.update(file.name.encode() + file.read_bytes())
    BUILDS.mkdir(parents=True, exist_ok=True)

    def compiled(source: pathlib.Path) -> pathlib.Path:
        contents = headers.copy()
        contents.update(source.name.encode() + source.read_bytes())
        made = BUILDS / f"{source.stem}_{contents.hexdigest()[:20]}.o"
        if not made.exists():
            beside = made.with_suffix(".new")
            subprocess.run([*command, "-c", str(source), "-o", beside], check=True, timeout=600)
            os.replace(beside, made)
        os.utime(made)
        return made

    with FileLock(f"{BUILDS}.lock"):
        with ThreadPoolExecutor(2) as threads:
            objects = list(threads.map(compiled, sorted((root / "csrc" / "cpu").glob("*.cpp"))))
        names = hashlib.sha256(repr(objects).encode()).hexdigest()[:20]
        library = BUILDS / f"_C_{names}.so"
        if not library.exists():
            link = [CXX, "-shared", "-fsanitize=address,undefined", *map(str, objects)]
            link += [f"-L{folder}" for folder in cpp_extension.library_paths()]
            link += ["-ltorch", "-ltorch_cpu", "-lc10", "-o", f"{library}.new"]
            subprocess.run(link, check=True, timeout=600)
            os.replace(f"{library}.new", library)
        os.utime(library)
        for old in sorted(BUILDS.iterdir(), key=os.path.getmtime)[:-24]:
            old.unlink()
    return library


# The package loads its module when it is imported: this one in its place.
_PROGRAM = """
import sys, torch
library, load = sys.argv[1], torch.ops.load_library
def load_ours(path):
    if "_C_cuda" in path:
        raise OSError("not here")
    load(library)
torch.ops.load_library = load_ours
import hostile
hostile.main(library)
"""


def attacked(library: pathlib.Path) -> subprocess.CompletedProcess[str]:
    """hostile.py with that module in a process of its own."""
    environment = {
        **os.environ,
        "LD_PRELOAD": preload(),
        "PYTHONPATH": os.pathsep.join([str(ROOT), str(ROOT / "tests" / "kernels")]),
        "OMP_NUM_THREADS": "1",
        # A limit of the process's memory is none of the sanitizer's, which maps terabytes.
        "ASAN_OPTIONS": "detect_leaks=0:allocator_may_return_null=1:max_allocation_size_mb=4096",
        "UBSAN_OPTIONS": "print_stacktrace=1",
    }
    command = [sys.executable, "-c", _PROGRAM, str(library)]
    return subprocess.run(command, capture_output=True, text=True, env=environment, timeout=600)

"""Memory that is freed is used again without asking the system."""

from __future__ import annotations

import platform
import subprocess
import sys

import pytest

PROGRAM = """
import resource, sys, torch
from greenmim_kernels.host_memory import return_freed_memory, keep_freed_memory
if sys.argv[1] != "default":
    keep_freed_memory()
if sys.argv[1] == "undo":
    return_freed_memory()
def step():  # what a step does: tensors of all sizes, all freed at its end
    kept = [torch.ones(size << 20) for size in (1, 3, 12, 1, 2)]
for _ in range(4):  # the heap grows to what it needs
    step()
before = resource.getrusage(resource.RUSAGE_SELF).ru_minflt
step()
print(resource.getrusage(resource.RUSAGE_SELF).ru_minflt - before)
"""


@pytest.mark.skipif(platform.libc_ver()[0] != "glibc", reason="the setting is glibc's")
def test_a_step_finds_the_memory_of_the_one_before():
    faults = [
        int(subprocess.check_output([sys.executable, "-c", PROGRAM, mode], timeout=120))
        for mode in ("keep", "default", "undo")
    ]
    pages = 19 << 20 >> 10  # of 4 KiB, 76 MiB of float32
    assert faults[0] < 100
    assert faults[1] > pages / 4  # else the setting does nothing here, and can go
    assert faults[2] > pages / 4

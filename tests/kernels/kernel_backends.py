"""Tests of the kernels for a GPU: on one, or Triton's in its interpreter."""

from __future__ import annotations

import dataclasses
import os
import pathlib
import subprocess
import sys

import pytest
import torch

from greenmim_kernels.backends import triton_interprets

INTERPRETED = triton_interprets()
DEVICE = "cpu" if INTERPRETED else "cuda"

if INTERPRETED:
    # pytest puts this file's folder on the path, which does not make it a package.
    from interpreter import repair

    from greenmim_kernels._triton.launch import launch_table

    repair()
    # It takes its time for an operation, whatever the size: test_gpu_long_groups has other sizes.
    LAUNCHES = launch_table(90)
    LAUNCHES |= {
        name: dataclasses.replace(launch, block=64)
        for name, launch in LAUNCHES.items()
        if "-long-" in name
    }


def kernel_test(test):
    """A test that runs kernels: here in the interpreter, else marked for a GPU."""
    return test if INTERPRETED else pytest.mark.gpu(test)


in_the_interpreter = pytest.mark.skipif(
    INTERPRETED or torch.cuda.is_available(), reason="the tests below run in this process"
)


# Parts of the tests, which processes of pytest-xdist run side by side (see tests/conftest). Few, as
# each loads all that the tests need.
SHARES = ("1/2", "2/2")
FILES = ("test_gpu_kernels.py", "test_gpu_windows.py", "test_gpu_long_groups.py")
shares = pytest.mark.parametrize(
    "share", [pytest.param(share, marks=pytest.mark.slow) for share in SHARES]
)


def run_in_the_interpreter(share: str) -> None:
    """Run a share of the tests in a process of their own, as the interpreter needs it."""
    pytest.importorskip("triton")
    here = pathlib.Path(__file__).resolve().parent
    files = [str(here / name) for name in FILES]
    command = [sys.executable, "-m", "pytest", "-q", "-p", "no:cacheprovider", "-x", *files]
    environment = {**os.environ, "TRITON_INTERPRET": "1", "GREENMIM_TEST_SHARE": share}
    done = subprocess.run(
        command, cwd=here.parents[1], env=environment, capture_output=True, text=True, timeout=1800
    )
    assert done.returncode == 0, done.stdout[-4000:]
    assert "passed" in done.stdout

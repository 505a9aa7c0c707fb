"""Every instruction set that this processor has: the tests of its kernels, in a process each."""

from __future__ import annotations

import os
import pathlib
import subprocess
import sys

import pytest

import greenmim_kernels as gk

pytestmark = pytest.mark.skipif(
    gk.available_backends()["cpp"] is not None, reason="no compiled kernels"
)
HERE = pathlib.Path(__file__).parent
TESTS = {
    "test_sparse_conv.py": ("test_agrees_with_the_reference",),
    "test_windows.py": ("test_windows_with_more_queries_than_are_taken_at_once",),
    "test_attention.py": (
        "test_agrees_with_the_reference",
        "test_a_nan_stays_in_its_window",
        "test_large_scores_do_not_overflow",
    ),
    "test_linear.py": (
        "test_gradients_are_the_exact_ones",
        "test_a_layer_is_the_exact_one",
        "test_the_bias_is_summed_in_blocks",
        "test_gelu_and_its_derivative_are_within_their_budget",
        "test_an_mlp_and_its_gradients_are_the_exact_ones",
    ),
}
# Says what it runs with, then runs it.
PROGRAM = """
import sys
import pytest
from greenmim_kernels.backends import cpu_capability
print(cpu_capability(), flush=True)
sys.exit(pytest.main(sys.argv[1:]))
"""


@pytest.mark.slow
@pytest.mark.parametrize("capability", ["default", "avx2", "avx512"])
def test_every_instruction_set_passes(capability):
    environment = {**os.environ, "GREENMIM_CPU_CAPABILITY": capability}
    tests = [f"{HERE / file}::{test}" for file, names in TESTS.items() for test in names]
    command = [sys.executable, "-c", PROGRAM, "-q", "-p", "no:cacheprovider", *tests]
    done = subprocess.run(command, env=environment, capture_output=True, text=True)
    if "does not have" in done.stderr:
        pytest.skip(f"this processor has no {capability}")
    assert done.stdout.partition("\n")[0] == capability, done.stderr[-2000:]
    assert done.returncode == 0, done.stdout[-2000:]

"""The CUDA kernels' primitives against their emulated twins, and compute-sanitizer, on a GPU."""

from __future__ import annotations

import numpy as np
import pytest
import torch
from emulated import Launch, build, build_for_gpu, decode, encode, run, run_binary, toolkit

from greenmim_kernels.testing import Case, make_inputs, relative_error

pytestmark = pytest.mark.gpu

# The last 64 numbers are of the fast exponential and logarithm.
FAST = 64
SMALL_CASES = [
    Case(image_size=(96, 64), batch=3, num_heads=1, shifted=True, dtype=torch.bfloat16),
    Case(
        image_size=(64, 96),
        window_size=14,
        batch=2,
        num_heads=1,
        mask_ratio=0.5,
        dtype=torch.bfloat16,
    ),  # fmt: skip
]


def test_every_primitive_does_what_its_twin_does():
    outputs = []
    for binary in (build("conformance.cu"), build_for_gpu("conformance.cu")):
        done = run_binary([binary])
        assert done.returncode == 0, done.stderr.decode()
        outputs.append(np.frombuffer(done.stdout, dtype=np.uint32))
    emulated, device = outputs
    assert len(device) == len(emulated)
    differ = np.flatnonzero(emulated[:-FAST] != device[:-FAST])
    assert differ.size == 0, f"words {differ[:8]} of the results differ"
    fast = [x[-FAST:].view(np.float32).astype(np.float64) for x in outputs]
    assert fast[1][0] == 0  # two to the power of minus infinity
    np.testing.assert_allclose(fast[1], fast[0], rtol=2**-21, atol=2**-21)


@pytest.mark.parametrize("case", SMALL_CASES, ids=str)
def test_the_kernels_agree_with_their_emulation(case):
    inputs = make_inputs(case)
    device = run(inputs, Launch.of_gpu(), build_for_gpu("attention.cu"))
    for name, value in run(inputs).items():
        assert relative_error(device[name], value) < 0.01, name


@pytest.mark.parametrize("tool", ["memcheck", "racecheck", "initcheck", "synccheck"])
@pytest.mark.parametrize("case", SMALL_CASES, ids=str)
def test_compute_sanitizer_finds_nothing(case, tool):
    command = toolkit("compute-sanitizer")
    if command is None:
        pytest.skip("this machine has no compute-sanitizer")
    inputs, launch = make_inputs(case), Launch.of_gpu()
    done = run_binary(
        [command, "--tool", tool, "--error-exitcode", "9", "--log-file", "/dev/stderr",
         build_for_gpu("attention.cu")],
        encode(inputs, launch),
    )  # fmt: skip
    assert done.returncode == 0, done.stderr.decode(errors="replace")[-4000:]
    assert decode(inputs, launch, done.stdout)["out"].isfinite().all()

"""The CUDA kernels' primitives against their emulated twins, on a GPU, and compute-sanitizer on the
kernels of both backends."""

from __future__ import annotations

import pathlib
import subprocess
import sys
from concurrent.futures import ThreadPoolExecutor

import numpy as np
import pytest
import torch
from conv_cases import conv_agrees, make_conv
from emulated import (
    Launch,
    build,
    build_for_gpu,
    convolve,
    decode,
    decode_conv,
    encode,
    encode_conv,
    run,
    run_binary,
    toolkit,
)
from test_cuda_emulated import agree

from benchmarks.environment import describe, folder_of, write_json
from greenmim_kernels.testing import Case, make_inputs, relative_error

pytestmark = pytest.mark.gpu

# The last numbers are of the fast exponential, logarithm and reciprocal, 32 each.
FAST = 96
# Of the small cases alone: all types and head dims compile for minutes.
ONLY = ("ONLY_HEAD_DIM=32", "ONLY_ELEMENT=1")
TOOLS = ("memcheck", "racecheck", "initcheck", "synccheck")
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
    # More groups hold tokens than are expected; sums of the table in runs.
    Case(image_size=(96, 64), window_size=5, shifted=True, num_heads=1, mask_ratio=0.4,
         group_size=29, dtype=torch.bfloat16),
    Case(stage=3, batch=64, num_heads=1, per_image=True, capacity=True, dtype=torch.bfloat16),
    # Blocks that go over several heads.
    Case(image_size=(96, 64), batch=5, num_heads=3, per_image=True, capacity=True,
         dtype=torch.bfloat16),
]  # fmt: skip


# By pieces of 8 bytes, and by element with a mask per image.
CONVOLUTIONS = [
    make_conv(132, (12, 8), batch=9, dtype=torch.bfloat16),
    make_conv(7, batch=9, dtype=torch.float32, per_image=True),
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
    # Two to the power of minus infinity, its inverse, and what a row without a probability takes.
    assert list(fast[1][::32]) == [0, -np.inf, np.inf]
    np.testing.assert_allclose(fast[1], fast[0], rtol=2**-21, atol=2**-21)


@pytest.mark.parametrize("case", SMALL_CASES, ids=str)
def test_the_kernels_agree_with_their_emulation(case):
    inputs = make_inputs(case)
    device = run(inputs, Launch.of_gpu(), build_for_gpu("attention.cu", *ONLY))
    emulated = run(inputs, binary=build("attention.cu", "plain", *ONLY))
    agree(device, inputs, case)  # the error budget
    for name, value in emulated.items():
        assert relative_error(device[name], value) < 0.01, name


@pytest.mark.parametrize("inputs", CONVOLUTIONS, ids=["wide", "narrow"])
def test_the_convolution_agrees_with_its_emulation(inputs):
    processors = Launch.of_gpu().processors
    device = convolve(inputs, processors=processors, binary=build_for_gpu("conv.cu"))
    conv_agrees(device, inputs)
    for name, value in convolve(inputs, processors=processors).items():
        assert relative_error(device[name], value) < 0.01, name


# What csrc/cuda/primitives.cuh leaves to try: a macro, and the percentage of shared memory.
NO_PREFETCH = ("GREENMIM_L2_PREFETCH=0",)
SWITCHES = {
    "as shipped": ((), "-1"),
    "nothing more into the second cache": (NO_PREFETCH, "-1"),
    "all memory shared": ((), "100"),
    "both": (NO_PREFETCH, "100"),
}


def test_the_switches_change_no_bit():
    inputs, launch = make_inputs(SMALL_CASES[0]), Launch.of_gpu()
    shipped, other = (
        run(inputs, launch, build_for_gpu("attention.cu", *ONLY, *more))
        for more in ((), NO_PREFETCH)
    )
    for name, value in other.items():
        assert torch.equal(value, shipped[name]), name


def test_what_the_switches_cost():
    """Their times are written, for a person to choose by."""
    environment = describe(torch.get_num_threads(), "cuda")
    file = folder_of(environment["device"]) / "cuda_switches.json"
    times: dict[str, dict[str, list[float]]] = {name: {} for name in SWITCHES}
    for stage, heads in ((1, 4), (2, 8)):
        case = Case(stage=stage, num_heads=heads, batch=128, capacity=True, dtype=torch.bfloat16)
        data = encode(make_inputs(case), Launch.of_gpu())
        for _ in range(2):  # in turns, so that a slow period is nobody's alone
            for name, (more, percent) in SWITCHES.items():
                command = [build_for_gpu("attention.cu", *ONLY, *more), "time", percent]
                done = run_binary(command, data)
                assert done.returncode == 0, done.stderr.decode()
                for which, line in zip(("forward", "backward"), done.stdout.split(), strict=True):
                    rows = times[name].setdefault(f"stage {stage} {which}", [])
                    rows.append(float(line))
                write_json(file, {"environment": environment, "microseconds": times})


def sanitized(tool: str, command: list, data: bytes = b"") -> bytes:
    """What a command prints under a tool of compute-sanitizer, which finds nothing."""
    sanitizer = toolkit("compute-sanitizer")
    options = ["--tool", tool, "--error-exitcode", "9", "--log-file", "/dev/stderr"]
    done = run_binary([sanitizer, *options, *command], data)
    assert done.returncode == 0, f"{tool}: {done.stderr.decode(errors='replace')[-4000:]}"
    return done.stdout


@pytest.mark.skipif(toolkit("compute-sanitizer") is None, reason="there is no compute-sanitizer")
@pytest.mark.parametrize("case", SMALL_CASES, ids=str)
def test_compute_sanitizer_finds_nothing(case):
    inputs, launch = make_inputs(case), Launch.of_gpu()
    command, data = [build_for_gpu("attention.cu", *ONLY)], encode(inputs, launch)
    with ThreadPoolExecutor() as pool:
        for out in pool.map(lambda tool: sanitized(tool, command, data), TOOLS):
            assert decode(inputs, launch, out)["out"].isfinite().all()


@pytest.mark.skipif(toolkit("compute-sanitizer") is None, reason="there is no compute-sanitizer")
@pytest.mark.parametrize("inputs", CONVOLUTIONS, ids=["wide", "narrow"])
def test_compute_sanitizer_finds_nothing_in_the_convolution(inputs):
    command = [build_for_gpu("conv.cu")]
    data = encode_conv(inputs, 0, Launch.of_gpu().processors)
    with ThreadPoolExecutor() as pool:
        for out in pool.map(lambda tool: sanitized(tool, command, data), TOOLS):
            assert all(value.isfinite().all() for value in decode_conv(inputs, out).values())


# Both cases, once each; memory of PyTorch's own pool would hide what is read beside a tensor.
TRITON = f"""
import sys
sys.path.insert(0, {str(pathlib.Path(__file__).parent)!r})
from test_cuda_on_gpu import SMALL_CASES
import greenmim_kernels as gk
from greenmim_kernels.testing import make_inputs, run
with gk.use_backend("triton"):
    assert all(run(make_inputs(c, device="cuda"))["out"].isfinite().all() for c in SMALL_CASES)
"""


@pytest.mark.skipif(toolkit("compute-sanitizer") is None, reason="there is no compute-sanitizer")
def test_compute_sanitizer_finds_nothing_in_triton_s_kernels(monkeypatch):
    monkeypatch.setenv("PYTORCH_NO_CUDA_MEMORY_CACHING", "1")
    command = [sys.executable, "-c", TRITON]
    subprocess.run(command, check=True)  # compiled once, before all tools ask for it
    # PyTorch asks the driver for what it may not have, which is no error of a kernel.
    quiet = ["--report-api-errors", "no", *command]
    with ThreadPoolExecutor() as pool:
        list(pool.map(lambda tool: sanitized(tool, quiet), TOOLS[:2]))

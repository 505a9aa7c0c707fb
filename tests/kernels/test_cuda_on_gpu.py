"""The CUDA kernels' primitives against their emulated twins, and compute-sanitizer, on a GPU."""

from __future__ import annotations

from concurrent.futures import ThreadPoolExecutor

import numpy as np
import pytest
import torch
from emulated import Launch, build, build_for_gpu, decode, encode, run, run_binary, toolkit

from benchmarks.environment import describe, folder_of, write_json
from greenmim_kernels.testing import Case, make_inputs, relative_error

pytestmark = pytest.mark.gpu

# The last numbers are of the fast exponential, logarithm and reciprocal, 32 each.
FAST = 96
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
    # Two to the power of minus infinity, its inverse, and what a row without a probability takes.
    assert list(fast[1][::32]) == [0, -np.inf, np.inf]
    np.testing.assert_allclose(fast[1], fast[0], rtol=2**-21, atol=2**-21)


@pytest.mark.parametrize("case", SMALL_CASES, ids=str)
def test_the_kernels_agree_with_their_emulation(case):
    inputs = make_inputs(case)
    device = run(inputs, Launch.of_gpu(), build_for_gpu("attention.cu"))
    for name, value in run(inputs).items():
        assert relative_error(device[name], value) < 0.01, name


# What a build may try (csrc/cuda/primitives.cuh).
SWITCHES = {
    "as shipped": (),
    "128 bytes into the second cache": ("GREENMIM_L2_PREFETCH=128",),
    "all memory shared": ("GREENMIM_SHARED_CARVEOUT=100",),
    "both": ("GREENMIM_L2_PREFETCH=128", "GREENMIM_SHARED_CARVEOUT=100"),
}


def test_what_the_switches_of_a_build_cost():
    """They change no bit; their times are written, for a person to choose by."""
    only = ("ONLY_HEAD_DIM=32", "ONLY_ELEMENT=1")
    with ThreadPoolExecutor() as pool:
        built = dict(
            zip(
                SWITCHES,
                pool.map(lambda d: build_for_gpu("attention.cu", *only, *d), SWITCHES.values()),
                strict=True,
            )
        )
    small, launch = make_inputs(SMALL_CASES[0]), Launch.of_gpu()
    shipped = run(small, launch, built["as shipped"])
    for name, binary in built.items():
        for key, value in run(small, launch, binary).items():
            assert torch.equal(value, shipped[key]), f"{name}: {key}"
    times: dict[str, dict[str, list[float]]] = {name: {} for name in SWITCHES}
    for stage, heads in ((1, 4), (2, 8)):
        case = Case(stage=stage, num_heads=heads, batch=128, shifted=True, dtype=torch.bfloat16)
        data = encode(make_inputs(case), launch)
        for _ in range(3):  # in turns, so that a slow period is nobody's alone
            for name, binary in built.items():
                done = run_binary([binary, "time"], data)
                assert done.returncode == 0, done.stderr.decode()
                for which, line in zip(("forward", "backward"), done.stdout.split(), strict=True):
                    rows = times[name].setdefault(f"stage {stage} {which} us", [])
                    rows.append(float(line))
    device = torch.cuda.get_device_name()
    write_json(
        folder_of(device) / "cuda_switches.json",
        {"environment": describe(torch.get_num_threads(), "cuda"), "microseconds": times},
    )


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

"""Every shipped launch compiled ahead of time for three architectures, without a GPU.

The figures stand in a committed file, so that a change in registers shows in a diff:
`python -m greenmim_kernels._triton.ahead_of_time` rewrites it.
"""

from __future__ import annotations

import json

import pytest

pytest.importorskip("triton")

from greenmim_kernels.backends import triton_interprets

if triton_interprets():
    pytest.skip("the interpreter compiles nothing", allow_module_level=True)

from greenmim_kernels._triton import ahead_of_time
from greenmim_kernels._triton.launch import HEAD_DIMS, LARGEST_BACKWARD_TILE, launch_table

COMMITTED = json.loads(ahead_of_time.FIGURES.read_text())


@pytest.fixture(scope="module")
def figures() -> dict[str, dict[str, dict[str, int]]]:
    version = ahead_of_time.triton.__version__
    if version != COMMITTED["triton"]:
        # Another compiler allocates other registers; what is gated is the one we measured.
        pytest.skip(f"the figures are of triton {COMMITTED['triton']}, this is {version}")
    return ahead_of_time.compile_all()


def test_the_table_has_every_class_and_is_not_long():
    table = launch_table()
    assert len(table) <= 60
    for precision in ("16bit", "fp32"):
        for head_dim in HEAD_DIMS:
            names = [f"fwd-{tile}-{head_dim}-{precision}" for tile in (16, 32, 64, "long")]
            for kernel in ("bwd_query", "bwd_key", "bwd_table"):
                names.append(f"{kernel}-long-{head_dim}-{precision}")
            largest = LARGEST_BACKWARD_TILE[precision][head_dim]
            names += [
                f"bwd-{tile}-{head_dim}-{precision}" for tile in (16, 32, 64) if tile <= largest
            ]
            assert set(names) <= set(table)


def test_no_spills_wide_loads_and_room_in_shared_memory(figures):
    for name, by_architecture in figures.items():
        _, _, head_dim, precision = name.split("-")
        for architecture, found in by_architecture.items():
            where = f"{name} on sm_{architecture}: {found}"
            assert found["shared_bytes"] <= ahead_of_time.SHARED_LIMIT[int(architecture)], where
            assert found["loads_16_bytes"] > 0, where
            if precision == "16bit":
                assert found["tensor_core"] > 0, where
            if precision == "16bit" or head_dim != "64":
                assert found["spill_loads"] == found["spill_stores"] == 0, where


def test_the_committed_figures_are_these(figures):
    assert COMMITTED["launches"] == figures, f"rewrite {ahead_of_time.FIGURES}"


@pytest.mark.parametrize("flag", ["GATHERED", "PER_IMAGE", "HAS_TABLE", "NEED_QKV", "NEED_TABLE"])
def test_the_variants_that_are_not_in_the_figures_compile(flag):
    """The interpreter does not check types; the compiler does."""
    names = [name for name in launch_table() if name.endswith("-32-16bit")]
    kernels = {name.split("-")[0] + str("long" in name): name for name in names}
    for name in kernels.values():
        flipped = flag in ("GATHERED", "PER_IMAGE")
        assert ahead_of_time.compile_launch(name, 90, **{flag: flipped}).asm["cubin"]


@pytest.mark.parametrize("scatter", [False, True])
@pytest.mark.parametrize("per_image", [False, True])
def test_gather_and_scatter_compile(scatter, per_image):
    found = ahead_of_time.inspect(
        ahead_of_time.compile_copy(90, SCATTER=scatter, PER_IMAGE=per_image)
    )
    assert found["spill_loads"] == 0 and found["shared_bytes"] <= ahead_of_time.SHARED_LIMIT[90]

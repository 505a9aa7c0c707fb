"""The compiled CUDA module, read without a GPU: registers, spills, instructions, ABI."""

from __future__ import annotations

import json
import math
import re
import subprocess
import sys

import cuda_binary
import emulated
import pytest
import torch
from emulated import LARGE, MIDDLE, SMALL, images_per_block, plan

from greenmim_kernels._triton import machine_code
from greenmim_kernels.testing import Case, make_partition

COMMITTED = json.loads(cuda_binary.FIGURES.read_text())
MOST_THREADS = 128  # of a block of attention, and of the convolution
REGISTERS = 64 * 1024  # of a multiprocessor, on every architecture
EXPERIMENTS = sorted((emulated.ROOT / "benchmarks" / "experiments").glob("*.patch"))

binary = cuda_binary.module()
needs_module = pytest.mark.skipif(
    binary is None or cuda_binary.cuobjdump() is None,
    reason="the CUDA module was not built here, or there is no cuobjdump",
)


@pytest.fixture(scope="module")
def figures(remembered):
    read_by = (binary, cuda_binary.__file__, machine_code.__file__)
    tool = cuda_binary.cuobjdump()
    return remembered("cuda", read_by, lambda: cuda_binary.figures(binary, tool), tool)


@needs_module
def test_every_kernel_is_there_for_every_architecture(figures):
    architectures = {arch for rows in COMMITTED["kernels"].values() for arch in rows}
    assert {"80", "86", "90", "100", "120"} <= architectures
    assert set(figures) == set(COMMITTED["kernels"])
    for dtype in ("bfloat16", "float16", "float32"):
        for head_dim in (16, 32, 64):
            assert f"attention_forward-{dtype}-{head_dim}-short" in figures
            assert f"attention_backward_long-{dtype}-{head_dim}" in figures
        for width in (1, 2 if dtype == "float32" else 4):
            assert f"sparse_depthwise_conv-{dtype}-{width}" in figures
            assert f"sparse_depthwise_conv-{dtype}-{width}-backward" in figures
    built = {arch for rows in figures.values() for arch in rows}
    for name, rows in figures.items():
        assert set(rows) == built, name
        read = {arch for arch, found in rows.items() if "instructions" in found}
        assert read == (built & set(cuda_binary.READ) or built), name


def blocks_of_forward(architecture: int, name: str) -> int:
    """What `forward_blocks` of attention_forward.cuh says."""
    if architecture == 90:
        return 4
    return 3 if architecture > 90 or "long" in name or "over-heads" in name else 4


@needs_module
def test_no_spills_tensor_cores_and_wide_accesses(figures):
    for name, rows in figures.items():
        for architecture, found in rows.items():
            where = f"{name} on sm_{architecture}: {found}"
            assert found["stack_bytes"] == found.get("spills", 0) == 0, where
            if name.startswith("attention"):
                # A launch with too many registers for its threads would fail.
                assert found["registers"] * MOST_THREADS <= REGISTERS, where
                if re.match(r"attention_forward-b?float16-(16|32)-", name):
                    blocks = blocks_of_forward(int(architecture), name)
                    assert blocks * found["registers"] * MOST_THREADS <= REGISTERS, where
                if re.match(r"attention_backward-", name):  # of short groups: two blocks
                    assert 2 * found["registers"] * MOST_THREADS <= REGISTERS, where
            if name.startswith("sparse_depthwise_conv"):
                blocks = 4 if name.endswith("backward") else 5
                assert blocks * found["registers"] * MOST_THREADS <= REGISTERS, where
            if "instructions" not in found:
                continue
            if name.startswith(("attention", "row_copy-16bytes")):
                assert found["reads_16_bytes"] > 0 and found["writes_16_bytes"] > 0, where
            if name.startswith("attention"):
                assert (found["tensor_core"] > 0) == ("float32" not in name), where


@needs_module
def test_what_starts_early_waits_before_it_touches_memory(figures):
    """The sums of the table's gradient, launched while the kernel that leaves them ends."""
    for name, rows in figures.items():
        for architecture, found in rows.items():
            if "instructions" not in found:
                continue
            has_it = int(architecture) >= 90
            starts_early = name.startswith("table_gradient")
            where = f"{name} on sm_{architecture}"
            assert (found["waits_for_last"] > 0) == (has_it and starts_early), where
            if has_it and starts_early:
                assert found["first_access"] == "ACQBULK", where
            lets_start = starts_early or "backward" in name
            assert (found["lets_next_start"] > 0) == (has_it and lets_start), where


@needs_module
def test_the_committed_figures_are_these(figures):
    if cuda_binary.compiler() != COMMITTED["nvcc"]:
        # Another compiler allocates other registers; what is gated above holds for it too.
        pytest.skip(f"the figures are of nvcc {COMMITTED['nvcc']}, not {cuda_binary.compiler()}")
    rewrite = "run python tests/kernels/cuda_binary.py and look at the diff"
    for name, rows in figures.items():
        for architecture, found in rows.items():
            # Of one that is not in READ and was built alone, there is more.
            committed = COMMITTED["kernels"][name].get(architecture, found)
            assert found == {**found, **committed}, rewrite


def test_shared_memory_is_as_committed_and_fits():
    found = cuda_binary.shared_memory()
    assert found == COMMITTED["shared_memory"]
    for problem, row in found.items():
        limit = int(problem.rsplit("of", 1)[1])
        assert max(row["forward"], row["backward"]) <= limit, problem


@pytest.mark.parametrize("head_dim", [16, 32, 64])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("slots", [1, 16, 17, 64, 65, 256, 1000, 3136])
@pytest.mark.parametrize("per_image", [False, True])
def test_every_group_of_a_window_up_to_16_has_a_launch(per_image, slots, dtype, head_dim):
    """Also on GPUs with the least shared memory that the kernels run on."""
    for limit in (LARGE, SMALL):
        for row in plan(dtype, head_dim, slots, 16, limit, per_image):
            assert row["fits"] and row["shared_bytes"] <= limit
            assert 1 <= row["strips"] <= 4 and 1 <= row["share"]


H200, A100, RTX_A4000 = (LARGE, 132), (MIDDLE, 108), (SMALL, 48)


# Forward and backward, at batch 128: blocks that share the groups, and the heads that each takes.
@pytest.mark.parametrize(
    ("gpu", "stage", "heads", "expected"),
    [
        (H200, 1, 4, [(264, 4), (264, 4)]),
        (H200, 2, 8, [(132, 4), (132, 4)]),
        (H200, 3, 16, [(132, 8), (132, 8)]),
        (H200, 4, 32, [(128, 16), (128, 16)]),
        # Here two blocks fit with the sums of a head each, and no more.
        (A100, 1, 4, [(216, 4), (54, 1)]),
        (A100, 3, 16, [(216, 16), (216, 16)]),
        # Here one does.
        (RTX_A4000, 1, 4, [(96, 4), (48, 4)]),
    ],
)
def test_what_blocks_of_swin_b_go_over_with_a_mask_per_image(gpu, stage, heads, expected):
    limit, processors = gpu
    part = make_partition(Case(stage=stage))
    problem = (torch.bfloat16, 32, part.group_size, 7, limit, True, 128, part.num_tokens, heads)
    rows = plan(*problem, processors)
    assert [(row["share"], row["block_heads"]) for row in rows] == expected
    for row in rows:
        runs = math.ceil(heads / row["block_heads"])
        resident = 2 if 2 * (row["shared_bytes"] + 1024) <= limit + 1024 else 1
        assert row["over_heads"] and row["share"] * runs <= resident * processors


def test_more_runs_of_heads_than_places():
    """A processor that holds two blocks: others would wait for a place."""
    for heads in (5, 12):
        for row in plan(torch.bfloat16, 32, 16, 7, LARGE, True, 8, 16, heads, 1):
            assert row["share"] * math.ceil(heads / row["block_heads"]) <= 2


def test_where_blocks_do_not_go_over_heads():
    def both(*problem):
        return [row["over_heads"] for row in plan(*problem)]

    assert both(torch.bfloat16, 32, 64, 7, LARGE, True) == [True, True]
    assert both(torch.bfloat16, 64, 64, 7, LARGE, True) == [True, False]  # no short backward
    assert both(torch.bfloat16, 32, 64, 7, LARGE, False) == [False, False]
    assert both(torch.float32, 32, 64, 7, LARGE, True) == [False, False]
    assert both(torch.bfloat16, 32, 208, 14, LARGE, True) == [False, False]  # long groups


@pytest.mark.parametrize("batch", [1, 64, 128, 256])
def test_how_many_images_a_block_of_swin_b_goes_over(batch):
    """On 132 processors that hold 2 blocks (backward), 3 (forward), or 8 (of a single strip)."""
    for stage, heads in ((1, 4), (2, 8), (3, 16), (4, 32)):
        for shifted in (False, True):
            part = make_partition(Case(stage=stage, shifted=shifted))
            blocks = heads * part.num_groups
            for places in (2 * 132, 3 * 132, 8 * 132):
                # For every number of images: blocks, waves, and what they cost. A block's setup is
                # worth three images.
                launched = [blocks * math.ceil(batch / n) for n in range(1, batch + 1)]
                waves = [math.ceil(n / places) for n in launched]
                costs = [w * (3 + n) for n, w in enumerate(waves, 1)]
                images = images_per_block(batch, blocks, places)
                where = f"stage {stage}, {blocks} blocks in {places} places: {images} images"
                assert costs[images - 1] == min(costs), where
                # Few images a block only where more would leave places empty.
                assert images >= 8 or waves[images - 1] == 1, where
                # At least two thirds of the places are taken, or every image has its own blocks.
                used = launched[images - 1] / (waves[images - 1] * places)
                assert used > 2 / 3 or images == 1, where


def test_how_many_images_a_block_of_stage_1_goes_over():
    # 4 heads of 13 groups: five runs of images fill 264 places, and a sixth would wait for a second
    # wave.
    assert [images_per_block(n, 52, 264) for n in (64, 128, 256)] == [13, 26, 52]


@pytest.mark.skipif(not (emulated.ROOT / ".git").exists(), reason="this is no clone")
@pytest.mark.parametrize("patch", EXPERIMENTS, ids=lambda path: path.stem)
def test_what_is_to_be_tried_on_a_gpu_fits_these_sources(patch):
    """Patches that change kernels: whoever has a GPU has no time to mend them."""
    subprocess.run(["git", "apply", "--check", str(patch)], cwd=emulated.ROOT, check=True)


@pytest.mark.skipif(emulated.toolkit("nvcc") is None, reason="there is no nvcc")
def test_the_kernels_are_c_plus_plus_17(tmp_path):
    """As which torch 2.11 compiles extensions, and newer ones do not."""
    source = tmp_path / "headers.cu"
    folder = emulated.ROOT / "csrc" / "cuda"
    names = ("attention_launch.cuh", "attention_type.cuh", "group_gather.cuh", "table_gradient.cuh",
             "sparse_depthwise_conv.cuh")  # fmt: skip
    lines = [f'#include "{folder / name}"' for name in names]
    # What is a template is only read; launches of the table's sum and a convolution are compiled.
    lines.append("auto* launches = &greenmim::cuda::run_table_gradient;")
    lines.append("auto* convolves = &greenmim::cuda::launch_conv<greenmim::cuda::float16, true>;")
    source.write_text("\n".join(lines) + "\n")
    command = [emulated.toolkit("nvcc"), "-std=c++17", "--expt-relaxed-constexpr", "-arch=sm_90"]
    command += ["-ptx", str(source), "-o", str(tmp_path / "headers.ptx")]
    done = subprocess.run(command, capture_output=True)
    assert done.returncode == 0, done.stderr.decode()


@pytest.mark.skipif(sys.version_info < (3, 11), reason="torch-abi-audit needs Python 3.11")
@pytest.mark.parametrize("name", ["_C", "_C_cuda"])
def test_the_binaries_use_the_stable_abi_of_torch_2_11(name):
    file = next(binary.parent.glob(f"{name}.*so"), None) if binary else None
    if file is None:
        pytest.skip(f"{name} was not built here")
    command = [sys.executable, "-m", "torch_abi_audit.cli", str(file), "--json"]
    done = subprocess.run(command, capture_output=True, text=True, check=True)
    (found,) = json.loads(done.stdout)["bundled_libs"]
    assert found["torch"]["uses_torch"] and found["torch"]["stable"], found
    assert found["torch"]["unstable_symbols"] == []
    assert found["torch"]["min_torch_version"] == "2.11.0"

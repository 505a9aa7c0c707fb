"""What every shipped launch is compiled to, for three architectures, without a GPU.

The figures stand in a committed file, by version of Triton, so that a change in registers shows in
a diff: `python -m greenmim_kernels._triton.ahead_of_time` rewrites those of the version at hand.
"""

from __future__ import annotations

import dataclasses
import json
import os
import pathlib
import re
import shutil

import pytest
import torch

pytest.importorskip("triton")

from greenmim_kernels.backends import triton_interprets

if triton_interprets():
    pytest.skip("the interpreter compiles nothing", allow_module_level=True)

import triton
from triton.backends.compiler import GPUTarget
from triton.compiler import make_backend
from triton.runtime.jit import create_function_from_signature

import greenmim_kernels as gk
from greenmim_kernels._triton import ahead_of_time, long_groups, operators, table_gradient
from greenmim_kernels._triton import launch as launches_of
from greenmim_kernels._triton.launch import (
    HEAD_DIMS,
    LARGEST_BACKWARD_TILE,
    SETUP_IMAGES,
    images_per_program,
    launch_table,
    resident,
    write_json,
)
from greenmim_kernels._triton.machine_code import (
    instructions,
    loop_length,
    overwritten_operands,
    product_loops,
    proxy_fence,
)
from greenmim_kernels.ops import SCHEMAS
from greenmim_kernels.testing import Case, make_inputs, operator_arguments, visible_tokens

COMMITTED = ahead_of_time.committed_figures()
LAUNCHES = [
    pytest.param(version, name, by_architecture, id=f"{version}-{name}")
    for version, figures in COMMITTED.items()
    for name, by_architecture in figures["launches"].items()
]
# One launch of each kernel: the largest tile of a Swin.
COMPILED = [n for n in launch_table(90) if re.search("-(64|long)-32-16bit$", n)]


def test_the_table_has_every_class_and_is_not_long():
    table = launch_table(90)
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


def test_blocks_of_long_groups_are_tiles_of_the_expanded_bias():
    for architecture in (80, 90):
        for name, launch in launch_table(architecture).items():
            if "-long-" in name:
                assert launch.block <= long_groups.LARGEST_TILE.value, name
                assert launch.block % long_groups.ALIGNMENT.value == 0, name


def test_devices_without_wide_products_share_launches():
    """sm_120 has neither wgmma nor tcgen05; its launches are those of sm_80."""
    older, newer = launch_table(80), launch_table(90)
    assert older != newer
    assert all(launch_table(architecture) == older for architecture in (86, 89, 120, 121))
    assert all(launch_table(architecture) == newer for architecture in (100, 103, 110))


def test_launches_of_sm_120_leave_those_of_sm_90(tmp_path, monkeypatch):
    file = tmp_path / "table.json"
    shipped = dataclasses.asdict(launch_table(90)["fwd-64-64-fp32"])
    file.write_text(json.dumps({"fwd-64-64-fp32": shipped}))
    monkeypatch.setattr(launches_of, "TABLE", file)
    found = launches_of.Launch(**{**shipped, "stages": 7})
    launch_table.cache_clear()
    try:
        launches_of.save({"fwd-64-64-fp32": found}, 120)
    finally:
        launch_table.cache_clear()
    expected = {"fwd-64-64-fp32": shipped, "fwd-64-64-fp32@80": dataclasses.asdict(found)}
    assert json.loads(file.read_text()) == expected


def test_two_processes_write_a_file_beside_files_of_their_own(tmp_path, monkeypatch):
    file, beside = tmp_path / "table.json", []
    replace = pathlib.Path.replace

    def record(self, target):
        beside.append(self)
        return replace(self, target)

    monkeypatch.setattr(pathlib.Path, "replace", record)
    for process in (1, 2):
        monkeypatch.setattr(os, "getpid", lambda process=process: process)
        write_json(file, {"process": process})
        assert json.loads(file.read_text()) == {"process": process}
    assert len(set(beside)) == 2 and list(tmp_path.iterdir()) == [file]


def test_figures_of_both_versions_are_committed():
    assert set(COMMITTED) == {"3.6.0", "3.8.0"}
    for version, figures in COMMITTED.items():
        assert set(figures["launches"]) == set(launch_table(90))
        rewrite = f"run python -m {ahead_of_time.__name__} with triton {version}"
        assert figures["sources"] == ahead_of_time.sources_digest(), rewrite


@pytest.mark.parametrize(("version", "name", "by_architecture"), LAUNCHES)
def test_no_spills_wide_loads_room_and_no_overwritten_operand(version, name, by_architecture):
    _, tile, head_dim, precision = name.split("-")
    assert set(by_architecture) == {str(a) for a in ahead_of_time.ARCHITECTURES}
    for architecture, found in by_architecture.items():
        where = f"sm_{architecture}: {found}"
        assert found["shared_bytes"] <= ahead_of_time.SHARED_LIMIT[int(architecture)], where
        assert found["loads_16_bytes"] > 0, where
        assert found["overwritten_operands"] == 0, where
        if precision == "16bit":
            assert found["tensor_core"] > 0, where
        if precision == "16bit" or head_dim != "64":
            assert found["spill_loads"] == found["spill_stores"] == 0, where
        # Triton 3.6 puts no fence between an asynchronous copy and wgmma.
        assert found["proxy_fence"] is not False or version == "3.6.0", where


@pytest.mark.parametrize("name", launch_table(90))
def test_resident_is_what_the_figures_of_every_version_allow(name):
    for architecture in (80, 90):
        launch = launch_table(architecture)[name]
        # For some short groups the older devices take what was measured on a newer one.
        if architecture == 90 or "-long-" in name or launch != launch_table(90)[name]:
            allowed = [
                resident(figures["launches"][name][str(architecture)], launch.warps, architecture)
                for figures in COMMITTED.values()
            ]
            assert launch.resident == min(allowed), architecture


def test_products_that_feed_each_other_have_one_warpgroup():
    """With eight warps the second would repeat what the first does on a tile of 64 rows."""
    for name, launch in launch_table(90).items():
        if name.endswith("16bit") and launch.block == 64 and not name.startswith("bwd_table"):
            assert launch.warps == 4, name


@pytest.mark.parametrize("name", COMPILED)
def test_the_committed_figures_are_these(name):
    """Of one launch of each kernel; the digest speaks for the others."""
    if triton.__version__ not in COMMITTED:
        pytest.skip(f"no figures of triton {triton.__version__}")
    committed = COMMITTED[triton.__version__]["launches"][name]
    found = ahead_of_time.figures_of(name, (80, 90))
    assert found == {architecture: committed[architecture] for architecture in found}


def test_one_launch_of_each_kernel_is_compiled():
    compiled = [ahead_of_time.kernel_of(name) for name in COMPILED]
    assert len(compiled) == len(ahead_of_time.KERNELS)
    assert all(kernel in compiled for kernel in ahead_of_time.KERNELS.values())


@pytest.fixture
def sources(tmp_path, monkeypatch) -> pathlib.Path:
    """A copy of what the digest is of."""
    for name in ahead_of_time.SOURCES:
        shutil.copy(ahead_of_time.FIGURES.parent / f"{name}.py", tmp_path)
    monkeypatch.setattr(ahead_of_time, "FIGURES", tmp_path / "figures.json")
    return tmp_path


@pytest.mark.parametrize("name", ahead_of_time.SOURCES)
def test_the_digest_is_of_code(name, sources):
    before = ahead_of_time.sources_digest()
    file = sources / f"{name}.py"
    source = file.read_text()
    in_words = source.replace('"""', '"""In other words: ', 1).replace("\n\n\n", "\n\n\n# Why.\n")
    file.write_text(in_words.replace("def ", "def  "))
    assert file.read_text() != source and ahead_of_time.sources_digest() == before
    file.write_text(re.sub(r"^( +\w+ = )", r"\1 -", source, count=1, flags=re.M))
    assert file.read_text() != source and ahead_of_time.sources_digest() != before


@pytest.mark.parametrize("field", ["block", "warps", "stages", "resident"])
def test_the_digest_is_of_launches(field, monkeypatch):
    before = ahead_of_time.sources_digest()

    def changed(architecture: int):
        name, table = "fwd-64-32-16bit", launch_table(architecture)
        return {**table, name: dataclasses.replace(table[name], **{field: 5})}

    monkeypatch.setattr(ahead_of_time, "launch_table", changed)
    # How many programs fit follows from the figures.
    assert (ahead_of_time.sources_digest() != before) == (field != "resident")


def test_no_kernel_takes_anything_from_files_that_the_digest_is_not_of():
    kernels = {kernel.__module__.rpartition(".")[2] for kernel in ahead_of_time.KERNELS.values()}
    assert kernels < set(ahead_of_time.SOURCES)
    for name in (*kernels, "primitives", "table_gradient"):
        source = (ahead_of_time.FIGURES.parent / f"{name}.py").read_text()
        taken = set(re.findall(r"^from \.(\w*) import", source, re.M))
        assert taken <= {"primitives", "table_gradient"}, name


@pytest.mark.parametrize(
    ("registers", "shared", "warps", "expected"),
    [(128, 40_960, 4, 4), (129, 1024, 4, 3), (255, 57_856, 4, 2), (32, 0, 1, 32), (32, 0, 8, 8),
     (168, 0, 1, 12), (32, 115_712, 4, 2), (32, 115_713, 4, 1)],
)  # fmt: skip
def test_programs_that_a_processor_holds(registers, shared, warps, expected):
    """As in the occupancy calculator of CUDA, compute capability 9.0."""
    found = {"registers": registers, "shared_bytes": shared}
    assert resident(found, warps, 90) == expected


@pytest.mark.parametrize("architecture", [86, 89, 120])
@pytest.mark.parametrize(
    ("registers", "shared", "warps", "expected"),
    [(32, 0, 4, 12), (32, 0, 8, 6), (128, 0, 4, 4), (32, 50_176, 4, 2), (32, 50_177, 4, 1)],
)
def test_programs_that_a_smaller_processor_holds(registers, shared, warps, expected, architecture):
    """48 warps, and 100 KB of shared memory."""
    found = {"registers": registers, "shared_bytes": shared}
    assert resident(found, warps, architecture) == expected


def test_no_launch_outgrows_a_smaller_processor():
    """Devices of sm_86, sm_89 and sm_120, with 99 KB for a program, take the launches of sm_80."""
    for figures in COMMITTED.values():
        for name, by_architecture in figures["launches"].items():
            assert by_architecture["80"]["shared_bytes"] <= 101_376, name


@pytest.mark.parametrize(
    "flag", ["GATHERED", "PER_IMAGE", "HAS_TABLE", "NEED_QKV", "NEED_TABLE", "DIM"]
)
def test_the_variants_that_are_not_in_the_figures_compile(flag):
    """The interpreter does not check types; the compiler does."""
    names = [name for name in launch_table(90) if name.endswith("-32-16bit")]
    kernels = {name.split("-")[0] + str("long" in name): name for name in names}
    for name in kernels.values():
        flags = {flag: 30 if flag == "DIM" else flag in ("GATHERED", "PER_IMAGE")}
        if flag == "HAS_TABLE":
            flags["NEED_TABLE"] = False
        if not name.startswith("bwd_table") or flag in ("GATHERED", "PER_IMAGE", "DIM"):
            assert ahead_of_time.compile_launch(name, 90, **flags).asm["cubin"]


def test_a_look_at_machine_code_leaves_the_environment():
    before = dict(os.environ)
    assert ahead_of_time.inspect(ahead_of_time.compile_copy(80))["instructions"] > 0
    assert dict(os.environ) == before


@pytest.mark.parametrize("scatter", [False, True])
@pytest.mark.parametrize("per_image", [False, True])
def test_gather_and_scatter_compile(scatter, per_image):
    found = ahead_of_time.inspect(
        ahead_of_time.compile_copy(90, SCATTER=scatter, PER_IMAGE=per_image)
    )
    assert found["spill_loads"] == 0 and found["shared_bytes"] <= ahead_of_time.SHARED_LIMIT[90]
    assert found["loads_16_bytes"] > 0


@pytest.mark.parametrize("architecture", ahead_of_time.ARCHITECTURES)
@pytest.mark.parametrize("element", ["bf16", "fp32"])
@pytest.mark.parametrize("per_image", [False, True])
def test_the_convolution_compiles(per_image, element, architecture):
    """As forward, as backward with the weights turned round and no bias, and the sums."""
    backward = {"FLIP": True, "p_bias": None}
    for compiled in (
        ahead_of_time.compile_conv(architecture, element, PER_IMAGE=per_image),
        ahead_of_time.compile_conv(architecture, element, PER_IMAGE=per_image, **backward),
        ahead_of_time.compile_conv_sums(architecture, element, PER_IMAGE=per_image),
    ):
        found = ahead_of_time.inspect(compiled)
        assert found["spill_loads"] == found["spill_stores"] == 0
        assert found["loads_16_bytes"] > 0
        assert found["registers"] <= 168  # three programs of four warps


def test_tiles_of_the_expanded_bias_are_read_sixteen_bytes_at_a_time():
    """And are to stay in the first cache, as nothing else is."""
    for kernel in ("fwd", "bwd_query", "bwd_key", "bwd_table"):
        code = ahead_of_time.compile_launch(f"{kernel}-long-32-16bit", 90).asm["ptx"]
        found = re.findall(r"ld\.global\.L1::evict_last\S*", code)
        assert found and all(".v4.b32" in load for load in found), kernel


@pytest.mark.parametrize("gathered", [False, True])
def test_the_expansion_of_a_bias_compiles(gathered):
    found = ahead_of_time.inspect(ahead_of_time.compile_expand_bias(90, GATHERED=gathered))
    assert found["spill_loads"] == 0 and found["registers"] <= 128


@pytest.mark.parametrize(("first", "last"), [(True, True), (True, False), (False, True)])
def test_the_sum_over_programs_compiles(first, last):
    found = ahead_of_time.inspect(ahead_of_time.compile_add_rows(90, first, last))
    assert found["spill_loads"] == 0 and found["registers"] <= 128


# --- what a call launches ------------------------------------------------------------------------


@pytest.fixture
def launches(monkeypatch) -> list[tuple]:
    """(kernel, grid, arguments, what Triton keys its compiled kernels by), instead of launching."""
    backend = make_backend(GPUTarget("cuda", 90, 32))
    found = []

    def record(self, *args, grid, warmup, **kwargs):
        bind = create_function_from_signature(self.signature, self.params, backend)
        arguments, specialization, options = bind(*args, **kwargs)
        found.append((self.fn.__name__, grid, arguments, f"{specialization} {options}"))

    monkeypatch.setattr(triton.JITFunction, "run", record)
    return found


def call(case: Case, part: gk.GroupPartition | None = None) -> None:
    inputs = make_inputs(case)
    inputs = dataclasses.replace(inputs, part=part or inputs.part)
    for name in SCHEMAS:
        getattr(operators, name)(*operator_arguments(name, inputs, variant="_triton"))


@pytest.mark.parametrize("window", [7, 14])
@pytest.mark.parametrize("per_image", [False, True])
def test_another_batch_or_mask_compiles_nothing(window, per_image, launches, monkeypatch):
    """Integers that are 1 or multiples of 16 in one call and not in another."""
    monkeypatch.setattr(table_gradient, "RUN", 10_000)  # one pass, however many programs
    case = Case(stage=2, window_size=window, per_image=per_image)
    keys = []
    for batch, ratio, group_size in ((16, 0.75, 64), (5, 0.6, 63), (1, 0.95, 62), (8, 0.5, 49)):
        launches.clear()
        size = group_size * (window // 7) ** 2
        batch = max(batch, 1 + per_image)
        call(dataclasses.replace(case, batch=batch, mask_ratio=ratio, group_size=size))
        keys.append({(name, key) for name, _, _, key in launches})
    # Of long groups three kernels backward, and, for one mask, the expanded bias.
    assert len(keys[0]) == (10 if window == 7 else 14 if per_image else 16)
    assert all(other == keys[0] for other in keys)


def problem_of(
    rows: int = 16, heads: int = 1, groups: int = 1, table_rows: int = 9
) -> operators._Problem:
    """Tensors without memory: q, k and v apart and head by head, of 32 columns, and no windows."""

    def numbers(*shape: int) -> torch.Tensor:
        return torch.empty(shape, dtype=torch.int32, device="meta")

    shape, strides = (1, rows, heads, 32), (rows * heads * 32, 32, rows * 32, 1)
    qkv = (torch.empty_strided(shape, strides, device="meta") for _ in range(3))
    table = torch.empty(table_rows, heads, device="meta")
    slots = [numbers(1, groups, 4) for _ in range(4)]
    return operators._Problem(*qkv, table, None, *slots, heads, 4, 1.0)


@pytest.mark.parametrize(
    ("fits", "too_large"),
    [
        ({"rows": 2**25}, {"rows": 2**25, "heads": 2}),  # 2^30 rows of the output, and 2^31
        ({"rows": 2**26 - 1}, {"rows": 2**26}),
        ({"table_rows": 2**30}, {"table_rows": 2**30, "heads": 2}),
    ],
)
def test_offsets_of_more_than_32_bits_are_refused(fits, too_large):
    problem_of(**fits)
    with pytest.raises(ValueError, match=r"q, k, v and the output span fewer than 2\*\*31"):
        problem_of(**too_large)


def test_more_programs_than_a_grid_has_are_refused():
    assert problem_of(heads=8, groups=2**28 - 1).launch("fwd")[0] == (2**31 - 8,)
    with pytest.raises(ValueError, match=r"fewer than 2\*\*31 programs at once, not 2147483648"):
        problem_of(heads=8, groups=2**28).launch("fwd")


def test_empty_groups_of_a_capacity_are_no_reason_for_longer_programs(launches, monkeypatch):
    """Swin-B at stage 1: 12 or 13 of 23 groups hold tokens."""
    monkeypatch.setattr(operators, "num_processors", lambda _: 132)
    case = Case(shifted=True, batch=128, num_heads=4, dtype=torch.bfloat16)
    window, shift = case.window_and_shift()
    grid = visible_tokens(case)
    capacity = gk.partition_capacity(case.grid, window, shift, int(grid.sum()))
    part = gk.group_partition(grid, window, shift, capacity=capacity)
    assert (part.num_groups, part.group_size) == (23, 64)
    assert 12 <= (part.window_id >= 0).any(-1).sum() <= 13
    call(case, part)
    images = {
        name: arguments["images"]
        for name, _, arguments, _ in launches
        if name.startswith("group_attention") and not arguments["GATHERED"]
    }
    assert images == {
        f"group_attention_{kernel}_kernel": images_per_program(
            128, 4 * 13, 132 * launch_table(90)[f"{kernel}-64-32-16bit"].resident
        )
        for kernel in ("fwd", "bwd")
    }


@pytest.mark.parametrize("head_dim", [16, 32, 64])
@pytest.mark.parametrize(("group_size", "window"), [(64, 7), (96, 9), (208, 14)])
def test_programs_of_pairs_and_their_sums(head_dim, group_size, window, launches, monkeypatch):
    """No more work is expected than there are pairs, and sums do not outgrow q, k and v."""
    monkeypatch.setattr(operators, "num_processors", lambda _: 132)
    expected = []
    monkeypatch.setattr(
        operators, "images_per_program", lambda _, programs, places: expected.append(programs) or 32
    )
    inputs = make_inputs(Case(batch=128, num_heads=128 // head_dim, head_dim=head_dim,
                              window_size=window, group_size=group_size,
                              dtype=torch.bfloat16))  # fmt: skip
    arguments = operator_arguments("group_window_attention_backward", inputs, variant="_triton")
    launches.clear(), expected.clear()
    operators.group_window_attention_backward(*arguments)
    for name, grid, values, _ in launches:
        if name == "long_attention_bwd_table_kernel":
            groups = inputs.part.num_groups
            assert expected[-1] * 4 <= grid[0]  # of four runs of images
            assert values["p_partial"].numel() * 8 <= inputs.qkv.numel() * 2
            assert grid[0] % (128 // head_dim * groups * 4) == 0


@pytest.mark.parametrize(
    ("batch", "programs", "places", "expected"),
    [(128, 52, 264, 26), (128, 52, 528, 13), (256, 32, 264, 32), (128, 16, 528, 4),
     (1, 52, 264, 1), (128, 148, 264, 26)],
)  # fmt: skip
def test_images_fill_whole_waves(batch, programs, places, expected):
    images = images_per_program(batch, programs, places)
    assert images == expected

    def cost(images):
        waves = -(-programs * -(-batch // images) // places)
        return waves * (SETUP_IMAGES + images)

    assert cost(images) == min(map(cost, range(1, batch + 1)))


# --- the scans of machine code ------------------------------------------------------------------

PRODUCT = "        /*0{at}*/         HGMMA.64x32x16.F32.BF16 R88, R24, gdesc[UR8], R88 ;\n"
WAIT = "        /*0500*/                   WARPGROUP.DEPBAR.LE gsb0, 0x0 ;\n"
FENCED = ("cp.async.wait_group 1;", "fence.proxy.async.shared::cta;", "wgmma.mma_async")


@pytest.mark.parametrize(
    ("instruction", "overwrites"),
    [
        ("FADD R27, R2, R3 ;", True),  # the last of its four registers
        ("FADD R28, R24, R25 ;", False),
        ("@!P0 MOV R24, R9 ;", True),
        ("LDS.128 R21, [R2] ;", True),  # writes R21 to R24
        ("LDS.64 R21, [R2] ;", False),
        ("IMAD.WIDE R23, R2, 0x4, R8 ;", True),
        ("ISETP.GE.AND P0, PT, R24, R3, PT ;", False),
        ("LOP3.LUT P1, R25, R2, R3, RZ, 0xc0, !PT ;", True),
        ("STG.E.128 [R24.64], R4 ;", False),
        ("LDSM.16.MT88.4 R20, [R2] ;", False),
        ("LDSM.16.MT88.4 R22, [R2] ;", True),
        ("LDSM.16.M88.2 R23, [R2] ;", True),
        ("LDSM.16.MT88.2 R22, [R2] ;", False),
        ("LDSM.16.M88 R23, [R2] ;", False),
        ("DMUL R23, R2, R4 ;", True),
        ("F2I.S64.TRUNC R23, R2 ;", True),
        ("F2I.TRUNC.NTZ R23, R2 ;", False),
        ("I2F.F64.S64 R23, R2 ;", True),
        ("I2F.S64 R23, R2 ;", False),
        ("F2F.F64.F32 R23, R2 ;", True),
        ("F2F.F32.F64 R23, R2 ;", False),
        ("SHF.R.U64 R23, R2, 0x3, R4 ;", False),
    ],
)
def test_an_operand_that_is_overwritten_is_found(instruction, overwrites):
    line = f"        /*0400*/                   {instruction}\n"

    def found(*lines: str) -> list[str]:
        return overwritten_operands(instructions("".join(lines)))

    assert bool(found(PRODUCT.format(at=300), line, WAIT)) == overwrites
    assert found(PRODUCT.format(at=300), WAIT, line) == []
    assert found(line, PRODUCT.format(at=450), WAIT) == []
    # The wait for all but one product may be for another.
    assert bool(found(PRODUCT.format(at=300), WAIT.replace("0x0 ", "0x1 "), line)) == overwrites
    from_memory = "        /*0300*/    HGMMA.64x32x16.F32.BF16 R88, gdesc[UR4], RZ, !UPT ;\n"
    assert found(from_memory, line, WAIT) == []


@pytest.mark.parametrize(
    ("lines", "expected"),
    [
        (("cp.async.wait_group 1;", "fence.proxy.async.shared::cta;", "wgmma.mma_async"), True),
        (("cp.async.wait_group 1;", "wgmma.mma_async", "fence.proxy.async.shared::cta;"), False),
        (("fence.proxy.async.shared::cta;", "cp.async.wait_group 1;", "wgmma.mma_async"), False),
        (("fence.proxy.async.shared::cta;", "wgmma.mma_async"), None),
        (("cp.async.wait_group 1;", "mma.sync"), None),
        ((*FENCED, *FENCED), True),
        ((*FENCED, "cp.async.wait_group 0;", "wgmma.mma_async"), False),
        (("cp.async.wait_group 1;", "wgmma.mma_async", *FENCED), False),
        (("cp.async.wait_group 1;", *FENCED, "wgmma.mma_async"), True),
        ((*FENCED, "cp.async.wait_group 0;"), True),
    ],
)
def test_a_missing_proxy_fence_is_found(lines, expected):
    assert proxy_fence("\n".join(lines)) is expected


def test_loops_around_products_are_found():
    """Two tiles' loops in one over images, and one without a product."""
    lines = {
        0x000: "MOV R1, R2 ;",
        0x010: "HMMA.16816.F32.BF16 R8, R4, R6, R8 ;",
        0x020: "@P0 BRA 0x10 ;",
        0x030: "FADD R1, R1, R2 ;",
        0x040: "@P1 BRA 0x30 ;",
        0x050: "HGMMA.64x32x16.F32.BF16 R88, R24, gdesc[UR8], R88 ;",
        0x060: "@P0 BRA 0x50 ;",
        0x070: "@!P2 BRA 0x0 ;",
        0x080: "BRA 0x80 ;",
    }
    code = instructions("".join(f"/*{at:04x}*/ {line}\n" for at, line in lines.items()))
    assert product_loops(code) == [2, 2, 8]
    assert loop_length(code) == 8
    assert product_loops(code[3:5]) == [] and loop_length(code[3:5]) == 0

"""The emulator sees what it is there for: broken rules, and faults planted in our kernels."""

from __future__ import annotations

import math
import pathlib
import shutil

import emulated
import pytest
import torch
from budget import plain_results
from conv_cases import ConvInputs, conv_agrees, make_conv
from emulated import Caught, Launch, build, run_binary
from window_cases import swin, window_inputs

import greenmim_kernels as gk
from greenmim_kernels.testing import Case, assert_within_budget, make_inputs, run

pytestmark = pytest.mark.slow
CASE = Case(image_size=(96, 64), batch=3, num_heads=1, shifted=True, dtype=torch.bfloat16)
LONG_CASE = Case(image_size=(64, 96), stage=1, window_size=14, batch=2, num_heads=1,
                 mask_ratio=0.5, dtype=torch.bfloat16)  # fmt: skip
GROUPS_CASE = Case(image_size=(96, 64), window_size=5, shifted=True, num_heads=1, mask_ratio=0.4,
                   group_size=29, dtype=torch.bfloat16)  # fmt: skip
# With a mask per image: blocks go over groups and heads; over more groups than they look at at
# once; and long groups, each with a row of sums.
HEADS_CASE = Case(image_size=(96, 64), batch=5, num_heads=3, shifted=True, per_image=True,
                  capacity=True, dtype=torch.bfloat16)  # fmt: skip
FAR_CASE = Case(stage=3, batch=64, num_heads=1, per_image=True, dtype=torch.bfloat16)
MANY_CASE = Case(image_size=(64, 64), window_size=16, mask_ratio=0.5, batch=80, num_heads=1,
                 per_image=True, dtype=torch.bfloat16)  # fmt: skip
# With padding that attends, packed and apart, the last in heads that are no whole tiles.
PADDED = (window_inputs(swin(), torch.bfloat16, 32, batch=3), False)
NARROW = (window_inputs(swin(), torch.bfloat16, 20, batch=3), True)
# Of a tile and a bit; by element; with a mask per image. Images enough for several blocks.
CONV = make_conv(132, (12, 8), batch=9, dtype=torch.bfloat16)
NARROW_CONV = make_conv(7, batch=9, dtype=torch.bfloat16, per_image=True)
ONLY = ("ONLY_HEAD_DIM=32", "ONLY_ELEMENT=1")


def selftest(name: str, kind: str = "plain", order: int = 0):
    done = run_binary([build("selftest.cpp", kind), name, str(order)])
    return done.returncode, done.stdout.decode().split(), done.stderr.decode(errors="replace")


@pytest.mark.parametrize(
    ("name", "order", "message"),
    [
        ("barrier-for-some", 0, "deadlock"),
        ("different-collectives", 0, "different collectives"),
        ("ended-lanes", 0, "ended while its warp waits"),
        ("ended-lanes", 1, "lanes that have ended"),
        ("absent-lane", 0, "a lane that is not there"),
        ("part-of-a-warp", 0, "a part of a warp"),
        ("copies-never-waited-for", 0, "before it waited for its cp.async"),
        ("misaligned-copy", 0, "no multiples"),
        ("misaligned-ldmatrix", 0, "no multiple of 16"),
        ("same-banks", 0, "in the same banks"),
    ],
)
def test_a_broken_rule_stops_the_program(name, order, message):
    status, _, error = selftest(name, order=order)
    assert status != 0 and message in error


@pytest.mark.parametrize("order", [0, 1, 7])
def test_right_kernels_run(order):
    expected = [str(float(32 + i)).removesuffix(".0") for i in range(64)]
    assert selftest("barrier", order=order)[1] == expected[:32] + [str(i) for i in range(32)]
    assert selftest("warp-barrier", order=order)[1][:4] == ["1", "0", "3", "2"]
    assert selftest("poison", order=order)[1] == ["1"] * 64
    assert selftest("atomics", order=order)[1][0] == str(3 * 64 * 63 // 2)


def test_orders_of_threads():
    assert selftest("order", order=0)[1] == [str(i) for i in range(64)]
    assert selftest("order", order=1)[1] == [str(63 - i) for i in range(64)]
    shuffled = selftest("order", order=7)[1]
    assert (
        sorted(map(int, shuffled)) == list(range(64)) and shuffled != selftest("order", order=8)[1]
    )


def test_a_copy_lands_at_its_wait():
    landed = selftest("copies")[1]
    assert landed == [str(4 * (64 + i) + 1) if i % 2 == 0 else "0" for i in range(64)]
    early = selftest("copies-not-waited-for")[1]
    assert all(math.isnan(float(x)) for x in early)


@pytest.mark.parametrize(
    "barrier", ["barrier", "warp-barrier", "barrier-between", "warp-barrier-between"]
)
def test_a_missing_barrier_is_a_race_and_a_wrong_result(barrier):
    assert selftest(barrier, "thread")[0] == 0
    status, _, error = selftest(f"missing-{barrier}", "thread")
    assert status != 0 and "data race" in error
    assert any("nan" in x for x in selftest(f"missing-{barrier}", order=1)[1])


def test_an_access_beyond_shared_memory():
    assert selftest("barrier", "address")[0] == 0
    status, _, error = selftest("beyond-shared-memory", "address")
    assert status != 0 and "heap-buffer-overflow" in error


# --- the kernels themselves ----------------------------------------------------------------------


def built(case: Case | tuple | ConvInputs, kind: str, root: pathlib.Path = emulated.ROOT):
    if isinstance(case, ConvInputs):
        return build("conv.cu", kind, root=root)
    return build("attention.cu", kind, *ONLY, root=root)


def check(binary: pathlib.Path, case: Case | tuple | ConvInputs) -> None:
    """Results within the budget and equal in every order, or an exception."""
    if isinstance(case, ConvInputs):
        for order, processors in ((0, 3), (1, 30), (7, 3)):
            conv_agrees(emulated.convolve(case, order, processors, binary=binary), case)
        return
    inputs, apart = case if isinstance(case, tuple) else (make_inputs(case), False)
    with gk.use_backend("reference"):
        exact = run(inputs.to(torch.float64))
    plain = plain_results(inputs, saved_output=inputs.part.group_size > 64)
    # Where blocks go over heads, they share these only where there are more blocks than groups.
    many = 30 if inputs.part.token_index.shape[0] > 1 else 1
    for order, processors in ((0, 1), (1, 1), (7, many)):
        launch = Launch(thread_order=order, processors=processors, apart=apart)
        actual = emulated.run(inputs, launch, binary)
        assert_within_budget({name: actual[name] for name in exact}, plain, exact)


@pytest.mark.parametrize("kind", ["address", "thread"])
@pytest.mark.parametrize("case", [CASE, LONG_CASE], ids=str)
def test_sanitizers_find_nothing(case, kind):
    inputs = make_inputs(case)
    for gathered in (False, True):
        emulated.run(inputs, Launch(gathered=gathered), build("attention.cu", kind, *ONLY))


@pytest.mark.parametrize("kind", ["address", "thread"])
@pytest.mark.parametrize("case", [PADDED, NARROW], ids=["padded", "narrow"])
def test_sanitizers_find_nothing_in_the_general_kernels(case, kind):
    inputs, apart = case
    emulated.run(inputs, Launch(apart=apart), build("attention.cu", kind, *ONLY))


@pytest.mark.parametrize("dtype", [torch.float32, torch.float16])
def test_sanitizers_find_nothing_in_other_kernels(dtype):
    defines = ("ONLY_HEAD_DIM=16", f"ONLY_ELEMENT={emulated.ELEMENTS[dtype]}")
    case = Case(image_size=(64, 64), batch=2, num_heads=2, head_dim=16, per_image=True, dtype=dtype)
    for kind in ("address", "thread"):
        emulated.run(make_inputs(case), Launch(), build("attention.cu", kind, *defines))


@pytest.mark.parametrize("kind", ["address", "thread"])
@pytest.mark.parametrize("case", [CONV, NARROW_CONV], ids=["wide", "narrow"])
def test_sanitizers_find_nothing_in_the_convolution(case, kind):
    for dtype in emulated.ELEMENTS:
        emulated.convolve(case.to(dtype), processors=30, binary=built(case, kind))


FORWARD, BACKWARD, LONG = (
    f"attention_{name}.cuh" for name in ("forward", "backward", "backward_long")
)
CONVOLUTION, OVER_HEADS = "sparse_depthwise_conv.cuh", "over_heads.cuh"
ALSO = "// Also: no warp still works on the stage that is filled next.\n"
# file, what stands there, what is planted where PLANTED holds, the sanitizer that has to see it,
# the case
FAULTS = {
    "forward: no barrier after the wait": (
        FORWARD,
        f"{ALSO}      __syncthreads();\n",
        f"{ALSO}      if (!PLANTED) __syncthreads();\n",
        "thread",
        CASE,
    ),
    "backward: no barrier after the wait": (
        BACKWARD,
        f"{ALSO}      __syncthreads();\n",
        f"{ALSO}      if (!PLANTED) __syncthreads();\n",
        "thread",
        CASE,
    ),
    "long backward: no barrier after the wait": (
        LONG,
        f"{ALSO}    __syncthreads();\n",
        f"{ALSO}    if (!PLANTED) __syncthreads();\n",
        "thread",
        LONG_CASE,
    ),
    "forward: bias made before the table is there": (
        FORWARD,
        "(!kLong && !kOverHeads) __syncthreads();  // the table is there\n",
        "(!kLong && !kOverHeads) if (!PLANTED) __syncthreads();\n",
        "thread",
        CASE,
    ),
    "backward: bias made before the table is there": (
        BACKWARD,
        "  __syncthreads();  // the table is there\n",
        "  if (!PLANTED) __syncthreads();\n",
        "thread",
        CASE,
    ),
    "backward: no barrier before the keys": (
        BACKWARD,
        "    __syncthreads();  // all probabilities are there; nobody needs k and v any more\n",
        "    if (!PLANTED) __syncthreads();\n",
        "thread",
        CASE,
    ),
    "backward: no barrier before the table": (
        BACKWARD,
        "  __syncthreads();  // nobody reads tiles or probabilities any more;",
        "  if (!PLANTED) __syncthreads();  //",
        "thread",
        CASE,
    ),
    "results read by other lanes without a barrier": (
        FORWARD,
        "        __syncwarp();\n        results.pieces",
        "        if (!PLANTED) __syncwarp();\n        results.pieces",
        "thread",
        CASE,
    ),
    "rows of the table added without a barrier": (
        "slots.cuh",
        "    __syncwarp();\n  }\n}\n\n// What a block leaves",
        "    if (!PLANTED) __syncwarp();\n  }\n}\n\n// What a block leaves",
        "thread",
        CASE,
    ),
    "forward: a wait that leaves one more on its way": (
        FORWARD,
        "copy_async_wait<Memory::kStages - 2>();",
        "PLANTED ? copy_async_wait<Memory::kStages - 1>()\n"
        "            : copy_async_wait<Memory::kStages - 2>();",
        "plain",
        CASE,
    ),
    "backward: a wait that leaves one on its way": (
        BACKWARD,
        "copy_async_wait<0>();\n      // Also",
        "PLANTED ? copy_async_wait<1>() : copy_async_wait<0>();\n      // Also",
        "plain",
        CASE,
    ),
    "the table read one beyond its end": (
        "slots.cuh",
        "i < a.table_rows; i += int(blockDim.x))\n      copy_async_4",
        "i < a.table_rows + PLANTED; i += int(blockDim.x))\n      copy_async_4",
        "address",
        CASE,
    ),
    "lse written one beyond its row": (
        FORWARD,
        "lse[computed_here(lse_row)] =",
        "lse[computed_here(lse_row) + PLANTED] =",
        "address",
        CASE,
    ),
    "the staging strip of the next warp": (
        LONG,
        "return staging + warp * kStrip",
        "return staging + (warp + PLANTED) * kStrip",
        "plain",
        LONG_CASE,
    ),
    "a fragment of the right operand from the wrong half": (
        "products.cuh",
        "Row::offset(lane % 8 + lane / 16 * 8, lane / 8 % 2)",
        "(PLANTED ? Row::offset(lane % 8 + lane / 8 % 2 * 8, lane / 16)"
        " : Row::offset(lane % 8 + lane / 16 * 8, lane / 8 % 2))",
        "plain",
        CASE,
    ),
    "a transposed fragment that is not": (
        "products.cuh",
        "load_matrices<true>(a, p);",
        "(PLANTED ? load_matrices<false> : load_matrices<true>)(a, p);",
        "plain",
        CASE,
    ),
    "the softmax of long groups not scaled to the new largest score": (
        FORWARD,
        "sum[half] *= factor;",
        "if (!PLANTED) sum[half] *= factor;",
        "plain",
        LONG_CASE,
    ),
    "sums of the table added before they are there": (
        "table_gradient.cuh",
        "  __syncthreads();\n",
        "  if (!PLANTED) __syncthreads();\n",
        "thread",
        CASE,
    ),
    "the last of a run's partial sums left out": (
        "table_gradient.cuh",
        "last = count * (run + 1) / runs;",
        "last = count * (run + 1) / runs - (PLANTED && runs > 1);",
        "plain",
        MANY_CASE,
    ),
    "pieces of a row copied to the places of another": (
        "slots.cuh",
        "const SharedAddress to = tile + t * tile_step + place[i];",
        "const SharedAddress to = tile + t * tile_step + place[i ^ int(PLANTED)];",
        "plain",
        CASE,
    ),
    "the last group with tokens not counted": (
        "slots.cuh",
        "filled = first + 32 - __clz",
        "filled = first + 32 - PLANTED - __clz",
        "plain",
        GROUPS_CASE,
    ),
    "a run of images one too short": (
        "attention_launch.cuh",
        "(a.batch + runs - 1) / runs",
        "(PLANTED ? a.batch : a.batch + runs - 1) / runs",
        "plain",
        CASE,
    ),
    "keys of the next window attended": (
        "slots.cuh",
        "return query.x == key.x;",
        "return PLANTED ? query.x >= 0 && key.x >= 0 : query.x == key.x;",
        "plain",
        CASE,
    ),
    "of the padding, the last image's sum alone": (
        "slots.cuh",
        "sums[d] += sum;",
        "sums[d] = PLANTED ? sum : sums[d] + sum;",
        "plain",
        PADDED,
    ),
    "padding without its value": (
        "slots.cuh",
        "copy_async_16(to, from, pads || is_there);",
        "copy_async_16(to, from, (pads && !PLANTED) || is_there);",
        "plain",
        PADDED,
    ),
    "v in the rows of k": (
        FORWARD,
        "value_rows = rows_of(a.v, place, 2)",
        "value_rows = rows_of(PLANTED ? a.k : a.v, place, 2)",
        "plain",
        PADDED,
    ),
    "the strips of a band from one too early on": (
        BACKWARD,
        "in_register(band.first * Row::kStripBytes + P::ScoresRight::lane_offset())",
        "in_register((band.first - (PLANTED && band.first > 0)) * Row::kStripBytes +"
        " P::ScoresRight::lane_offset())",
        "plain",
        CASE,
    ),
    "the bias not divided by the scale": (
        FORWARD,
        "kLong ? kLog2E : a.inverse_scale",
        "kLong ? kLog2E : PLANTED ? 1.0f : a.inverse_scale",
        "plain",
        CASE,
    ),
    "the columns of the next head": (
        "slots.cuh",
        "copy_async_8(to + 8, from + 4, valid && columns >= 8);",
        "copy_async_8(to + 8, from + 4, valid && (PLANTED || columns >= 8));",
        "plain",
        NARROW,
    ),
    "results in the next head": (
        "slots.cuh",
        "if (int(column) + 4 < head_dim)",
        "if (PLANTED || int(column) + 4 < head_dim)",
        "address",
        NARROW,
    ),
    "over heads, forward: the next group's slots read before they are there": (
        FORWARD,
        "next_group.put(a, slots);\n          __syncthreads();",
        "next_group.put(a, slots);\n          if (!PLANTED) __syncthreads();",
        "thread",
        HEADS_CASE,
    ),
    "over heads, backward: the next group's slots read before they are there": (
        BACKWARD,
        "next_group.put(a, slots).row;\n          __syncthreads();",
        "next_group.put(a, slots).row;\n          if (!PLANTED) __syncthreads();",
        "thread",
        HEADS_CASE,
    ),
    "over heads: the next group's slots read before their copy is there": (
        OVER_HEADS,
        "blocks.last_head - blocks.first_head == 1",
        "blocks.last_head - blocks.first_head == (PLANTED ? 0 : 1)",
        "plain",
        FAR_CASE,
    ),
    "over heads: the last of a run left out": (
        OVER_HEADS,
        "first_head + a.block_heads : a.heads;",
        "first_head + a.block_heads : a.heads - int(PLANTED);",
        "plain",
        HEADS_CASE,
    ),
    "over heads: the bias of the first one": (
        FORWARD,
        "slots.table + (now.step - first_step) * slots.column;",
        "slots.table + (PLANTED ? 0 : now.step - first_step) * slots.column;",
        "plain",
        HEADS_CASE,
    ),
    "over heads: the denominators of the next image": (
        FORWARD,
        "lse = nth(lse, 1, kOverHeads ? a.rows",
        "lse = nth(lse, 1, kOverHeads && !PLANTED ? a.rows",
        "address",
        HEADS_CASE,
    ),
    "over heads: groups beyond the 32 that a warp looks at": (
        OVER_HEADS,
        "group += 32 * a.share;",
        "group += (32 + PLANTED) * a.share;",
        "plain",
        FAR_CASE,
    ),
    "over heads: a group left out that holds tokens": (
        OVER_HEADS,
        "__ballot_sync(0xFFFFFFFF, token >= 0)",
        "__ballot_sync(0xFFFFFFFF, token >= 0 && !(PLANTED && lane_index() == 1))",
        "plain",
        HEADS_CASE,
    ),
    "over heads: gradients of the bias from the second key on": (
        OVER_HEADS,
        "first[i] = (keys & 0xFFFF) + lane % kLanes;",
        "first[i] = (keys & 0xFFFF) + PLANTED + lane % kLanes;",
        "plain",
        HEADS_CASE,
    ),
    "over heads: both halves of a warp add to one copy": (
        OVER_HEADS,
        "base[i] = half * table_rows +",
        "base[i] = (PLANTED ? 0 : half) * table_rows +",
        "thread",
        HEADS_CASE,
    ),
    "over heads: gradients of the bias added before they are there": (
        BACKWARD,
        "          __syncwarp();\n          sums.add",
        "          if (!PLANTED) __syncwarp();\n          sums.add",
        "thread",
        HEADS_CASE,
    ),
    "over heads: sums of the table added to the first one's": (
        BACKWARD,
        "memory.copies + (step - first_step) *",
        "memory.copies + (PLANTED ? 0 : step - first_step) *",
        "plain",
        HEADS_CASE,
    ),
    "over heads: sums of the table in the first run's row": (
        OVER_HEADS,
        "(program * a.heads + first_head)",
        "(program * a.heads + (PLANTED ? 0 : first_head))",
        "plain",
        HEADS_CASE,
    ),
    "over heads: a window that ends with the one before it": (
        OVER_HEADS,
        "return next < 0 ? count : next;",
        "return PLANTED ? slot + 1 : next < 0 ? count : next;",
        "plain",
        HEADS_CASE,
    ),
    "convolution: the channels beyond the last": (
        CONVOLUTION,
        "works = channel < c.channels;",
        "works = PLANTED || channel < c.channels;",
        "address",
        CONV,
    ),
    "convolution: sums of the next place over those that are read": (
        CONVOLUTION,
        "    __syncthreads();  // nobody reads the sums before any more\n",
        "    if (!PLANTED) __syncthreads();\n",
        "thread",
        CONV,
    ),
    "convolution: sums added before they are there": (
        CONVOLUTION,
        "    __syncthreads();\n    if (column",
        "    if (!PLANTED) __syncthreads();\n    if (column",
        "thread",
        CONV,
    ),
    "convolution: the gradient of the opposite place": (
        CONVOLUTION,
        "int64_t(part) * kPlaces + kPlaces - 1 - k",
        "int64_t(part) * kPlaces + (PLANTED ? k : kPlaces - 1 - k)",
        "plain",
        CONV,
    ),
    "convolution: the weights not turned round backward": (
        CONVOLUTION,
        "(kBackward ? kPlaces - 1 - k : k)",
        "(kBackward && !PLANTED ? kPlaces - 1 - k : k)",
        "plain",
        NARROW_CONV,
    ),
    "convolution: the neighbours of the image before": (
        CONVOLUTION,
        "if (c.per_image || image == first_image)",
        "if ((c.per_image && !PLANTED) || image == first_image)",
        "plain",
        NARROW_CONV,
    ),
    "convolution: the last image of a run left out": (
        CONVOLUTION,
        "std::min(first_image + c.images, c.batch)",
        "std::min(first_image + c.images - (PLANTED && c.images > 1), c.batch)",
        "plain",
        CONV,
    ),
    "convolution: a step of tokens taken twice": (
        CONVOLUTION,
        "first_token + int64_t(c.steps) * c.rows()",
        "first_token + (int64_t(c.steps) + PLANTED) * c.rows()",
        "plain",
        CONV,
    ),
}
CHOICE = """
#include <cstdlib>
inline const int planted = std::getenv("PLANTED") ? std::atoi(std::getenv("PLANTED")) : -1;
"""


@pytest.fixture(scope="module")
def faulty(tmp_path_factory: pytest.TempPathFactory) -> pathlib.Path:
    """Sources with every fault, of which the environment variable PLANTED chooses one.

    So they are compiled once, and not once for each fault.
    """
    root = tmp_path_factory.mktemp("faulty", numbered=False)
    for folder in ("csrc/cuda", "tests/emulator"):
        shutil.copytree(emulated.ROOT / folder, root / folder)
    for name in ("attention.cu", "conv.cu"):
        program = root / "tests" / "emulator" / name
        program.write_text(CHOICE + program.read_text())
    for number, (file, before, after, *_) in enumerate(FAULTS.values()):
        source = root / "csrc" / "cuda" / file
        text = source.read_text()
        assert before in text, f"{file} has changed: plant this fault anew: {before}"
        source.write_text(text.replace(before, after.replace("PLANTED", f"(planted == {number})")))
    return root


@pytest.mark.parametrize("fault", FAULTS)
def test_a_planted_fault_is_caught(fault, faulty, monkeypatch):
    *_, kind, case = FAULTS[fault]
    monkeypatch.setenv("PLANTED", str(list(FAULTS).index(fault)))
    with pytest.raises((AssertionError, Caught)) as caught:
        check(built(case, kind, faulty), case)
    expected = {"thread": "data race", "address": "Sanitizer", "plain": "error"}[kind]
    assert expected in str(caught.value)


CASES = {"short": CASE, "long": LONG_CASE, "many": MANY_CASE, "groups": GROUPS_CASE}
CASES |= {"heads": HEADS_CASE, "far": FAR_CASE}
CASES |= {"padded": PADDED, "narrow": NARROW, "conv": CONV, "narrow-conv": NARROW_CONV}


@pytest.mark.parametrize(
    ("kind", "case"),
    [
        *(("plain", case) for case in CASES),
        *(("address", case) for case in CASES),
        ("thread", "short"),
        ("thread", "long"),
        ("thread", "heads"),
        ("thread", "conv"),
    ],
)
def test_without_a_fault_nothing_is_caught(kind, case, faulty):
    check(built(CASES[case], kind, faulty), CASES[case])

"""The CUDA kernels of a mask per image, whose blocks go over groups and heads, run on the CPU."""

from __future__ import annotations

import dataclasses
import functools

import pytest
import torch
from emulated import LARGE, Launch, build, plan
from emulated import run as emulate
from test_cuda_emulated import (
    ORDERS,
    OVER_HEADS,
    agree,
    fused_and_gathered,
    name,
    with_empty_groups,
)
from window_cases import swin, window_inputs

import greenmim_kernels as gk
from greenmim_kernels.testing import Case, Inputs, make_inputs, relative_error

pytestmark = pytest.mark.slow
DTYPES = (torch.bfloat16, torch.float16)
SMALL = functools.partial(Case, image_size=(96, 64), batch=3, per_image=True)
CASES = [
    OVER_HEADS[0],
    SMALL(stage=2, head_dim=16, num_heads=3),
    SMALL(head_dim=64, num_heads=2),  # forward alone
    SMALL(stage=3, num_heads=7, batch=5),  # of one strip
    SMALL(window_size=2, num_heads=2, mask_ratio=0.5),  # many windows in a group
    OVER_HEADS[1],  # full windows: every kind of step of the table's sums
    SMALL(window_size=5, shifted=True, mask_ratio=0.4, num_heads=1),
]
# Blocks that take many groups each, a few, and one.
PROCESSORS = (1, 7, 1000)
ONLY = ("ONLY_HEAD_DIM=32", "ONLY_ELEMENT=1")


def with_tensors(part, change):
    names = ("token_index", "window_id", "query_row", "key_row")
    changed = {name: change(getattr(part, name)).contiguous() for name in names}
    return dataclasses.replace(part, **changed)


@pytest.mark.parametrize("dtype", DTYPES, ids=name)
@pytest.mark.parametrize("case", CASES, ids=str)
def test_agrees_with_the_reference_however_it_is_cut(case, dtype):
    inputs = make_inputs(dataclasses.replace(case, dtype=dtype))
    first = emulate(inputs)
    for processors in PROCESSORS:
        alike = emulate(inputs, Launch(processors=processors))
        agree(alike, inputs, case)
        for key in ("out", "lse", "grad_qkv"):
            assert torch.equal(alike[key], first[key]), key
        for order in ORDERS[1:]:
            again = emulate(inputs, Launch(processors=processors, thread_order=order))
            for key, value in again.items():
                assert torch.equal(value, alike[key]), f"{key} depends on the order of threads"


@pytest.mark.parametrize("dtype", DTYPES, ids=name)
@pytest.mark.parametrize("case", CASES[:3], ids=str)
def test_the_same_mask_for_all_images_gives_the_same_bits(case, dtype):
    """As by the kernels that go over images: sums of the table alone have another order."""
    shared = make_inputs(dataclasses.replace(case, per_image=False, dtype=dtype))
    part = with_tensors(shared.part, lambda x: x.expand(case.batch, *x.shape[1:]))
    expected, actual = emulate(shared), emulate(dataclasses.replace(shared, part=part))
    for key in ("out", "lse", "grad_qkv"):
        assert torch.equal(actual[key], expected[key]), key
    assert relative_error(actual["grad_table"], expected["grad_table"]) < 1e-5


@pytest.mark.parametrize("after", ["all", 1, 0])
def test_groups_without_a_token(after):
    """At the end, as with capacity, or anywhere; more of them than a block looks at at once."""
    inputs = make_inputs(dataclasses.replace(CASES[0], dtype=torch.bfloat16))
    exact = emulate(inputs)
    many = with_empty_groups(inputs.part, inputs.part.num_groups if after == "all" else after)
    padded = dataclasses.replace(inputs, part=many)
    for processors in PROCESSORS:
        for order in ORDERS:
            launch = Launch(processors=processors, thread_order=order)
            actual = emulate(padded, launch)
            for key in ("out", "lse", "grad_qkv"):
                assert torch.equal(actual[key], exact[key]), key
            agree(actual, inputs, CASES[0])


@pytest.mark.parametrize("batch", [63, 64, 65, 66])
def test_blocks_that_look_at_32_groups_and_end_there(batch):
    """Two blocks, and a group for each image."""
    case = Case(image_size=(32, 32), stage=3, batch=batch, num_heads=1, per_image=True,
                mask_ratio=0.0, dtype=torch.bfloat16)  # fmt: skip
    inputs = make_inputs(case)
    assert inputs.part.num_groups == 1
    agree(emulate(inputs), inputs, case)


@pytest.mark.parametrize("window", [45, 46])
def test_tables_around_what_two_bytes_can_name(window):
    """Of 7921 and 8281 rows: with the larger one blocks go over images."""
    visible = torch.zeros(3, window, window, dtype=torch.bool)
    generator = torch.Generator().manual_seed(0)
    for one in visible:
        one.view(-1)[torch.randperm(window**2, generator=generator)[:14]] = True
    part = gk.group_partition(visible, window, 0, 16)
    for row in plan(torch.bfloat16, 32, 16, window, per_image=True, rows=14):
        assert row["over_heads"] == (window == 45)

    def normal(*shape):
        return torch.randn(shape, generator=generator).bfloat16()

    table = normal((2 * window - 1) ** 2, 2).float()
    inputs = Inputs(normal(3, 14, 3 * 64), table, normal(3, 14, 64), part, num_heads=2)
    agree(emulate(inputs), inputs)


@pytest.mark.parametrize("dtype", DTYPES, ids=name)
@pytest.mark.parametrize("head_dim", [16, 32])
def test_padding_that_attends_without_a_value(head_dim, dtype):
    """As zeros, in every group that a block comes to."""
    problem = swin((20, 9), (7, 7), (3, 3))
    orders = torch.stack([torch.randperm(problem.tokens) for _ in range(3)])
    index = torch.where(problem.index < 0, -1, orders[:, problem.index[0].clamp(min=0)])
    inputs = window_inputs(dataclasses.replace(problem, index=index), dtype, head_dim)
    inputs = dataclasses.replace(inputs, pad_value=None)
    assert ((inputs.part.token_index < 0) & (inputs.part.window_id >= 0)).any()
    for processors in PROCESSORS:
        agree(emulate(inputs, Launch(processors=processors)), inputs)


def test_a_batch_without_a_token_in_any_window():
    """Nothing but zeros is written, and the table has a gradient: none."""
    inputs = make_inputs(dataclasses.replace(CASES[0], dtype=torch.bfloat16))
    part = dataclasses.replace(inputs.part, window_id=torch.full_like(inputs.part.window_id, -1))
    for processors in PROCESSORS:
        result = emulate(dataclasses.replace(inputs, part=part), Launch(processors=processors))
        for key in ("out", "lse", "grad_qkv", "grad_table"):
            assert (result[key] == 0).all(), key


@pytest.mark.parametrize("dtype", DTYPES, ids=name)
@pytest.mark.parametrize("case", [CASES[0], CASES[2], CASES[3]], ids=str)
def test_gathered_groups(case, dtype):
    """No group is left out, so blocks take other ones: the table's sums have another order."""
    fused, grouped = fused_and_gathered(make_inputs(dataclasses.replace(case, dtype=dtype)))
    assert relative_error(grouped["grad_table"], fused["grad_table"]) < 1e-6


@pytest.mark.parametrize("poison", [torch.nan, torch.inf])
def test_what_is_not_finite_stays_in_its_group_and_head(poison):
    """Though a block goes on to other groups and heads with the same memory."""
    case = dataclasses.replace(CASES[0], dtype=torch.bfloat16)
    inputs = make_inputs(case)
    clean = emulate(inputs)
    part, dim = inputs.part, case.head_dim
    members = part.token_index[1, 0][part.token_index[1, 0] >= 0].long()
    # The query and the key of a token of the second image, in the third head.
    columns = [2 * dim, case.channels + 2 * dim]
    inputs.qkv[1, members[0], columns] = poison
    result = emulate(inputs)
    for key in ("out", "grad_qkv"):
        differs = (result[key] != clean[key]).unflatten(-1, (-1, case.num_heads, dim))
        differs = differs.any(-1).any(-2)  # of each token and head
        assert differs[1, members, 2].any(), key
        differs[1, members, 2] = False
        assert not differs.any(), key
    assert not result["grad_table"][:, 2].isfinite().all()
    others = [0, 1, 3, 4]
    assert torch.equal(result["grad_table"][:, others], clean["grad_table"][:, others])


@pytest.mark.parametrize("kind", ["address", "thread"])
@pytest.mark.parametrize("case", [CASES[0], CASES[5]], ids=str)
def test_sanitizers_find_nothing(case, kind):
    inputs = make_inputs(dataclasses.replace(case, batch=2, dtype=torch.bfloat16))
    binary = build("attention.cu", kind, *ONLY)
    for gathered in (False, True):
        emulate(inputs, Launch(gathered=gathered), binary)


def test_slots_in_no_order_do_not_lead_out_of_memory():
    """Windows of a partition are sorted; of one that is not, results are nobody's, and no more."""
    inputs = make_inputs(dataclasses.replace(CASES[0], dtype=torch.bfloat16))
    order = torch.randperm(inputs.part.group_size, generator=torch.Generator().manual_seed(0))
    part = with_tensors(inputs.part, lambda x: x[..., order])
    emulate(
        dataclasses.replace(inputs, part=part), Launch(), build("attention.cu", "address", *ONLY)
    )


def test_these_processors_have_blocks_of_few_heads_and_of_all():
    part = make_inputs(CASES[0]).part
    problem = (torch.bfloat16, 32, part.group_size, 7, LARGE, True, 3, part.num_tokens, 5)
    taken = [{row["block_heads"] for row in plan(*problem, n)} for n in PROCESSORS]
    assert 5 in taken[0] and taken[-1] == {1}
    by_batch = {
        row["block_heads"]
        for batch in (2, 8, 64, 256)
        for row in plan(torch.bfloat16, 32, 64, 7, per_image=True, batch=batch, rows=64, heads=6)
    }
    assert len(by_batch) >= 3

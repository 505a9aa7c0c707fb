"""What PyTorch asks of an operator: opcheck, compile, autocast, odd inputs, clear errors."""

from __future__ import annotations

import dataclasses
import functools
import itertools

import pytest
import torch
from torch._dynamo.testing import CompileCounter

import greenmim_kernels as gk
from greenmim_kernels.ops import SCHEMAS, operator
from greenmim_kernels.testing import (
    Case,
    make_inputs,
    operator_arguments,
    relative_error,
    run,
    visible_tokens,
)

BACKENDS = ("reference", "cpp")


THREE = [(name, True) for name in SCHEMAS if name.startswith("group_window")]


@pytest.mark.parametrize("per_image", [False, True])
@pytest.mark.parametrize(("name", "three"), [*((n, False) for n in SCHEMAS), *THREE])
def test_opcheck(name, three, per_image):
    case = Case(image_size=(64, 96), stage=2, batch=2, head_dim=4, mask_ratio=0.5,
                window_size=3, shifted=True, per_image=per_image)  # fmt: skip
    torch.library.opcheck(operator(name), operator_arguments(name, make_inputs(case), three=three))


@pytest.mark.parametrize("needs", list(itertools.product([True, False], repeat=3))[1:])
@pytest.mark.parametrize(
    ("name", "three"),
    [
        ("block_diagonal_attention_backward", False),
        ("group_window_attention_backward", False),
        ("group_window_attention_backward", True),
    ],
)
def test_opcheck_of_a_backward_that_is_asked_for_less(name, three, needs):
    case = Case(image_size=(64, 96), stage=3, batch=2, head_dim=4, mask_ratio=0.5)
    grouped = name.startswith("block")
    arguments = operator_arguments(name, make_inputs(case), three=three)
    arguments = arguments[: -2 if grouped else -3]
    needs = needs[: 2 if grouped else 3]
    torch.library.opcheck(operator(name), (*arguments, *needs))
    table = 2 if grouped else 4
    without_table = [None if i == table else value for i, value in enumerate(arguments)]
    torch.library.opcheck(operator(name), (*without_table, *needs))


@pytest.mark.parametrize("backend", BACKENDS)
def test_compiles_whole_and_once_for_all_masks(backend):
    case = Case(shifted=True)
    window, shift = case.window_and_shift()
    eager = make_inputs(case)
    counter = CompileCounter()

    def attention(qkv, table, part, num_heads):
        grouped = gk.block_diagonal_attention(gk.group_gather(qkv, part), table, part, num_heads)
        fused = gk.group_window_attention(qkv, table, part, num_heads)
        return fused + gk.group_scatter(grouped, part)

    torch._dynamo.reset()
    compiled = torch.compile(attention, fullgraph=True, backend="aot_eager")
    counted = torch.compile(attention, fullgraph=True, backend=counter)
    with gk.use_backend(backend):
        for seed in range(3):
            tokens = eager.part.num_tokens
            capacity = gk.partition_capacity(case.grid, window, shift, tokens)
            visible = visible_tokens(case, seed)
            part = gk.group_partition(visible, window, shift, capacity=capacity)
            inputs = dataclasses.replace(eager, part=part)
            expected = run(inputs, attention)
            for name, value in run(inputs, compiled).items():
                assert relative_error(value, expected[name]) < 1e-5, name
            counted(inputs.qkv, inputs.table, part, inputs.num_heads)
    assert counter.frame_count == 1


def test_compiles_with_inductor():
    inputs = make_inputs(Case(shifted=True))
    expected = run(inputs)
    torch._dynamo.reset()
    compiled = torch.compile(gk.group_window_attention, fullgraph=True)
    for name, value in run(inputs, compiled).items():
        assert relative_error(value, expected[name]) < 1e-5, name


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_autocast_changes_nothing(backend, dtype):
    inputs = make_inputs(Case(dtype=dtype))

    def attention(*arguments, autocast=False):
        with torch.autocast("cpu", dtype=torch.bfloat16, enabled=autocast):
            return gk.group_window_attention(*arguments)

    with gk.use_backend(backend):
        expected = run(inputs, attention)
        actual = run(inputs, functools.partial(attention, autocast=True))
    for name, value in actual.items():
        # Indexing sums the reference's table gradient in an order of its own.
        assert relative_error(value, expected[name]) < 1e-5, name
        assert backend == "reference" or torch.equal(value, expected[name])


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize("dtype", [torch.float64, torch.bfloat16, torch.float16])
def test_gradient_of_the_table_has_its_dtype(backend, dtype):
    inputs = make_inputs(Case())
    inputs.table = inputs.table.to(dtype)
    with gk.use_backend(backend):
        assert run(inputs)["grad_table"].dtype == dtype


@pytest.mark.parametrize("backend", BACKENDS)
def test_empty_batch(backend):
    inputs = make_inputs(Case())
    qkv = inputs.qkv[:0].requires_grad_()
    table = inputs.table.requires_grad_()
    with gk.use_backend(backend):
        out = gk.group_window_attention(qkv, table, inputs.part, inputs.num_heads)
        out.sum().backward()
        gathered = gk.group_gather(qkv, inputs.part)
        assert gk.group_scatter(gathered, inputs.part).shape == qkv.shape
    assert out.shape == (0, inputs.part.num_tokens, inputs.qkv.shape[-1] // 3)
    assert qkv.grad.shape == qkv.shape
    assert (table.grad == 0).all()


def test_non_contiguous_inputs_and_gradients():
    inputs = make_inputs(Case())
    expected = run(inputs)
    strided = dataclasses.replace(
        inputs,
        qkv=inputs.qkv.repeat_interleave(2, -1)[..., ::2],
        table=inputs.table.t().contiguous().t(),
        grad_out=inputs.grad_out.transpose(0, 1).contiguous().transpose(0, 1),
    )
    assert not any(t.is_contiguous() for t in (strided.qkv, strided.table, strided.grad_out))
    with gk.use_backend("cpp"):
        for name, value in run(strided).items():
            assert torch.equal(value, expected[name]), name
        x = strided.qkv
        assert torch.equal(gk.group_scatter(gk.group_gather(x, inputs.part), inputs.part), x)


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize("only", ["qkv", "table"])
def test_only_one_input_needs_a_gradient(backend, only):
    inputs = make_inputs(Case(shifted=True))
    with gk.use_backend(backend):
        expected = run(inputs)[f"grad_{only}"]
        leaf = getattr(inputs, only).requires_grad_()
        out = gk.group_window_attention(inputs.qkv, inputs.table, inputs.part, inputs.num_heads)
        out.backward(inputs.grad_out)
    assert relative_error(leaf.grad, expected) < 1e-5
    assert (inputs.table if only == "qkv" else inputs.qkv).grad is None


def test_the_backward_leaves_out_what_nobody_asked_for():
    inputs = make_inputs(Case())
    arguments = operator_arguments("group_window_attention_backward", inputs, three=True)[:-3]
    backward = operator("group_window_attention_backward")
    for needs in itertools.product([True, False], repeat=3):
        found = [grad.numel() > 0 for grad in backward(*arguments, *needs)]
        assert found == [needs[0]] * 3 + [*needs[1:]]


@pytest.mark.parametrize("three", [False, True])
def test_copy_on_write_tensors(three):
    """None is written to, and none is copied within threads, where PyTorch forbids it."""
    inputs = make_inputs(Case())
    for name in ("group_window_attention", "group_window_attention_backward"):
        arguments = operator_arguments(name, inputs, three=three)
        expected = operator(name)(*arguments)
        lazy = [
            torch._lazy_clone(x.clone()) if isinstance(x, torch.Tensor) else x for x in arguments
        ]
        for found, one in zip(operator(name)(*lazy), expected, strict=True):
            assert torch.equal(found, one)


def test_k_and_v_go_together():
    arguments = operator_arguments("group_window_attention", make_inputs(Case()), three=True)
    for one in (1, 2):
        with pytest.raises(RuntimeError, match="pass both k and v, or neither"):
            operator("group_window_attention")(
                *(None if i == one else x for i, x in enumerate(arguments))
            )


def test_second_derivative():
    inputs = make_inputs(Case())
    qkv = inputs.qkv.requires_grad_()
    with gk.use_backend("cpp"):
        out = gk.group_window_attention(qkv, inputs.table, inputs.part, inputs.num_heads)
    (grad,) = torch.autograd.grad(out, qkv, inputs.grad_out, create_graph=True)
    with pytest.raises(RuntimeError, match='use_backend\\("reference"\\)'):
        grad.sum().backward()


@pytest.mark.parametrize("backend", BACKENDS)
def test_second_derivative_of_gather_and_scatter(backend):
    inputs = make_inputs(Case(image_size=(64, 64), stage=3, mask_ratio=0.5, head_dim=1,
                              dtype=torch.float64))  # fmt: skip

    def there_and_back(x):
        with gk.use_backend(backend):
            return gk.group_scatter(gk.group_gather(x, inputs.part) ** 2, inputs.part)

    assert torch.autograd.gradgradcheck(there_and_back, inputs.qkv.requires_grad_())


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"qkv": torch.zeros(2, 768)}, r"must be \[B, N, C\]"),
        ({"qkv": torch.zeros(2, 767, 192)}, "767 tokens per image, the partition 768"),
        ({"qkv": torch.zeros(2, 768, 192, dtype=torch.int32)}, "floating point"),
        ({"qkv": torch.zeros(2, 768, 190)}, "3 x num_heads x head_dim"),
        ({"num_heads": 5}, "3 x num_heads x head_dim"),
        ({"num_heads": 0}, "3 x num_heads x head_dim"),
        ({"table": torch.zeros(169, 3)}, r"must be \[169, 2\], got \[169, 3\]"),
        ({"table": torch.zeros(169, 2, dtype=torch.int64)}, "floating point"),
    ],
)
def test_clear_errors(change, message):
    inputs = dataclasses.replace(make_inputs(Case()), **change)
    with pytest.raises(ValueError, match=message):
        gk.group_window_attention(inputs.qkv, inputs.table, inputs.part, inputs.num_heads)


def test_errors_of_batches_and_groups():
    inputs = make_inputs(Case(batch=3, per_image=True))
    with pytest.raises(ValueError, match="is of 3 images and x a batch of 2"):
        gk.group_gather(inputs.qkv[:2], inputs.part)
    with pytest.raises(ValueError, match="slots, C"):
        gk.group_scatter(torch.zeros(3, 2, 7, 8), inputs.part)
    with pytest.raises(ValueError, match="slots, C"):
        gk.block_diagonal_attention(inputs.qkv, inputs.table, inputs.part, 2)
    qkv = gk.group_gather(inputs.qkv, inputs.part)
    scale = torch.tensor(0.5, requires_grad=True)  # whose gradient would be lost
    with pytest.raises(ValueError, match="scale must be a number"):
        gk.block_diagonal_attention(qkv, inputs.table, inputs.part, 2, scale)
    numbers = (gk.block_diagonal_attention(qkv, inputs.table, inputs.part, 2, x) for x in
               (0.5, scale.detach()))  # fmt: skip
    assert torch.equal(*numbers)


@pytest.mark.parametrize(
    ("field", "value", "message"),
    [
        (
            "token_index",
            768,
            "token 768 which the image does not have|holds 768, but an image has 768 tokens",
        ),
        ("token_index", 1, "twice"),
        ("query_row", 200, "outside the 169 rows"),
        ("key_row", -200, "outside the 169 rows"),
    ],
)
def test_the_kernel_refuses_a_partition_that_would_leave_its_memory(field, value, message):
    inputs = make_inputs(Case())
    broken = getattr(inputs.part, field).clone()
    broken[0, 0, 0] = value
    part = dataclasses.replace(inputs.part, **{field: broken})
    with gk.use_backend("cpp"), pytest.raises(RuntimeError, match=message):
        gk.group_window_attention(inputs.qkv, inputs.table, part, inputs.num_heads)
    if field == "token_index":
        with gk.use_backend("cpp"), pytest.raises(RuntimeError, match=message):
            gk.group_gather(inputs.qkv, part)


@pytest.mark.parametrize("grouped", [False, True])
@pytest.mark.parametrize(
    ("argument", "change", "message"),
    [
        (0, lambda grad_out: grad_out[:, :-1], "grad_out must be like qkv"),
        (0, lambda grad_out: grad_out.double(), "grad_out must be like qkv"),
        (0, lambda grad_out: grad_out.flatten(0, 1)[None], "grad_out must be like qkv"),
        (-1, lambda lse: lse.transpose(1, 2), "lse must be what the forward pass returned"),
        (-1, lambda lse: lse.half(), "lse must be what the forward pass returned"),
    ],
)
def test_the_backward_kernel_refuses_what_does_not_fit(argument, change, message, grouped):
    """It would read beyond their memory."""
    name = "block_diagonal_attention" if grouped else "group_window_attention"
    arguments = list(operator_arguments(f"{name}_backward", make_inputs(Case(stage=3, batch=2))))
    argument = argument if argument == 0 else 4 if grouped else 7  # lse
    arguments[argument] = change(arguments[argument])
    with pytest.raises(RuntimeError, match=message):
        operator(f"{name}_backward")(*arguments)

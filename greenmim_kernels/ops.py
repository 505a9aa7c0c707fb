"""Registration of the operators: schema, shape rule and autograd rule of each, once.

The schemas live in the namespace ``greenmim`` (`_ops`). The compiled modules only add kernels:
``_C`` under the CPU key, ``_C_cuda`` under the CUDA key, and the dispatcher picks by device.
Triton's kernels stand beside them under names of their own, ``<operator>_triton``, with the same
rules; which of the two is called is decided in Python. Backward passes are operators of their own.
Conventions of every schema:

- qkv [B, G, S, 3C]; q [B, N, 3C], which then holds k and v too, and they are None; or q, k and v
  [B, N, heads, D] each, with any strides but the last;
- table [rows, heads] in the accumulation dtype, or None; pad_value [3C] in q's dtype, or None;
- token_index, window_id, query_row, key_row [P, G, S]: int32, P = 1 or B, as in a GroupPartition;
- window_slots: the most slots that a window may have;
- lse [B, heads, G * S or N]: log of the softmax's denominator, in the accumulation dtype; not
  differentiable, kept for the backward pass;
- neighbours [P, N, 9]: int32, as from `grid_neighbours`; weight [C, 9] and bias [C] of the
  convolution in the accumulation dtype;
- a gradient that is not asked for is an empty tensor; that of pad_value is [2 D, heads], for its k
  and v, in the accumulation dtype.
"""

from __future__ import annotations

import contextlib
from collections.abc import Callable

import torch
from torch import Tensor

from ._ops import add_op_namespace_prefix, ops
from .reference import accumulation_dtype, with_rows

_WINDOWS = (
    "Tensor window_id, Tensor query_row, Tensor key_row, int num_heads, int window_slots,"
    " float scale"
)
SCHEMAS = {
    "group_gather": "(Tensor x, Tensor token_index) -> Tensor",
    "group_scatter": "(Tensor x, Tensor token_index, SymInt num_tokens) -> Tensor",
    "block_diagonal_attention": (
        f"(Tensor qkv, Tensor? table, {_WINDOWS}) -> (Tensor out, Tensor lse)"
    ),
    "block_diagonal_attention_backward": (
        f"(Tensor grad_out, Tensor qkv, Tensor? table, Tensor out, Tensor lse, {_WINDOWS},"
        " bool need_qkv, bool need_table) -> (Tensor grad_qkv, Tensor grad_table)"
    ),
    "group_window_attention": (
        "(Tensor q, Tensor? k, Tensor? v, Tensor? table, Tensor? pad_value, Tensor token_index,"
        f" {_WINDOWS}) -> (Tensor out, Tensor lse)"
    ),
    "group_window_attention_backward": (
        "(Tensor grad_out, Tensor q, Tensor? k, Tensor? v, Tensor? table, Tensor? pad_value,"
        f" Tensor out, Tensor lse, Tensor token_index, {_WINDOWS}, bool need_qkv, bool need_table,"
        " bool need_pad) -> (Tensor grad_q, Tensor grad_k, Tensor grad_v, Tensor grad_table,"
        " Tensor grad_pad)"
    ),
    "sparse_depthwise_conv": (
        "(Tensor x, Tensor weight, Tensor? bias, Tensor neighbours) -> Tensor"
    ),
    "sparse_depthwise_conv_backward": (
        "(Tensor grad_out, Tensor x, Tensor weight, Tensor neighbours, bool need_x,"
        " bool need_weight, bool need_bias) -> (Tensor grad_x, Tensor grad_weight,"
        " Tensor grad_bias)"
    ),
}

# Suffixes of the operators' names: the compiled kernels', and Triton's.
VARIANTS = ("", "_triton")


def _triton_kernel(name: str) -> Callable:
    def call(*arguments):
        # Imported when the dispatcher first runs it, so that nothing else needs Triton.
        from ._triton import operators

        device = arguments[0].device
        # Triton launches on the current device, wherever the tensors are.
        with torch.cuda.device(device) if device.type == "cuda" else contextlib.nullcontext():
            return getattr(operators, name)(*arguments)

    return call


_library = torch.library.Library(ops.name, "DEF")
for _name, _schema in SCHEMAS.items():
    for _variant in VARIANTS:
        _library.define(_name + _variant + _schema)
    for _key in ("CUDA", "CPU"):  # the CPU through Triton's interpreter
        _library.impl(_name + "_triton", _triton_kernel(_name), _key)


def operator(name: str, variant: str = "") -> Callable:
    """The registered operator, for example ``operator("group_gather", "_triton")``."""
    return getattr(ops, name + variant).default


def _on_one_device(name: str, fake: Callable) -> Callable:
    """The shape rule, which refuses mixed devices.

    Beside a tensor on the meta device, the dispatcher runs it for tensors on the CPU too, and its
    result would be memory that nothing writes to.
    """

    def checked(*arguments):
        devices = {str(x.device) for x in arguments if isinstance(x, Tensor)}
        if len(devices) > 1:
            raise RuntimeError(
                f"{name} needs its tensors on one device, got some on"
                f" {', '.join(sorted(devices))}; move them to one"
            )
        try:
            return fake(*arguments)
        except (IndexError, ValueError, TypeError, ZeroDivisionError) as error:
            raise RuntimeError(f"{name} got tensors whose shapes do not fit ({error})") from error

    return checked


def _register(
    name: str, variant: str, fake: Callable, backward: Callable, setup_context: Callable
) -> None:
    qualified = add_op_namespace_prefix(name + variant)
    torch.library.register_fake(qualified, _on_one_device(name, fake))
    torch.library.register_autograd(qualified, backward, setup_context=setup_context)


# --- gather and scatter: each is the other's backward -------------------------------------------


def _gather_fake(x: Tensor, token_index: Tensor) -> Tensor:
    return x.new_empty(x.shape[0], *token_index.shape[1:], x.shape[2])


def _gather_setup(ctx, inputs, output) -> None:
    x, token_index = inputs
    ctx.num_tokens = x.shape[1]
    ctx.save_for_backward(token_index)


def _scatter_fake(x: Tensor, token_index: Tensor, num_tokens: int) -> Tensor:
    return x.new_empty(x.shape[0], num_tokens, x.shape[3])


def _scatter_setup(ctx, inputs, output) -> None:
    ctx.save_for_backward(inputs[1])


def _register_gather_scatter(variant: str) -> None:
    def gather_backward(ctx, grad: Tensor):
        (token_index,) = ctx.saved_tensors
        return operator("group_scatter", variant)(grad, token_index, ctx.num_tokens), None

    def scatter_backward(ctx, grad: Tensor):
        (token_index,) = ctx.saved_tensors
        return operator("group_gather", variant)(grad, token_index), None, None

    _register("group_gather", variant, _gather_fake, gather_backward, _gather_setup)
    _register("group_scatter", variant, _scatter_fake, scatter_backward, _scatter_setup)


# --- attention ----------------------------------------------------------------------------------


def _setup_attention(ctx, inputs, output) -> None:
    """Saves what the backward operator takes, in its order: inputs, results, the partition."""
    out, lse = output
    ctx.mark_non_differentiable(lse)
    ctx.set_materialize_grads(False)
    tensors, ctx.scalars = inputs[:-3], inputs[-3:]
    ctx.num_inputs = len(inputs)
    differentiable = 5 if len(tensors) == 9 else 2  # q, k, v, table, pad_value; or qkv, table
    ctx.save_for_backward(*tensors[:differentiable], out, lse, *tensors[differentiable:])


def _lse_like(x: Tensor, num_heads: int, rows: int) -> Tensor:
    return x.new_empty(x.shape[0], num_heads, rows, dtype=accumulation_dtype(x.dtype))


def _grad_sums_like(x: Tensor, shape: tuple[int, ...], needed: bool) -> Tensor:
    return x.new_empty(shape if needed else (0,), dtype=accumulation_dtype(x.dtype))


def _block_diagonal_fake(qkv: Tensor, table: Tensor | None, *rest) -> tuple[Tensor, Tensor]:
    *sizes, channels = qkv.shape
    return qkv.new_empty(*sizes, channels // 3), _lse_like(qkv, rest[-3], sizes[1] * sizes[2])


def _block_diagonal_backward_fake(
    grad_out: Tensor, qkv: Tensor, table: Tensor | None, *rest
) -> tuple[Tensor, Tensor]:
    need_qkv, need_table = rest[-2:]
    table_shape = () if table is None else table.shape
    return (
        qkv.new_empty(qkv.shape if need_qkv else (0,)),
        _grad_sums_like(qkv, table_shape, need_table and table is not None),
    )


def _window_fake(q: Tensor, k: Tensor | None, *rest) -> tuple[Tensor, Tensor]:
    batch, rows, *width = q.shape
    channels = width[0] // 3 if k is None else width[0] * width[1]
    return q.new_empty(batch, rows, channels), _lse_like(q, rest[-3], rows)


def _window_backward_fake(
    grad_out: Tensor,
    q: Tensor,
    k: Tensor | None,
    v: Tensor | None,
    table: Tensor | None,
    pad_value: Tensor | None,
    *rest,
) -> tuple[Tensor, ...]:
    num_heads, _, _, need_qkv, need_table, need_pad = rest[-6:]
    if not need_qkv:
        grads = [q.new_empty(0) for _ in range(3)]
    elif k is None or v is None:
        grads = [q.new_empty(q.shape), q.new_empty(0), q.new_empty(0)]
    else:
        grads = [torch.empty_like(with_rows(x)) for x in (q, k, v)]
    table_shape = () if table is None else table.shape
    pad_shape = () if pad_value is None else (2 * pad_value.shape[0] // 3 // num_heads, num_heads)
    return (
        *grads,
        _grad_sums_like(q, table_shape, need_table and table is not None),
        _grad_sums_like(q, pad_shape, need_pad and pad_value is not None),
    )


def _pad_gradient(grad: Tensor, pad_value: Tensor) -> Tensor:
    """[2 D, heads] -> [3C], with zeros for q: padding has no queries."""
    of_keys = grad.unflatten(0, (2, -1)).transpose(1, 2).flatten()
    queries = of_keys.new_zeros(len(pad_value) - len(of_keys))
    return torch.cat([queries, of_keys]).to(pad_value.dtype)


def _register_attention(variant: str) -> None:
    def block_diagonal_backward(ctx, grad_out: Tensor | None, grad_lse: Tensor | None):
        needed = ctx.needs_input_grad[:2]
        grads = (None, None)
        if grad_out is not None and any(needed):
            backward = operator("block_diagonal_attention_backward", variant)
            grads = backward(grad_out, *ctx.saved_tensors, *ctx.scalars, *needed)
        return if_needed(grads, needed, ctx.num_inputs)

    def window_backward(ctx, grad_out: Tensor | None, grad_lse: Tensor | None):
        needed = ctx.needs_input_grad[:5]
        grads = (None,) * 5
        if grad_out is not None and any(needed):
            backward = operator("group_window_attention_backward", variant)
            saved = ctx.saved_tensors  # read once: checkpointing does not give them twice
            need_grads = any(needed[:3]), *needed[3:]
            *grads, grad_pad = backward(grad_out, *saved, *ctx.scalars, *need_grads)
            grads.append(_pad_gradient(grad_pad, saved[4]) if needed[4] else None)
        return if_needed(grads, needed, ctx.num_inputs)

    rules: dict[str, tuple[Callable, Callable, Callable]] = {
        "block_diagonal_attention": (
            _block_diagonal_fake,
            block_diagonal_backward,
            _block_diagonal_backward_fake,
        ),
        "group_window_attention": (_window_fake, window_backward, _window_backward_fake),
    }
    for name, (fake, backward, backward_fake) in rules.items():
        _register(name, variant, fake, backward, _setup_attention)
        _register_once_differentiable(name, variant, backward_fake)


def _register_once_differentiable(name: str, variant: str, fake: Callable) -> None:
    """Registers an operator's backward pass, which refuses to be differentiated."""

    def refuse(ctx, *grads):
        raise RuntimeError(
            f"{name} has no second derivative; to get one, run it inside"
            ' greenmim_kernels.use_backend("reference")'
        )

    _register(name + "_backward", variant, fake, refuse, lambda ctx, inputs, output: None)


def if_needed(grads, needed: tuple[bool, ...], num_inputs: int) -> tuple[Tensor | None, ...]:
    """None in place of gradients that were not asked for, and for all further inputs."""
    kept = [grad if need else None for grad, need in zip(grads, needed, strict=True)]
    return *kept, *(None,) * (num_inputs - len(needed))


# --- the convolution of visible tokens ----------------------------------------------------------


def _conv_fake(x: Tensor, weight: Tensor, bias: Tensor | None, neighbours: Tensor) -> Tensor:
    return x.new_empty(x.shape)


def _conv_backward_fake(
    grad_out: Tensor,
    x: Tensor,
    weight: Tensor,
    neighbours: Tensor,
    need_x: bool,
    need_weight: bool,
    need_bias: bool,
) -> tuple[Tensor, ...]:
    return (
        x.new_empty(x.shape if need_x else (0,)),
        weight.new_empty(weight.shape if need_weight else (0,)),
        weight.new_empty(weight.shape[:1] if need_bias else (0,)),
    )


def _conv_setup(ctx, inputs, output) -> None:
    x, weight, _, neighbours = inputs
    ctx.save_for_backward(x, weight, neighbours)


def _register_conv(variant: str) -> None:
    def backward(ctx, grad_out: Tensor):
        needed = ctx.needs_input_grad[:3]
        run = operator("sparse_depthwise_conv_backward", variant)
        return if_needed(run(grad_out, *ctx.saved_tensors, *needed), needed, 4)

    name = "sparse_depthwise_conv"
    _register(name, variant, _conv_fake, backward, _conv_setup)
    _register_once_differentiable(name, variant, _conv_backward_fake)


# --- linear layers by oneDNN: on a CPU alone; their autograd rules are in `onednn` ---------------

# x [..., I], weight [O, I], bias [O], grad [..., O], all float32. An MLP: a layer, GELU, a layer;
# hidden is GELU's result, slope its derivative.
_library.define("onednn_linear(Tensor x, Tensor weight, Tensor? bias) -> Tensor")
_library.define(
    "onednn_linear_backward(Tensor grad, Tensor x, Tensor weight, bool need_x, bool need_weight,"
    " bool need_bias) -> (Tensor grad_x, Tensor grad_weight, Tensor grad_bias)"
)
_library.define(
    "onednn_mlp(Tensor x, Tensor weight1, Tensor? bias1, Tensor weight2, Tensor? bias2)"
    " -> (Tensor out, Tensor hidden, Tensor slope)"
)
_library.define(
    "onednn_mlp_backward(Tensor grad, Tensor x, Tensor hidden, Tensor slope, Tensor weight1,"
    " Tensor weight2, bool need_x, bool need_weight1, bool need_bias1, bool need_weight2,"
    " bool need_bias2) -> (Tensor grad_x, Tensor grad_weight1, Tensor grad_bias1,"
    " Tensor grad_weight2, Tensor grad_bias2)"
)


def _linear_fake(x: Tensor, weight: Tensor, bias: Tensor | None) -> Tensor:
    return x.new_empty(*x.shape[:-1], weight.shape[0])


def _linear_backward_fake(
    grad: Tensor, x: Tensor, weight: Tensor, need_x: bool, need_weight: bool, need_bias: bool
) -> tuple[Tensor, ...]:
    shapes = x.shape, weight.shape, weight.shape[:1]
    return _empty_unless_needed(grad, shapes, (need_x, need_weight, need_bias))


def _mlp_fake(x: Tensor, weight1: Tensor, bias1, weight2: Tensor, bias2) -> tuple[Tensor, ...]:
    widths = weight2.shape[0], weight1.shape[0], weight1.shape[0]
    return tuple(x.new_empty(*x.shape[:-1], width) for width in widths)


def _mlp_backward_fake(
    grad: Tensor,
    x: Tensor,
    hidden: Tensor,
    slope: Tensor,
    weight1: Tensor,
    weight2: Tensor,
    *needed: bool,
) -> tuple[Tensor, ...]:
    biases = weight1.shape[:1], weight2.shape[:1]
    return _empty_unless_needed(
        grad, (x.shape, weight1.shape, biases[0], weight2.shape, biases[1]), needed
    )


_linear_rules: dict[str, Callable] = {
    "onednn_linear": _linear_fake,
    "onednn_linear_backward": _linear_backward_fake,
    "onednn_mlp": _mlp_fake,
    "onednn_mlp_backward": _mlp_backward_fake,
}
for _name, _fake in _linear_rules.items():
    torch.library.register_fake(add_op_namespace_prefix(_name), _on_one_device(_name, _fake))


def _empty_unless_needed(
    grad: Tensor, shapes: tuple, needed: tuple[bool, ...]
) -> tuple[Tensor, ...]:
    return tuple(
        grad.new_empty(shape if need else (0,)) for shape, need in zip(shapes, needed, strict=True)
    )


for _variant in VARIANTS:
    _register_gather_scatter(_variant)
    _register_attention(_variant)
    _register_conv(_variant)

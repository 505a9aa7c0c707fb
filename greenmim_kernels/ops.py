"""Registration of the operators: schema, shape rule and autograd rule of each, once.

The schemas live in the namespace ``greenmim``. The compiled modules only add kernels: ``_C`` under
the CPU key, ``_C_cuda`` under the CUDA key, and the dispatcher picks by device. Triton's kernels
stand beside them under names of their own, ``<operator>_triton``, with the same rules; which of the
two is called is decided in Python. Backward passes are operators of their own. Conventions of every
schema:

- qkv [B, N, 3C] or [B, G, S, 3C]; table [rows, heads] in the accumulation dtype, or None;
- token_index, window_id, query_row, key_row [P, G, S]: int32, P = 1 or B, as in a GroupPartition;
- lse [B, heads, rows]: log of the softmax's denominator, in the accumulation dtype; not
  differentiable, kept for the backward pass;
- a gradient that is not asked for comes back as an empty tensor.
"""

from __future__ import annotations

import contextlib
from collections.abc import Callable

import torch
from torch import Tensor

from .reference import accumulation_dtype

NAMESPACE = "greenmim"
_WINDOWS = "Tensor window_id, Tensor query_row, Tensor key_row, int num_heads, float scale"
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
        f"(Tensor qkv, Tensor? table, Tensor token_index, {_WINDOWS}) -> (Tensor out, Tensor lse)"
    ),
    "group_window_attention_backward": (
        "(Tensor grad_out, Tensor qkv, Tensor? table, Tensor out, Tensor lse, Tensor token_index,"
        f" {_WINDOWS}, bool need_qkv, bool need_table) -> (Tensor grad_qkv, Tensor grad_table)"
    ),
}

# The compiled kernels, and Triton's.
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


_library = torch.library.Library(NAMESPACE, "DEF")
for _name, _schema in SCHEMAS.items():
    for _variant in VARIANTS:
        _library.define(_name + _variant + _schema)
    for _key in ("CUDA", "CPU"):  # the CPU through Triton's interpreter
        _library.impl(_name + "_triton", _triton_kernel(_name), _key)


def operator(name: str, variant: str = "") -> Callable:
    """The registered operator, for example ``operator("group_gather", "_triton")``."""
    return getattr(getattr(torch.ops, NAMESPACE), name + variant).default


def _register(
    name: str, variant: str, fake: Callable, backward: Callable, setup_context: Callable
) -> None:
    qualified = f"{NAMESPACE}::{name}{variant}"
    torch.library.register_fake(qualified, fake)
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


def _register_copies(variant: str) -> None:
    def gather_backward(ctx, grad: Tensor):
        (token_index,) = ctx.saved_tensors
        return operator("group_scatter", variant)(grad, token_index, ctx.num_tokens), None

    def scatter_backward(ctx, grad: Tensor):
        (token_index,) = ctx.saved_tensors
        return operator("group_gather", variant)(grad, token_index), None, None

    _register("group_gather", variant, _gather_fake, gather_backward, _gather_setup)
    _register("group_scatter", variant, _scatter_fake, scatter_backward, _scatter_setup)


# --- attention: the fused and the grouped form share one rule -----------------------------------


def _register_attention(name: str, variant: str, num_index_tensors: int) -> None:
    """`num_index_tensors`: how many partition tensors stand between table and num_heads."""

    def fake(qkv: Tensor, table: Tensor | None, *rest) -> tuple[Tensor, Tensor]:
        num_heads = rest[num_index_tensors]
        batch, *rows, channels = qkv.shape
        num_rows = rows[0] * rows[1] if len(rows) == 2 else rows[0]
        lse_dtype = accumulation_dtype(qkv.dtype)
        return (
            qkv.new_empty(batch, *rows, channels // 3),
            qkv.new_empty(batch, num_heads, num_rows, dtype=lse_dtype),
        )

    def setup_context(ctx, inputs, output) -> None:
        qkv, table, *rest = inputs
        out, lse = output
        ctx.mark_non_differentiable(lse)
        ctx.set_materialize_grads(False)
        ctx.sizes = rest[num_index_tensors:]
        ctx.save_for_backward(qkv, table, out, lse, *rest[:num_index_tensors])

    def backward(ctx, grad_out: Tensor | None, grad_lse: Tensor | None):
        nothing = (None,) * (num_index_tensors + len(ctx.sizes))
        need_qkv, need_table = ctx.needs_input_grad[:2]
        if grad_out is None or not (need_qkv or need_table):
            return None, None, *nothing
        grad_qkv, grad_table = operator(name + "_backward", variant)(
            grad_out, *ctx.saved_tensors, *ctx.sizes, need_qkv, need_table
        )
        return grad_qkv if need_qkv else None, grad_table if need_table else None, *nothing

    def backward_fake(
        grad_out: Tensor, qkv: Tensor, table: Tensor | None, out: Tensor, lse: Tensor, *rest
    ) -> tuple[Tensor, Tensor]:
        need_qkv, need_table = rest[-2:]
        grad_qkv = qkv.new_empty(qkv.shape if need_qkv else (0,))
        shape = table.shape if need_table and table is not None else (0,)
        return grad_qkv, qkv.new_empty(shape, dtype=lse.dtype)

    def refuse(ctx, *grads):
        raise RuntimeError(
            f"{name} has no second derivative; for one, run it inside"
            ' greenmim_kernels.use_backend("reference")'
        )

    _register(name, variant, fake, backward, setup_context)
    _register(name + "_backward", variant, backward_fake, refuse, lambda ctx, inputs, output: None)


# --- linear layers on a CPU: kernels of _C alone, with oneDNN; autograd is the caller's ---------

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


@torch.library.register_fake(f"{NAMESPACE}::onednn_linear")
def _linear_fake(x: Tensor, weight: Tensor, bias: Tensor | None) -> Tensor:
    return x.new_empty(*x.shape[:-1], weight.shape[0])


@torch.library.register_fake(f"{NAMESPACE}::onednn_linear_backward")
def _linear_backward_fake(
    grad: Tensor, x: Tensor, weight: Tensor, need_x: bool, need_weight: bool, need_bias: bool
) -> tuple[Tensor, Tensor, Tensor]:
    shapes = x.shape, weight.shape, weight.shape[:1]
    return _needed(grad, shapes, (need_x, need_weight, need_bias))


@torch.library.register_fake(f"{NAMESPACE}::onednn_mlp")
def _mlp_fake(x: Tensor, weight1: Tensor, bias1, weight2: Tensor, bias2) -> tuple[Tensor, ...]:
    widths = weight2.shape[0], weight1.shape[0], weight1.shape[0]
    return tuple(x.new_empty(*x.shape[:-1], width) for width in widths)


@torch.library.register_fake(f"{NAMESPACE}::onednn_mlp_backward")
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
    return _needed(grad, (x.shape, weight1.shape, biases[0], weight2.shape, biases[1]), needed)


def _needed(grad: Tensor, shapes: tuple, needed: tuple[bool, ...]) -> tuple[Tensor, ...]:
    return tuple(
        grad.new_empty(shape if need else (0,)) for shape, need in zip(shapes, needed, strict=True)
    )


for _variant in VARIANTS:
    _register_copies(_variant)
    _register_attention("block_diagonal_attention", _variant, num_index_tensors=3)
    _register_attention("group_window_attention", _variant, num_index_tensors=4)

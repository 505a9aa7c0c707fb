"""The public operators: check the inputs, choose the backend, call it."""

from __future__ import annotations

import torch
from torch import Tensor

from . import reference
from .backends import choose_backend
from .ops import operator
from .partition import GroupPartition

# Under which of an operator's two names a backend is registered (see `ops`).
VARIANT = {"cpp": "", "cuda": "", "triton": "_triton"}


def group_gather(x: Tensor, part: GroupPartition) -> Tensor:
    """Bring the tokens of every group together.

    Args:
        x: floating point tensor [B, N, C], N = ``part.num_tokens``.
        part: partition with P = 1 or P = B, on the device of `x`.

    Returns:
        Tensor [B, G, S, C] of the same dtype, zeros in padding slots. Differentiable.

    Raises:
        ValueError: shapes, dtypes or devices that do not fit, or a forced backend that cannot.
    """
    _check_tokens("x", x, part)
    backend = choose_backend("group_gather", x.device, x.dtype)
    if backend == "reference":
        return reference.group_gather(x, part.token_index)
    return operator("group_gather", VARIANT[backend])(x, part.token_index)


def group_scatter(x: Tensor, part: GroupPartition) -> Tensor:
    """Put the tokens of every group back in row-major order: the inverse of :func:`group_gather`.

    Args:
        x: floating point tensor [B, G, S, C]; its padding slots are not read.
        part: partition with P = 1 or P = B, on the device of `x`.

    Returns:
        Tensor [B, N, C] of the same dtype. Differentiable; the gradient of padding is zero.

    Raises:
        ValueError: shapes, dtypes or devices that do not fit, or a forced backend that cannot.
    """
    _check_groups("x", x, part)
    backend = choose_backend("group_scatter", x.device, x.dtype)
    if backend == "reference":
        return reference.group_scatter(x, part.token_index, part.num_tokens)
    return operator("group_scatter", VARIANT[backend])(x, part.token_index, part.num_tokens)


def block_diagonal_attention(
    qkv: Tensor,
    table: Tensor | None,
    part: GroupPartition,
    num_heads: int,
    scale: float | None = None,
) -> Tensor:
    """Window attention on gathered groups: a slot attends to the slots of its window, exactly.

    In a partition with padding that attends, its slots are like those of tokens: qkv is read there.

    Args:
        qkv: floating point tensor [B, G, S, 3C]; the last axis holds q, k, v blocks of C, each
            num_heads x head_dim. Padding slots are never read.
        table: relative position bias [part.table_rows, num_heads] of any float dtype, or None;
            for windows of M tokens a side, prod(2 M - 1) rows as in Swin.
        part: partition with P = 1 or P = B, on the device of `qkv`.
        num_heads: number of heads; divides C.
        scale: factor of q . k; head_dim ** -0.5 if None.

    Returns:
        Tensor [B, G, S, C] in the dtype of `qkv`, zeros in padding slots. Softmax and sums run in
        fp32 (fp64 for fp64). Differentiable in `qkv` and `table`.

    Raises:
        ValueError: shapes, dtypes or devices that do not fit, or a forced backend that cannot.
    """
    _check_groups("qkv", qkv, part)
    head_dim = _head_dim(qkv, num_heads)
    table = _check_table(table, part, num_heads, qkv)
    sizes = (num_heads, part.window_slots, _number(scale, head_dim))
    arguments = (qkv, table, *part.tensors[1:], *sizes)
    name = "block_diagonal_attention"
    backend = _backend_of(name, qkv, table, part, head_dim)
    if backend == "reference":
        return reference.block_diagonal_attention(*arguments)
    return operator(name, VARIANT[backend])(*arguments)[0]


def group_window_attention(
    qkv: Tensor | tuple[Tensor, Tensor, Tensor],
    table: Tensor | None,
    part: GroupPartition,
    num_heads: int,
    scale: float | Tensor | None = None,
    pad_value: Tensor | None = None,
) -> Tensor:
    """Window attention on visible tokens: gather, attention and scatter in one pass.

    Equal to ``group_scatter(block_diagonal_attention(group_gather(qkv, part), ...), part)``
    without anything of the size of the groups in memory.

    Args:
        qkv: floating point tensor [B, N, 3C], tokens in row-major order of their grid; the last
            axis holds q, k, v blocks of C, each num_heads x head_dim. Or (q, k, v), [B, N,
            num_heads, head_dim] each, which are read where they lie, whatever their strides, if the
            elements of a head are neighbours; their gradients are laid out like them.
        table: relative position bias [part.table_rows, num_heads] of any float dtype, or None;
            for windows of M tokens a side, prod(2 M - 1) rows as in Swin.
        part: partition with P = 1 or P = B, on the device of `qkv`.
        num_heads: number of heads; divides C.
        scale: factor of q . k: a number, or a tensor [] or [num_heads], by which q is multiplied
            in its own dtype (cosine attention); head_dim ** -0.5 if None.
        pad_value: [3C], the q, k and v of the padding that attends in a partition made with
            ``pad=True`` (for Swin: the bias of its qkv layer); None: zeros.

    Returns:
        Tensor [B, N, C] in the dtype of `qkv`, zeros for tokens in no window. Softmax and sums run
        in fp32 (fp64 for fp64). Differentiable in all but the partition; a gradient comes in the
        dtype of its tensor.

    A value that is not finite reaches the tokens of its group at most; in the "cpp" backend, which
    works window by window, those of its window.

    Raises:
        ValueError: shapes, dtypes or devices that do not fit, or a forced backend that cannot.
    """
    if isinstance(qkv, Tensor):
        _check_tokens("qkv", qkv, part)
        head_dim = _head_dim(qkv, num_heads)
    else:
        head_dim = _check_three(qkv, part, num_heads)
    table = _check_table(table, part, num_heads, qkv if isinstance(qkv, Tensor) else qkv[0])
    if isinstance(scale, Tensor):
        if scale.numel() not in (1, num_heads) or scale.dim() > 1:
            raise ValueError(
                f"scale must be a number or a tensor [] or [{num_heads}], got {list(scale.shape)}"
            )
        if isinstance(qkv, Tensor):
            qkv = qkv.unflatten(-1, (3, num_heads, head_dim)).unbind(2)
        q, k, v = qkv
        qkv, scale = ((q * scale.to(q.device).view(-1, 1)).to(q.dtype), k, v), 1.0
    if isinstance(qkv, Tensor):
        q, k, v = qkv.contiguous(), None, None
    else:
        q, k, v = map(reference.with_rows, qkv)
    if pad_value is not None:
        if pad_value.shape != (3 * num_heads * head_dim,) or pad_value.device != q.device:
            raise ValueError(
                f"pad_value must be [{3 * num_heads * head_dim}] on {q.device}, got"
                f" {list(pad_value.shape)} on {pad_value.device}"
            )
        pad_value = pad_value.to(q.dtype)
    sizes = (num_heads, part.window_slots, _number(scale, head_dim))
    arguments = (q, k, v, table, pad_value, *part.tensors, *sizes)
    name = "group_window_attention"
    backend = _backend_of(name, q, table, part, head_dim)
    if backend == "reference":
        return reference.group_window_attention(*arguments)
    return operator(name, VARIANT[backend])(*arguments)[0]


def sparse_depthwise_conv(
    x: Tensor, weight: Tensor, bias: Tensor | None, neighbours: Tensor
) -> Tensor:
    """Depthwise 3 x 3 convolution of visible tokens; hidden neighbours count as zero.

    Equal to putting the tokens on a map of zeros, ``conv2d`` with a padding of 1 and one group per
    channel, and taking the visible tokens again, without the map.

    Args:
        x: floating point tensor [B, N, C].
        weight: [C, 1, 3, 3] as of ``nn.Conv2d``, or [C, 9], of any float dtype.
        bias: [C], or None.
        neighbours: int32 [P, N, 9] with P = 1 or B, on the device of `x`: the token under each of
            the kernel's places, row by row, or -1; see :func:`greenmim_kernels.grid_neighbours`.
            Tokens may be numbered in any order, but who has a neighbour is that one's, at the
            opposite place: on this the gradient relies. Kernels on a GPU trust it.

    Returns:
        Tensor [B, N, C] of the dtype of `x`. Sums run in fp32 (fp64 for fp64). Differentiable in
        `x`, `weight` and `bias`.

    Raises:
        ValueError: shapes, dtypes or devices that do not fit, or a forced backend that cannot.
    """
    if x.dim() != 3 or not x.dtype.is_floating_point:
        raise ValueError(f"x must be floating point [B, N, C], got {x.dtype} {list(x.shape)}")
    batch, tokens, channels = x.shape
    if tuple(weight.shape) not in ((channels, 1, 3, 3), (channels, 9)):
        raise ValueError(
            f"weight must be [{channels}, 1, 3, 3] or [{channels}, 9], got {list(weight.shape)}"
        )
    if bias is not None and tuple(bias.shape) != (channels,):
        raise ValueError(f"bias must be [{channels}], got {list(bias.shape)}")
    for name, value in (("weight", weight), ("bias", bias)):
        if value is not None and not value.dtype.is_floating_point:
            raise ValueError(f"{name} must be floating point, got {value.dtype}")
    if tuple(neighbours.shape[1:]) != (tokens, 9) or neighbours.dtype != torch.int32:
        raise ValueError(
            f"neighbours must be int32 [1 or {batch}, {tokens}, 9], got {neighbours.dtype}"
            f" {list(neighbours.shape)}; make them with grid_neighbours"
        )
    if neighbours.shape[0] not in (1, batch):
        raise ValueError(
            f"neighbours are of {neighbours.shape[0]} images and x a batch of {batch}; give those"
            " of one mask for the batch or of one per image"
        )
    for name, value in (("weight", weight), ("bias", bias), ("neighbours", neighbours)):
        if value is not None and value.device != x.device:
            raise ValueError(f"{name} is on {value.device} and x on {x.device}")
    dtype = reference.accumulation_dtype(x.dtype)
    weight = weight.flatten(1).to(dtype)
    bias = None if bias is None else bias.to(dtype)
    name = "sparse_depthwise_conv"
    backend = choose_backend(name, x.device, x.dtype)
    if backend == "reference":
        return reference.sparse_depthwise_conv(x, weight, bias, neighbours)
    return operator(name, VARIANT[backend])(x, weight, bias, neighbours)


def _number(scale: float | None, head_dim: int) -> float:
    return head_dim**-0.5 if scale is None else float(scale)


def _backend_of(
    name: str, x: Tensor, table: Tensor | None, part: GroupPartition, head_dim: int
) -> str:
    rows = None if table is None else table.shape[0]
    return choose_backend(name, x.device, x.dtype, head_dim, part.group_size, rows)


def _check_tokens(name: str, x: Tensor, part: GroupPartition) -> None:
    if x.dim() != 3:
        raise ValueError(f"{name} must be [B, N, C], got shape {list(x.shape)}")
    if x.shape[1] != part.num_tokens:
        raise ValueError(_counts(name, x, part))
    _check_common(name, x, part)


def _counts(name: str, x: Tensor, part: GroupPartition) -> str:
    return (
        f"{name} has {x.shape[1]} tokens per image, the partition {part.num_tokens};"
        " make the partition from the grid these tokens come from"
    )


def _check_groups(name: str, x: Tensor, part: GroupPartition) -> None:
    if x.dim() != 4 or x.shape[1] != part.num_groups or x.shape[2] != part.group_size:
        raise ValueError(
            f"{name} must be [B, {part.num_groups} groups, {part.group_size} slots, C] for this"
            f" partition, got shape {list(x.shape)}"
        )
    _check_common(name, x, part)


def _check_common(name: str, x: Tensor, part: GroupPartition) -> None:
    if not x.dtype.is_floating_point:
        raise ValueError(f"{name} must be floating point, got {x.dtype}")
    num_partitions = part.token_index.shape[0]
    if num_partitions != 1 and num_partitions != x.shape[0]:
        raise ValueError(
            f"the partition holds {num_partitions} images' windows and {name} a batch of"
            f" {x.shape[0]}; give one mask for the batch or one per image"
        )
    for tensor in part.tensors:
        if tensor.device != x.device:
            raise ValueError(
                f"the partition is on {tensor.device} and {name} on {x.device};"
                " move it with part.to(device)"
            )


def _check_three(qkv: tuple[Tensor, Tensor, Tensor], part: GroupPartition, num_heads: int) -> int:
    """The head dim of (q, k, v)."""
    if not isinstance(qkv, (tuple, list)) or len(qkv) != 3:
        raise ValueError("qkv must be a tensor [B, N, 3C] or three, (q, k, v)")
    q = qkv[0]
    if any(x.dim() != 4 or x.shape != q.shape for x in qkv) or q.shape[2] != num_heads:
        raise ValueError(
            f"q, k and v must all be [B, N, {num_heads} heads, head_dim], got shapes"
            f" {', '.join(str(list(x.shape)) for x in qkv)}"
        )
    if any(x.dtype != q.dtype or x.device != q.device for x in qkv):
        raise ValueError(
            "q, k and v must have one dtype and be on one device, got"
            f" {', '.join(f'{x.dtype} on {x.device}' for x in qkv)}; convert them, as with q.to(v)"
        )
    if q.shape[1] != part.num_tokens:
        raise ValueError(_counts("q", q, part))
    if q.shape[3] == 0:
        raise ValueError("the head dim of q, k and v must not be 0")
    _check_common("q", q, part)
    return q.shape[3]


def _head_dim(qkv: Tensor, num_heads: int) -> int:
    if num_heads < 1 or qkv.shape[-1] == 0 or qkv.shape[-1] % (3 * num_heads):
        raise ValueError(
            f"the last axis of qkv must hold 3 x num_heads x head_dim values,"
            f" got {qkv.shape[-1]} with num_heads = {num_heads}"
        )
    return qkv.shape[-1] // (3 * num_heads)


def _check_table(
    table: Tensor | None, part: GroupPartition, num_heads: int, x: Tensor
) -> Tensor | None:
    """The table in the accumulation dtype."""
    if table is None:
        return None
    if part.table_rows == 0:
        raise ValueError("this partition knows no bias; make it with window_size or bias_index")
    rows = part.table_rows
    if rows is None:
        rows = table.shape[0] if table.dim() else 0
    if tuple(table.shape) != (rows, num_heads):
        windows = "this partition"
        if part.window_size is not None:
            windows = f"windows {' x '.join(map(str, part.window_size))}"
        raise ValueError(
            f"the bias table of {windows} with {num_heads} heads must be"
            f" {[rows, num_heads]}, got {list(table.shape)}"
        )
    if not table.dtype.is_floating_point:
        raise ValueError(f"the bias table must be floating point, got {table.dtype}")
    if table.device != x.device:
        raise ValueError(f"the bias table is on {table.device} and qkv on {x.device}")
    return table.to(reference.accumulation_dtype(x.dtype))

"""The public operators: check the inputs, choose the backend, call it."""

from __future__ import annotations

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
    table, scale = _check_attention(qkv, table, part, num_heads, scale)
    arguments = (qkv, table, *part.tensors[1:], num_heads, scale)
    name = "block_diagonal_attention"
    head_dim = qkv.shape[-1] // (3 * num_heads)
    table_rows = None if table is None else len(table)
    backend = choose_backend(name, qkv.device, qkv.dtype, head_dim, part.group_size, table_rows)
    if backend == "reference":
        return reference.block_diagonal_attention(*arguments)
    return operator(name, VARIANT[backend])(*arguments)[0]


def group_window_attention(
    qkv: Tensor,
    table: Tensor | None,
    part: GroupPartition,
    num_heads: int,
    scale: float | None = None,
) -> Tensor:
    """Window attention on visible tokens: gather, attention and scatter in one pass.

    Equal to ``group_scatter(block_diagonal_attention(group_gather(qkv, part), ...), part)``
    without anything of the size of the groups in memory.

    Args:
        qkv: floating point tensor [B, N, 3C], tokens in row-major order of their grid; the last
            axis holds q, k, v blocks of C, each num_heads x head_dim.
        table: relative position bias [part.table_rows, num_heads] of any float dtype, or None;
            for windows of M tokens a side, prod(2 M - 1) rows as in Swin.
        part: partition with P = 1 or P = B, on the device of `qkv`.
        num_heads: number of heads; divides C.
        scale: factor of q . k; head_dim ** -0.5 if None.

    Returns:
        Tensor [B, N, C] in the dtype of `qkv`. Softmax and sums run in fp32 (fp64 for fp64).
        Differentiable in `qkv` and `table`; the table's gradient comes in the table's dtype.

    A value that is not finite reaches the tokens of its group at most; in the "cpp" backend, which
    works window by window, those of its window.

    Raises:
        ValueError: shapes, dtypes or devices that do not fit, or a forced backend that cannot.
    """
    _check_tokens("qkv", qkv, part)
    table, scale = _check_attention(qkv, table, part, num_heads, scale)
    arguments = (qkv, table, *part.tensors, num_heads, scale)
    name = "group_window_attention"
    head_dim = qkv.shape[-1] // (3 * num_heads)
    table_rows = None if table is None else len(table)
    backend = choose_backend(name, qkv.device, qkv.dtype, head_dim, part.group_size, table_rows)
    if backend == "reference":
        return reference.group_window_attention(*arguments)
    return operator(name, VARIANT[backend])(*arguments)[0]


def _check_tokens(name: str, x: Tensor, part: GroupPartition) -> None:
    if x.dim() != 3:
        raise ValueError(f"{name} must be [B, N, C], got shape {list(x.shape)}")
    if x.shape[1] != part.num_tokens:
        raise ValueError(
            f"{name} has {x.shape[1]} tokens per image, the partition {part.num_tokens};"
            " make the partition from the grid these tokens come from"
        )
    _check_common(name, x, part)


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


def _check_attention(
    qkv: Tensor, table: Tensor | None, part: GroupPartition, num_heads: int, scale: float | None
) -> tuple[Tensor | None, float]:
    """Returns the table in the accumulation dtype, and the scale."""
    if num_heads < 1 or qkv.shape[-1] == 0 or qkv.shape[-1] % (3 * num_heads):
        raise ValueError(
            f"the last axis of qkv must hold 3 x num_heads x head_dim values,"
            f" got {qkv.shape[-1]} with num_heads = {num_heads}"
        )
    if table is not None:
        if part.table_rows == 0:
            raise ValueError("this partition knows no bias; make it with window_size or bias_index")
        rows = len(table) if part.table_rows is None else part.table_rows
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
        if table.device != qkv.device:
            raise ValueError(f"the bias table is on {table.device} and qkv on {qkv.device}")
        table = table.to(reference.accumulation_dtype(qkv.dtype))
    if scale is None:
        scale = (qkv.shape[-1] // (3 * num_heads)) ** -0.5
    return table, float(scale)

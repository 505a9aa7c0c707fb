"""The public operators: check the inputs, choose the backend, call it."""

from __future__ import annotations

import torch
from torch import Tensor

from . import reference
from .backends import choose_backend
from .ops import operator
from .partition import GroupPartition

# The suffix of the operators' names under which a backend is registered (see `ops`).
VARIANT = {"cpp": "", "cuda": "", "triton": "_triton"}


def group_gather(x: Tensor, part: GroupPartition) -> Tensor:
    """Bring the tokens of every group together.

    Args:
        x: floating point tensor [B, N, C], N = ``part.num_tokens``.
        part: partition with P = 1 or P = B, on the device of `x`.

    Returns:
        Tensor [B, G, S, C] of the same dtype, zeros in padding slots. Differentiable.

    Raises:
        ValueError: shapes, dtypes or devices do not fit, or a forced backend cannot run this.
        RuntimeError: the backend in force cannot be used here.
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
        ValueError: shapes, dtypes or devices do not fit, or a forced backend cannot run this.
        RuntimeError: the backend in force cannot be used here.
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

    The formula is that of :func:`group_window_attention`. Slots of padding that attends count as
    tokens: `qkv` is read there.

    Args:
        qkv: floating point tensor [B, G, S, 3C]; the last axis holds q, k, v blocks of C, each
            num_heads x head_dim. Slots without a window are never read.
        table: relative position bias [part.table_rows, num_heads] of any float dtype, on the device
            of `qkv`, or None; for windows of M tokens a side, prod(2 M - 1) rows as in Swin.
        part: partition with P = 1 or P = B, on the device of `qkv`.
        num_heads: number of heads; divides C.
        scale: factor on q . k, a number; None means head_dim ** -0.5.

    Returns:
        Tensor [B, G, S, C] in the dtype of `qkv`, zeros in slots without a window. Softmax and sums
        run in fp32 (fp64 for fp64). Differentiable in `qkv` and `table`.

    Raises:
        ValueError: shapes, dtypes or devices do not fit, or a forced backend cannot run this.
        RuntimeError: the backend in force cannot be used here.
    """
    _check_groups("qkv", qkv, part)
    head_dim = _head_dim(qkv, num_heads)
    table = _check_table(table, part, num_heads, qkv)
    if isinstance(scale, Tensor) and (scale.numel() != 1 or scale.requires_grad):
        raise ValueError(
            "scale must be a number here; for one that is learned or per head, multiply q by it and"
            " pass scale=1.0"
        )
    scalars = (num_heads, part.window_slots, _number(scale, head_dim))
    arguments = (qkv, table, *part.tensors[1:], *scalars)
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

    For each head, out_i = sum_j softmax_j(scale q_i . k_j + table[query_row[i] + key_row[j]]) v_j,
    over the slots j in the window of i (Huang et al., NeurIPS 2022, arXiv 2205.13515, section 3.2,
    but other windows are excluded exactly). Equal to
    ``group_scatter(block_diagonal_attention(group_gather(qkv, part), ...), part)``, without storing
    anything of the size of the groups.

    A value that is not finite reaches the tokens of its group at most; in the "cpp" backend, which
    works window by window, those of its window.

    Args:
        qkv: floating point tensor [B, N, 3C], tokens in row-major order of their grid; the last
            axis holds q, k, v blocks of C, each num_heads x head_dim. Or (q, k, v), [B, N,
            num_heads, head_dim] each: read without a copy, with any strides, if the last axis alone
            has stride 1. Their gradients then have the same order of axes in memory.
        table: relative position bias [part.table_rows, num_heads] of any float dtype, on the device
            of `qkv`, or None; for windows of M tokens a side, prod(2 M - 1) rows as in Swin.
        part: partition with P = 1 or P = B, on the device of `qkv`.
        num_heads: number of heads; divides C.
        scale: factor on q . k: a number, or a tensor [] or [num_heads] (cosine attention), which
            multiplies q; the product is rounded to q's dtype. None means head_dim ** -0.5.
        pad_value: [3C] on the device of `qkv`, the q, k and v of the padding that attends in a
            partition made with ``pad=True`` (for Swin: the bias of its qkv layer). None: zeros.

    Returns:
        Tensor [B, N, C] in the dtype of `qkv`, zeros for tokens in no window. Softmax and sums run
        in fp32 (fp64 for fp64). Differentiable in all tensors but the partition's; a gradient has
        the dtype of its tensor.

    Raises:
        ValueError: shapes, dtypes or devices do not fit, or a forced backend cannot run this.
        RuntimeError: the backend in force cannot be used here.
    """
    if isinstance(qkv, Tensor):
        _check_tokens("qkv", qkv, part)
        head_dim = _head_dim(qkv, num_heads)
    else:
        head_dim = _check_separate(qkv, part, num_heads)
    table = _check_table(table, part, num_heads, qkv if isinstance(qkv, Tensor) else qkv[0])
    if isinstance(scale, Tensor):
        if scale.numel() not in (1, num_heads) or scale.dim() > 1:
            raise ValueError(
                f"scale must be a number or a tensor [] or [{num_heads}], got {list(scale.shape)}"
            )
        if isinstance(qkv, Tensor):
            qkv = qkv.unflatten(-1, (3, num_heads, head_dim)).unbind(2)
        q, k, v = qkv
        # In PyTorch: right for every scale, zero too, and the kernels multiply no pairs by it.
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
    scalars = (num_heads, part.window_slots, _number(scale, head_dim))
    arguments = (q, k, v, table, pad_value, *part.tensors, *scalars)
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
    channel, and taking the visible tokens out again, without the map. It is the convolution of the
    positional encoding in Twins (Chu et al., NeurIPS 2021, arXiv 2104.13840).

    Args:
        x: floating point tensor [B, N, C].
        weight: [C, 1, 3, 3] as in ``nn.Conv2d``, or [C, 9], of any float dtype.
        bias: [C] of any float dtype, or None.
        neighbours: int32 [P, N, 9] with P = 1 or B, on the device of `x`: the token at each place
            of the kernel, row by row, or -1; see :func:`greenmim_kernels.grid_neighbours`. Tokens
            may be in any order, but neighbours must be mutual: if b is at one place of a, then a is
            at the opposite place of b. The gradient relies on it; kernels on a GPU do not check it.

    Returns:
        Tensor [B, N, C] of the dtype of `x`. Sums run in fp32 (fp64 for fp64). Differentiable in
        `x`, `weight` and `bias`.

    Raises:
        ValueError: shapes, dtypes or devices do not fit, or a forced backend cannot run this.
        RuntimeError: the backend in force cannot be used here, or, on a CPU, neighbours are wrong.
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
            f"neighbours are of {neighbours.shape[0]} images and x a batch of {batch}; make them"
            " from one mask for the batch, or from one per image"
        )
    for name, value in (("weight", weight), ("bias", bias), ("neighbours", neighbours)):
        if value is not None and value.device != x.device:
            raise ValueError(
                f"{name} is on {value.device} and x on {x.device}; move them to one device"
            )
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
        raise ValueError(_wrong_count(name, x, part))
    _check_common(name, x, part)


def _wrong_count(name: str, x: Tensor, part: GroupPartition) -> str:
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
            f"the partition is of {num_partitions} images and {name} a batch of {x.shape[0]}; make"
            " it for one image (P = 1) or for each"
        )
    for tensor in part.tensors:
        if tensor.device != x.device:
            raise ValueError(
                f"the partition is on {tensor.device} and {name} on {x.device};"
                " move it with part.to(device)"
            )


def _check_separate(
    qkv: tuple[Tensor, Tensor, Tensor], part: GroupPartition, num_heads: int
) -> int:
    """The head dim of (q, k, v)."""
    if not isinstance(qkv, (tuple, list)) or len(qkv) != 3:
        raise ValueError("qkv must be one tensor [B, N, 3C], or a tuple of three, (q, k, v)")
    q = qkv[0]
    if any(x.dim() != 4 or x.shape != q.shape for x in qkv) or q.shape[2] != num_heads:
        raise ValueError(
            f"q, k and v must all be [B, N, {num_heads} heads, head_dim], got shapes"
            f" {', '.join(str(list(x.shape)) for x in qkv)}"
        )
    if any(x.dtype != q.dtype or x.device != q.device for x in qkv):
        raise ValueError(
            "q, k and v must have one dtype and be on one device, got"
            f" {', '.join(f'{x.dtype} on {x.device}' for x in qkv)}; convert them with q.to(v)"
        )
    if q.shape[1] != part.num_tokens:
        raise ValueError(_wrong_count("q", q, part))
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
        raise ValueError(
            "this partition has no bias table; make it with window_size or bias_index, or pass None"
        )
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
        raise ValueError(
            f"the bias table is on {table.device} and qkv on {x.device}; move them to one device"
        )
    return table.to(reference.accumulation_dtype(x.dtype))

"""Shapes, inputs and the error budget shared by the tests and the benchmarks.

The budget has no hand-tuned tolerance: a backend's error against the fp64 result may be a small
multiple of that of plain eager PyTorch in the same dtype, plus a rounding band of the dtype.
"""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Callable, Iterable

import numpy as np
import torch
from torch import Tensor

from .backends import use_backend
from .functional import group_gather, group_window_attention
from .neighbours import grid_neighbours
from .ops import operator
from .partition import GroupPartition, group_partition, partition_capacity
from .reference import accumulation_dtype

UNIT_PIXELS = 32
PATCH_PIXELS = 4


@dataclasses.dataclass(frozen=True)
class Case:
    """One attention layer: a stage of a Swin at some image size and mask ratio.

    Attributes:
        image_size: pixels (height, width), multiples of 32.
        stage: 1 to 4; the token grid is image / (4 * 2 ** (stage - 1)).
        window_size: M of the model; on an axis where the grid is no larger, the window is the grid.
        per_image: one mask per image instead of one for the batch.
        group_size: slots of a group; the cost model chooses if None.
        capacity: whether the partition is that of a training step: as many groups as any mask may
            need, of one size for all masks, and tokens numbered in the encoder's order.
    """

    image_size: tuple[int, int] = (224, 224)
    stage: int = 1
    window_size: int = 7
    shifted: bool = False
    batch: int = 2
    num_heads: int = 2
    head_dim: int = 32
    mask_ratio: float = 0.75
    per_image: bool = False
    group_size: int | None = None
    capacity: bool = False
    dtype: torch.dtype = torch.float32

    @property
    def channels(self) -> int:
        return self.num_heads * self.head_dim

    @property
    def scale(self) -> int:
        """Tokens per unit along an axis."""
        return UNIT_PIXELS // (PATCH_PIXELS * 2 ** (self.stage - 1))

    @property
    def grid(self) -> tuple[int, ...]:
        return tuple(side // UNIT_PIXELS * self.scale for side in self.image_size)

    def window_and_shift(self) -> tuple[tuple[int, ...], tuple[int, ...]]:
        window = tuple(min(self.window_size, side) for side in self.grid)
        shift = tuple(
            self.window_size // 2 if self.shifted and side > self.window_size else 0
            for side in self.grid
        )
        return window, shift

    def __str__(self) -> str:
        parts = [
            "x".join(map(str, self.image_size)),
            f"stage{self.stage}",
            f"window{self.window_size}" + ("s" if self.shifted else ""),
            f"B{self.batch}",
            f"{self.num_heads}x{self.head_dim}",
            f"r{self.mask_ratio:g}",
            str(self.dtype).removeprefix("torch."),
        ]
        parts += ["per_image"] * self.per_image + ["capacity"] * self.capacity
        return "-".join(parts)


def visible_tokens(case: Case, seed: int = 0) -> np.ndarray:
    """A random visible token grid, bool [H, W], or [B, H, W] with one mask per image."""
    rng = np.random.default_rng(seed)
    height, width = (side // UNIT_PIXELS for side in case.image_size)
    kept = max(1, int(height * width * (1 - case.mask_ratio)))
    units = np.zeros((case.batch if case.per_image else 1, height * width), dtype=bool)
    for row in units:
        row[rng.permutation(row.size)[:kept]] = True
    grids = units.reshape(-1, height, width).repeat(case.scale, 1).repeat(case.scale, 2)
    return grids if case.per_image else grids[0]


def make_partition(case: Case, seed: int = 0) -> GroupPartition:
    """The partition of a case's random mask, on the CPU."""
    window, shift = case.window_and_shift()
    visible = visible_tokens(case, seed)
    if not case.capacity:
        return group_partition(visible, window, shift, case.group_size)
    grids = visible.reshape(-1, *case.grid)
    numbers = np.stack([encoder_numbers(grid, case.scale) for grid in grids])
    size = (numbers.shape[1], case.group_size)
    capacity = partition_capacity(case.grid, window, shift, *size)
    part = group_partition(visible, window, shift, case.group_size, capacity)
    index = part.token_index.numpy()
    index = np.where(index < 0, -1, numbers[np.arange(len(numbers))[:, None, None], index])
    return dataclasses.replace(part, token_index=torch.from_numpy(index.astype(np.int32)))


def encoder_numbers(grid: np.ndarray, scale: int) -> np.ndarray:
    """The encoder's number of each visible token of a grid, row-major: unit by unit, and within a
    unit the four children of a token of the next stage together, column by column."""
    row, column = grid.nonzero()
    order = row // scale * grid.shape[1] + column // scale
    for half in (1 << bit for bit in reversed(range(scale.bit_length() - 1))):
        order = 4 * order + 2 * (column // half % 2) + row // half % 2
    return order.argsort().argsort()


@dataclasses.dataclass
class Inputs:
    """qkv [B, N, 3C], table [rows, heads] in at least fp32, grad_out [B, N, C], pad_value [3C]."""

    qkv: Tensor
    table: Tensor | None
    grad_out: Tensor
    part: GroupPartition
    num_heads: int
    pad_value: Tensor | None = None

    def to(self, dtype: torch.dtype) -> Inputs:
        table_dtype = torch.promote_types(dtype, torch.float32)
        return dataclasses.replace(
            self,
            qkv=self.qkv.to(dtype),
            table=None if self.table is None else self.table.to(table_dtype),
            grad_out=self.grad_out.to(dtype),
            pad_value=None if self.pad_value is None else self.pad_value.to(dtype),
        )


def make_inputs(case: Case, seed: int = 0, device: str = "cpu") -> Inputs:
    """Random inputs of a case, rounded to the case's dtype."""
    part = make_partition(case, seed)
    generator = torch.Generator().manual_seed(seed)

    def draw(*shape: int) -> Tensor:
        return torch.randn(*shape, generator=generator, dtype=torch.float32)

    inputs = Inputs(
        qkv=draw(case.batch, part.num_tokens, 3 * case.channels),
        table=draw(part.table_rows or 0, case.num_heads),
        grad_out=draw(case.batch, part.num_tokens, case.channels),
        part=part.to(device),
        num_heads=case.num_heads,
    ).to(case.dtype)
    for name in ("qkv", "table", "grad_out"):
        setattr(inputs, name, getattr(inputs, name).to(device))
    return inputs


def run(inputs: Inputs, attention=group_window_attention) -> dict[str, Tensor]:
    """Forward and backward with the backend in force: {"out", "grad_qkv", "grad_table"}, and
    "grad_pad" if there is a pad_value."""
    given = {"qkv": inputs.qkv, "table": inputs.table, "pad": inputs.pad_value}
    leaves = {k: x.detach().requires_grad_() for k, x in given.items() if x is not None}
    pad = {"pad_value": leaves["pad"]} if "pad" in leaves else {}
    out = attention(leaves["qkv"], leaves.get("table"), inputs.part, inputs.num_heads, **pad)
    grads = torch.autograd.grad(out, list(leaves.values()), inputs.grad_out)
    names = [f"grad_{name}" for name in leaves]
    return {"out": out.detach(), **dict(zip(names, grads, strict=True))}


def operator_arguments(
    name: str, inputs: Inputs, scale: float = 0.3, variant: str = "", three: bool = False
) -> tuple:
    """Arguments of an operator of `ops`; for a backward pass, with the results of its forward pass.

    three: q, k and v as three tensors with different strides, and a pad_value.
    """
    part, qkv, grad_out, table = inputs.part, inputs.qkv, inputs.grad_out, inputs.table
    if name.startswith("sparse"):
        return _conv_arguments(name, inputs)
    if name == "group_gather":
        return qkv.requires_grad_(), part.token_index
    if name.startswith("block_diagonal") or name == "group_scatter":
        with use_backend("reference"):
            qkv, grad_out = group_gather(qkv, part), group_gather(grad_out, part)
    if name == "group_scatter":
        return qkv.requires_grad_(), part.token_index, part.num_tokens
    sizes = (inputs.num_heads, part.window_slots, scale)
    tensors: tuple[Tensor | None, ...]
    indices: tuple[Tensor, ...]
    if name.startswith("block_diagonal"):
        tensors, indices = (qkv, table), part.tensors[1:]
    else:
        tensors, indices = (qkv, None, None, table, None), part.tensors
        if three:
            q, k, v = qkv.unflatten(-1, (3, inputs.num_heads, -1)).unbind(2)
            # A different layout each: a slice of qkv, head by head, contiguous.
            k = k.transpose(1, 2).contiguous().transpose(1, 2)
            tensors = (q, k, v.contiguous(), table, qkv[0, 0].clone())
    tensors = tuple(x if x is None else x.detach() for x in tensors)
    if not name.endswith("_backward"):
        return *(x if x is None else x.requires_grad_() for x in tensors), *indices, *sizes
    saved = operator(name.removesuffix("_backward"), variant)(*tensors, *indices, *sizes)
    needs = (True, True) if len(tensors) == 2 else (True, True, tensors[-1] is not None)
    return grad_out, *tensors, *saved, *indices, *sizes, *needs


def _conv_arguments(name: str, inputs: Inputs) -> tuple:
    """Arguments of the convolution: the tokens of qkv, side by side in one row."""
    x, grad_out = inputs.qkv.detach(), inputs.qkv.detach().flip(1)
    row = np.ones((inputs.part.num_partitions, 1, x.shape[1]), dtype=bool)
    neighbours = grid_neighbours(row).to(x.device)
    dtype = accumulation_dtype(x.dtype)
    weight = x[0, 0, :, None].to(dtype) * torch.linspace(-1, 1, 9, dtype=dtype, device=x.device)
    if name.endswith("_backward"):
        return grad_out, x, weight, neighbours, True, True, True
    bias = x[0, 1].to(dtype)
    return *(t.clone().requires_grad_() for t in (x, weight, bias)), neighbours


def relative_error(actual: Tensor, exact: Tensor, least_scale: float = 1e-30) -> float:
    """Largest deviation, relative to the largest absolute value of the exact tensor."""
    if exact.numel() == 0:
        return 0.0
    error = (actual.double() - exact.double()).abs().max().item()
    return error / max(exact.abs().max().item(), least_scale) if math.isfinite(error) else math.inf


def assert_within_budget(
    actual: dict[str, Tensor],
    plain: dict[str, Tensor],
    exact: dict[str, Tensor],
    factor: float = 2.0,
    other_draws: Callable[[], Iterable[tuple[dict[str, Tensor], dict[str, Tensor]]]] | None = None,
) -> None:
    """Compare a backend's results with the fp64 reference's.

    Args:
        actual: results of the backend under test.
        plain: results of the reference in the same dtype: what rounding alone costs. For fp64, as
            nothing is more exact, results in fp32, whose error is scaled down.
        exact: results of the reference in fp64, on the same values.
        factor: the multiple of the plain error that is allowed, on top of a rounding band: 4 eps of
            the result's dtype and 16 of the accumulation dtype (small cases have too few values for
            the plain error to be typical).
        other_draws: called only if the budget is exceeded; gives (plain, exact) of the same case on
            other values. The largest of their plain errors then counts: with few entries in a
            table, plain arithmetic is sometimes lucky.

    Raises:
        AssertionError: names the tensor, its error and what was allowed.
    """
    for name, expected in exact.items():
        got = actual[name]
        least = _least_scale(name, exact)
        assert got.shape == expected.shape, f"{name}: {list(got.shape)} != {list(expected.shape)}"
        eps = torch.finfo(got.dtype).eps
        ratio = eps / torch.finfo(plain[name].dtype).eps
        band = 4 * eps + 16 * torch.finfo(accumulation_dtype(got.dtype)).eps
        error = relative_error(got, expected, least)
        allowed = factor * ratio * relative_error(plain[name], expected, least) + band
        if error > allowed and other_draws is not None:
            costs = [
                relative_error(p[name], e[name], _least_scale(name, e)) for p, e in other_draws()
            ]
            allowed = max(allowed, factor * ratio * max(costs) + band)
        assert error <= allowed, f"{name}: error {error:.2e}, allowed {allowed:.2e}"


def _least_scale(name: str, exact: dict[str, Tensor]) -> float:
    """The least value that an error is taken relative to.

    The table's gradient cancels to nothing where windows hold one token; its error is that of its
    terms, which are about as large as the gradient of qkv.
    """
    terms = exact.get("grad_qkv")
    if name != "grad_table" or terms is None or not terms.numel():
        return 1e-30
    return terms.abs().max().item()


def assert_backend_agrees(inputs: Inputs, backend: str, factor: float = 2.0) -> None:
    """Run one backend and the reference on the same values and hold the error to the budget."""
    dtype = inputs.qkv.dtype
    with use_backend(backend):
        actual = run(inputs)
    with use_backend("reference"):
        plain = run(inputs.to(torch.float32) if dtype == torch.float64 else inputs)
        exact = run(inputs.to(torch.float64))
    assert actual["out"].dtype == actual["grad_qkv"].dtype == dtype
    assert inputs.table is None or actual["grad_table"].dtype == inputs.table.dtype
    assert_within_budget(actual, plain, exact, factor)

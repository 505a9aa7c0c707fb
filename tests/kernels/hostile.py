"""Tensors that no caller means to pass, to the operators below the checks of Python.

Each must raise, or give what the documentation says.
"""

from __future__ import annotations

import contextlib
import dataclasses
import pathlib
import resource
from collections import Counter
from collections.abc import Callable, Iterator
from typing import Any

import numpy as np
import torch
from torch import Tensor

import greenmim_kernels as gk
from greenmim_kernels import backends
from greenmim_kernels.ops import SCHEMAS, operator
from greenmim_kernels.testing import Case, make_inputs, operator_arguments

ONEDNN = ("onednn_linear", "onednn_linear_backward", "onednn_mlp", "onednn_mlp_backward")
CASE = Case(image_size=(64, 96), stage=2, batch=2, head_dim=4, mask_ratio=0.5, window_size=3,
            shifted=True)  # fmt: skip
TOKENS = make_inputs(CASE).part.num_tokens
NUMBERS = (-(2**31), -(2**31) + 1, -2, -1, 0, 1, TOKENS - 1, TOKENS, 2**15, 2**24, 2**31 - 1)
# What raises these says what is wrong; a crash, or a result, is for the caller of `outcome`.
CLEAR = (RuntimeError, ValueError, TypeError, NotImplementedError, OverflowError, IndexError)


@dataclasses.dataclass
class Attack:
    """Arguments of an operator.

    Attributes:
        must: "raise", or "either": what is wrong may not matter.
    """

    name: str
    what: str
    arguments: tuple
    must: str = "either"


def arguments_of(name: str, per_image: bool = False) -> tuple:
    """Right ones, without gradients."""
    if name in ONEDNN:
        rows, inner, out = 5, 7, 20
        x, weight1, bias1 = torch.randn(rows, inner), torch.randn(out, inner), torch.randn(out)
        if name == "onednn_linear":
            return x, weight1, bias1
        if name == "onednn_linear_backward":
            return torch.randn(rows, out), x, weight1, True, True, True
        weight2, bias2 = torch.randn(inner, out), torch.randn(inner)
        if name == "onednn_mlp":
            return x, weight1, bias1, weight2, bias2
        hidden = torch.randn(rows, out), torch.randn(rows, out)
        return torch.randn(rows, inner), x, *hidden, weight1, weight2, *(True,) * 5
    case = dataclasses.replace(CASE, per_image=per_image)
    three = name.startswith("group_window")
    arguments = operator_arguments(name, make_inputs(case), three=three)
    return tuple(x.detach() if isinstance(x, Tensor) else x for x in arguments)


def _with(arguments: tuple, at: int, value: Any) -> tuple:
    return *arguments[:at], value, *arguments[at + 1 :]


def _shapes(x: Tensor) -> Iterator[tuple[str, Tensor]]:
    """Other shapes, other layouts of memory, and sizes that no memory holds."""
    yield "no axes", x.new_zeros(())
    yield "one axis", x.flatten()
    yield "one more axis", x[None]
    yield "empty", x.new_zeros(0)
    for axis in range(x.dim()):
        yield f"axis {axis} empty", x.narrow(axis, 0, 0)
        yield f"axis {axis} of one", x.narrow(axis, 0, 1)
        yield f"axis {axis} shorter", x.narrow(axis, 0, x.shape[axis] - 1)
        yield f"axis {axis} twice", torch.cat([x, x], axis)
        huge = list(x.shape)
        huge[axis] = 2**31
        if x[:1].numel() * 2**31 > 2**34:  # to copy it is refused at once
            yield f"axis {axis} of 2^31", x.new_zeros(1).expand(huge)
        nothing = [2**62 if i == axis else 0 for i in range(x.dim())]
        yield f"axis {axis} of 2^62", x.new_zeros(1).as_strided(nothing, [0] * x.dim())


def _same_values(x: Tensor) -> Iterator[tuple[str, Tensor]]:
    """The same values, laid out otherwise: the result is the same."""
    yield "every second element", x.repeat_interleave(2, -1)[..., ::2]
    yield "last axis first", x.movedim(-1, 0).contiguous().movedim(0, -1)
    after = torch.cat([x.new_zeros(1), x.flatten()])[1:].view(x.shape)
    yield "an element further on in its memory", after


def _overlapping(x: Tensor) -> Iterator[tuple[str, Tensor]]:
    yield "one element expanded", x.flatten()[0].expand(x.shape)
    yield "strides of one", torch.as_strided(x, x.shape, [1] * x.dim())
    yield "rows that overlap", torch.as_strided(x, x.shape, [*[2] * (x.dim() - 1), 1])


def attacks(name: str) -> Iterator[Attack]:
    """All on one operator."""
    for per_image in (False, True)[: 1 if name in ONEDNN else 2]:
        right = arguments_of(name, per_image)
        for at, value in enumerate(right):
            if isinstance(value, Tensor):
                for what, changed in _shapes(value):
                    yield Attack(name, f"{at}: {what}", _with(right, at, changed))
                for what, changed in _overlapping(value):
                    yield Attack(name, f"{at}: {what}", _with(right, at, changed))
                for dtype in (torch.int64, torch.float16, torch.float64, torch.bool, torch.int32,
                              torch.complex64, torch.uint8, torch.float8_e4m3fn):  # fmt: skip
                    if dtype != value.dtype:
                        yield Attack(name, f"{at}: {dtype}", _with(right, at, value.to(dtype)))
                yield Attack(name, f"{at}: meta", _with(right, at, value.to("meta")), "raise")
                if value.dim() == 2:
                    sparse = value.to_sparse()
                    yield Attack(name, f"{at}: sparse", _with(right, at, sparse), "raise")
                if value.dtype.is_floating_point:
                    for odd in (torch.nan, torch.inf, -3e38):
                        filled = torch.full_like(value, odd)
                        yield Attack(name, f"{at}: all {odd}", _with(right, at, filled))
                    learns = value.clone().requires_grad_()
                    yield Attack(name, f"{at}: learns", _with(right, at, learns))
                else:
                    for number in NUMBERS:
                        for places in (slice(None), slice(0, 1), slice(-1, None)):
                            changed = value.clone()
                            changed.view(-1)[places] = number
                            what = f"{at}: {number} at {places}"
                            yield Attack(name, what, _with(right, at, changed))
                    yield Attack(name, f"{at}: reversed", _with(right, at, value.flip(-1)))
                    for seed in range(4):
                        generator = torch.Generator().manual_seed(seed)
                        low, high = ((-2, 900), (-(2**31), 2**31 - 1))[seed % 2]
                        drawn = torch.randint(low, high, value.shape, generator=generator)
                        yield Attack(name, f"{at}: drawn", _with(right, at, drawn.int()))
            elif isinstance(value, bool):
                yield Attack(name, f"{at}: not {value}", _with(right, at, not value))
            elif isinstance(value, int):
                for number in (-(2**63), -(2**31), -1, 0, 1, 3, 2**31, 2**62, 2**63 - 1,
                               (2**64 + 2) // 3):  # fmt: skip
                    yield Attack(name, f"{at}: {number}", _with(right, at, number))
            elif isinstance(value, float):
                for number in (torch.nan, torch.inf, -torch.inf, 0.0, 1e308, -1.0):
                    yield Attack(name, f"{at}: {number}", _with(right, at, number))
            if value is not None:
                yield Attack(name, f"{at}: absent", _with(right, at, None))
        # Where nothing is computed, sizes must not wrap either.
        for heads in (2**62, (2**64 + 2) // 3):
            nobody = tuple(x[:0] if isinstance(x, Tensor) and x.dtype.is_floating_point
                           and x.dim() > 2 else heads if type(x) is int and x == CASE.num_heads
                           else x for x in right)  # fmt: skip
            if "attention" in name:
                yield Attack(name, f"{heads} heads and no image", nobody)


def outcome(attack: Attack) -> str:
    """ "raised" or "gave"; AssertionError where that is not what must be."""
    try:
        result = operator(attack.name)(*attack.arguments)
        for x in result if isinstance(result, tuple) else (result,):
            if x.device.type == "cpu" and x.numel():
                x.detach().reshape(-1).view(torch.uint8).sum()  # all of it is there to be read
            assert x.device.type == "cpu", f"{attack.name}, {attack.what}: on {x.device}"
    except CLEAR as error:
        assert str(error).strip(), f"{attack.name}, {attack.what}: without a word"
        return "raised"
    assert attack.must != "raise", f"{attack.name}, {attack.what}: nothing was raised"
    return "gave"


@contextlib.contextmanager
def bounded_memory(more: int = 2**32) -> Iterator[None]:
    """What asks for more bytes is refused at once, on a machine that has them, too."""
    before = resource.getrlimit(resource.RLIMIT_AS)
    used = int(pathlib.Path("/proc/self/statm").read_text().split()[0]) * resource.getpagesize()
    resource.setrlimit(resource.RLIMIT_AS, (used + more, before[1]))
    try:
        yield
    finally:
        resource.setrlimit(resource.RLIMIT_AS, before)


def run_attacks(names: tuple[str, ...]) -> Counter[tuple[str, str]]:
    """How many raised and gave a result, by operator."""
    return Counter((name, outcome(attack)) for name in names for attack in attacks(name))


def layouts_change_nothing(names: tuple[str, ...]) -> int:
    """The same values give the same results however they lie in memory; the number of layouts."""
    count = 0
    for name in names:
        right = arguments_of(name)
        expected = operator(name)(*right)
        for at, value in enumerate(right):
            if not isinstance(value, Tensor) or not value.dim():
                continue
            for what, changed in _same_values(value):
                assert torch.equal(changed, value)
                found = operator(name)(*_with(right, at, changed))
                pairs = zip(*((x,) if isinstance(x, Tensor) else x for x in (found, expected)),
                            strict=True)  # fmt: skip
                for one, other in pairs:
                    torch.testing.assert_close(one, other, msg=f"{name}, {at}: {what}")
                count += 1
    return count


# ---- through the public functions ---------------------------------------------------------------


def public_attacks() -> Iterator[tuple[str, Callable[[], Any]]]:
    """Calls that must raise."""
    inputs = make_inputs(CASE)
    part, qkv, table, heads = inputs.part, inputs.qkv, inputs.table, inputs.num_heads
    with gk.use_backend("reference"):
        grouped = gk.group_gather(qkv, part)
    calls = {
        "gather": lambda p, x=qkv: gk.group_gather(x, p),
        "scatter": lambda p, x=grouped: gk.group_scatter(x, p),
        "groups": lambda p, x=grouped: gk.block_diagonal_attention(x, table, p, heads),
        "fused": lambda p, x=qkv: gk.group_window_attention(x, table, p, heads),
    }
    for name, call in calls.items():
        yield f"{name}: partition on meta", lambda call=call: call(part.to("meta"))
        x = grouped if name in ("scatter", "groups") else qkv
        for what, changed in (("int", x.int()), ("meta", x.to("meta")), ("one axis", x.flatten()),
                              ("shorter", x[:, :-1])):  # fmt: skip
            yield f"{name}: {what}", lambda call=call, changed=changed: call(part, changed)
        fields = ("token_index",) if name in ("gather", "scatter") else gk.partition.TENSORS
        for field in fields if name != "groups" else gk.partition.TENSORS[1:]:
            tensor = getattr(part, field)
            for number in (2**31 - 1, -(2**31)):
                if field == "window_id":
                    continue  # a number like another
                broken = dataclasses.replace(part, **{field: torch.full_like(tensor, number)})
                yield f"{name}: {field} {number}", lambda call=call, broken=broken: call(broken)
            broken = dataclasses.replace(part, **{field: tensor.long()})
            yield f"{name}: {field} int64", lambda call=call, broken=broken: call(broken)
            broken = dataclasses.replace(part, **{field: tensor[..., :-1]})
            yield f"{name}: {field} shorter", lambda call=call, broken=broken: call(broken)
    grid, zero = np.ones((6, 6), dtype=bool), torch.zeros(1, dtype=torch.int32)
    for what, call in {
        "capacity": lambda: gk.group_partition(grid, 3, capacity=2**31 - 1, group_size=2**31 - 1),
        "window": lambda: gk.group_partition(grid, 2**31),
        "shift": lambda: gk.group_partition(grid, 3, -1),
        "numbers for bools": lambda: gk.group_partition(grid.astype(np.uint8), 3),
        "no memory": lambda: gk.group_partition(np.broadcast_to(True, (2**20, 2**20)), 3),
        "windows": lambda: gk.partition_from_windows(torch.full((2, 4), 2**31)),
        "windows of 2^31": lambda: gk.partition_from_windows(zero.expand(2**16, 2**16)),
        "counts": lambda: gk.pack_windows(np.array([2**40]), 2**31 - 1),
    }.items():  # fmt: skip
        yield f"planner: {what}", call


def bools_of_other_bytes() -> None:
    """A bool whose byte is neither 0 nor 1, as a view makes it, counts once."""
    grid = np.zeros((6, 6), dtype=np.uint8)
    grid[::2] = 255
    odd, plain = grid.view(np.bool_), grid != 0
    for one, other in zip(gk.group_partition(odd, 3, 1).tensors,
                          gk.group_partition(plain, 3, 1).tensors, strict=True):  # fmt: skip
        assert torch.equal(one, other)


ALL = (*SCHEMAS, *ONEDNN)


def main(library: str) -> None:
    """All, with the kernels of a build of `_C` that was loaded (see sanitized.py)."""
    torch.set_num_threads(1)
    file = pathlib.Path(library)
    backends.library_file = lambda name: file if name == "_C" else None
    backends.cpu_capability()
    counts = run_attacks(ALL)
    layouts_change_nothing(ALL)
    for per_image in (False, True):  # ordinary ones, in every capability's kernels
        for dtype in (torch.float64, torch.float32, torch.bfloat16, torch.float16):
            case = dataclasses.replace(CASE, per_image=per_image, dtype=dtype)
            for name in SCHEMAS:
                three = name.startswith("group_window")
                operator(name)(*operator_arguments(name, make_inputs(case), three=three))
    print(sum(counts.values()), "attacks")

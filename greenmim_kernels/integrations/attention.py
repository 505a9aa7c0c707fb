"""Attention modules of other libraries on the fused operator.

A fused module is its original with another class, made of one from here and the original's.
Parameters, buffers, keys and hooks stay what they are; what the kernels do not do goes to the
original's own ``forward``. How a library names things is in a reader, so that no name of ours gets
in the way of one of theirs.
"""

from __future__ import annotations

import functools
import math
import warnings
import weakref
from collections.abc import Sequence
from dataclasses import dataclass, replace

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from ..backends import choose_backend, is_forced
from ..functional import group_window_attention
from ..partition import GroupPartition
from ..reference import accumulation_dtype
from ..windows import partition_from_windows
from .grids import GridPartition, grid_partition


class Fused:
    """What every fused module is; `unfused`: the original's class, ours, and `plain_index`."""

    unfused: tuple[type[nn.Module], type[Fused], bool]

    def __reduce_ex__(self, protocol):
        # The class is made while running, so that a pickle cannot name it.
        _, _, *state = super().__reduce_ex__(protocol)
        return _new, self.unfused, *state


@functools.cache
def fused_class(
    original: type[nn.Module], ours: type[Fused], plain_index: bool = True
) -> type[nn.Module]:
    """The class of a module of class `original` that runs by `ours`.

    plain_index: whether the module's ``relative_position_index`` is Swin's for its window.
    """
    members = {"unfused": (original, ours, plain_index)}
    return type(f"Fused{original.__name__}", (ours, original), members)


def _new(*unfused) -> nn.Module:
    made = fused_class(*unfused)
    return made.__new__(made)


# --- readers: what the operator needs, from a module m of a library ------------------------------


class Swin:
    """Microsoft's Swin and SimMIM, timm, MONAI, Video-Swin, MMDetection."""

    def qkv_and_bias(self, m, x: Tensor) -> tuple[Tensor | tuple[Tensor, ...], Tensor | None]:
        """x [B, N, C] -> what the operator takes as qkv; and its value in padding, [3C]."""
        return m.qkv(x), m.qkv.bias

    def table(self, m) -> Tensor:
        """[rows, heads]"""
        return m.relative_position_bias_table

    def scale(self, m) -> float | Tensor:
        return m.scale

    def output(self, m, x: Tensor) -> Tensor:
        return m.proj_drop(m.proj(x))

    def heads(self, m) -> tuple[int, int]:
        """How many, and their dim."""
        return m.num_heads, m.proj.in_features // m.num_heads

    def window(self, m) -> Sequence[int]:
        """The one that the bias table is for."""
        return m.window_size

    def dropout(self, m) -> float:
        """That of the attention's probabilities."""
        return m.attn_drop.p


class SwinV2(Swin):
    """Microsoft's and timm's: cosine attention, and a bias that an MLP computes."""

    def qkv_and_bias(self, m, x: Tensor) -> tuple[tuple[Tensor, ...], Tensor | None]:
        bias = None
        if m.q_bias is not None:
            bias = torch.cat((m.q_bias, torch.zeros_like(m.v_bias), m.v_bias))
        qkv = F.linear(x, m.qkv.weight, bias)
        q, k, v = qkv.unflatten(-1, (3, m.num_heads, -1)).unbind(-3)
        return (of_length(q, m.logit_scale), of_length(k), v), bias

    def table(self, m) -> Tensor:
        return bias_of_mlp(m.cpb_mlp(m.relative_coords_table), m.num_heads)

    def scale(self, m) -> float:
        return 1.0


class HuggingFaceSwin(Swin):
    def qkv_and_bias(self, m, x: Tensor) -> tuple[tuple[Tensor, ...], Tensor | None]:
        layers = m.q_proj, m.k_proj, m.v_proj
        return tuple(self._by_head(m, layer(x)) for layer in layers), joined_bias(layers)

    def _by_head(self, m, x: Tensor) -> Tensor:
        return x.unflatten(-1, self.heads(m))

    def table(self, m) -> Tensor:
        return m.relative_position_bias.relative_position_bias_table

    def scale(self, m) -> float:
        return m.scaling

    def output(self, m, x: Tensor) -> Tensor:
        return m.o_proj(x)

    def heads(self, m) -> tuple[int, int]:
        return m.num_attention_heads, m.head_dim

    def window(self, m) -> Sequence[int]:
        return m.relative_position_bias.window_size

    def dropout(self, m) -> float:
        return m.attention_dropout


class HuggingFaceSelfAttention(HuggingFaceSwin):
    """Swin before transformers 5, Donut's, MaskFormer's and CLAP's: the projection is elsewhere."""

    def qkv_and_bias(self, m, x: Tensor) -> tuple[tuple[Tensor, ...], Tensor | None]:
        layers = m.query, m.key, m.value
        return tuple(self._by_head(m, layer(x)) for layer in layers), joined_bias(layers)

    def table(self, m) -> Tensor:
        return m.relative_position_bias_table

    def scale(self, m) -> float:
        return m.attention_head_size**-0.5

    def output(self, m, x: Tensor) -> Tensor:
        return x

    def heads(self, m) -> tuple[int, int]:
        return m.num_attention_heads, m.attention_head_size

    def window(self, m) -> Sequence[int]:
        return m.window_size

    def dropout(self, m) -> float:
        return m.dropout.p


class HuggingFaceSwinV2(HuggingFaceSelfAttention):
    def qkv_and_bias(self, m, x: Tensor) -> tuple[tuple[Tensor, ...], Tensor | None]:
        (q, k, v), bias = super().qkv_and_bias(m, x)
        return (of_length(q, m.logit_scale), of_length(k), v), bias

    def table(self, m) -> Tensor:
        table = m.continuous_position_bias_mlp(m.relative_coords_table)
        return bias_of_mlp(table, m.num_attention_heads)

    def scale(self, m) -> float:
        return 1.0


def of_length(x: Tensor, logit_scale: Tensor | None = None) -> Tensor:
    """x [..., heads, D] with rows of length 1; or exp of SwinV2's parameter [heads, 1, 1]."""
    length = None if logit_scale is None else logit_scale.view(-1, 1).clamp(max=math.log(100)).exp()
    return _OfLength.apply(x, length)[0]


class _OfLength(torch.autograd.Function):
    """In a third of the passes over memory that `F.normalize` and a product take."""

    @staticmethod
    def forward(x: Tensor, length: Tensor | None) -> tuple[Tensor, Tensor]:
        dtype = accumulation_dtype(x.dtype)
        norm = torch.linalg.vector_norm(x, dim=-1, keepdim=True, dtype=dtype).clamp_min(1e-12)
        factor = norm.reciprocal() if length is None else length.to(dtype) / norm
        return (x * factor).to(x.dtype), factor

    @staticmethod
    def setup_context(ctx, inputs, output) -> None:
        _, length = inputs
        y, factor = output
        ctx.mark_non_differentiable(factor)
        ctx.set_materialize_grads(False)
        ctx.save_for_backward(y, factor, length)

    @staticmethod
    def backward(ctx, grad: Tensor | None, _):
        y, factor, length = ctx.saved_tensors
        if grad is None:
            return None, None
        dtype = grad.dtype
        grad = grad.to(factor.dtype)
        along, of_length = (grad * y).sum(-1, keepdim=True), None
        if length is not None:
            if ctx.needs_input_grad[1]:
                of_length = (along.flatten(0, -3).sum(0) / length).to(length.dtype)
            along = along / length.to(along.dtype) ** 2
        across = torch.addcmul(grad, y.to(grad.dtype), along, value=-1)
        return (across * factor).to(dtype), of_length


def bias_of_mlp(table: Tensor, num_heads: int) -> Tensor:
    """SwinV2's table [1, rows per axis ..., heads] -> [rows, heads] between 0 and 16."""
    return 16 * table.view(-1, num_heads).sigmoid()


def joined_bias(layers: Sequence[nn.Linear]) -> Tensor | None:
    """The biases of the q, k and v layers, [3C], with zeros where one has none."""
    given = [layer.bias for layer in layers]
    if all(bias is None for bias in given):
        return None
    zeros = torch.zeros_like(next(bias for bias in given if bias is not None))
    return torch.cat([zeros if bias is None else bias for bias in given])


# --- fused modules ------------------------------------------------------------------------------


class FusedAttention(Fused):
    """``forward(x, mask)``, x [B windows, n, C] with the windows of an image together.

    A GridPartition may stand in the place of the mask; x is then [B, N, C].
    """

    reader: Swin

    def forward(self, x: Tensor, mask: Tensor | GridPartition | None = None, *more, **options):
        if not asks_more(self, *more, *options.values()):
            out = attend(self, x, mask)
            if out is not None:
                return out
        return super().forward(x, mask, *more, **options)


class FusedSwinAttention(FusedAttention):
    reader = Swin()


class FusedSwinV2Attention(FusedAttention):
    reader = SwinV2()


class FusedHuggingFaceSwinAttention(Fused):
    reader = HuggingFaceSwin()

    def forward(self, hidden_states, attention_mask=None, **options):
        if not asks_more(self, asked_maps(self, options)):
            out = attend(self, hidden_states, attention_mask)
            if out is not None:
                return out, None
        return super().forward(hidden_states, attention_mask, **options)


class FusedHuggingFaceSelfAttention(Fused):
    reader = HuggingFaceSelfAttention()

    def forward(self, hidden_states, attention_mask=None, *more, **options):
        if not asks_more(self, *more, *options.values()):
            out = attend(self, hidden_states, attention_mask)
            if out is not None:
                return (out,)
        return super().forward(hidden_states, attention_mask, *more, **options)


class FusedHuggingFaceSwinV2Attention(FusedHuggingFaceSelfAttention):
    reader = HuggingFaceSwinV2()


def asked_maps(m: nn.Module, options: dict) -> bool | None:
    """Whether transformers' options or configuration ask for attention maps."""
    return options.get("output_attentions") or getattr(m.config, "output_attentions", False)


def asks_more(m: nn.Module, *given: object) -> bool:
    """Whether a call asks for what the kernels do not do, such as attention maps; says so."""
    asked = any([one is not None and one is not False for one in given])
    return asked and not say_once(
        m, "attention maps, or more than windows and a mask, are asked for"
    )


def attend(m: nn.Module, x: Tensor, mask: Tensor | GridPartition | None) -> Tensor | None:
    """A fused module's attention; None, and says why, if the kernels do not do it."""
    if isinstance(mask, GridPartition):
        return attend_in(m, x, mask, mask.pads)
    part = _partition(m, x, mask)
    if part is None or not takes(m, x, part):
        return None
    windows, slots, channels = x.shape
    together = 1 if mask is None else len(mask)
    out = attend_in(m, x.reshape(windows // together, together * slots, channels), part)
    return out.reshape(windows, slots, -1)


def attend_in(m: nn.Module, x: Tensor, part: GroupPartition, pads: bool = False) -> Tensor:
    """x [B, N, C] -> [B, N, C]; pads: whether there is padding that attends."""
    read = m.reader
    qkv, bias = read.qkv_and_bias(m, x)
    number, _ = read.heads(m)
    out = group_window_attention(
        qkv, read.table(m), part, number, read.scale(m), bias if pads else None
    )
    return read.output(m, out)


def takes(m: nn.Module, x: Tensor, part: GroupPartition) -> bool:
    """Whether the kernels do a call of a fused module; says why not."""
    if m.training and m.reader.dropout(m) > 0:
        return say_once(m, "attention dropout is above 0 in training")
    _, head_dim = m.reader.heads(m)
    backend = choose_backend(
        "group_window_attention", x.device, x.dtype, head_dim, part.group_size, part.table_rows
    )
    if backend == "reference" and not is_forced():
        return say_once(m, f"no kernel takes {x.dtype} and head dim {head_dim} on {x.device.type}")
    return True


_said: set[tuple[type, str]] = set()


def say_once(m: nn.Module, reason: str) -> bool:
    """Warns that calls go to the original's code; returns False."""
    if not torch.compiler.is_compiling() and (type(m), reason) not in _said:
        _said.add((type(m), reason))
        warnings.warn(
            f"{m.unfused[0].__name__} runs its own code, not the fused kernels: {reason}",
            stacklevel=5,
        )
    return False


# --- windows that the caller has cut ------------------------------------------------------------


@dataclass(frozen=True)
class _Last:
    mask: weakref.ref | None
    version: int | None
    slots: int
    part: GroupPartition


# The partition of each module's last mask.
_last: weakref.WeakKeyDictionary[nn.Module, _Last] = weakref.WeakKeyDictionary()


def _partition(m: nn.Module, x: Tensor, mask: Tensor | None) -> GroupPartition | None:
    slots = x.shape[1]
    _, _, plain_index = m.unfused
    if mask is None and plain_index:
        return grid_partition((slots,), (slots,), (0,), m.reader.window(m), x.device)
    if mask is not None and (mask.shape[1:] != (slots, slots) or len(x) % len(mask)):
        say_once(m, f"a mask {list(mask.shape)} is none of windows {list(x.shape[:2])}")
        return None
    if torch.compiler.is_compiling():
        return _cut(m, mask, slots, checked=False)
    try:
        return _last_or_cut(m, mask, slots)
    except ValueError as error:
        say_once(m, str(error))
        return None


def _last_or_cut(m: nn.Module, mask: Tensor | None, slots: int) -> GroupPartition:
    last = _last.get(m)
    version = 0 if mask is None else None if mask.is_inference() else mask._version
    if last is not None and last.slots == slots and last.version == version is not None:
        if mask is None and last.mask is None or last.mask is not None and last.mask() is mask:
            return last.part
    # On a GPU a check waits for the device: a module's masks after the first are trusted.
    on_cpu = mask is None or mask.device.type == "cpu"
    with torch.inference_mode(False):  # autograd refuses to save tensors made in it
        part = _cut(m, mask, slots, on_cpu or last is None or last.slots != slots)
    _last[m] = _Last(None if mask is None else weakref.ref(mask), version, slots, part)
    return part


def _cut(m: nn.Module, mask: Tensor | None, slots: int, checked: bool) -> GroupPartition:
    if checked and mask is not None and not ((mask == 0) | (mask <= -50)).all():
        raise ValueError("its mask has values other than 0 and -100")
    window, index, windows = tuple(m.reader.window(m)), None, 1 if mask is None else len(mask)
    _, _, plain_index = m.unfused
    if not plain_index:
        window, index = None, index_matrix(m)[:slots, :slots]
    token = torch.arange(windows * slots, device=(index if mask is None else mask).device)
    part = partition_from_windows(
        token.view(windows, slots),
        window,
        mask=mask,
        bias_index=index,
        num_tokens=None if checked else windows * slots,
    )
    # Not every row of a table need be in an index.
    return part if plain_index else replace(part, table_rows=len(m.reader.table(m)))


def index_matrix(m: nn.Module) -> Tensor:
    """relative_position_index as a matrix, [n, n]."""
    index = m.relative_position_index
    side = math.isqrt(index.numel())
    return index.view(side, side)

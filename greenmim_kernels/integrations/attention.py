"""Attention modules of other libraries on the fused operator.

A fused module is its original with another class, made of one from here and the original's.
Parameters, buffers and keys stay what they are; what the kernels do not do goes to the original's
own ``forward``.
"""

from __future__ import annotations

import functools
import math
import warnings
import weakref
from collections.abc import Sequence
from dataclasses import dataclass, replace
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor, nn
from torch._subclasses.fake_tensor import FakeTensor
from torch.utils._python_dispatch import _disable_current_modes
from torch.utils.weak import WeakTensorKeyDictionary

from ..backends import candidates, choose_backend, is_forced
from ..functional import group_window_attention
from ..partition import GroupPartition
from ..windows import partition_from_windows
from .grids import GridPartition, grid_partition, is_capturing
from .readers import (
    HuggingFaceSelfAttention,
    HuggingFaceSwin,
    HuggingFaceSwinV2,
    Swin,
    SwinV2,
    TimmMaxVit,
    TorchvisionMaxVit,
)

# What a fused module's other base is.
if TYPE_CHECKING:
    _Original = nn.Module
else:
    _Original = object


class Fused(_Original):
    """What every fused module is; `unfused` is what its class was made of."""

    reader: Swin
    unfused: tuple[type[nn.Module], type[Fused], bool, bool]

    def _load_from_state_dict(self, state_dict: dict, prefix: str, *more) -> None:
        mask, own = state_dict.get(f"{prefix}attn_mask"), getattr(self, "attn_mask", None)
        has_other = (
            isinstance(mask, Tensor)
            and isinstance(own, Tensor)
            and mask.shape == own.shape
            and not own.is_meta
            and not torch.equal(mask.to(own), own)
        )
        super()._load_from_state_dict(state_dict, prefix, *more)
        original, ours, plain_index, _ = self.unfused
        if f"{prefix}relative_position_index" in state_dict:
            has_other |= has_plain_index(self, ours) != plain_index
        if has_other:
            say_once(self, "another relative_position_index or mask was loaded; fuse it again")
            self.__class__ = original  # type: ignore[assignment]  # the other of its two bases

    def __reduce_ex__(self, protocol):
        # The class is made while running, so that a pickle cannot name it.
        _, _, *state = super().__reduce_ex__(protocol)
        return _new, self.unfused, *state


@functools.cache
def fused_class(
    original: type[nn.Module], ours: type[Fused], plain_index: bool = True, partial: bool = False
) -> type[nn.Module]:
    """The class of a module of class `original` that runs by `ours`.

    plain_index: whether the module's ``relative_position_index`` is Swin's for its window.
    partial: whether it takes windows with fewer slots, which are the first of a whole one.
    """
    members = {"unfused": (original, ours, plain_index, partial)}
    return type(f"Fused{original.__name__}", (ours, original), members)


def _new(*unfused) -> nn.Module:
    made = fused_class(*unfused)
    return made.__new__(made)


def made_of(m: nn.Module) -> tuple[type[nn.Module], type[Fused], bool, bool]:
    """A fused module's `unfused`; others are transformers' SwinAttention, called from `layers`."""
    return getattr(m, "unfused", None) or (type(m), FusedHuggingFaceSwinAttention, True, False)


def reader_of(m: nn.Module) -> Swin:
    return made_of(m)[1].reader


# --- fused modules ------------------------------------------------------------------------------


class FusedAttention(Fused):
    """``forward(x, mask)``, x [B windows, n, C] with the windows of an image together.

    A GridPartition may stand in the place of the mask; x is then [B, N, C].
    """

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


class FusedHATAttention(Fused):
    """``forward(x, rpi, mask)``, with the relative position index as an argument."""

    reader = Swin()

    def forward(self, x: Tensor, rpi: Tensor, mask: Tensor | None = None) -> Tensor:
        out = attend(self, x, mask, rpi)
        return super().forward(x, rpi, mask) if out is None else out


class FusedTimmMaxVitAttention(Fused):
    """``forward(x, shared_rel_pos)``, x [B windows, ..., C]; one with a bias looks at x alone."""

    reader = TimmMaxVit()

    def forward(self, x: Tensor, shared_rel_pos: Tensor | GridPartition | None = None) -> Tensor:
        part = shared_rel_pos if isinstance(shared_rel_pos, GridPartition) else None
        out = attend(self, x, part)
        return super().forward(x, shared_rel_pos) if out is None else out


class FusedTorchvisionMaxVitAttention(Fused):
    """``forward(x)``, x [B, windows, n, C]."""

    reader = TorchvisionMaxVit()

    def forward(self, x: Tensor, part: GridPartition | None = None) -> Tensor:
        out = attend(self, x, part)
        return super().forward(x) if out is None else out


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


def attend(
    m: nn.Module, x: Tensor, mask: Tensor | GridPartition | None, index: Tensor | None = None
) -> Tensor | None:
    """A fused module's attention; None, and says why, if the kernels do not do it.

    index: one that comes with a call, which must be Swin's.
    """
    if isinstance(mask, GridPartition):
        return attend_in(m, x, mask, mask.pads)
    if not may_take(m, x) or (index is not None and not _is_swins(m, index)):
        return None
    flat = reader_of(m).windows(x)
    part = _partition(m, flat, mask)
    if part is None or not takes(m, flat, part):
        return None
    windows, slots, channels = flat.shape
    together = 1 if mask is None else mask.shape[0]
    out = attend_in(m, flat.reshape(windows // together, together * slots, channels), part)
    return out.reshape(*x.shape[:-1], -1)


def attend_in(m: nn.Module, x: Tensor, part: GroupPartition, pads: bool = False) -> Tensor:
    """x [B, N, C] -> [B, N, C]; pads: whether there is padding that attends."""
    read = reader_of(m)
    number, _ = read.heads(m)
    padding = read.of_padding(m, x) if pads else None
    qkv, table, scale = read.qkv(m, x), read.table(m), read.scale(m)
    return read.output(m, group_window_attention(qkv, table, part, number, scale, padding))


# --- what the kernels do not do -----------------------------------------------------------------


def may_take(m: nn.Module, x: Tensor) -> bool:
    """Whether the kernels do a fused module's call, if a partition of it fits; says why not."""
    if isinstance(x, torch.fx.Proxy):
        return False  # the library's code is what is traced
    if m.training and reader_of(m).dropout(m) > 0:
        return say_once(m, "attention dropout is above 0 in training")
    if reader_of(m).shows_maps(m):
        return say_once(m, "a hook looks at attention maps")
    usable = candidates("group_window_attention", x.device, x.dtype)
    if usable == ("reference",) and not is_forced():
        return say_once(m, "no backend takes its dtype on its device")
    return True


def takes(m: nn.Module, x: Tensor, part: GroupPartition) -> bool:
    """Whether a kernel has room for its heads and groups; says so if not."""
    _, head_dim = reader_of(m).heads(m)
    backend = choose_backend(
        "group_window_attention", x.device, x.dtype, head_dim, part.group_size, part.table_rows
    )
    if backend == "reference" and not is_forced():
        return say_once(m, "no backend takes its head dim and window")
    return True


def asked_maps(m: nn.Module, options: dict) -> bool | None:
    """Whether transformers' options or configuration ask for attention maps."""
    return options.get("output_attentions") or getattr(m.config, "output_attentions", False)


def asks_more(m: nn.Module, *given: object) -> bool:
    """Whether a call asks for what the kernels do not do, such as attention maps; says so."""
    asked = any([one is not None and one is not False for one in given])
    return asked and not say_once(
        m, "attention maps, or more than windows and a mask, are asked for"
    )


_said: set[tuple[str, str]] = set()


def say_once(m: nn.Module, reason: str, detail: str = "") -> bool:
    """Warns that calls go to the original's code; returns False."""
    return _say(made_of(m)[0].__name__, reason, detail)


# Dynamo takes the answer as a constant, so that it is said while tracing.
@torch.compiler.assume_constant_result
def _say(name: str, reason: str, detail: str) -> bool:
    if (name, reason) not in _said:
        _said.add((name, reason))
        text = f"{name} runs its own code, not the fused kernels: {reason}"
        warnings.warn(f"{text} ({detail})" if detail else text, stacklevel=6)
    return False


# --- windows that the caller has cut ------------------------------------------------------------


@dataclass(frozen=True)
class _Cut:
    """A partition, and what it was made of besides its mask."""

    slots: int
    window: tuple[int, ...]
    versions: tuple[int | None, int | None]  # of the mask and of the index
    index: weakref.ref | None
    part: GroupPartition


# By its mask, or by its index where it has no mask; blocks of a network may share one.
_cuts = WeakTensorKeyDictionary()
# Modules of which a mask was checked, with its number of slots.
_checked: weakref.WeakKeyDictionary[nn.Module, int] = weakref.WeakKeyDictionary()
_captured: list[GroupPartition] = []  # what CUDA graphs read


def _partition(m: nn.Module, x: Tensor, mask: Tensor | None) -> GroupPartition | None:
    slots, window = x.shape[1], reader_of(m).window(m)
    _, _, plain_index, partial = made_of(m)
    if slots > math.prod(window) or (slots < math.prod(window) and not partial):
        say_once(m, "windows of other sizes than its bias is for")
        return None
    if mask is None and plain_index:
        return grid_partition((slots,), (slots,), (0,), window, x.device)
    if mask is not None:
        if mask.shape[1:] != (slots, slots) or x.shape[0] % mask.shape[0]:
            say_once(m, "a mask that is not [windows, n, n]")
            return None
        if mask.requires_grad:
            say_once(m, "a mask that learns")
            return None
        if isinstance(mask, FakeTensor) and not torch.compiler.is_compiling():
            return None
    if torch.compiler.is_compiling():
        return _cut(m, mask, slots, trusted=True)
    try:
        return _last_or_cut(m, mask, slots)
    except ValueError as error:
        say_once(m, "a mask of another kind", str(error))
        return None


def _last_or_cut(m: nn.Module, mask: Tensor | None, slots: int) -> GroupPartition:
    index = None if made_of(m)[2] else m.relative_position_index
    of, window = index if mask is None else mask, tuple(reader_of(m).window(m))
    versions = _version(mask), _version(index)
    last = _cuts.get(of)
    if last is not None and (last.slots, last.window, last.versions) == (slots, window, versions):
        is_same = index is None if last.index is None else last.index() is index
        if is_same and None not in versions:
            return last.part
    # On a GPU a check in Python waits for the device: a module's masks after the first are trusted.
    on_cpu = mask is None or mask.device.type == "cpu"
    trusted = not on_cpu and _checked.get(m) == slots
    with torch.inference_mode(False):  # autograd refuses to save tensors made in it
        part = _cut(m, mask, slots, trusted)
    known = None if index is None else weakref.ref(index)
    _cuts[of], _checked[m] = _Cut(slots, window, versions, known, part), slots
    if is_capturing(part.token_index.device):
        _captured.append(part)
    return part


def _version(x: Tensor | None) -> int | None:
    """It grows when x is written to; None: nobody knows, as in inference mode."""
    return 0 if x is None else None if x.is_inference() else x._version


def _cut(m: nn.Module, mask: Tensor | None, slots: int, trusted: bool) -> GroupPartition:
    """trusted: a mask that cuts no windows into segments fails later, on its device."""
    window: tuple | None = tuple(reader_of(m).window(m))
    index, windows = None, 1
    if mask is not None:
        windows, attends = mask.shape[0], mask == 0
        # A lesser value is a bias of its own.
        excludes = (attends | (mask <= -50)).all()
        if trusted:
            segment = attends.byte().argmax(-1)  # the first that a slot attends to
            is_cut = ((segment[:, :, None] == segment[:, None]) == attends).all()
            torch._assert_async(excludes & is_cut, "the mask cuts no windows into segments")
        elif not excludes:
            raise ValueError("it has values other than 0 and -100")
    _, _, plain_index, _ = made_of(m)
    if not plain_index:
        window, index = None, index_matrix(m)[:slots, :slots]
    of_device: Any = index if mask is None else mask
    token = torch.arange(windows * slots, device=of_device.device)
    part = partition_from_windows(
        token.view(windows, slots),
        window,
        mask=mask,
        bias_index=index,
        num_tokens=windows * slots if trusted else None,
    )
    # Not every row of a table need be in an index.
    return part if plain_index else replace(part, table_rows=reader_of(m).table(m).shape[0])


def has_plain_index(m: nn.Module, ours: type[Fused]) -> bool:
    """Whether its relative_position_index, if it has one, is Swin's for its window."""
    index = getattr(m, "relative_position_index", None)
    if not isinstance(index, Tensor):
        return True
    return not index.is_meta and _has_values_of_swins(index, ours.reader.window(m))


def swins_index(window: Sequence[int], device: torch.device | str = "cpu") -> Tensor:
    """Swin's relative_position_index, int32 [n, n]."""
    slots = math.prod(window)
    part = grid_partition((slots,), (slots,), (0,), window, torch.device(device))
    return part.query_row[0, 0, :, None] + part.key_row[0, 0]


def _has_values_of_swins(index: Tensor, window: Sequence[int]) -> bool:
    return torch.equal(index.reshape(-1).int(), swins_index(window, index.device).view(-1))


# Of each module the last index that came with a call, its version, and whether it is Swin's.
_indices: weakref.WeakKeyDictionary[nn.Module, tuple] = weakref.WeakKeyDictionary()


def _is_swins(m: nn.Module, index: Tensor) -> bool:
    """Whether an index that comes with a call is Swin's; says so if not."""
    if index.numel() != math.prod(m.window_size) ** 2:
        return False  # the module's own code says what is wrong
    if torch.compiler.is_compiling():
        is_same = (index.reshape(-1) == swins_index(m.window_size, index.device).view(-1)).all()
        torch._assert_async(is_same, "the relative position index is not Swin's")
        return True
    if isinstance(index, FakeTensor):
        return False
    known, version, is_plain = _indices.get(m, (lambda: None, None, False))
    if known() is not index or version is None or version != _version(index):
        with _disable_current_modes():  # x may be fake where the index is not
            is_plain = _has_values_of_swins(index, m.window_size)
        _indices[m] = weakref.ref(index), _version(index), is_plain
    return is_plain or say_once(m, "a relative position index that is not Swin's")


def index_matrix(m: nn.Module) -> Tensor:
    """relative_position_index as a matrix, [n, n]."""
    index = m.relative_position_index
    side = math.isqrt(index.numel())
    return index.view(side, side)

"""Attention modules of other libraries, run by the fused operator.

A fused module is the library's module with its class exchanged: the new one is derived from a class
of this file and from the library's. Parameters, buffers and state dict keys stay. Calls that the
kernels cannot run go to the library's own ``forward``.
"""

from __future__ import annotations

import functools
import math
import warnings
import weakref
from collections.abc import Sequence
from dataclasses import dataclass, replace
from typing import TYPE_CHECKING, Any, NamedTuple

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
    HuggingFaceSelfAttentionReader,
    HuggingFaceSwinReader,
    HuggingFaceSwinV2Reader,
    SwinReader,
    SwinV2Reader,
    TimmMaxVitReader,
    TorchvisionMaxVitReader,
)

# The other base of a fused module's class is a Module, which a type checker must be told.
if TYPE_CHECKING:
    _Original = nn.Module
else:
    _Original = object


class Origin(NamedTuple):
    """What the class of a fused module was made from.

    Attributes:
        original: the library's class.
        ours: the class from here that runs it.
        has_swin_index: whether the module's ``relative_position_index`` is Swin's for its window.
        takes_fewer_slots: whether windows may have fewer slots than the table's, its first ones.
    """

    original: type[nn.Module]
    ours: type[Fused]
    has_swin_index: bool = True
    takes_fewer_slots: bool = False


class Fused(_Original):
    """Base of every fused module."""

    reader: SwinReader
    fused_from: Origin

    def _load_from_state_dict(self, state_dict: dict, prefix: str, *more) -> None:
        _, ours, had_swin_index, _ = self.fused_from
        # Compared before loading, which overwrites the module's own.
        names = ["attn_mask"] if had_swin_index else ["attn_mask", "relative_position_index"]
        has_changed = any(
            [_differ(getattr(self, n, None), state_dict.get(prefix + n)) for n in names]
        )
        super()._load_from_state_dict(state_dict, prefix, *more)
        if f"{prefix}relative_position_index" in state_dict:
            has_changed |= index_is_swins(self, ours) != had_swin_index
        if has_changed:
            warn_once(self, "another relative_position_index or mask was loaded; fuse it again")
            self.__class__ = self.fused_from.original  # type: ignore[assignment]  # one of its bases

    def __reduce_ex__(self, protocol):
        # A pickle cannot name the class, which is made at run time.
        _, _, *state = super().__reduce_ex__(protocol)
        return _new, tuple(self.fused_from), *state


def _differ(own: object, loaded: object) -> bool:
    """Whether two buffers that fit differ in their values."""
    if not isinstance(own, Tensor) or not isinstance(loaded, Tensor) or own.is_meta:
        return False
    return own.shape == loaded.shape and not torch.equal(loaded.to(own), own)


@functools.cache
def fused_class(origin: Origin) -> type[nn.Module]:
    """The class of modules fused from `origin`."""
    name = f"Fused{origin.original.__name__}"
    return type(name, (origin.ours, origin.original), {"fused_from": origin})


def _new(*origin) -> nn.Module:
    cls = fused_class(Origin(*origin))
    return cls.__new__(cls)


def origin_of(m: nn.Module) -> Origin:
    """`fused_from`; without it `m` is transformers' SwinAttention, called by `layers`."""
    return getattr(m, "fused_from", None) or Origin(type(m), FusedHuggingFaceSwinAttention)


def reader_of(m: nn.Module) -> SwinReader:
    return origin_of(m).ours.reader


# --- fused modules ------------------------------------------------------------------------------


class FusedAttention(Fused):
    """``forward(x, mask)``, x [B * windows, n, C] with the windows of an image side by side.

    Fused blocks pass a GridPartition as the mask; x is then [B, N, C].
    """

    def forward(self, x: Tensor, mask: Tensor | GridPartition | None = None, *more, **options):
        if not wants_more(self, *more, *options.values()):
            out = attend(self, x, mask)
            if out is not None:
                return out
        return super().forward(x, mask, *more, **options)


class FusedSwinAttention(FusedAttention):
    reader = SwinReader()


class FusedSwinV2Attention(FusedAttention):
    reader = SwinV2Reader()


class FusedHATAttention(Fused):
    """HAT's ``forward(x, rpi, mask)``; rpi is the relative position index."""

    reader = SwinReader()

    def forward(self, x: Tensor, rpi: Tensor, mask: Tensor | None = None) -> Tensor:
        out = attend(self, x, mask, rpi)
        return super().forward(x, rpi, mask) if out is None else out


class FusedTimmMaxVitAttention(Fused):
    """AttentionCl: ``forward(x, shared_rel_pos)``, x [B * windows, ..., C].

    With a bias of its own the library's code ignores the second argument.
    """

    reader = TimmMaxVitReader()

    def forward(self, x: Tensor, shared_rel_pos: Tensor | GridPartition | None = None) -> Tensor:
        part = shared_rel_pos if isinstance(shared_rel_pos, GridPartition) else None
        out = attend(self, x, part)
        return super().forward(x, shared_rel_pos) if out is None else out


class FusedTorchvisionMaxVitAttention(Fused):
    """RelativePositionalMultiHeadAttention: ``forward(x)``, x [B, windows, n, C]."""

    reader = TorchvisionMaxVitReader()

    def forward(self, x: Tensor, part: GridPartition | None = None) -> Tensor:
        out = attend(self, x, part)
        return super().forward(x) if out is None else out


class FusedHuggingFaceSwinAttention(Fused):
    reader = HuggingFaceSwinReader()

    def forward(self, hidden_states, attention_mask=None, **options):
        if not wants_more(self, wants_maps(self, options)):
            out = attend(self, hidden_states, attention_mask)
            if out is not None:
                return out, None
        return super().forward(hidden_states, attention_mask, **options)


class FusedHuggingFaceSelfAttention(Fused):
    reader = HuggingFaceSelfAttentionReader()

    def forward(self, hidden_states, attention_mask=None, *more, **options):
        if not wants_more(self, *more, *options.values()):
            out = attend(self, hidden_states, attention_mask)
            if out is not None:
                return (out,)
        return super().forward(hidden_states, attention_mask, *more, **options)


class FusedHuggingFaceSwinV2Attention(FusedHuggingFaceSelfAttention):
    reader = HuggingFaceSwinV2Reader()


def attend(
    m: nn.Module, x: Tensor, mask: Tensor | GridPartition | None, index: Tensor | None = None
) -> Tensor | None:
    """The output of a fused module's call; None if the kernels cannot run it.

    It warns then, except where the library's code raises or PyTorch traces it.

    mask: as in the library's call, or the partition that a fused block passes.
    index: the relative position index of a call that brings one; it must be Swin's.
    """
    if isinstance(mask, GridPartition):
        return attend_in(m, x, mask, mask.pads)
    if not can_run(m, x) or (index is not None and not _is_swin_index(m, index)):
        return None
    flat = reader_of(m).windows(x)
    part = _partition(m, flat, mask)
    if part is None or not has_room(m, flat, part):
        return None
    windows, slots, channels = flat.shape
    per_image = 1 if mask is None else mask.shape[0]
    out = attend_in(m, flat.reshape(windows // per_image, per_image * slots, channels), part)
    return out.reshape(*x.shape[:-1], -1)


def attend_in(m: nn.Module, x: Tensor, part: GroupPartition, pads: bool = False) -> Tensor:
    """x [B, N, C] -> [B, N, C] in the windows of `part`; pads: whether padding attends in it."""
    reader = reader_of(m)
    num_heads, _ = reader.heads(m)
    pad_value = reader.pad_value(m, x) if pads else None
    qkv, table, scale = reader.qkv(m, x), reader.table(m), reader.scale(m)
    out = group_window_attention(qkv, table, part, num_heads, scale, pad_value)
    return reader.output(m, out)


# --- what the kernels cannot run ------------------------------------------------------------------


def can_run(m: nn.Module, x: Tensor) -> bool:
    """Whether the kernels can run a fused module on x, whatever its windows; warns if not."""
    if isinstance(x, torch.fx.Proxy):
        return False  # torch.fx traces the library's code
    if m.training and reader_of(m).dropout(m) > 0:
        return warn_once(
            m, "attention dropout is above 0 in training; set it to 0 to run the kernels"
        )
    if reader_of(m).exposes_maps(m):
        return warn_once(m, "a hook looks at attention maps; remove it to run the kernels")
    usable = candidates(x.device, x.dtype)
    if usable == ("reference",) and not is_forced():
        return warn_once(m, "no backend takes its dtype on its device (see `greenmim doctor`)")
    return True


def has_room(m: nn.Module, x: Tensor, part: GroupPartition) -> bool:
    """Whether a kernel has room for the module's heads and the groups of `part`; warns if not."""
    _, head_dim = reader_of(m).heads(m)
    backend = choose_backend(
        "group_window_attention", x.device, x.dtype, head_dim, part.group_size, part.table_rows
    )
    if backend == "reference" and not is_forced():
        return warn_once(m, "no backend takes its head dim and window (see `greenmim doctor`)")
    return True


def wants_maps(m: nn.Module, options: dict) -> bool | None:
    """Whether a call's options or the configuration (of transformers) ask for attention maps."""
    return options.get("output_attentions") or getattr(m.config, "output_attentions", False)


def wants_more(m: nn.Module, *given: object) -> bool:
    """Whether a call's further arguments ask for anything, such as attention maps; warns if so."""
    if any([one is not None and one is not False for one in given]):
        warn_once(m, "the call asks for attention maps, or for more than windows and a mask")
        return True
    return False


_warned: set[tuple[str, str]] = set()


def warn_once(m: nn.Module, reason: str, detail: str = "") -> bool:
    """Warns that the library's code runs a call, once per class and reason; returns False."""
    return _warn(origin_of(m).original.__name__, reason, detail)


# Dynamo calls it once and keeps the answer as a constant, so that the warning comes while tracing.
@torch.compiler.assume_constant_result
def _warn(name: str, reason: str, detail: str) -> bool:
    if (name, reason) not in _warned:
        _warned.add((name, reason))
        text = f"{name} runs its own code, not the fused kernels: {reason}"
        warnings.warn(f"{text} ({detail})" if detail else text, stacklevel=6)
    return False


# --- windows that the caller has cut ------------------------------------------------------------


@dataclass(frozen=True)
class _Kept:
    """A partition, and what it depends on besides the tensor that it is kept by."""

    slots: int
    window: tuple[int, ...]
    versions: tuple[int | None, int | None]  # of the mask and of the index
    index: weakref.ref | None
    part: GroupPartition


# Keyed by the mask, or by the index without a mask: the blocks of a network may share one.
_kept = WeakTensorKeyDictionary()
# The modules whose first mask was checked, with its number of slots.
_checked: weakref.WeakKeyDictionary[nn.Module, int] = weakref.WeakKeyDictionary()
_captured: list[GroupPartition] = []  # CUDA graphs read them for as long as the process lives


def _partition(m: nn.Module, x: Tensor, mask: Tensor | None) -> GroupPartition | None:
    """The partition of the windows x [B * windows, n, C]; None, after a warning, if there is none.

    It covers the windows of one image; without a mask, one window.
    """
    slots, window = x.shape[1], reader_of(m).window_size(m)
    _, _, has_swin_index, takes_fewer_slots = origin_of(m)
    if slots > math.prod(window) or (slots < math.prod(window) and not takes_fewer_slots):
        warn_once(m, "its windows are of another size than its bias table")
        return None
    if mask is None and has_swin_index:
        return grid_partition((slots,), (slots,), (0,), window, x.device)
    if mask is not None:
        if mask.shape[1:] != (slots, slots) or x.shape[0] % mask.shape[0]:
            warn_once(m, "its mask is not [windows, n, n]")
            return None
        if mask.requires_grad:
            warn_once(m, "its mask requires a gradient, which the kernels do not compute")
            return None
        if isinstance(mask, FakeTensor) and not torch.compiler.is_compiling():
            return None  # it has no values to look at
    if torch.compiler.is_compiling():
        return _make(m, mask, slots, trusted=True)
    try:
        return _kept_or_made(m, mask, slots)
    except ValueError as error:
        warn_once(m, "its mask or relative position index cannot be used", str(error))
        return None


def _kept_or_made(m: nn.Module, mask: Tensor | None, slots: int) -> GroupPartition:
    index = None if origin_of(m).has_swin_index else m.relative_position_index
    key, window = index if mask is None else mask, tuple(reader_of(m).window_size(m))
    versions = _version(mask), _version(index)
    kept = _kept.get(key)
    if kept is not None and (kept.slots, kept.window, kept.versions) == (slots, window, versions):
        is_same = index is None if kept.index is None else kept.index() is index
        if is_same and None not in versions:
            return kept.part
    # Where a check in Python waits for the device, a module's masks after the first are trusted.
    trusted = mask is not None and _waits(mask.device) and _checked.get(m) == slots
    with torch.inference_mode(False):  # autograd refuses to save tensors made in it
        part = _make(m, mask, slots, trusted)
    index_ref = None if index is None else weakref.ref(index)
    _kept[key] = _Kept(slots, window, versions, index_ref, part)
    if mask is not None:
        _checked[m] = slots
    if is_capturing(part.token_index.device):
        _captured.append(part)
    return part


def _waits(device: torch.device) -> bool:
    """Whether to read a value in Python waits for the device."""
    return device.type != "cpu"


def _version(x: Tensor | None) -> int | None:
    """A number that grows with each write to x; None in inference mode, which counts none."""
    return 0 if x is None else None if x.is_inference() else x._version


def _make(m: nn.Module, mask: Tensor | None, slots: int, trusted: bool) -> GroupPartition:
    """The partition of a mask, or of one window without a mask.

    trusted: do not wait for the device; a mask or an index that does not fit fails there, later.
    """
    window: tuple | None = tuple(reader_of(m).window_size(m))
    index, windows = None, 1
    if mask is not None:
        windows, attends = mask.shape[0], mask == 0
        # Any other value would be a bias, not an exclusion.
        excludes = (attends | (mask <= -50)).all()
        if trusted:
            segment = attends.byte().argmax(-1)  # the first slot that a slot attends to
            is_cut = ((segment[:, :, None] == segment[:, None]) == attends).all()
            torch._assert_async(
                excludes & is_cut,
                "the mask does not cut windows into segments, or has values other than 0 and those"
                " up to -50; call unfuse_window_attention(model)",
            )
        elif not excludes:
            raise ValueError("the mask has values other than 0 and those up to -50")
    has_swin_index = origin_of(m).has_swin_index
    if not has_swin_index:
        window, index = None, index_matrix(m)[:slots, :slots]
        rows = reader_of(m).table(m).shape[0]
        if trusted:
            is_sum = index[:, :1] + index[:1] - index[0, 0] == index
            torch._assert_async(
                (is_sum & (index >= 0) & (index < rows)).all(),
                "the relative position index is no sum of a term of the query and a term of the"
                " key; call unfuse_window_attention(model)",
            )
    on_device: Any = index if mask is None else mask
    token = torch.arange(windows * slots, device=on_device.device)
    part = partition_from_windows(
        token.view(windows, slots),
        window,
        mask=mask,
        bias_index=index,
        num_tokens=windows * slots if trusted else None,
    )
    # The table may have rows that no pair of the index takes.
    return part if has_swin_index else replace(part, table_rows=rows)


# --- relative position indices --------------------------------------------------------------------


def index_is_swins(m: nn.Module, ours: type[Fused]) -> bool:
    """Whether the module's relative_position_index is Swin's for its window, or it has none."""
    index = getattr(m, "relative_position_index", None)
    if not isinstance(index, Tensor):
        return True
    return not index.is_meta and _equals_swin_index(index, ours.reader.window_size(m))


def swin_index(window: Sequence[int], device: torch.device | str = "cpu") -> Tensor:
    """Swin's relative_position_index of a window of n slots, int32 [n, n]."""
    slots = math.prod(window)
    part = grid_partition((slots,), (slots,), (0,), window, torch.device(device))
    return part.query_row[0, 0, :, None] + part.key_row[0, 0]


def _equals_swin_index(index: Tensor, window: Sequence[int]) -> bool:
    return torch.equal(index.reshape(-1).int(), swin_index(window, index.device).view(-1))


# For each module the index of its last call, that tensor's version, and whether it was Swin's.
_indices: weakref.WeakKeyDictionary[nn.Module, tuple] = weakref.WeakKeyDictionary()


def _is_swin_index(m: nn.Module, index: Tensor) -> bool:
    """Whether the index of a call is Swin's; warns about another one of its size."""
    if index.numel() != math.prod(m.window_size) ** 2:
        return False  # the library's code raises
    if torch.compiler.is_compiling():
        is_same = (index.reshape(-1) == swin_index(m.window_size, index.device).view(-1)).all()
        message = "the relative position index is not Swin's; call unfuse_window_attention(model)"
        torch._assert_async(is_same, message)
        return True
    if isinstance(index, FakeTensor):
        return False
    last, version, is_swin = _indices.get(m, (lambda: None, None, False))
    if last() is not index or version is None or version != _version(index):
        with _disable_current_modes():  # x may be fake where the index is not
            is_swin = _equals_swin_index(index, m.window_size)
        _indices[m] = weakref.ref(index), _version(index), is_swin
    return is_swin or warn_once(m, "its relative position index is not Swin's")


def index_matrix(m: nn.Module) -> Tensor:
    """The module's relative_position_index as a matrix [n, n]."""
    index = m.relative_position_index
    slots = math.isqrt(index.numel())
    return index.view(slots, slots)

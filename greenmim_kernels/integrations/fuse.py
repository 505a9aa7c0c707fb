"""Which modules of a model the kernels can run, and the exchange of their classes."""

from __future__ import annotations

import copy
import hashlib
import math
import re
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from functools import partial
from operator import attrgetter
from typing import Any

import torch
from torch import Tensor, nn

from ..backends import use_backend
from ..windows import partition_from_windows
from . import attention, blocks
from .attention import Fused, fused_class, has_plain_index, index_matrix
from .grids import cut


@dataclass
class FusionReport:
    """What :func:`fuse_window_attention` did.

    Attributes:
        fused: what was replaced, by the module's name.
        left: why a module that looks like attention in windows was not, by its name.
    """

    fused: dict[str, str] = field(default_factory=dict)
    left: dict[str, str] = field(default_factory=dict)

    def __str__(self) -> str:
        if not self.fused and not self.left:
            return "no attention in windows found; nothing was changed"
        lines = []
        for title, entries in (("fused", self.fused), ("left as it is", self.left)):
            by_text: dict[str, list[str]] = {}
            for name, text in entries.items():
                by_text.setdefault(text, []).append(name or "the model itself")
            for text, names in by_text.items():
                where = names[0] if len(names) == 1 else f"{names[0]} to {names[-1]}"
                lines.append(f"{title}: {len(names)} x {text} ({where})")
        return "\n".join(lines)


def fuse_window_attention(model: nn.Module) -> FusionReport:
    """Makes the attention in windows of a model run on the fused kernels, in place.

    Parameters, buffers, their names and values stay; :func:`unfuse_window_attention` undoes it.
    Modules are known by their structure: the Swins of timm, torchvision, transformers, MONAI and
    Microsoft, SwinIR and MaxViT with rolling, padding and cutting into windows; else each class
    with the names and the ``forward(x, mask)`` of Swin's ``WindowAttention``, and HAT's. A copy of
    each with other weights is asked for its numbers before and after, in float64 on the CPU; where
    they differ the module is left alone.

    Calls go to the module's own code, with one warning, where the kernels lack something: attention
    dropout above 0 in training, attention maps asked for, a dtype or head dim. Pairs that a mask
    excludes are excluded exactly, where libraries add -100.

    Args:
        model: any module, on any device but "meta", before FSDP shards it; may be one of these
            modules itself.

    Returns:
        A :class:`FusionReport`; print it.
    """
    left: dict[str, str] = {}
    tried: dict[tuple, tuple | str] = {}
    for kinds in (ATTENTION, BLOCKS, LAYERS):
        for name, module in model.named_modules():
            found = [kind for kind in kinds if kind.fits(module)]
            if not found or isinstance(module, Fused):
                continue
            code = _code_of(module)
            for kind in found:
                key = (kind.ours, code)
                if key not in tried:
                    tried[key] = _try(module, kind)
                if isinstance(tried[key], tuple):
                    module.__class__ = fused_class(*tried[key])
                    break
            else:
                left[name] = f"{type(module).__name__}: {tried[found[0].ours, code]}"
    return _report(model, left)


def unfuse_window_attention(model: nn.Module) -> None:
    """Gives every module that :func:`fuse_window_attention` changed its own class back.

    Args:
        model: changed in place.

    Raises:
        RuntimeError: something else, such as FSDP, has changed the class of a fused module since;
            nothing is undone.
    """
    fused = {name: module for name, module in model.named_modules() if isinstance(module, Fused)}
    for name, module in fused.items():
        if type(module) is not fused_class(*module.unfused):  # type: ignore[arg-type]  # hashable
            raise RuntimeError(
                f"{name or 'the model'} has become a {type(module).__name__} since it was fused;"
                " undo that first"
            )
    for module in fused.values():
        module.__class__ = module.unfused[0]  # type: ignore[assignment]  # one of its two bases


def _report(model: nn.Module, left: dict[str, str]) -> FusionReport:
    report = FusionReport(left=dict(left))
    inside: list[str] = []
    for name, module in model.named_modules():
        if any(name.startswith(outer) for outer in inside):
            continue
        label = type(module).__name__
        if isinstance(module, Fused):
            extent = next(
                kind.extent
                for kind in (*ATTENTION, *BLOCKS, *LAYERS)
                if kind.ours is module.unfused[1]
            )
            report.fused[name] = f"{module.unfused[0].__name__}, {extent}"
            inside.append(f"{name}." if name else "")
        elif _looks_like_it(module) and not any(f"{name}.".startswith(f"{x}.") for x in left):
            report.left[name] = f"{label}: not known"
            inside.append(f"{name}.")
    return report


def _looks_like_it(module: nn.Module) -> bool:
    name = type(module).__name__
    is_called_so = re.search("window.*(attention|msa)$", name, re.IGNORECASE) is not None
    return is_called_so or hasattr(module, "relative_position_index")


# --- is it what it looks like? ------------------------------------------------------------------


# Attributes that differ between modules of a model where their code does not.
SIZES = frozenset(
    "training p drop_prob input_resolution dim embed_dims num_heads num_attention_heads head_dim"
    " attention_head_size all_head_size scale scaling in_features out_features in_channels"
    " out_channels normalized_shape".split()
)


def _code_of(module: nn.Module) -> tuple:
    """What a module computes with besides its weights: those with the same run the same code."""
    plain = (bool, int, float, str, tuple, list, type(None))
    found: list[object] = []
    for name, child in module.named_modules():
        settings = [
            (key, str(value))
            for key, value in sorted(vars(child).items())
            if isinstance(value, plain) and key not in SIZES
        ]
        tensors = [*child._parameters.items(), *child._buffers.items()]
        given = [(key, x is None) for key, x in tensors]
        # Such as a method that somebody has replaced.
        called = [(key, id(value)) for key, value in vars(child).items() if callable(value)]
        found.append((name, type(child), str(called), str(settings), str(given)))
    found += [(name, _digest(buffer)) for name, buffer in module.named_buffers()]
    return tuple(found)


def _digest(x: Tensor) -> bytes:
    """Of a buffer's values; empty without any."""
    if x.is_meta:
        return b""
    return hashlib.blake2b(x.detach().cpu().flatten().view(torch.uint8).numpy().tobytes()).digest()


def _try(module: nn.Module, kind: Kind) -> tuple | str:
    """What to fuse a module by, if a copy gives its numbers so; else the reason why not."""
    if any(x.is_meta for x in (*module.parameters(), *module.buffers())):
        return 'on the device "meta"; fuse it with values'
    if "forward" in vars(module):
        return "its forward was replaced"
    try:
        # Whatever surrounds the call: the copies are on the CPU, in float64.
        with (
            torch.device("cpu"),
            torch.inference_mode(False),
            torch.no_grad(),
            torch.autocast("cpu", enabled=False),
            use_backend("reference"),  # which takes everything
        ):
            return _compared(module, kind)
    except Exception as error:  # of anybody's code
        return f"its code could not be tried: {type(error).__name__}: {error}"


def _compared(module: nn.Module, kind: Kind) -> tuple | str:
    plain_index = has_plain_index(module, kind.ours)
    if not plain_index:
        index = index_matrix(module).cpu()
        partition_from_windows(torch.arange(index.shape[0])[None], bias_index=index)
    original, draw = _copy(module), torch.Generator().manual_seed(0)
    for weight in original.parameters():
        fan_in = weight.shape[-1] if weight.dim() == 2 else 1
        weight.copy_(torch.randn(weight.shape, dtype=weight.dtype, generator=draw) / fan_in**0.5)
    fused = copy.deepcopy(original)
    unfuse_window_attention(original)
    unfused = (type(module), kind.ours, plain_index, True)
    fused.__class__ = fused_class(*unfused)  # type: ignore[arg-type]  # hashable
    for number, arguments in enumerate(kind.sample(original, draw)):
        try:
            one, other = (getattr(m, kind.method)(*arguments) for m in (original, fused))
            one, other = (x if isinstance(x, Tensor) else x[0] for x in (one, other))
            # Libraries may take the softmax in float32 even so.
            is_same = one.shape == other.shape
            is_same = is_same and (one - other).abs().max() <= 1e-5 * one.abs().max()
        except Exception:
            if number < kind.whole:
                raise
            is_same = False
        if not is_same and number < kind.whole:
            return "its code computes something else"
        if not is_same:  # windows with fewer slots
            return (*unfused[:3], False)
    return unfused


def _copy(module: nn.Module) -> nn.Module:
    """In float64 on the CPU, for evaluation, without hooks."""
    without: dict = {}
    for child in module.modules():
        hooks = [value for key, value in vars(child).items() if "_hooks" in key]
        without |= {id(value): type(value)() for value in hooks if isinstance(value, dict)}
    return copy.deepcopy(module, without).cpu().double().eval()


def _windows(ours: Any, layer: str, m: nn.Module, draw: torch.Generator) -> Iterator[tuple]:
    """Windows without a mask, with one, and with fewer slots; `layer` takes the input."""
    slots, channels = math.prod(ours.reader.window(m)), m.get_submodule(layer).weight.shape[1]
    part = torch.arange(slots) % 3
    mask = torch.zeros(2, slots, slots, dtype=torch.float64)
    mask[1] = -100.0 * (part[:, None] != part)
    for count, one in ((slots, None), (slots, mask), (slots - 1, None)):
        yield torch.randn(4, count, channels, dtype=torch.float64, generator=draw), one


def _of_hat(m: nn.Module, draw: torch.Generator) -> Iterator[tuple]:
    index = attention.swins_index(m.window_size).long()
    for x, mask in _windows(attention.FusedHATAttention, "qkv", m, draw):
        yield x, index, mask


def _one_window(ours: Any, layer: str, m: nn.Module, draw: torch.Generator) -> Iterator[tuple]:
    """[B, 1, n, C]; and with fewer slots."""
    slots, channels = math.prod(ours.reader.window(m)), m.get_submodule(layer).weight.shape[1]
    for count in (slots, slots - 1):
        yield (torch.randn(4, 1, count, channels, dtype=torch.float64, generator=draw),)


def _grid(window: tuple[int, ...], channels: int, draw: torch.Generator) -> Tensor:
    """[2, ..., C], some larger than the window, which does not divide it."""
    grid = [side + 1 + axis for axis, side in enumerate(window)]
    return torch.randn(2, *grid, channels, dtype=torch.float64, generator=draw)


def _of_timm(m: Any, draw: torch.Generator) -> Iterator[tuple]:
    m.dynamic_mask = True  # else it has one for one size of input
    yield (_grid(m.window_size, m.attn.qkv.weight.shape[1], draw),)


def _of_swin_block(m: Any, draw: torch.Generator) -> Iterator[tuple]:
    channels = m.attn.qkv.weight.shape[1]
    sizes = [m.input_resolution]
    takes_size = hasattr(m, "calculate_mask")  # as SwinIR's, which keeps the mask of one size
    if takes_size:
        sizes.append((2 * m.window_size, 3 * m.window_size))
    for high, wide in sizes:
        x = torch.randn(2, high * wide, channels, dtype=torch.float64, generator=draw)
        yield (x, (high, wide)) if takes_size else (x,)


def _of_torchvision(m: nn.Module, draw: torch.Generator) -> Iterator[tuple]:
    x = _grid(m.window_size, m.qkv.weight.shape[1], draw)
    yield (x,)
    yield (x[:, : max(1, m.window_size[0] - 1)],)  # less than a window


def _of_hugging_face(m: nn.Module, draw: torch.Generator) -> Iterator[tuple]:
    x = _grid((m.window_size,) * 2, m.layernorm_before.weight.shape[0], draw)
    yield x.flatten(1, 2), tuple(x.shape[1:3])


def _of_monai(m: nn.Module, draw: torch.Generator) -> Iterator[tuple]:
    whole = _grid(m.window_size, m.attn.qkv.weight.shape[1], draw)
    for x in (whole, whole[:, : max(1, m.window_size[0] - 1)]):
        window, shift = blocks.window_and_shift(x.shape[1:-1], m.window_size, m.shift_size)
        part = torch.from_numpy(cut(x.shape[1:-1], window, shift, True)[1])
        yield x, -100.0 * (part[:, :, None] != part[:, None]).double()


def _of_monai_layer(m: nn.Module, draw: torch.Generator) -> Iterator[tuple]:
    channels = m.blocks[0].attn.qkv.weight.shape[1]
    yield (_grid(m.window_size, channels, draw).movedim(-1, 1),)


def _of_timm_maxvit(m: Any, draw: torch.Generator) -> Iterator[tuple]:
    high, wide = m.partition_size
    shape = 2, 2 * high, 3 * wide, m.attn.qkv.weight.shape[1]
    yield (torch.randn(shape, dtype=torch.float64, generator=draw),)


def _of_torchvision_maxvit(m: Any, draw: torch.Generator) -> Iterator[tuple]:
    shape = 2, m.attn_layer[1].to_qkv.weight.shape[1], *m.grid_size
    yield (torch.randn(shape, dtype=torch.float64, generator=draw),)


# --- what is known ------------------------------------------------------------------------------


@dataclass(frozen=True)
class Kind:
    """A kind of module.

    Attributes:
        extent: how much the kernels do of it.
        ours: the class that runs it.
        names: attributes that a module of this kind has, or parts of it.
        sample: arguments for a module of it, with values of the generator.
        child: the attention that must be fused before, or a list of blocks.
        parts: the only children that it may have; empty: any.
        method: what is called with the arguments.
        whole: how many samples must agree; those behind have windows with fewer slots.
    """

    extent: str
    ours: type[Fused]
    names: str
    sample: Callable[[nn.Module, torch.Generator], Iterator[tuple]]
    child: str = ""
    parts: str = ""
    method: str = "forward"
    whole: int = 2

    def fits(self, module: nn.Module) -> bool:
        try:
            attrgetter(*self.names.split())(module)
            child = module.get_submodule(self.child)
        except AttributeError:
            return False
        if self.parts and not set(dict(module.named_children())) <= set(self.parts.split()):
            return False
        if not self.child:
            return True
        within = child if isinstance(child, nn.ModuleList) else [child]
        return len(within) > 0 and all(isinstance(one, Fused) for one in within)


_INDEXED = "relative_position_index num_heads window_size qkv proj attn_drop proj_drop"
ATTENTION = [
    Kind(
        "attention alone",
        attention.FusedSwinAttention,
        f"relative_position_bias_table scale {_INDEXED}",
        partial(_windows, attention.FusedSwinAttention, "qkv"),
    ),
    Kind(
        "attention alone",
        attention.FusedSwinV2Attention,
        f"q_bias logit_scale cpb_mlp relative_coords_table {_INDEXED}",
        partial(_windows, attention.FusedSwinV2Attention, "qkv"),
    ),
    Kind(
        "attention alone",
        attention.FusedHATAttention,
        "relative_position_bias_table scale num_heads window_size qkv proj attn_drop proj_drop",
        _of_hat,
    ),
    Kind(
        "attention alone",
        attention.FusedHuggingFaceSwinAttention,
        "q_proj k_proj v_proj o_proj relative_position_bias scaling config",
        partial(_windows, attention.FusedHuggingFaceSwinAttention, "q_proj"),
    ),
    Kind(
        "attention alone",
        attention.FusedHuggingFaceSwinV2Attention,
        "query key value logit_scale continuous_position_bias_mlp window_size",
        partial(_windows, attention.FusedHuggingFaceSwinV2Attention, "query"),
    ),
    Kind(
        "attention alone",
        attention.FusedHuggingFaceSelfAttention,
        "query key value relative_position_bias_table relative_position_index window_size"
        " attention_head_size dropout",
        partial(_windows, attention.FusedHuggingFaceSelfAttention, "query"),
    ),
    Kind(
        "with padding and windows",
        blocks.FusedTorchvisionV2Attention,
        "qkv proj logit_scale cpb_mlp relative_coords_table shift_size attention_dropout",
        _of_torchvision,
    ),
    Kind(
        "with padding and windows",
        blocks.FusedTorchvisionAttention,
        "qkv proj relative_position_bias_table shift_size attention_dropout",
        _of_torchvision,
    ),
    Kind(
        "attention alone",
        attention.FusedTimmMaxVitAttention,
        "rel_pos.window_size dim_head head_first qkv.in_features proj attn_drop proj_drop",
        partial(_one_window, attention.FusedTimmMaxVitAttention, "qkv"),
        whole=1,
    ),
    Kind(
        "attention alone",
        attention.FusedTorchvisionMaxVitAttention,
        "to_qkv merge relative_position_bias_table n_heads head_dim size scale_factor",
        partial(_one_window, attention.FusedTorchvisionMaxVitAttention, "to_qkv"),
        whole=1,
    ),
]
BLOCKS = [
    Kind(
        "with padding and windows",
        blocks.FusedTimmBlock,
        "_attn window_size shift_size",
        _of_timm,
        child="attn",
        method="_attn",
    ),
    Kind(
        "with windows",
        blocks.FusedSwinBlock,
        "attn_mask norm1 norm2 mlp drop_path input_resolution window_size shift_size",
        _of_swin_block,
        child="attn",
        parts="norm1 attn drop_path norm2 mlp",
    ),
    Kind(
        "with windows",
        blocks.FusedSwinV2Block,
        "attn_mask norm1 norm2 mlp drop_path input_resolution window_size shift_size",
        _of_swin_block,
        child="attn",
        parts="norm1 attn drop_path norm2 mlp",
    ),
    Kind(
        "with padding and windows",
        blocks.FusedHuggingFaceSwinLayer,
        "layernorm_before layernorm_after mlp set_shift_and_window_size window_size shift_size",
        _of_hugging_face,
        child="attention",
    ),
    Kind(
        "with padding and windows",
        blocks.FusedHuggingFacePreNormLayer,
        "layernorm_before layernorm_after intermediate output window_size shift_size",
        _of_hugging_face,
        child="attention.self",
    ),
    Kind(
        "with padding and windows",
        blocks.FusedHuggingFaceSwinV2Layer,
        "layernorm_before layernorm_after intermediate output window_size shift_size",
        _of_hugging_face,
        child="attention.self",
    ),
    Kind(
        "with padding and windows",
        blocks.FusedMonaiBlock,
        "forward_part1 norm1 window_size shift_size",
        _of_monai,
        child="attn",
        method="forward_part1",
    ),
    Kind(
        "with windows or grids",
        blocks.FusedTimmMaxVitBlock,
        "partition_block partition_size",
        _of_timm_maxvit,
        child="attn",
        method="_partition_attn",
    ),
    Kind(
        "with windows or grids",
        blocks.FusedTorchvisionMaxVitLayer,
        "attn_layer mlp_layer stochastic_dropout partition_type grid_size",
        _of_torchvision_maxvit,
        child="attn_layer.1",
        parts="partition_op departition_op partition_swap departition_swap attn_layer mlp_layer"
        " stochastic_dropout",
    ),
]
LAYERS = [
    Kind(
        "with padding, windows and masks",
        blocks.FusedMonaiLayer,
        "no_shift downsample window_size shift_size",
        _of_monai_layer,
        child="blocks",
    ),
]

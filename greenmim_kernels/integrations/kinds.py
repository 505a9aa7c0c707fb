"""Which modules of other libraries are known: by what attributes, and with what they are tried."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from functools import partial
from operator import attrgetter
from typing import Any

import torch
from torch import Tensor, nn

from . import attention, blocks
from .attention import Fused
from .grids import cut


@dataclass(frozen=True)
class Kind:
    """A kind of module.

    Attributes:
        extent: how much the kernels do of it.
        ours: the class that runs it.
        names: attributes that a module of this kind has; of a part of it with a dot.
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


# --- what modules of a kind are tried with ------------------------------------------------------


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


# --- attention; blocks whose attention is fused; layers of fused blocks --------------------------


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
    *[
        Kind(
            "with windows",
            ours,
            "attn_mask norm1 norm2 mlp drop_path input_resolution window_size shift_size",
            _of_swin_block,
            child="attn",
            parts="norm1 attn drop_path norm2 mlp",
        )
        for ours in (blocks.FusedSwinBlock, blocks.FusedSwinV2Block)
    ],
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

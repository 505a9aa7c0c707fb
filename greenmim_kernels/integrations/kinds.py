"""The kinds of modules of other libraries that are known: their attributes, and sample inputs."""

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
from .grids import cut_windows


@dataclass(frozen=True)
class Kind:
    """A kind of module.

    Attributes:
        extent: how much of the module the kernels run, for people.
        ours: the class that runs it.
        attributes: what a module of this kind has, separated by spaces; dots reach into children.
        samples: yields arguments for a module, with values from the generator.
        child: the child that must be fused already: its attention, or a list of blocks.
        children: the only children that it may have; empty: any.
        method: the method that takes the samples.
        required: how many samples the fused module must reproduce. The others have windows with
            fewer slots, which it may leave to the library's code.
    """

    extent: str
    ours: type[Fused]
    attributes: str
    samples: Callable[[nn.Module, torch.Generator], Iterator[tuple]]
    child: str = ""
    children: str = ""
    method: str = "forward"
    required: int = 2

    def fits(self, module: nn.Module) -> bool:
        """Whether a module has the structure of this kind; `fuse` compares its numbers."""
        try:
            attrgetter(*self.attributes.split())(module)
            child = module.get_submodule(self.child)
        except AttributeError:
            return False
        if self.children and not set(dict(module.named_children())) <= set(self.children.split()):
            return False
        if not self.child:
            return True
        within = child if isinstance(child, nn.ModuleList) else [child]
        return len(within) > 0 and all(isinstance(one, Fused) for one in within)


# --- samples, in float64 ------------------------------------------------------------------------


def _randn(generator: torch.Generator, *shape: int) -> Tensor:
    return torch.randn(shape, dtype=torch.float64, generator=generator)


def _segment_mask(segment: Tensor) -> Tensor:
    """Labels [..., n] -> Swin's attn_mask [..., n, n]."""
    return -100.0 * (segment[..., :, None] != segment[..., None, :]).double()


def _windows(ours: Any, layer: str, m: nn.Module, generator: torch.Generator) -> Iterator[tuple]:
    """Windows [4, n, C] without and with a mask, and with fewer slots; `layer` takes C channels."""
    slots, channels = math.prod(ours.reader.window_size(m)), m.get_submodule(layer).weight.shape[1]
    thirds = torch.arange(slots) % 3
    segment = torch.stack([torch.zeros_like(thirds), thirds])
    for count, mask in ((slots, None), (slots, _segment_mask(segment)), (slots - 1, None)):
        yield _randn(generator, 4, count, channels), mask


def _hat_windows(m: nn.Module, generator: torch.Generator) -> Iterator[tuple]:
    index = attention.swin_index(m.window_size).long()
    for x, mask in _windows(attention.FusedHATAttention, "qkv", m, generator):
        yield x, index, mask


def _one_window(ours: Any, layer: str, m: nn.Module, generator: torch.Generator) -> Iterator[tuple]:
    """A window [4, 1, n, C], and one with fewer slots; `layer` takes C channels."""
    for x, mask in _windows(ours, layer, m, generator):
        if mask is None:
            yield (x[:, None],)


def _grid(window: tuple[int, ...], channels: int, generator: torch.Generator) -> Tensor:
    """[2, ..., C], a little larger than the window, which does not divide it."""
    return _randn(generator, 2, *[side + 1 + axis for axis, side in enumerate(window)], channels)


def _timm_block(m: Any, generator: torch.Generator) -> Iterator[tuple]:
    m.dynamic_mask = True  # its own mask is for one size of input
    yield (_grid(m.window_size, m.attn.qkv.weight.shape[1], generator),)


def _swin_block(m: Any, generator: torch.Generator) -> Iterator[tuple]:
    channels = m.attn.qkv.weight.shape[1]
    sizes = [m.input_resolution]
    takes_size = hasattr(m, "calculate_mask")  # SwinIR's, whose own mask is for one size
    if takes_size:
        sizes.append((2 * m.window_size, 3 * m.window_size))
    for height, width in sizes:
        x = _randn(generator, 2, height * width, channels)
        yield (x, (height, width)) if takes_size else (x,)


def _torchvision_attention(m: nn.Module, generator: torch.Generator) -> Iterator[tuple]:
    x = _grid(m.window_size, m.qkv.weight.shape[1], generator)
    yield (x,)
    yield (x[:, : max(1, m.window_size[0] - 1)],)  # smaller than a window


def _hugging_face_layer(m: nn.Module, generator: torch.Generator) -> Iterator[tuple]:
    x = _grid((m.window_size,) * 2, m.layernorm_before.weight.shape[0], generator)
    yield x.flatten(1, 2), tuple(x.shape[1:3])


def _monai_block(m: nn.Module, generator: torch.Generator) -> Iterator[tuple]:
    large = _grid(m.window_size, m.attn.qkv.weight.shape[1], generator)
    for x in (large, large[:, : max(1, m.window_size[0] - 1)]):  # and smaller than a window
        window, shift = blocks.window_and_shift(x.shape[1:-1], m.window_size, m.shift_size)
        _, segment = cut_windows(x.shape[1:-1], window, shift, pads_first=True)
        yield x, _segment_mask(torch.from_numpy(segment))


def _monai_layer(m: nn.Module, generator: torch.Generator) -> Iterator[tuple]:
    channels = m.blocks[0].attn.qkv.weight.shape[1]
    yield (_grid(m.window_size, channels, generator).movedim(-1, 1),)


def _timm_maxvit_block(m: Any, generator: torch.Generator) -> Iterator[tuple]:
    height, width = m.partition_size
    yield (_randn(generator, 2, 2 * height, 3 * width, m.attn.qkv.weight.shape[1]),)


def _torchvision_maxvit_layer(m: Any, generator: torch.Generator) -> Iterator[tuple]:
    yield (_randn(generator, 2, m.attn_layer[1].to_qkv.weight.shape[1], *m.grid_size),)


# --- the kinds: attention; blocks whose attention is fused; layers of fused blocks ---------------


_SWIN = "num_heads window_size qkv proj attn_drop proj_drop"
ATTENTION = [
    Kind(
        "attention alone",
        attention.FusedSwinAttention,
        f"relative_position_bias_table relative_position_index scale {_SWIN}",
        partial(_windows, attention.FusedSwinAttention, "qkv"),
    ),
    Kind(
        "attention alone",
        attention.FusedSwinV2Attention,
        f"q_bias logit_scale cpb_mlp relative_coords_table relative_position_index {_SWIN}",
        partial(_windows, attention.FusedSwinV2Attention, "qkv"),
    ),
    Kind(
        "attention alone",
        attention.FusedHATAttention,
        f"relative_position_bias_table scale {_SWIN}",
        _hat_windows,
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
        _torchvision_attention,
    ),
    Kind(
        "with padding and windows",
        blocks.FusedTorchvisionAttention,
        "qkv proj relative_position_bias_table shift_size attention_dropout",
        _torchvision_attention,
    ),
    Kind(
        "attention alone",
        attention.FusedTimmMaxVitAttention,
        "rel_pos.window_size dim_head head_first qkv.in_features proj attn_drop proj_drop",
        partial(_one_window, attention.FusedTimmMaxVitAttention, "qkv"),
        required=1,
    ),
    Kind(
        "attention alone",
        attention.FusedTorchvisionMaxVitAttention,
        "to_qkv merge relative_position_bias_table n_heads head_dim size scale_factor",
        partial(_one_window, attention.FusedTorchvisionMaxVitAttention, "to_qkv"),
        required=1,
    ),
]
BLOCKS = [
    Kind(
        "with padding and windows",
        blocks.FusedTimmBlock,
        "_attn window_size shift_size",
        _timm_block,
        child="attn",
        method="_attn",
    ),
    *[
        Kind(
            "with windows",
            ours,
            "attn_mask norm1 norm2 mlp drop_path input_resolution window_size shift_size",
            _swin_block,
            child="attn",
            children="norm1 attn drop_path norm2 mlp",
        )
        for ours in (blocks.FusedSwinBlock, blocks.FusedSwinV2Block)
    ],
    Kind(
        "with padding and windows",
        blocks.FusedHuggingFaceSwinLayer,
        "layernorm_before layernorm_after mlp set_shift_and_window_size window_size shift_size",
        _hugging_face_layer,
        child="attention",
    ),
    Kind(
        "with padding and windows",
        blocks.FusedHuggingFacePreNormLayer,
        "layernorm_before layernorm_after intermediate output window_size shift_size",
        _hugging_face_layer,
        child="attention.self",
    ),
    Kind(
        "with padding and windows",
        blocks.FusedHuggingFaceSwinV2Layer,
        "layernorm_before layernorm_after intermediate output window_size shift_size",
        _hugging_face_layer,
        child="attention.self",
    ),
    Kind(
        "with padding and windows",
        blocks.FusedMonaiBlock,
        "forward_part1 norm1 window_size shift_size",
        _monai_block,
        child="attn",
        method="forward_part1",
    ),
    Kind(
        "with windows or grids",
        blocks.FusedTimmMaxVitBlock,
        "partition_block partition_size",
        _timm_maxvit_block,
        child="attn",
        method="_partition_attn",
    ),
    Kind(
        "with windows or grids",
        blocks.FusedTorchvisionMaxVitLayer,
        "attn_layer mlp_layer stochastic_dropout partition_type grid_size",
        _torchvision_maxvit_layer,
        child="attn_layer.1",
        children="partition_op departition_op partition_swap departition_swap attn_layer mlp_layer"
        " stochastic_dropout",
    ),
]
LAYERS = [
    Kind(
        "with padding, windows and masks",
        blocks.FusedMonaiLayer,
        "no_shift downsample window_size shift_size",
        _monai_layer,
        child="blocks",
    ),
]

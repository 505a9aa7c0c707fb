"""Twins-SVT on visible tokens only, with timm's parameters.

Windows in even blocks; in odd ones global attention, in which a cell of tokens is one key; after
the first block of a stage a depthwise convolution that tells where tokens are. Source of the
method: Huang et al., NeurIPS 2022 (arXiv 2205.13515); of the network: Chu et al., NeurIPS 2021
(arXiv 2104.13840). With everything visible, on grids that are multiples of the window, it equals
timm's dense Twins, whose weights differ in one number (see `to_timm`), and whose norms of patch
embeddings and of global attention's keys have an epsilon of 1e-5, whatever the others have.

A cell is in one unit, so it is visible as a whole or not at all, and its tokens stand together in
the order of a plan: a convolution whose stride is its kernel is a linear layer on them.
"""

from __future__ import annotations

import re
from collections.abc import Collection, Iterator, Mapping
from typing import Any

import torch
from timm.models.twins import Block, Twins
from torch import Tensor, nn
from torch.nn import functional as F

from greenmim_kernels import GroupPartition, group_window_attention, sparse_depthwise_conv

from ..config import NUM_STAGES, PATCH_PIXELS, ModelConfig, models_like
from ..planning import Plan
from .visible import VisibleBlock, VisibleEncoder, embed_patches

_POS_CONV = "pos_block.{}.proj.0.weight"
_LOCAL, _GLOBAL = "attn.qkv.weight", "attn.q.weight"  # of even blocks, of odd ones
_CELLS = re.compile(r"^(patch_embeds\.[123]\.proj|blocks\.\d+\.\d+\.attn\.sr)\.weight$")
# Weights do not tell; all that were published have it.
_HEAD_DIM = 32


class LocalBlock(VisibleBlock, Block):  # type: ignore[misc]  # its own `forward`
    """timm's block with attention in windows, on visible tokens."""

    def _attend(self, x: Tensor, part: GroupPartition) -> Tensor:
        attention = self.attn
        out = group_window_attention(attention.qkv(x), None, part, attention.num_heads)
        return attention.proj(out)


class GlobalBlock(VisibleBlock, Block):  # type: ignore[misc]  # its own `forward`
    """timm's block with global attention, on visible tokens; windows mean nothing to it."""

    def _attend(self, x: Tensor, part: GroupPartition) -> Tensor:
        attention, heads = self.attn, self.attn.num_heads
        keys = x if attention.sr is None else attention.norm(of_cells(attention.sr, x))
        query = attention.q(x).unflatten(2, (heads, -1)).transpose(1, 2)  # [B, heads, N, D]
        key, value = attention.kv(keys).unflatten(2, (2, heads, -1)).permute(2, 0, 3, 1, 4)
        out = F.scaled_dot_product_attention(query, key, value)
        return attention.proj(out.transpose(1, 2).flatten(2))


def of_cells(convolution: nn.Conv2d, x: Tensor) -> Tensor:
    """A convolution whose stride is its kernel, of s x s cells: [B, N, C] -> [B, N / s^2, C']."""
    weight, side = convolution.weight, convolution.kernel_size[0]
    # The order of a plan, level by level: of the bits of rows and columns, the higher first.
    bits = side.bit_length() - 1
    weight = weight.unflatten(3, (2,) * bits).unflatten(2, (2,) * bits)
    order = [axis for bit in range(bits) for axis in (2 + bits + bit, 2 + bit)]
    weight = weight.permute(0, *order, 1).flatten(1)
    return F.linear(x.unflatten(1, (-1, side**2)).flatten(2), weight, convolution.bias)


class TwinsSVTEncoder(VisibleEncoder, Twins):  # type: ignore[misc]  # its own `forward`
    """timm's Twins-SVT, but visible tokens in and out; without a head."""

    timm_head, timm_norm_eps = "head", 1e-6

    def __init__(self, config: ModelConfig) -> None:
        super().__init__(
            img_size=config.image_hw,
            patch_size=PATCH_PIXELS,
            embed_dims=config.stage_dims,
            depths=config.depths,
            num_heads=config.num_heads,
            sr_ratios=config.sr_ratios,
            wss=(config.window_size,) * NUM_STAGES,
            drop_path_rate=config.drop_path,
            num_classes=0,
            global_pool="",
        )
        for module in self.modules():
            if isinstance(module, nn.LayerNorm):  # timm would pass it on to some alone
                module.eps = config.norm_eps
        for stage in self.blocks:
            for number, block in enumerate(stage):
                # timm offers no hook to choose the class; parameters and names stay what they are.
                block.__class__ = GlobalBlock if number % 2 else LocalBlock
        if config.pos_conv_residual:
            with torch.no_grad():
                for block in self.pos_block:
                    block.proj[0].weight[:, :, 1, 1] += 1

    def visible_blocks(self) -> Iterator[VisibleBlock]:
        stages: Any = self.blocks
        return (block for stage in stages for block in stage)

    def stages(self, images: Tensor, plan: Plan) -> list[Tensor]:
        """images [B, 3, H, W] -> for each stage, its visible tokens [B, N, C] in a plan's order."""
        outputs: list[Tensor] = []
        for stage, embed in enumerate(self.patch_embeds):
            if stage == 0:
                x = embed_patches(embed, images, plan.patch_index)
            else:
                x = embed.norm(of_cells(embed.proj, outputs[-1]))
            for number, block in enumerate(self.blocks[stage]):
                x = block(x, plan.partitions[stage][0])
                if number == 0:
                    convolution = self.pos_block[stage].proj[0]
                    weights = convolution.weight, convolution.bias
                    x = sparse_depthwise_conv(x, *weights, plan.neighbours[stage])
            outputs.append(x)
        return outputs

    # ---- the names of its weights ----

    @classmethod
    def claims(cls, names: Collection[str]) -> bool:
        return {_POS_CONV.format(0), f"blocks.0.0.{_LOCAL}"} <= set(names)

    @classmethod
    def to_own(cls, tensors: Mapping[str, Tensor], source: str) -> dict[str, Tensor]:
        parts = ("patch_embeds.", "blocks.", "pos_block.", "norm.")
        if strangers := [name for name in tensors if not name.startswith(parts)]:
            raise ValueError(f"holds {strangers[0]!r}")
        cells = [name for name in tensors if _CELLS.match(name)]
        if bad := [name for name in cells if tensors[name].ndim != 4]:
            raise ValueError(f"has {tensors[bad[0]].ndim} axes in {bad[0]}, not 4")
        # Of the strided convolutions each has another kernel; this one is always 2 x 2.
        tell = tensors.get("patch_embeds.1.proj.weight")
        if tell is None:
            raise ValueError("has no patch_embeds.1.proj.weight")
        if (tuple(tell.shape[2:]) != (2, 2)) != (source == "official"):
            order = "[out, s, s, in]" if source == "official" else "[out, in, s, s]"
            raise ValueError(f"has weights of cells that are not {order}")
        if source == "official":
            return {n: t.permute(0, 3, 1, 2) if n in cells else t for n, t in tensors.items()}
        return _middle_moved(tensors, 1) if source == "timm" else dict(tensors)

    @classmethod
    def to_timm(cls, tensors: Mapping[str, Tensor]) -> dict[str, Tensor]:
        """timm adds the input of a positional convolution to its output: 1 less in the middle."""
        return _middle_moved(tensors, -1)

    @classmethod
    def to_official(cls, tensors: Mapping[str, Tensor]) -> dict[str, Tensor]:
        """Weights of cells are [out, s, s, in], as sparse convolutions have them."""
        return {n: t.permute(0, 2, 3, 1) if _CELLS.match(n) else t for n, t in tensors.items()}

    @classmethod
    def sizes(cls, tensors: Mapping[str, Tensor]) -> dict[str, Any]:
        """Nothing tells images, windows and heads."""
        dims, depths, ratios = [], [], []
        for stage in range(NUM_STAGES):
            bias = tensors.get(f"patch_embeds.{stage}.proj.bias")
            block = re.compile(rf"blocks\.{stage}\.(\d+)\.norm1\.weight")
            found = [int(match[1]) for match in map(block.fullmatch, tensors) if match]
            if bias is None or not found:
                raise ValueError("it has not the four stages of a Twins-SVT")
            dims.append(len(bias))
            depths.append(max(found) + 1)
            kernel = tensors.get(f"blocks.{stage}.1.attn.sr.weight")
            ratios.append(1 if kernel is None else kernel.shape[2])
        return {"embed_dim": tuple(dims), "depths": tuple(depths), "sr_ratios": tuple(ratios)}

    @classmethod
    def usual(cls, sizes: Mapping[str, Any]) -> dict[str, Any]:
        """As in all that were published."""
        found: dict = {"image_size": ModelConfig.image_size, "window_size": ModelConfig.window_size}
        width, one = sizes["embed_dim"], (1,) * NUM_STAGES
        dims = ModelConfig(encoder="twins_svt", embed_dim=width, num_heads=one).stage_dims
        if not any(dim % _HEAD_DIM for dim in dims):
            found["num_heads"] = tuple(dim // _HEAD_DIM for dim in dims)
        return found

    @classmethod
    def continued(cls, config: ModelConfig, before: ModelConfig) -> ModelConfig:
        if config.num_heads != before.num_heads:  # of which no weight's shape depends
            raise ValueError(f"it has {before.num_heads} heads, and this recipe {config.num_heads}")
        return config

    @classmethod
    def timm_arguments(cls, config: ModelConfig) -> dict[str, Any]:
        fields = ("embed_dim", "depths", "num_heads", "sr_ratios")
        sizes = {name: getattr(config, name) for name in fields}
        named = [
            name.removeprefix("greenmim_").removesuffix("_patch4_224")
            for name in models_like(config, fields)
        ]
        arguments: dict[str, Any] = {"model_name": named[0] if named else "twins_svt_base"}
        arguments |= {"img_size": config.image_hw, "wss": (config.window_size,) * NUM_STAGES}
        if not named:
            arguments |= sizes | {"embed_dims": config.stage_dims}
            del arguments["embed_dim"]
        return arguments


def _middle_moved(tensors: Mapping[str, Tensor], by: float) -> dict[str, Tensor]:
    """With a number added to the middle weights of positional convolutions."""
    moved = dict(tensors)
    for stage in range(NUM_STAGES):
        name = _POS_CONV.format(stage)
        if name in tensors:
            # In 16 bits, what is beside the 1 would be rounded off.
            dtype = torch.promote_types(tensors[name].dtype, torch.float32)
            moved[name] = tensors[name].to(dtype, copy=True)
            moved[name][:, :, 1, 1] += by
    return moved

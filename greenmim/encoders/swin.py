"""Swin on visible tokens only, with timm's parameters.

Source of the method: Huang et al., NeurIPS 2022 (arXiv 2205.13515), section 3; of the network: Liu
et al., ICCV 2021. With everything visible, on grids that are multiples of the window, it equals
timm's dense Swin.
"""

from __future__ import annotations

import functools
from collections.abc import Iterator

import torch
from timm.layers import DropPath
from timm.models.swin_transformer import SwinTransformer, SwinTransformerBlock
from torch import Tensor, nn
from torch.nn import functional as F
from torch.utils.checkpoint import checkpoint

from greenmim_kernels import GroupPartition, group_window_attention, use_backend
from greenmim_kernels.backends import forced_backend

from ..config import PATCH_PIXELS, ModelConfig
from ..planning import Plan


class VisibleBlock(SwinTransformerBlock):
    """timm's Swin block, called with the visible tokens and the partition of its windows.

    A module of its own, so that what wraps modules (FSDP, torch.compile) can wrap a block.
    """

    grad_checkpointing = False

    def forward(self, x: Tensor, part: GroupPartition) -> Tensor:
        """x [B, N, C] -> [B, N, C]."""
        if self.grad_checkpointing and self.training:
            # The only thing random is stochastic depth; without it no generator's state need be
            # kept, which a CUDA graph could not repeat.
            random = isinstance(self.drop_path1, DropPath)
            run = self._run
            if not torch.compiler.is_compiling():  # which takes the backend as a constant
                # On a GPU the backward pass has a thread of its own, where no backend is forced.
                run = functools.partial(self._run_by, forced_backend())
            return checkpoint(run, x, part, use_reentrant=False, preserve_rng_state=random)
        return self._run(x, part)

    def _run_by(self, backend: str, x: Tensor, part: GroupPartition) -> Tensor:
        with use_backend(backend):
            return self._run(x, part)

    def _run(self, x: Tensor, part: GroupPartition) -> Tensor:
        x = x + self.drop_path1(self._attend(self.norm1(x), part))
        return x + self.drop_path2(self.mlp(self.norm2(x)))

    def _attend(self, x: Tensor, part: GroupPartition) -> Tensor:
        attention = self.attn
        table = attention.relative_position_bias_table
        x = group_window_attention(attention.qkv(x), table, part, attention.num_heads)
        return attention.proj(x)


class SwinEncoder(SwinTransformer):
    """timm's Swin without a head: its modules, its state dict, but visible tokens in and out.

    Args:
        config: sizes of the model.
    """

    def __init__(self, config: ModelConfig) -> None:
        super().__init__(
            img_size=config.image_hw,
            patch_size=PATCH_PIXELS,
            window_size=config.window_size,
            embed_dim=config.embed_dim,
            depths=config.depths,
            num_heads=config.num_heads,
            drop_path_rate=config.drop_path,
            norm_layer=functools.partial(nn.LayerNorm, eps=config.norm_eps),
            num_classes=0,
            global_pool="",
            # Else every shifted block holds a dense mask as a buffer, which nothing here reads but
            # devices store and distributed training sends around.
            strict_img_size=False,
        )
        for block in self.blocks():
            # timm offers no hook to choose the class; parameters and names stay what they are.
            block.__class__ = VisibleBlock

    def blocks(self) -> Iterator[VisibleBlock]:
        """The blocks of all stages, in order."""
        return (block for stage in self.layers for block in stage.blocks)

    def set_grad_checkpointing(self, enable: bool = True) -> None:
        """Whether blocks compute their activations again in the backward pass to save memory."""
        for block in self.blocks():
            block.grad_checkpointing = enable

    def forward(self, images: Tensor, plan: Plan) -> Tensor:
        """images [B, 3, H, W] -> latent [B, n_vis, C4], after the final norm."""
        return self.norm(self.stages(images, plan)[-1])

    def stages(self, images: Tensor, plan: Plan) -> list[Tensor]:
        """images [B, 3, H, W] -> for each stage, its visible tokens [B, N, C] in a plan's order."""
        x = self._embed(images, plan.patch_index)
        outputs = []
        for index, (stage, partitions) in enumerate(zip(self.layers, plan.partitions, strict=True)):
            if index > 0:
                x = merge_patches(stage.downsample, x)
            for number, block in enumerate(stage.blocks):
                x = block(x, partitions[number % 2])
            outputs.append(x)
        return outputs

    def _embed(self, images: Tensor, patch_index: Tensor) -> Tensor:
        """Pixels of visible patches -> tokens [B, N1, C]: hidden patches cost nothing."""
        conv = self.patch_embed.proj
        side = PATCH_PIXELS
        patches = images.unflatten(3, (-1, side)).unflatten(2, (-1, side))
        patches = patches.permute(0, 2, 4, 1, 3, 5)  # [B, H/4, W/4, 3, 4, 4], a view
        pixels = take_cells(patches, patch_index).flatten(2)
        return self.patch_embed.norm(F.linear(pixels, conv.weight.flatten(1), conv.bias))


def take_cells(grid: Tensor, index: Tensor) -> Tensor:
    """Some cells of a grid [B, H, W, ...] -> [B, N, ...], without a copy of the others.

    Args:
        index: int64 [P, N], places in the flattened grid; P = 1 for all images alike, or B.
    """
    rows, columns = index // grid.shape[2], index % grid.shape[2]
    if len(index) == 1:
        return grid[:, rows[0], columns[0]]
    return grid[torch.arange(len(grid), device=grid.device)[:, None], rows, columns]


def merge_patches(merge: nn.Module, x: Tensor) -> Tensor:
    """timm's PatchMerging on visible tokens [B, N, C] -> [B, N / 4, 2C].

    The four tokens of a cell stand together in the order in which Swin concatenates them.
    """
    return merge.reduction(merge.norm(x.unflatten(1, (-1, 4)).flatten(2)))

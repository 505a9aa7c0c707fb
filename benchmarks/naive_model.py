"""The pre-training step that everybody has: grouped masked attention in eager PyTorch.

What the published method describes (Huang et al., NeurIPS 2022, section 3 and appendix), written
with ordinary tensor operations: a dense patch embedding of which the visible tokens are kept,
windows packed into groups of the size of the fullest one, gathers, dense masks and biases, the
whole decoder. The parameters are those of a :class:`greenmim.GreenMIM`, and so is the loss, which
the tests compare. Frozen: a peer that is tuned along with what it is compared to is no peer.

Planning a mask (grouping by knapsack, on the host, from counts that the device has to be asked
for) can be left out of a step by planning ahead; the published code does it in every step.
"""

from __future__ import annotations

import math
from typing import NamedTuple

import numpy as np
import torch
from torch import Tensor, nn
from torch.nn import functional as F

from greenmim import GreenMIM
from greenmim_kernels import GroupPartition
from greenmim_kernels.partition import table_rows

from .naive import NaiveGroupAttention, SpreadGroupAttention, indexed, selected

SIDE = 32  # pixels of a unit


class NaivePlan(NamedTuple):
    """What a mask means for a step.

    Attributes:
        visible: bool [L].
        patches: int64 [N1], visible patches in the flattened grid.
        attentions: for each stage, those of even and of odd blocks, with their partitions.
        children: for each step to the next stage, int64 [4, N], positions of a cell's tokens.
        order: int64 [L], where each unit stands among visible ones and mask tokens.
    """

    visible: Tensor
    patches: Tensor
    attentions: list[list[tuple[NaiveGroupAttention, GroupPartition]]]
    children: list[Tensor]
    order: Tensor


class NaiveGreenMIM(nn.Module):
    """The published step with the parameters of `model`.

    Args:
        spread: with what `SpreadGroupAttention` does otherwise, in all gathers.
    """

    def __init__(self, model: GreenMIM, spread: bool = False) -> None:
        super().__init__()
        self.model = model
        self.attention = SpreadGroupAttention if spread else NaiveGroupAttention
        self.rows = selected if spread else indexed

    def plan(self, visible: Tensor) -> NaivePlan:
        """Plan a mask, bool [L] on the device of the step; asks the device for its counts."""
        config, device = self.model.config, visible.device
        coords, attentions = self._coords(visible), []
        for number, (grid, window, shift) in enumerate(config.stage_windows()):
            pair = [self._attention(coords[number], grid, window, (0, 0))]
            if any(shift):
                pair.append(self._attention(coords[number], grid, window, shift))
            attentions.append([pair[0], pair[-1]])
        children = []
        for (grid, _, _), fine, coarse in zip(
            config.stage_windows(), coords, coords[1:], strict=False
        ):
            offsets = torch.tensor([[0, 0], [1, 0], [0, 1], [1, 1]], device=device)
            children.append(_positions(fine, grid, 2 * coarse + offsets[:, None]))
        width = config.stage_windows()[0][0][1]
        shuffled = torch.cat([visible.nonzero(), (~visible).nonzero()])[:, 0]
        return NaivePlan(
            visible=visible,
            patches=coords[0][:, 0] * width + coords[0][:, 1],
            attentions=attentions,
            children=children,
            order=shuffled.argsort(),
        )

    def _attention(self, *windows) -> tuple[NaiveGroupAttention, GroupPartition]:
        part = _partition(*windows)
        return self.attention(part), part

    def _coords(self, visible: Tensor) -> list[Tensor]:
        """Of each stage, where its visible tokens are: int64 [N, 2], row-major."""
        config, found = self.model.config, []
        units = visible.view(config.unit_grid)
        for grid, _, _ in config.stage_windows():
            scale = grid[0] // units.shape[0]
            tokens = units.repeat_interleave(scale, 0).repeat_interleave(scale, 1)
            found.append(tokens.nonzero())
        return found

    def forward(self, images: Tensor, plan: NaivePlan) -> Tensor:
        """images [B, 3, H, W] -> the loss, a scalar."""
        latent = self._encode(images, plan)
        return self._loss(images, self._decode(latent, plan), plan)

    def _encode(self, images: Tensor, plan: NaivePlan) -> Tensor:
        encoder = self.model.encoder
        x = self.rows(encoder.patch_embed(images).flatten(1, 2), plan.patches)
        for number, stage in enumerate(encoder.layers):
            if number > 0:
                cells = torch.cat([self.rows(x, index) for index in plan.children[number - 1]], -1)
                x = self._merge(stage.downsample, cells)
            for index, block in enumerate(stage.blocks):
                x = self._block(block, x, *plan.attentions[number][index % 2])
        return encoder.norm(x)

    @staticmethod
    def _merge(merging: nn.Module, cells: Tensor) -> Tensor:
        return merging.reduction(merging.norm(cells))

    @staticmethod
    def _block(
        block: nn.Module, x: Tensor, attention: NaiveGroupAttention, part: GroupPartition
    ) -> Tensor:
        table, heads = block.attn.relative_position_bias_table, block.attn.num_heads
        qkv = block.attn.qkv(block.norm1(x))
        x = x + block.attn.proj(attention(qkv, table, part, heads))
        return x + block.mlp(block.norm2(x))

    def _decode(self, latent: Tensor, plan: NaivePlan) -> Tensor:
        model = self.model
        x = model.decoder_embed(latent)
        hidden = len(plan.visible) - x.shape[1]
        mask_tokens = model.mask_token.expand(len(x), hidden, -1)
        x = self.rows(torch.cat([x, mask_tokens.to(x.dtype)], 1), plan.order)
        x = x + model.decoder_pos_embed
        for block in model.decoder_blocks:
            x = block(x)
        return model.decoder_pred(model.decoder_norm(x))

    def _loss(self, images: Tensor, prediction: Tensor, plan: NaivePlan) -> Tensor:
        batch, _, height, width = images.shape
        target = images.reshape(batch, 3, height // SIDE, SIDE, width // SIDE, SIDE)
        target = torch.einsum("bchpwq->bhwpqc", target).reshape(batch, -1, SIDE * SIDE * 3)
        if self.model.config.norm_pix_loss:
            mean, variance = target.mean(-1, keepdim=True), target.var(-1, keepdim=True)
            target = (target - mean) / (variance + 1e-6) ** 0.5
        error = ((prediction - target) ** 2).mean(-1)  # [B, L]
        hidden = (~plan.visible).to(error.dtype)
        return (error * hidden).sum() / (hidden.sum() * batch)


class NaiveGreenMIMv2(NaiveGreenMIM):
    """The same step with a SwinV2, written as timm writes its dense attention."""

    @staticmethod
    def _merge(merging: nn.Module, cells: Tensor) -> Tensor:
        return merging.norm(merging.reduction(cells))

    @staticmethod
    def _block(
        block: nn.Module, x: Tensor, attention: NaiveGroupAttention, part: GroupPartition
    ) -> Tensor:
        module = block.attn
        bias = torch.cat([module.q_bias, torch.zeros_like(module.v_bias), module.v_bias])
        qkv = F.linear(x, module.qkv.weight, bias)
        q, k, v = qkv.unflatten(-1, (3, module.num_heads, -1)).unbind(2)
        scale = module.logit_scale.clamp(max=math.log(100)).exp().view(-1, 1)
        # The naive path divides by the root of the head's size, as Swin does.
        q = F.normalize(q, dim=-1) * (scale * q.shape[-1] ** 0.5)
        k = F.normalize(k, dim=-1)
        table = 16 * module.cpb_mlp(module.relative_coords_table).flatten(0, 2).sigmoid()
        # Under autocast a norm is in float32, and products in 16 bit again.
        qkv = torch.stack([part.to(v.dtype) for part in (q, k, v)], 2).flatten(2)
        x = x + block.norm1(module.proj(attention(qkv, table, part, module.num_heads)))
        return x + block.norm2(block.mlp(x))


class TwinsPlan(NamedTuple):
    """What a mask means for a step of a Twins.

    Attributes:
        base: as of a Swin; `children` in Swin's order, although they are of a convolution.
        places: for each stage, int64 [N], visible tokens in the flattened grid.
        cells: for each stage, int64 [s * s, N / s^2], positions of the tokens of each key of global
            attention, row by row; None where a token is a key.
    """

    base: NaivePlan
    places: list[Tensor]
    cells: list[Tensor | None]

    @property
    def visible(self) -> Tensor:
        return self.base.visible

    @property
    def order(self) -> Tensor:
        return self.base.order


class NaiveGreenMIMTwins(NaiveGreenMIM):
    """The same step with a Twins-SVT: strided convolutions as linear layers on gathered cells, the
    positional one dense on a map of zeros, in the layout that is faster for it."""

    def plan(self, visible: Tensor) -> TwinsPlan:
        config, coords = self.model.config, self._coords(visible)
        places, cells = [], []
        for (grid, _, _), at, ratio in zip(
            config.stage_windows(), coords, config.sr_ratios, strict=True
        ):
            places.append(at[:, 0] * grid[1] + at[:, 1])
            if ratio == 1:
                cells.append(None)
                continue
            first = at[(at % ratio == 0).all(1)]  # of each cell
            side = torch.arange(ratio, device=at.device)
            offsets = torch.cartesian_prod(side, side)
            cells.append(_positions(at, grid, first + offsets[:, None]))
        return TwinsPlan(super().plan(visible), places, cells)

    def _encode(self, images: Tensor, plan: TwinsPlan) -> Tensor:
        encoder, config = self.model.encoder, self.model.config
        for number, embed in enumerate(encoder.patch_embeds):
            if number == 0:
                x = self.rows(embed.proj(images).flatten(2).transpose(1, 2), plan.places[0])
            else:
                # Swin's order goes down the columns first.
                weight = embed.proj.weight.transpose(2, 3)
                x = self._of_cells(x, plan.base.children[number - 1], weight, embed.proj.bias)
            x = embed.norm(x)
            for index, block in enumerate(encoder.blocks[number]):
                if index % 2 == 0:
                    attention, part = plan.base.attentions[number][0]
                    qkv = block.attn.qkv(block.norm1(x))
                    out = attention(qkv, None, part, block.attn.num_heads)
                else:
                    out = self._global(block.attn, block.norm1(x), plan.cells[number])
                x = x + block.attn.proj(out)
                x = x + block.mlp(block.norm2(x))
                if index == 0:
                    grid = config.stage_windows()[number][0]
                    x = self._position(encoder.pos_block[number], x, plan.places[number], grid)
        return encoder.norm(x)

    def _of_cells(self, x: Tensor, index: Tensor, weight: Tensor, bias: Tensor) -> Tensor:
        cells = self.rows(x, index.t()).flatten(2)
        return F.linear(cells, weight.permute(0, 2, 3, 1).flatten(1), bias)

    def _global(self, attention: nn.Module, x: Tensor, cells: Tensor | None) -> Tensor:
        keys, heads = x, attention.num_heads
        if cells is not None:
            sr = attention.sr
            keys = attention.norm(self._of_cells(x, cells, sr.weight, sr.bias))
        q = attention.q(x).unflatten(2, (heads, -1)).transpose(1, 2)
        k, v = attention.kv(keys).unflatten(2, (2, heads, -1)).permute(2, 0, 3, 1, 4)
        return F.scaled_dot_product_attention(q, k, v).transpose(1, 2).flatten(2)

    def _position(
        self, block: nn.Module, x: Tensor, places: Tensor, grid: tuple[int, int]
    ) -> Tensor:
        dense = x.new_zeros(len(x), grid[0] * grid[1], x.shape[2]).index_copy(1, places, x)
        dense = block.proj(dense.unflatten(1, grid).permute(0, 3, 1, 2))
        return self.rows(dense.permute(0, 2, 3, 1).flatten(1, 2), places)


def _positions(coords: Tensor, grid: tuple[int, int], at: Tensor) -> Tensor:
    """Which of the tokens at coords [N, 2], row-major, is at each place [..., 2] of a grid."""
    places = torch.empty(grid, dtype=torch.long, device=coords.device)
    places[coords[:, 0], coords[:, 1]] = torch.arange(len(coords), device=coords.device)
    row, column = at.unbind(-1)
    return places[row, column]


def _partition(
    coords: Tensor, grid: tuple[int, int], window: tuple[int, int], shift: tuple[int, int]
) -> GroupPartition:
    """Windows of the visible tokens at coords [N, 2], packed as published."""
    first = torch.tensor([(m - s) % m for m, s in zip(window, shift, strict=True)])
    size = torch.tensor(window)
    moved, size = coords + first.to(coords.device), size.to(coords.device)
    cell, (row, column) = moved // size, (moved % size).unbind(-1)
    place = row * (2 * window[1] - 1) + column
    columns = -(-(grid[1] + window[1]) // window[1])
    window_id = cell[:, 0] * columns + cell[:, 1]
    if len(coords) <= 2 * window[0] * window[1]:
        groups = [torch.arange(len(coords), device=coords.device)]  # one group and a mask
        slots = len(coords)
    else:
        ids, counts = window_id.unique(return_counts=True)
        counts = counts.tolist()  # the host waits here
        slots = max(counts)
        groups = [
            torch.isin(window_id, ids[packed]).nonzero()[:, 0]
            for packed in knapsacks(counts, slots)
        ]
    index = torch.full((1, len(groups), slots), -1, dtype=torch.int32, device=coords.device)
    for number, group in enumerate(groups):
        index[0, number, : len(group)] = group
    taken, used = index.clamp(min=0).long(), index >= 0
    return GroupPartition(
        token_index=index,
        window_id=torch.where(used, window_id[taken], -1).int(),
        query_row=(place + (table_rows(window) - 1) // 2)[taken].int(),
        key_row=(-place)[taken].int(),
        num_tokens=len(coords),
        table_rows=table_rows(window),
        window_size=window,
        window_slots=window[0] * window[1],
    )


def knapsacks(counts: list[int], slots: int) -> list[list[int]]:
    """Pack windows of so many tokens: again and again the fullest group that can be made.

    Each group is a subset-sum problem, solved by dynamic programming over the sums within reach.
    """
    left = list(range(len(counts)))
    groups = []
    while left:
        # reached[j][s]: the first j windows have a subset of s tokens.
        reached = np.zeros((len(left) + 1, slots + 1), dtype=bool)
        reached[0, 0] = True
        for j, window in enumerate(left):
            reached[j + 1] = reached[j]
            reached[j + 1, counts[window] :] |= reached[j, : slots + 1 - counts[window]]
        total, packed = int(reached[-1].nonzero()[0][-1]), []
        for j in range(len(left), 0, -1):
            if not reached[j - 1, total]:
                packed.append(left[j - 1])
                total -= counts[left[j - 1]]
        groups.append(sorted(packed))
        left = [window for window in left if window not in packed]
    return groups

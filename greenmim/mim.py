"""GreenMIM: encode the visible units of an image, decode all of them, compare the hidden ones.

Source: Huang et al., Green Hierarchical Vision Transformer for Masked Image Modeling, NeurIPS 2022
(arXiv 2205.13515), sections 3 and 4.
"""

from __future__ import annotations

import functools
import itertools
from collections.abc import Iterator
from typing import NamedTuple

import numpy as np
import torch
from timm.models.vision_transformer import Block
from torch import Tensor, nn
from torch.nn import functional as F
from torch.utils.checkpoint import checkpoint

from .config import UNIT_PIXELS, ModelConfig, model_config
from .encoders import create_encoder, take_cells
from .masking import random_visible
from .planning import Plan, Planner, check_images, checked_plan

UNIT_VALUES = UNIT_PIXELS * UNIT_PIXELS * 3


class MIMOutput(NamedTuple):
    """The result of a forward pass.

    Attributes:
        loss: scalar, mean squared error over hidden units; 0 where nothing is hidden.
        prediction: [B, L, 3072], values of every unit by row, column, channel, normalised as
            :meth:`GreenMIM.target` is; None with `loss_only`.
        latent: [B, n_vis, C4], visible units after the encoder's final norm, row-major.
        visible: bool [P, L], True = visible; P = 1 for one mask per batch, or B.
    """

    loss: Tensor
    prediction: Tensor | None
    latent: Tensor
    visible: Tensor


class GreenMIM(nn.Module):
    """An encoder on visible tokens and an MAE-like decoder (Huang et al., NeurIPS 2022).

    B images of H x W pixels have L = H W / 32^2 units, of which n_vis are visible; C4 are the
    encoder's channels at its last stage, and 3072 = 32 x 32 x 3 the values of a unit.

    The state dict holds the encoder as ``encoder.`` + timm's keys, and the decoder under its
    published names.

    Args:
        config: sizes of the model.
    """

    grad_checkpointing = False

    def __init__(self, config: ModelConfig) -> None:
        super().__init__()
        self.config = config
        self.planner = Planner(config)
        self.encoder = create_encoder(config)
        width = config.decoder_dim
        self.decoder_embed = nn.Linear(config.stage_dims[-1], width)
        self.mask_token = nn.Parameter(torch.zeros(1, 1, width))
        # Fixed, but part of the published state dict.
        self.decoder_pos_embed = nn.Parameter(
            sincos_position_embedding(width, config.unit_grid), requires_grad=False
        )
        self.decoder_blocks = decoder_blocks(config)
        self.decoder_norm = nn.LayerNorm(width, eps=config.norm_eps)
        self.decoder_pred = nn.Linear(width, UNIT_VALUES)
        self._initialise_decoder()

    def _initialise_decoder(self) -> None:
        """As MAE: Xavier-uniform matrices, zero biases, a small mask token.

        The encoder is initialised as timm does it.
        """
        nn.init.normal_(self.mask_token, std=0.02)
        for part in (self.decoder_embed, self.decoder_blocks, self.decoder_pred):
            for module in part.modules():
                if isinstance(module, nn.Linear):
                    nn.init.xavier_uniform_(module.weight)
                    nn.init.zeros_(module.bias)

    def plan(self, visible: np.ndarray | Tensor) -> Plan:
        """Plan a step on the CPU (see :class:`greenmim.planning.Planner`, which loaders can use).

        Args:
            visible: bool unit grid, row-major: [L] for the whole batch or [B, L], one per image.

        Raises:
            ValueError: wrong shape or dtype, no visible unit, or counts that differ between images.
        """
        return self.planner(visible)

    def forward(
        self,
        images: Tensor,
        visible: np.ndarray | Tensor | None = None,
        mask_ratio: float = 0.75,
        plan: Plan | None = None,
        loss_only: bool = False,
    ) -> MIMOutput:
        """Reconstruct images from their visible units.

        Args:
            images: float [B, 3, H, W], normalised with the data's mean and standard deviation.
            visible: bool unit grid [L] or [B, L], row-major, True = visible. None draws one mask
                for the batch from PyTorch's global generator.
            mask_ratio: share of hidden units; used only where the mask is drawn.
            plan: `self.plan(visible)`, made ahead, in place of `visible`; it is moved to the
                images' device. This form compiles with ``fullgraph=True``.
            loss_only: predict hidden units only, which is all that the loss needs.

        Raises:
            ValueError: images or mask of the wrong shape or dtype, no visible unit, a mask_ratio
                outside [0, 1), counts that differ between images, a plan made for another model or
                number of images, or both `visible` and `plan`.
        """
        check_images(images, self.config.image_hw)
        if plan is None:
            if visible is None:
                seed = int(torch.randint(2**62, ()))
                rng = np.random.default_rng(seed)
                visible = random_visible(rng, self.config.num_units, mask_ratio)
            plan = self.plan(visible)
        elif visible is not None:
            raise ValueError("both visible and plan were given; give one of them")
        plan = checked_plan(plan, self.planner, images)
        latent = self.encoder(images, plan)
        if loss_only:
            return MIMOutput(self.training_loss(images, latent, plan), None, latent, plan.visible)
        prediction = self.decode(latent, plan)
        return MIMOutput(self.loss(images, prediction, plan), prediction, latent, plan.visible)

    def decode(self, latent: Tensor, plan: Plan) -> Tensor:
        """Values of all units, normalised as :meth:`target` is; each latent is put in its place.

        Args:
            latent: [B, n_vis, C4], as the encoder gives it for `plan`.
            plan: on the device of `latent`.

        Returns:
            [B, L, 3072].
        """
        x = self.decoder_embed(latent)
        batch, _, width = x.shape
        units = plan.visible.shape[1]
        index = plan.unit_index[..., None].expand(batch, -1, width)
        placed = x.new_zeros(batch, units, width).scatter(1, index, x)
        x = torch.where(plan.visible[..., None], placed, self.mask_token.to(x.dtype))
        return self._predict(x + self.decoder_pos_embed)

    def training_loss(self, images: Tensor, latent: Tensor, plan: Plan) -> Tensor:
        """The loss of :meth:`decode`'s prediction, computed for the hidden units alone; a scalar.

        What the decoder does with a token depends on its position embedding, not on its place in
        the sequence, so hidden units can follow the visible ones.

        Args:
            images: float [B, 3, H, W].
            latent: [B, n_vis, C4], as the encoder gives it for `plan`.
            plan: on the device of `images`.
        """
        hidden = plan.hidden_index.shape[1]
        position = self.decoder_pos_embed[0]
        x = self.decoder_embed(latent) + position[plan.unit_index]
        masked = (self.mask_token + position[plan.hidden_index]).expand(len(x), -1, -1)
        prediction = self._predict(torch.cat([x, masked.to(x.dtype)], 1), last=hidden)
        prediction = prediction.to(torch.promote_types(images.dtype, torch.float32))
        if prediction.numel() == 0:  # the mean of nothing would be NaN
            return prediction.sum()
        return F.mse_loss(prediction, self.target(images, plan.hidden_index))

    def _predict(self, x: Tensor, last: int | None = None) -> Tensor:
        """Decoder tokens [B, L, width] -> [B, L, 3072], or [B, last, 3072] of the last tokens."""
        for number, block in enumerate(self.decoder_blocks, 1):
            count = last if number == len(self.decoder_blocks) else None
            if self.grad_checkpointing and self.training:
                x = checkpoint(block, x, count, use_reentrant=False, preserve_rng_state=False)
            else:
                x = block(x, count)
        if last is not None:  # a decoder without blocks still has all tokens here
            x = x[:, x.shape[1] - last :]
        return self.decoder_pred(self.decoder_norm(x))

    def loss(self, images: Tensor, prediction: Tensor, plan: Plan) -> Tensor:
        """Mean squared error over the hidden units, at least in float32; a scalar.

        Args:
            images: float [B, 3, H, W].
            prediction: [B, L, 3072].
            plan: which units are hidden; on the device of `images`.
        """
        hidden = plan.visible.logical_not()
        count = len(images) * (plan.visible.shape[1] - plan.unit_index.shape[1])
        # Where nothing is hidden or the batch is empty, the sum is 0 and so would be the count.
        return (self.errors(images, prediction) * hidden).sum() / max(count, 1)

    def errors(self, images: Tensor, prediction: Tensor) -> Tensor:
        """Mean squared error of each unit [B, L], hidden or not, at least in float32.

        Args:
            images: float [B, 3, H, W].
            prediction: [B, L, 3072].
        """
        target = self.target(images)
        return (prediction.to(target.dtype) - target).square().mean(-1)

    def target(self, images: Tensor, index: Tensor | None = None) -> Tensor:
        """Pixels of the units to predict, at least in float32.

        With ``norm_pix_loss`` each unit is normalised by its own mean and unbiased variance (He et
        al., MAE, CVPR 2022, arXiv 2111.06377).

        Args:
            images: float [B, 3, H, W].
            index: int64 [P, n], the units; None for all.

        Returns:
            [B, n, 3072], or [B, L, 3072].
        """
        images = images.to(torch.promote_types(images.dtype, torch.float32))
        if index is None:
            target = self.patchify(images)
        else:
            target = take_cells(_unit_grid(images), index).flatten(2)
        if self.config.norm_pix_loss:
            variance, mean = torch.var_mean(target, -1, keepdim=True)
            target = (target - mean) / (variance + 1e-6).sqrt()
        return target

    def patchify(self, images: Tensor) -> Tensor:
        """Each unit's pixels by row, column, channel.

        Args:
            images: [B, 3, H, W].

        Returns:
            [B, L, 3072].
        """
        return _unit_grid(images).flatten(3).flatten(1, 2)

    def unpatchify(self, patches: Tensor) -> Tensor:
        """Undoes :meth:`patchify`.

        Args:
            patches: [B, L, 3072].

        Returns:
            [B, 3, H, W], of the model's size.
        """
        x = patches.unflatten(2, (UNIT_PIXELS, UNIT_PIXELS, 3))
        x = x.unflatten(1, self.config.unit_grid)  # [B, h, w, 32, 32, 3]
        return x.permute(0, 5, 1, 3, 2, 4).flatten(4).flatten(2, 3)

    def encode(self, images: Tensor) -> list[Tensor]:
        """Feature maps of the four stages with everything visible, for downstream use.

        Args:
            images: float [B, 3, H, W]; H and W multiples of 32, of any size for which the windows
                of every stage are those of the model.

        Returns:
            Four tensors [B, C, H / s, W / s] with s = 4, 8, 16, 32, before the final norm (as
            timm's ``features_only``).

        Raises:
            ValueError: images of a wrong shape, or so small or large that windows change.
        """
        size = tuple(images.shape[2:])
        check_images(images, size)
        planner = Planner(self.config, size)
        ours, theirs = (
            [window for _, window, _ in stages] for stages in (self.planner.stages, planner.stages)
        )
        if ours != theirs:
            raise ValueError(
                f"images of {size[0]} x {size[1]} px need windows of {theirs} tokens, and this"
                f" model has {ours}; create it with image_size={size}"
            )
        height, width = planner.unit_grid
        plan = planner(np.ones(height * width, dtype=bool)).to(images.device, non_blocking=True)
        maps = []
        for x, (grid, _, _) in zip(self.encoder.stages(images, plan), planner.stages, strict=True):
            positions = planner.positions(np.ones((1, height * width), bool), grid[0] // height)
            row_major = torch.from_numpy(positions[0].argsort()).to(x.device, non_blocking=True)
            maps.append(x[:, row_major].transpose(1, 2).unflatten(2, grid).contiguous())
        return maps

    def embed(self, images: Tensor, plan: Plan | None = None) -> Tensor:
        """One vector per image, for classifiers: the mean of the encoder's tokens, after its norm.

        Args:
            images: float [B, 3, H, W] of the model's size.
            plan: with everything visible, made ahead (see :meth:`plan`).

        Returns:
            [B, C4].

        Raises:
            ValueError: images of another size, or a plan made for another model.
        """
        check_images(images, self.config.image_hw)
        if plan is None:
            plan = self.plan(np.ones(self.config.num_units, dtype=bool))
        return self.encoder(images, checked_plan(plan, self.planner, images)).mean(1)

    def set_grad_checkpointing(self, enable: bool = True) -> None:
        """Recompute activations in the backward pass of training: less memory, more time.

        Args:
            enable: whether to.
        """
        self.encoder.set_grad_checkpointing(enable)
        self.grad_checkpointing = enable

    def no_weight_decay(self) -> set[str]:
        """Names without weight decay: 1-d parameters, tokens, positions, and the encoder's own."""
        own = {name for name, parameter in self.named_parameters() if parameter.ndim <= 1}
        of_encoder = {f"encoder.{name}" for name in self.encoder.no_weight_decay()}
        return own | of_encoder | {"mask_token", "decoder_pos_embed"}

    def blocks(self) -> Iterator[nn.Module]:
        """The transformer blocks of encoder and decoder, in order."""
        return itertools.chain(self.encoder.visible_blocks(), self.decoder_blocks)


def _unit_grid(images: Tensor) -> Tensor:
    """images [B, 3, H, W] -> a view [B, h, w, 32, 32, 3] of their units."""
    side = UNIT_PIXELS
    x = images.unflatten(3, (-1, side)).unflatten(2, (-1, side))  # [B, 3, h, 32, w, 32]
    return x.permute(0, 2, 4, 3, 5, 1)


def create_model(name: str, **overrides) -> GreenMIM:
    """A model by name, with fresh weights.

    Args:
        name: one of `greenmim.config.MODELS`, such as greenmim_swin_base_patch4_window7_224.
        overrides: fields of :class:`ModelConfig` to change, such as ``image_size=(192, 256)``.

    Raises:
        ValueError: unknown name (the nearest ones are named) or sizes that do not fit together.
        TypeError: an override that ModelConfig does not have.
    """
    return GreenMIM(model_config(name, **overrides))


# ---- decoder (He et al., CVPR 2022, as GreenMIM uses it) ----------------------------------------


def sincos_position_embedding(dim: int, grid: tuple[int, int]) -> Tensor:
    """Fixed 2-D sine-cosine embedding, float32 [1, H * W, dim], tokens row-major.

    The first half of the channels encodes the column and the second half the row, each as sines
    then cosines at frequencies 10000 ** (-4 k / dim), k = 0 .. dim / 4 - 1 (MAE's order).
    """
    frequency = 10000.0 ** -(torch.arange(dim // 4, dtype=torch.float64) * 4 / dim)
    row, column = torch.meshgrid(
        *(torch.arange(side, dtype=torch.float64) for side in grid), indexing="ij"
    )
    halves = []
    for axis in (column, row):
        angle = axis.flatten()[:, None] * frequency
        halves += [angle.sin(), angle.cos()]
    return torch.cat(halves, 1).float()[None]


class DecoderBlock(Block):
    """timm's ViT block without attention masks; it can compute its last tokens only."""

    def forward(self, x: Tensor, last: int | None = None) -> Tensor:  # type: ignore[override]
        """x [B, L, C] -> [B, L, C], or [B, last, C]: the last tokens, which attend to all."""
        if last is None or last == x.shape[1]:
            return super().forward(x)
        normed = self.norm1(x)
        x = x[:, x.shape[1] - last :]
        x = x + self.drop_path1(self.ls1(self._attend(normed, last)))
        return x + self.drop_path2(self.ls2(self.mlp(self.norm2(x))))

    def _attend(self, x: Tensor, last: int) -> Tensor:
        attention = self.attn
        width, heads = x.shape[2], attention.num_heads
        weights = attention.qkv.weight.split((width, 2 * width))
        biases = attention.qkv.bias.split((width, 2 * width))
        query = F.linear(x[:, x.shape[1] - last :].contiguous(), weights[0], biases[0])
        key_value = F.linear(x, weights[1], biases[1])
        query = query.unflatten(2, (heads, -1)).transpose(1, 2)  # [B, heads, last, D]
        key, value = key_value.unflatten(2, (2, heads, -1)).permute(2, 0, 3, 1, 4)
        out = F.scaled_dot_product_attention(query, key, value)
        return attention.proj(out.transpose(1, 2).flatten(2))


def decoder_blocks(config: ModelConfig) -> nn.ModuleList:
    """Plain ViT blocks of the decoder's width."""
    return nn.ModuleList(
        DecoderBlock(
            config.decoder_dim,
            config.decoder_heads,
            qkv_bias=True,
            # timm takes whatever makes one.
            norm_layer=functools.partial(nn.LayerNorm, eps=config.norm_eps),  # type: ignore[arg-type]
        )
        for _ in range(config.decoder_depth)
    )

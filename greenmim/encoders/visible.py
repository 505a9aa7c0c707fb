"""What every encoder on visible tokens has: its blocks, its passes, the names of its weights.

An encoder is one file here and one entry in `config.ENCODERS`: a class that has timm's own beside
this base, so that its parameters and state dict are timm's. What the rest of the package wants to
know, it asks this base.
"""

from __future__ import annotations

import functools
from collections.abc import Collection, Iterator, Mapping
from typing import Any

import torch
from timm.layers import DropPath
from torch import Tensor, nn
from torch.nn import functional as F
from torch.utils.checkpoint import checkpoint

from greenmim_kernels import GroupPartition, use_backend
from greenmim_kernels.backends import backend_in_force

from ..config import PATCH_PIXELS, ModelConfig
from ..planning import Plan


class VisibleBlock(nn.Module):
    """A block called with the visible tokens and the partition of its windows; a base beside
    timm's, whose parts it calls.

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
                run = functools.partial(self._run_by, backend_in_force())
            return checkpoint(run, x, part, use_reentrant=False, preserve_rng_state=random)
        return self._run(x, part)

    def _run_by(self, backend: str, x: Tensor, part: GroupPartition) -> Tensor:
        with use_backend(backend):
            return self._run(x, part)

    def _run(self, x: Tensor, part: GroupPartition) -> Tensor:
        """With the norms before attention and MLP."""
        x = x + self.drop_path1(self._attend(self.norm1(x), part))
        return x + self.drop_path2(self.mlp(self.norm2(x)))

    def _attend(self, x: Tensor, part: GroupPartition) -> Tensor:
        raise NotImplementedError


class VisibleEncoder(nn.Module):
    """An encoder: images and a plan in, visible tokens out."""

    # timm's name of a classifier's head, and its epsilon of the blocks' norms.
    timm_head, timm_norm_eps = "head.fc", 1e-5
    # Its class of blocks, if they are what `greenmim_kernels.onednn` makes one node of autograd.
    one_node_block: type[VisibleBlock] | None = None

    def forward(self, images: Tensor, plan: Plan) -> Tensor:
        """images [B, 3, H, W] -> latent [B, n_vis, C4], after the final norm."""
        return self.norm(self.stages(images, plan)[-1])

    def stages(self, images: Tensor, plan: Plan) -> list[Tensor]:
        """images [B, 3, H, W] -> for each stage, its visible tokens [B, N, C] in a plan's order."""
        raise NotImplementedError

    def visible_blocks(self) -> Iterator[VisibleBlock]:
        """The blocks of all stages, in order."""
        raise NotImplementedError

    def set_grad_checkpointing(self, enable: bool = True) -> None:
        """Whether blocks compute their activations again in the backward pass to save memory."""
        for block in self.visible_blocks():
            block.grad_checkpointing = enable

    def no_weight_decay(self) -> set[str]:
        """Names of the parameters without weight decay: those with one axis, and timm's."""
        one_axis = {name for name, parameter in self.named_parameters() if parameter.ndim <= 1}
        return one_axis | set(super().no_weight_decay())  # type: ignore[misc]  # timm's

    # ---- the names of its weights; `tensors` have no prefix ----

    @classmethod
    def claims(cls, names: Collection[str]) -> bool:
        """Whether a state dict with these names is of such an encoder, of whatever kind."""
        raise NotImplementedError

    @classmethod
    def to_own(cls, tensors: Mapping[str, Tensor], source: str) -> dict[str, Tensor]:
        """A state dict of a kind (see `checkpoint`) as this class has it, with timm's names.

        Raises:
            ValueError: it is none of that kind; the text goes on after "it".
        """
        raise NotImplementedError

    @classmethod
    def to_timm(cls, tensors: Mapping[str, Tensor]) -> dict[str, Tensor]:
        """One of this class as timm's has it: the same, where nothing is said."""
        return dict(tensors)

    @classmethod
    def to_official(cls, tensors: Mapping[str, Tensor]) -> dict[str, Tensor]:
        """One of this class as the published checkpoints have it.

        Raises:
            ValueError: none was published, or not of such sizes.
        """
        raise NotImplementedError

    @classmethod
    def to_swin_order(cls, tensors: Mapping[str, Tensor]) -> dict[str, Tensor]:
        """Patch merging of weights published before 2023, of this class, in Swin's order."""
        raise ValueError("only weights of a Swin have another order of patch merging")

    @classmethod
    def sizes(cls, tensors: Mapping[str, Tensor]) -> dict[str, Any]:
        """What weights of this class tell of their `ModelConfig`.

        Raises:
            ValueError: they are not whole, or of sizes that there are not; goes on after "it" or
                "its".
        """
        raise NotImplementedError

    @classmethod
    def usual(cls, sizes: Mapping[str, Any]) -> dict[str, Any]:
        """What weights of such `sizes` do not tell, as it most often is; nothing, by default."""
        return {}

    @classmethod
    def continued(cls, config: ModelConfig, before: ModelConfig) -> ModelConfig:
        """The configuration of a model that starts from the weights of another, which may have had
        other windows.

        Raises:
            ValueError: they differ in what no weight tells.
        """
        return config

    @classmethod
    def fitted(
        cls, tensors: Mapping[str, Tensor], config: ModelConfig, own: Mapping[str, Tensor]
    ) -> tuple[dict[str, Tensor], list[str]]:
        """Weights of this class for other windows, and lines for people on what changed.

        Args:
            tensors: what a checkpoint has.
            config: of the encoder that is to have them.
            own: its state dict.
        """
        return dict(tensors), []

    @classmethod
    def timm_arguments(cls, config: ModelConfig) -> dict[str, Any]:
        """Arguments of `timm.create_model` for this encoder, "model_name" among them."""
        raise NotImplementedError


def embed_patches(embed: nn.Module, images: Tensor, patch_index: Tensor) -> Tensor:
    """timm's patch embedding of visible patches alone -> tokens [B, N1, C]: hidden ones cost
    nothing."""
    side = PATCH_PIXELS
    patches = images.unflatten(3, (-1, side)).unflatten(2, (-1, side))
    patches = patches.permute(0, 2, 4, 1, 3, 5)  # [B, H/4, W/4, 3, 4, 4], a view
    pixels = take_cells(patches, patch_index).flatten(2)
    return embed.norm(F.linear(pixels, embed.proj.weight.flatten(1), embed.proj.bias))


def take_cells(grid: Tensor, index: Tensor) -> Tensor:
    """Some cells of a grid [B, H, W, ...] -> [B, N, ...], without a copy of the others.

    Args:
        index: int64 [P, N], places in the flattened grid; P = 1 for all images alike, or B.
    """
    rows, columns = index // grid.shape[2], index % grid.shape[2]
    if len(index) == 1:
        return grid[:, rows[0], columns[0]]
    return grid[torch.arange(len(grid), device=grid.device)[:, None], rows, columns]

"""What every encoder on visible tokens has: its blocks, its passes, the names of its weights.

An encoder is one file here and one entry in `config.ENCODERS`. Its class inherits from timm's too,
so that parameters and state dict are timm's. The rest of the package uses only this interface.
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
    """A block on visible tokens and the partition of its windows; a base beside timm's block.

    It is a module, so that FSDP and torch.compile can wrap it.
    """

    grad_checkpointing = False

    def forward(self, x: Tensor, part: GroupPartition) -> Tensor:
        """x [B, N, C] -> [B, N, C]."""
        if self.grad_checkpointing and self.training:
            # Only stochastic depth is random; without it the generator's state is not saved, which
            # a CUDA graph could not restore.
            random = isinstance(self.drop_path1, DropPath)
            run = self._run
            if not torch.compiler.is_compiling():  # there the backend is a constant
                # On a GPU the backward pass runs in another thread, which `use_backend` does not
                # reach.
                run = functools.partial(self._run_by, backend_in_force())
            return checkpoint(run, x, part, use_reentrant=False, preserve_rng_state=random)
        return self._run(x, part)

    def _run_by(self, backend: str, x: Tensor, part: GroupPartition) -> Tensor:
        with use_backend(backend):
            return self._run(x, part)

    def _run(self, x: Tensor, part: GroupPartition) -> Tensor:
        """Pre-norm: norms before attention and MLP."""
        x = x + self.drop_path1(self._attend(self.norm1(x), part))
        return x + self.drop_path2(self.mlp(self.norm2(x)))

    def _attend(self, x: Tensor, part: GroupPartition) -> Tensor:
        raise NotImplementedError


class VisibleEncoder(nn.Module):
    """An encoder: images and a plan in, visible tokens out."""

    # timm's name of the classifier's head, and timm's default epsilon of the blocks' norms.
    timm_head, timm_norm_eps = "head.fc", 1e-5
    # The class of blocks that `greenmim_kernels.onednn` runs as one autograd node; None for none.
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
        """Recompute activations in the backward pass of training: less memory, more time."""
        for block in self.visible_blocks():
            block.grad_checkpointing = enable

    def no_weight_decay(self) -> set[str]:
        """Names of parameters without weight decay: 1-d ones, and those that timm names."""
        one_axis = {name for name, parameter in self.named_parameters() if parameter.ndim <= 1}
        return one_axis | set(super().no_weight_decay())  # type: ignore[misc]  # timm's

    # ---- the names of its weights; `tensors` have no prefix ----

    @classmethod
    def claims(cls, names: Collection[str]) -> bool:
        """Whether these names belong to a state dict of this encoder, of any kind."""
        raise NotImplementedError

    @classmethod
    def to_own(cls, tensors: Mapping[str, Tensor], source: str) -> dict[str, Tensor]:
        """A state dict of kind `source` (see `checkpoint`) under this class's names.

        Raises:
            ValueError: it is not of that kind; the message continues "it".
        """
        raise NotImplementedError

    @classmethod
    def to_timm(cls, tensors: Mapping[str, Tensor]) -> dict[str, Tensor]:
        """A state dict of this class under timm's names and conventions; unchanged by default."""
        return dict(tensors)

    @classmethod
    def to_official(cls, tensors: Mapping[str, Tensor]) -> dict[str, Tensor]:
        """A state dict of this class as in the published checkpoints.

        Raises:
            ValueError: no such model was published.
        """
        raise NotImplementedError

    @classmethod
    def to_swin_order(cls, tensors: Mapping[str, Tensor]) -> dict[str, Tensor]:
        """Weights of this class published before 2023, patch merging reordered as Swin's."""
        raise ValueError(
            "only weights of a Swin have another order of patch merging; leave merge_order out"
        )

    @classmethod
    def sizes(cls, tensors: Mapping[str, Tensor]) -> dict[str, Any]:
        """Fields of `ModelConfig` that weights of this class tell.

        Raises:
            ValueError: they are incomplete, or of impossible sizes; the message begins with "it" or
                "its".
        """
        raise NotImplementedError

    @classmethod
    def usual(cls, sizes: Mapping[str, Any]) -> dict[str, Any]:
        """Sizes that such weights do not tell, as in the published models; {} by default."""
        return {}

    @classmethod
    def continued(cls, config: ModelConfig, before: ModelConfig) -> ModelConfig:
        """`config` adapted to weights trained with `before`, which may have had other windows.

        Raises:
            ValueError: they differ in something that no weight tells.
        """
        return config

    @classmethod
    def fitted(
        cls, tensors: Mapping[str, Tensor], config: ModelConfig, own: Mapping[str, Tensor]
    ) -> tuple[dict[str, Tensor], list[str]]:
        """Weights of this class fitted to other windows, and lines for the user on what changed.

        Args:
            tensors: the checkpoint's.
            config: of the model that takes them.
            own: state dict of that model's encoder.
        """
        return dict(tensors), []

    @classmethod
    def timm_arguments(cls, config: ModelConfig) -> dict[str, Any]:
        """Arguments of `timm.create_model` for this encoder, "model_name" among them."""
        raise NotImplementedError


def embed_patches(embed: nn.Module, images: Tensor, patch_index: Tensor) -> Tensor:
    """timm's patch embedding of the visible patches only -> tokens [B, N1, C].

    Args:
        images: float [B, 3, H, W].
        patch_index: int64 [P, N1], places in the flattened patch grid.
    """
    side = PATCH_PIXELS
    patches = images.unflatten(3, (-1, side)).unflatten(2, (-1, side))
    patches = patches.permute(0, 2, 4, 1, 3, 5)  # [B, H/4, W/4, 3, 4, 4], a view
    pixels = take_cells(patches, patch_index).flatten(2)
    return embed.norm(F.linear(pixels, embed.proj.weight.flatten(1), embed.proj.bias))


def take_cells(grid: Tensor, index: Tensor) -> Tensor:
    """Cells of a grid [B, H, W, ...] -> [B, N, ...]; the others are not copied.

    Args:
        index: int64 [P, N], places in the flattened grid; P = 1 for all images alike, or B.
    """
    rows, columns = index // grid.shape[2], index % grid.shape[2]
    if len(index) == 1:
        return grid[:, rows[0], columns[0]]
    return grid[torch.arange(len(grid), device=grid.device)[:, None], rows, columns]

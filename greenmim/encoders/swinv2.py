"""SwinV2 on visible tokens only, with timm's parameters.

Cosine attention, a position bias that a small network gives, norms after attention and MLP. Source
of the network: Liu et al., CVPR 2022 (arXiv 2111.09883). With everything visible, on grids that are
multiples of the window, it equals timm's dense SwinV2.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping
from typing import Any

from timm.models.swin_transformer_v2 import SwinTransformerV2, SwinTransformerV2Block
from torch import Tensor, nn

from greenmim_kernels import GroupPartition, group_window_attention
from greenmim_kernels.integrations.readers import SwinV2Reader

from ..config import ModelConfig
from .shifted_windows import ShiftedWindowEncoder
from .visible import VisibleBlock

_reader = SwinV2Reader()  # of q, k, v and the bias table from timm's module


class SwinV2Block(VisibleBlock, SwinTransformerV2Block):  # type: ignore[misc]  # its own `forward`
    """timm's SwinV2 block on visible tokens."""

    def _run(self, x: Tensor, part: GroupPartition) -> Tensor:
        x = x + self.drop_path1(self.norm1(self._attend(x, part)))
        return x + self.drop_path2(self.norm2(self.mlp(x)))

    def _attend(self, x: Tensor, part: GroupPartition) -> Tensor:
        module = self.attn
        qkv, table = _reader.qkv(module, x), _reader.table(module)
        # Queries have the length of their head's scale already, keys the length 1.
        return module.proj(group_window_attention(qkv, table, part, module.num_heads, scale=1.0))


class SwinV2Encoder(ShiftedWindowEncoder, SwinTransformerV2):  # type: ignore[misc]  # its own `forward`
    """timm's SwinV2, but visible tokens in and out."""

    block = SwinV2Block
    timm_default, sign = "swinv2_base_window8_256", "attn.logit_scale"

    def __init__(self, config: ModelConfig) -> None:
        super().__init__(config, pretrained_window_sizes=config.pretrained_window_sizes)
        for name, buffer in self.named_buffers():
            if name.endswith("relative_coords_table") and not buffer.is_meta:
                if not buffer.isfinite().all():
                    raise ValueError(
                        "this timm divides by zero where a window, or a pretrained window, is one"
                        " token wide; install timm>=1.0.31"
                    )

    @staticmethod
    def merge(merging: nn.Module, x: Tensor) -> Tensor:
        return merging.norm(merging.reduction(x.unflatten(1, (-1, 4)).flatten(2)))

    @classmethod
    def to_own(cls, tensors: Mapping[str, Tensor], source: str) -> dict[str, Tensor]:
        if source == "official":
            raise ValueError("holds a SwinV2, which was never published with GreenMIM")
        return super().to_own(tensors, source)

    @classmethod
    def to_official(cls, tensors: Mapping[str, Tensor]) -> dict[str, Tensor]:
        raise ValueError("no SwinV2 of GreenMIM was published")

    @classmethod
    def continued(cls, config: ModelConfig, before: ModelConfig) -> ModelConfig:
        """Positions keep their meaning in a stage with other windows than before.

        Exactly so where those were square: timm takes one side for both axes.
        """
        sides = []
        pairs = zip(config.stage_windows(), before.stage_windows(), strict=True)
        settings = zip(config.pretrained_window_sizes, before.pretrained_window_sizes, strict=True)
        for ((_, now, _), (_, then, _)), (own, earlier) in zip(pairs, settings, strict=True):
            sides.append(own or earlier or (max(then) if then != now else 0))
        return dataclasses.replace(config, pretrained_window_sizes=tuple(sides))

    @staticmethod
    def heads_of(name: str, tensor: Tensor) -> int:
        return tensor.numel()

    @classmethod
    def timm_arguments(cls, config: ModelConfig) -> dict[str, Any]:
        arguments = super().timm_arguments(config)
        arguments["model_name"] = arguments["model_name"].replace("_patch4", "")
        if any(config.pretrained_window_sizes):
            arguments["pretrained_window_sizes"] = config.pretrained_window_sizes
        return arguments

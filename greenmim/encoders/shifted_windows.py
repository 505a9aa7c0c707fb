"""What both Swins share: stages of blocks whose windows are shifted in turn, and timm's names."""

from __future__ import annotations

import functools
import re
from collections.abc import Collection, Iterator, Mapping
from typing import Any

from torch import Tensor, nn

from ..config import PATCH_PIXELS, ModelConfig, models_like
from ..planning import Plan
from .visible import VisibleBlock, VisibleEncoder, embed_patches

_DOWNSAMPLE = re.compile(r"^layers\.(\d+)\.downsample\.")
# Stages whose patch merging has the number of, by kind; Microsoft's have others than timm's.
_MERGES = {"official": [{0, 1, 2}], "timm": [{1, 2, 3}, {0, 1, 2}], "greenmim": [{1, 2, 3}]}


class ShiftedWindowEncoder(VisibleEncoder):
    """A base beside timm's SwinTransformer and SwinTransformerV2: their modules, their state dict,
    without a head.

    Args:
        config: sizes of the model.
        more: arguments of timm's class that the other one has not.
    """

    block: type[VisibleBlock]
    timm_default: str  # a model of timm's, of whatever size
    # What tells such an encoder from others: the end of a name that each block has.
    sign: str

    def __init__(self, config: ModelConfig, **more: Any) -> None:
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
            **more,
        )
        for block in self.visible_blocks():
            # timm offers no hook to choose the class; parameters and names stay what they are.
            block.__class__ = self.block

    def visible_blocks(self) -> Iterator[VisibleBlock]:
        """The blocks of all stages, in order."""
        return (block for stage in self.layers for block in stage.blocks)

    def stages(self, images: Tensor, plan: Plan) -> list[Tensor]:
        """images [B, 3, H, W] -> for each stage, its visible tokens [B, N, C] in a plan's order."""
        x = embed_patches(self.patch_embed, images, plan.patch_index)
        outputs = []
        for index, (stage, partitions) in enumerate(zip(self.layers, plan.partitions, strict=True)):
            if index > 0:
                x = self.merge(stage.downsample, x)
            for number, block in enumerate(stage.blocks):
                x = block(x, partitions[number % 2])
            outputs.append(x)
        return outputs

    @staticmethod
    def merge(merging: nn.Module, x: Tensor) -> Tensor:
        """timm's PatchMerging on visible tokens [B, N, C] -> [B, N / 4, 2C].

        The four tokens of a cell stand together in the order in which Swin concatenates them.
        """
        raise NotImplementedError

    @classmethod
    def claims(cls, names: Collection[str]) -> bool:
        return any(name.endswith(cls.sign) for name in names)

    @classmethod
    def to_own(cls, tensors: Mapping[str, Tensor], source: str) -> dict[str, Tensor]:
        strangers = [n for n in tensors if not n.startswith(("patch_embed.", "layers.", "norm."))]
        merges = {int(found[1]) for found in map(_DOWNSAMPLE.match, tensors) if found}
        if strangers:
            raise ValueError(f"holds {strangers[0]!r}")
        if merges not in _MERGES[source]:
            raise ValueError(f"has patch merging in stages {merges}")
        by = 1 if merges == {0, 1, 2} else 0
        return {_move_downsample(name, by): tensor for name, tensor in tensors.items()}

    @classmethod
    def to_official(cls, tensors: Mapping[str, Tensor]) -> dict[str, Tensor]:
        return {_move_downsample(name, -1): tensor for name, tensor in tensors.items()}

    @classmethod
    def sizes(cls, tensors: Mapping[str, Tensor]) -> dict[str, Any]:
        depths: dict[int, int] = {}
        heads: dict[int, int] = {}
        sign = re.compile(rf"layers\.(\d)\.blocks\.(\d+)\.{re.escape(cls.sign)}")
        for name, tensor in tensors.items():
            if found := sign.fullmatch(name):
                stage, block = int(found[1]), int(found[2])
                depths[stage] = max(depths.get(stage, 0), block + 1)
                heads[stage] = cls.heads_of(name, tensor)
        if sorted(depths) != [0, 1, 2, 3] or "patch_embed.proj.weight" not in tensors:
            raise ValueError("it has not the four stages of a Swin")
        return {
            "embed_dim": tensors["patch_embed.proj.weight"].shape[0],
            "depths": tuple(depths[stage] for stage in range(4)),
            "num_heads": tuple(heads[stage] for stage in range(4)),
        }

    @staticmethod
    def heads_of(name: str, tensor: Tensor) -> int:
        """Attention heads, by the tensor that has the `sign`."""
        raise NotImplementedError

    @classmethod
    def timm_arguments(cls, config: ModelConfig) -> dict[str, Any]:
        fields = ("embed_dim", "depths", "num_heads")
        sizes = {name: getattr(config, name) for name in fields}
        # timm has each size with one window, which its arguments change.
        named = [
            name.removeprefix("greenmim_").replace("window14", "window7")
            for name in models_like(config, fields)
        ]
        arguments: dict[str, Any] = {"model_name": named[0] if named else cls.timm_default}
        arguments |= {"img_size": config.image_hw, "window_size": config.window_size}
        return arguments | ({} if named else sizes)


def _move_downsample(name: str, by: int) -> str:
    return _DOWNSAMPLE.sub(lambda found: f"layers.{int(found[1]) + by}.downsample.", name)

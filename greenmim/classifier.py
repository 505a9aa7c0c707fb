"""A classifier: the encoder with everything visible, and a linear layer on the mean of its tokens.

It equals timm's network with a head where grids are multiples of the window (a Twins up to two
epsilons, see `encoders.twins_svt`); attention is the fused operator.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping

import numpy as np
from timm.layers import trunc_normal_
from torch import Tensor, nn

from .checkpoint import convert_checkpoint, plain_names
from .config import ModelConfig
from .encoders import VisibleBlock, create_encoder
from .planning import Plan, Planner, check_images, checked_plan


class Classifier(nn.Module):
    """An encoder with a linear head: class scores of images.

    The state dict holds the encoder as ``encoder.`` + timm's keys, and ``head.fc``.

    Args:
        config: sizes of the encoder; the decoder's are not used.
        num_classes: number of classes K, at least 1.
    """

    def __init__(self, config: ModelConfig, num_classes: int) -> None:
        super().__init__()
        self.config, self.num_classes = config, num_classes
        self.planner = Planner(config)
        self.encoder = create_encoder(config)
        self.head = nn.ModuleDict({"fc": nn.Linear(config.stage_dims[-1], num_classes)})
        trunc_normal_(self.head["fc"].weight, std=0.02)  # as timm and Swin's own code
        nn.init.zeros_(self.head["fc"].bias)

    def plan(self) -> Plan:
        """The plan with everything visible, on the CPU; one serves every forward pass."""
        return self.planner(np.ones(self.config.num_units, dtype=bool))

    def forward(self, images: Tensor, plan: Plan | None = None) -> Tensor:
        """Class scores (logits).

        Args:
            images: float [B, 3, H, W] of the model's size, normalised with the data's mean and
                standard deviation.
            plan: `self.plan()` made ahead; this form compiles with ``fullgraph=True``.

        Returns:
            [B, K].

        Raises:
            ValueError: images of another size, or a plan made for another model.
        """
        check_images(images, self.config.image_hw)
        if plan is None:
            plan = self.plan()
        plan = checked_plan(plan, self.planner, images)
        return self.head["fc"](self.encoder(images, plan).mean(1))

    def set_grad_checkpointing(self, enable: bool = True) -> None:
        """Recompute activations in the backward pass of training: less memory, more time."""
        self.encoder.set_grad_checkpointing(enable)

    def blocks(self) -> Iterator[VisibleBlock]:
        """The transformer blocks, in order."""
        return self.encoder.visible_blocks()

    def no_weight_decay(self) -> set[str]:
        """Names of the parameters without weight decay: the encoder's, and the head's bias."""
        of_encoder = {f"encoder.{name}" for name in self.encoder.no_weight_decay()}
        return of_encoder | {"head.fc.bias"}

    def to_timm(self) -> dict[str, Tensor]:
        """The state dict under timm's names, with the head."""
        encoder = convert_checkpoint(self.state_dict(), source="greenmim", target="timm")
        head = self.head["fc"].state_dict()
        return encoder | {f"{self.encoder.timm_head}.{name}": head[name] for name in head}

    def group_matcher(self, coarse: bool = False) -> dict:
        """Patterns that tell a parameter's layer, for timm's layer-wise learning-rate decay.

        Args:
            coarse: one layer per stage, not per block.
        """

        def inside(pattern: str) -> str:
            return pattern.replace("^", r"^encoder\.")

        return {
            name: inside(found) if isinstance(found, str) else [(inside(p), n) for p, n in found]
            for name, found in self.encoder.group_matcher(coarse).items()
        }


def head_of(weights: Mapping[str, Tensor]) -> tuple[Tensor, Tensor] | None:
    """Weight [K, C] and bias [K] of a head, ours, timm's or Microsoft's; None without one."""
    weights = plain_names(weights)
    for name in ("head.fc", "head"):
        weight, bias = weights.get(f"{name}.weight"), weights.get(f"{name}.bias")
        if weight is not None and bias is not None and weight.ndim == 2:
            return weight, bias
    return None

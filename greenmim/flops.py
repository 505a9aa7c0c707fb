"""Floating-point operations of a model on visible tokens."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, nn
from torch.utils.flop_counter import FlopCounterMode

from .planning import Plan


def forward_flops(model: nn.Module, plan: Plan, **options: bool) -> int:
    """Of one image, two for each multiplication with addition; attention counts real pairs only.

    Args:
        model: a GreenMIM or a Classifier.
        plan: of the image's visible units.
        options: of the model's forward pass, such as `loss_only` for what training computes.
    """
    own = {"group_window_attention": _window_attention_flops, "sparse_depthwise_conv": _conv_flops}
    formulas = {
        getattr(torch.ops.greenmim, name + variant): formula
        for name, formula in own.items()
        for variant in ("", "_triton")
    }
    formulas[torch.ops.aten._scaled_dot_product_flash_attention_for_cpu] = _attention_flops
    image = torch.zeros(1, 3, *model.config.image_hw)
    with torch.no_grad(), FlopCounterMode(display=False, custom_mapping=formulas) as counter:
        model(image, plan=plan, **options)
    return counter.get_total_flops()


def _attention_flops(query: Tensor, key: Tensor, *_: object, **__: object) -> int:
    return 4 * query.numel() * key.shape[2]


def _window_attention_flops(q: Tensor, *others: Any, **_: object) -> int:
    """`q` is [B, N, heads, D], or [B, N, 3C] with keys and values."""
    window_id = others[5]
    pairs = sum(int(torch.bincount(row[row >= 0]).square().sum()) for row in window_id)
    channels = q.shape[2] // 3 if q.ndim == 3 else q.shape[2] * q.shape[3]
    return 4 * pairs * channels * (len(q) // len(window_id))


def _conv_flops(
    x: Tensor, weight: Tensor, bias: Tensor, neighbours: Tensor, *_: object, **__: object
) -> int:
    pairs = int((neighbours >= 0).sum())
    return 2 * pairs * x.shape[2] * (len(x) // len(neighbours))


_formula: Any
for _formula in (_attention_flops, _window_attention_flops, _conv_flops):
    _formula._get_raw = True

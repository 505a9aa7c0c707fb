"""What plain PyTorch costs in a dtype: the measure of a kernel that rounds its probabilities."""

from __future__ import annotations

import math

import torch
from torch import Tensor

import greenmim_kernels as gk
from greenmim_kernels.reference import relative_position_bias
from greenmim_kernels.testing import Inputs, run


class _SavedOutput(torch.autograd.Function):
    """softmax(scores) v, whose backward takes delta from the rounded output, as FlashAttention."""

    @staticmethod
    def forward(ctx, scores: Tensor, v: Tensor) -> Tensor:
        p = scores.softmax(-1)
        out = p.to(v.dtype) @ v
        ctx.save_for_backward(p, v, out)
        return out

    @staticmethod
    def backward(ctx, grad_out: Tensor) -> tuple[Tensor, Tensor]:
        p, v, out = ctx.saved_tensors
        delta = (grad_out.float() * out.float()).sum(-1, keepdim=True)
        grad_scores = p * ((grad_out @ v.transpose(-1, -2)).float() - delta)
        return grad_scores, p.to(v.dtype).transpose(-1, -2) @ grad_out


def plain_results(inputs: Inputs, saved_output: bool = False) -> dict[str, Tensor]:
    """Forward and backward, softmax in float32, probabilities in the dtype of qkv."""

    def attention(qkv, table, part, num_heads, pad_value=None):
        x = gk.group_gather(qkv, part)
        if pad_value is not None:
            x = torch.where((part.token_index >= 0)[..., None], x, pad_value)
        q, k, v = x.unflatten(-1, (3, num_heads, -1)).movedim(3, 0).transpose(-2, -3).unbind(0)
        # Padding is a window of its own, so that no row is without a key.
        same = (part.window_id[..., :, None] == part.window_id[..., None, :])[:, :, None]
        scores = (q.float() @ k.float().transpose(-1, -2)) * q.shape[-1] ** -0.5
        if table is not None:
            scores = scores + relative_position_bias(table, *part.tensors[1:])
        scores = scores.masked_fill(~same, -math.inf)
        if saved_output:
            out = _SavedOutput.apply(scores, v)
        else:
            out = scores.softmax(-1).to(qkv.dtype) @ v
        return gk.group_scatter(out.transpose(-2, -3).flatten(-2), part)

    with gk.use_backend("reference"):
        return run(inputs, attention)

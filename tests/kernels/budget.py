"""What plain PyTorch costs in a dtype: the measure of a kernel that rounds its probabilities."""

from __future__ import annotations

import math

import torch
from torch import Tensor

import greenmim_kernels as gk
from greenmim_kernels.reference import relative_position_bias
from greenmim_kernels.testing import Inputs, run

LN_2 = math.log(2)


class _Recomputed(torch.autograd.Function):
    """softmax(scores) v, whose backward makes the probabilities of scores and log-denominators.

    As kernels of a GPU do it: scores in base 2, logarithms kept in base e. So a window of one
    token, whose scores have a gradient of nothing, has that of their rounding. Delta is taken from
    the rounded output, or summed anew.
    """

    @staticmethod
    def forward(ctx, scores: Tensor, v: Tensor, saved_output: bool) -> Tensor:
        most = scores.amax(-1, keepdim=True)
        p = (scores - most).exp2()
        total = p.sum(-1, keepdim=True)
        out = (p / total).to(v.dtype) @ v
        ctx.save_for_backward(scores, (most + total.log2()) * LN_2, v, out)
        ctx.saved_output = saved_output
        return out

    @staticmethod
    def backward(ctx, grad_out: Tensor) -> tuple[Tensor, Tensor, None]:
        scores, lse, v, out = ctx.saved_tensors
        p = (scores - lse / LN_2).exp2()
        grad_p = (grad_out @ v.transpose(-1, -2)).float()
        parts = grad_out.float() * out.float() if ctx.saved_output else p * grad_p
        delta = parts.sum(-1, keepdim=True)
        return p * (grad_p - delta) * LN_2, p.to(v.dtype).transpose(-1, -2) @ grad_out, None


def plain_results(inputs: Inputs, saved_output: bool = False) -> dict[str, Tensor]:
    """Forward and backward, softmax in float32, probabilities in the dtype of qkv."""

    def attention(qkv, table, part, num_heads, pad_value=None):
        x = gk.group_gather(qkv, part)
        if pad_value is not None:
            x = torch.where((part.token_index >= 0)[..., None], x, pad_value)
        q, k, v = x.unflatten(-1, (3, num_heads, -1)).movedim(3, 0).transpose(-2, -3).unbind(0)
        # Padding is a window of its own, so that no row is without a key.
        same = (part.window_id[..., :, None] == part.window_id[..., None, :])[:, :, None]
        scores = (q.float() @ k.float().transpose(-1, -2)) * (q.shape[-1] ** -0.5 / LN_2)
        if table is not None:
            scores = scores + relative_position_bias(table, *part.tensors[1:]) / LN_2
        scores = scores.masked_fill(~same, -math.inf)
        out = _Recomputed.apply(scores, v, saved_output)
        return gk.group_scatter(out.transpose(-2, -3).flatten(-2), part)

    with gk.use_backend("reference"):
        return run(inputs, attention)

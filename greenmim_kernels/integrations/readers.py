"""Readers: what the operator needs, read from an attention module of some library.

A reader knows the library's names. It is no base of the fused module, so that no method of ours
hides an attribute of theirs. In every method `m` is the library's module.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from ..reference import accumulation_dtype


class SwinReader:
    """Microsoft's Swin and SimMIM, timm, MONAI, Video-Swin, MMDetection."""

    def qkv(self, m, x: Tensor) -> Tensor | tuple[Tensor, Tensor, Tensor]:
        """x [B, N, C] -> qkv [B, N, 3C], or (q, k, v), [B, N, num_heads, head_dim] each."""
        return m.qkv(x)

    def pad_value(self, m, x: Tensor) -> Tensor | None:
        """The q, k and v of a token of zeros, [3C]; None if the layers have no bias."""
        return output_at_zero(m.qkv, x)

    def table(self, m) -> Tensor:
        """The relative position bias table, [rows, num_heads]."""
        return m.relative_position_bias_table

    def scale(self, m) -> float | Tensor:
        """The factor of q . k."""
        return m.scale

    def output(self, m, x: Tensor) -> Tensor:
        """What follows the attention: x [B, N, C] -> [B, N, C]."""
        return m.proj_drop(m.proj(x))

    def windows(self, x: Tensor) -> Tensor:
        """The input of a call -> [B * windows, n, C]."""
        return x

    def heads(self, m) -> tuple[int, int]:
        """(num_heads, head_dim)."""
        return m.num_heads, m.proj.in_features // m.num_heads

    def window_size(self, m) -> Sequence[int]:
        """The window that the bias table is for."""
        return m.window_size

    def dropout(self, m) -> float:
        """The dropout probability of the attention weights."""
        return m.attn_drop.p

    def exposes_maps(self, m) -> bool:
        """Whether a hook inside the module sees the attention maps."""
        return any([has_hooks(getattr(m, name, None)) for name in ("softmax", "attn_drop")])


class SwinV2Reader(SwinReader):
    """Microsoft's and timm's SwinV2: cosine attention, and a bias that an MLP computes."""

    def qkv(self, m, x: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        bias = self.pad_value(m, x)
        if bias is None:
            qkv = m.qkv(x)
        elif hasattr(m.qkv, "with_bias"):  # a layer of `greenmim_kernels.onednn`
            qkv = m.qkv.with_bias(x, bias)
        else:
            qkv = F.linear(x, m.qkv.weight, bias)
        q, k, v = qkv.unflatten(-1, (3, m.num_heads, -1)).unbind(-3)
        return with_length(q, m.logit_scale), with_length(k), v

    def pad_value(self, m, x: Tensor) -> Tensor | None:
        if m.q_bias is None:
            return None
        return torch.cat((m.q_bias, torch.zeros_like(m.v_bias), m.v_bias))

    def table(self, m) -> Tensor:
        return mlp_bias_table(m.cpb_mlp(m.relative_coords_table), m.num_heads)

    def scale(self, m) -> float:
        return 1.0


class HuggingFaceSwinReader(SwinReader):
    """SwinAttention of transformers 5 and newer."""

    def _layers(self, m) -> tuple[nn.Module, nn.Module, nn.Module]:
        return m.q_proj, m.k_proj, m.v_proj

    def qkv(self, m, x: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        return tuple([layer(x).unflatten(-1, self.heads(m)) for layer in self._layers(m)])

    def pad_value(self, m, x: Tensor) -> Tensor | None:
        biases = [output_at_zero(layer, x) for layer in self._layers(m)]
        if all([bias is None for bias in biases]):
            return None
        zeros = x.new_zeros(math.prod(self.heads(m)))
        return torch.cat([zeros if bias is None else bias for bias in biases])

    def table(self, m) -> Tensor:
        return m.relative_position_bias.relative_position_bias_table

    def scale(self, m) -> float:
        return m.scaling

    def output(self, m, x: Tensor) -> Tensor:
        return m.o_proj(x)

    def heads(self, m) -> tuple[int, int]:
        return m.num_attention_heads, m.head_dim

    def window_size(self, m) -> Sequence[int]:
        return m.relative_position_bias.window_size

    def dropout(self, m) -> float:
        return m.attention_dropout

    def exposes_maps(self, m) -> bool:
        # Eager attention returns the maps, and a hook on the module sees what it returns.
        return m.config._attn_implementation == "eager" and has_hooks(m)


class HuggingFaceSelfAttentionReader(HuggingFaceSwinReader):
    """transformers' Swin before version 5, Donut, MaskFormer, CLAP: no output projection here."""

    def _layers(self, m) -> tuple[nn.Module, nn.Module, nn.Module]:
        return m.query, m.key, m.value

    def table(self, m) -> Tensor:
        return m.relative_position_bias_table

    def scale(self, m) -> float:
        return m.attention_head_size**-0.5

    def output(self, m, x: Tensor) -> Tensor:
        return x

    def heads(self, m) -> tuple[int, int]:
        return m.num_attention_heads, m.attention_head_size

    def window_size(self, m) -> Sequence[int]:
        return m.window_size

    def dropout(self, m) -> float:
        return m.dropout.p

    def exposes_maps(self, m) -> bool:
        return has_hooks(m.dropout)


class HuggingFaceSwinV2Reader(HuggingFaceSelfAttentionReader):
    """transformers' Swinv2SelfAttention and Swin2SRSelfAttention."""

    def qkv(self, m, x: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        q, k, v = super().qkv(m, x)
        return with_length(q, m.logit_scale), with_length(k), v

    def table(self, m) -> Tensor:
        table = m.continuous_position_bias_mlp(m.relative_coords_table)
        return mlp_bias_table(table, m.num_attention_heads)

    def scale(self, m) -> float:
        return 1.0


class TorchvisionReader(SwinReader):
    """torchvision's Swin, which uses the weights of its layers and never calls the layers."""

    def qkv(self, m, x: Tensor) -> Any:
        return F.linear(x, m.qkv.weight, self.pad_value(m, x))

    def pad_value(self, m, x: Tensor) -> Tensor | None:
        return m.qkv.bias

    def output(self, m, x: Tensor) -> Tensor:
        x = F.linear(x, m.proj.weight, m.proj.bias)
        return F.dropout(x, p=m.dropout, training=m.training)

    def scale(self, m) -> float:
        return self.heads(m)[1] ** -0.5

    def dropout(self, m) -> float:
        return m.attention_dropout

    def exposes_maps(self, m) -> bool:
        return False


class TorchvisionV2Reader(SwinV2Reader, TorchvisionReader):
    """torchvision's SwinV2."""

    def qkv(self, m, x: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        qkv = TorchvisionReader.qkv(self, m, x)
        q, k, v = qkv.unflatten(-1, (3, m.num_heads, -1)).unbind(-3)
        return with_length(q, m.logit_scale), with_length(k), v

    def pad_value(self, m, x: Tensor) -> Tensor | None:
        if m.qkv.bias is None:
            return None
        q, k, v = m.qkv.bias.chunk(3)
        return torch.cat((q, torch.zeros_like(k), v))  # torchvision sets the keys' bias to zero


class TimmMaxVitReader(SwinReader):
    """timm's AttentionCl, whose bias is one of three modules."""

    def qkv(self, m, x: Tensor) -> Tensor | tuple[Tensor, Tensor, Tensor]:
        if not m.head_first:
            return m.qkv(x)
        return m.qkv(x).unflatten(-1, (m.num_heads, -1)).chunk(3, dim=-1)

    def table(self, m) -> Tensor:
        bias = m.rel_pos
        if hasattr(bias, "mlp"):  # RelPosMlp
            return bias.mlp(bias.rel_coords_log).view(-1, m.num_heads)
        table = bias.relative_position_bias_table
        if table.dim() == 3:  # RelPosBiasTf, [heads, rows ...], by key minus query: reversed
            return table.flip(1, 2).flatten(1).T
        return table

    def scale(self, m) -> float:
        return m.dim_head**-0.5 if m.fused_attn else m.scale  # its fused path ignores m.scale

    def windows(self, x: Tensor) -> Tensor:
        return x.flatten(1, -2)

    def heads(self, m) -> tuple[int, int]:
        return m.num_heads, m.dim_head

    def window_size(self, m) -> Sequence[int]:
        return m.rel_pos.window_size


class TorchvisionMaxVitReader(SwinReader):
    """torchvision's RelativePositionalMultiHeadAttention."""

    def qkv(self, m, x: Tensor) -> Tensor:
        return m.to_qkv(x)

    def scale(self, m) -> float:
        return m.scale_factor

    def output(self, m, x: Tensor) -> Tensor:
        return m.merge(x)

    def windows(self, x: Tensor) -> Tensor:
        return x.flatten(0, 1)

    def heads(self, m) -> tuple[int, int]:
        return m.n_heads, m.head_dim

    def window_size(self, m) -> Sequence[int]:
        return m.size, m.size

    def dropout(self, m) -> float:
        return 0.0

    def exposes_maps(self, m) -> bool:
        return False


def output_at_zero(layer: nn.Module, x: Tensor) -> Tensor | None:
    """The output of a linear layer for a token of zeros, [out]; None if the layer has no bias.

    x: a tensor [..., C] of the dtype and on the device of the layer's input.
    """
    bias = layer.bias
    if bias is None or type(bias) in (Tensor, nn.Parameter):
        return bias
    return layer(x.new_zeros(1, x.shape[-1]))[0]  # quantised or sharded: only the layer can tell


def has_hooks(m: nn.Module | None) -> bool:
    """Whether something is called before or after the module's forward pass."""
    return m is not None and bool(m._forward_hooks or m._forward_pre_hooks)


def with_length(x: Tensor, logit_scale: Tensor | None = None) -> Tensor:
    """x [..., heads, D] with rows of length 1 or, with SwinV2's logit_scale, of its clamped exp.

    logit_scale: [heads, 1, 1], the logarithm of the factor of cosine attention (Liu et al., CVPR
    2022, arXiv 2111.09883, section 3.2), clamped at log(100) as in their code.
    """
    length = None if logit_scale is None else logit_scale.view(-1, 1).clamp(max=math.log(100)).exp()
    return _WithLength.apply(x, length)[0]


class _WithLength(torch.autograd.Function):
    """`F.normalize` and the product with `length`, in a third of their passes over memory."""

    @staticmethod
    def forward(x: Tensor, length: Tensor | None) -> tuple[Tensor, Tensor]:
        dtype = accumulation_dtype(x.dtype)
        norm = torch.linalg.vector_norm(x, dim=-1, keepdim=True, dtype=dtype).clamp_min(1e-12)
        factor = norm.reciprocal() if length is None else length.to(dtype) / norm
        return (x * factor).to(x.dtype), factor

    @staticmethod
    def setup_context(ctx, inputs, output) -> None:
        ctx.set_materialize_grads(False)
        ctx.save_for_backward(*output, inputs[1])

    @staticmethod
    def backward(ctx, grad: Tensor | None, grad_factor: Tensor | None):
        """grad_factor is not None only in a second derivative, which goes through `factor`."""
        y, factor, length = ctx.saved_tensors
        if grad is None and grad_factor is None:
            return None, None
        dtype, y = y.dtype, y.to(factor.dtype)
        grad = torch.zeros_like(y) if grad is None else grad.to(factor.dtype)
        along, grad_length = (grad * y).sum(-1, keepdim=True), None
        if grad_factor is not None:
            along = along + grad_factor * factor
        if length is not None:
            if ctx.needs_input_grad[1]:
                grad_length = (along.flatten(0, -3).sum(0) / length).to(length.dtype)
            along = along / length.to(along.dtype) ** 2
        across = torch.addcmul(grad, y, along, value=-1)
        return (across * factor).to(dtype), grad_length


def mlp_bias_table(table: Tensor, num_heads: int) -> Tensor:
    """Output [1, rows ..., heads] of SwinV2's MLP -> bias table [rows, heads], in [0, 16].

    The factor 16 is that of their code, not of the paper.
    """
    return 16 * table.view(-1, num_heads).to(accumulation_dtype(table.dtype)).sigmoid()

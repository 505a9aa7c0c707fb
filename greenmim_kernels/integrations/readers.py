"""What the operator needs of the attention modules of libraries.

How a library names things is here and not in the classes of fused modules, so that no name of ours
gets in the way of one of theirs. In all of them m is the library's module.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from ..reference import accumulation_dtype


class Swin:
    """Microsoft's Swin and SimMIM, timm, MONAI, Video-Swin, MMDetection."""

    def qkv(self, m, x: Tensor) -> Tensor | tuple[Tensor, Tensor, Tensor]:
        """x [B, N, C] -> what the operator takes."""
        return m.qkv(x)

    def of_padding(self, m, x: Tensor) -> Tensor | None:
        """qkv where x is zero, [3C]; None: zeros."""
        return at_zero(m.qkv, x)

    def table(self, m) -> Tensor:
        """[rows, heads]"""
        return m.relative_position_bias_table

    def scale(self, m) -> float | Tensor:
        return m.scale

    def output(self, m, x: Tensor) -> Tensor:
        return m.proj_drop(m.proj(x))

    def windows(self, x: Tensor) -> Tensor:
        """A call's input as [B windows, n, C]."""
        return x

    def heads(self, m) -> tuple[int, int]:
        """How many, and their dim."""
        return m.num_heads, m.proj.in_features // m.num_heads

    def window(self, m) -> Sequence[int]:
        """The one that the bias table is for."""
        return m.window_size

    def dropout(self, m) -> float:
        """That of the attention's probabilities."""
        return m.attn_drop.p

    def shows_maps(self, m) -> bool:
        """Whether somebody looks at the attention maps inside of the module."""
        return any([has_hooks(getattr(m, name, None)) for name in ("softmax", "attn_drop")])


class SwinV2(Swin):
    """Microsoft's and timm's: cosine attention, and a bias that an MLP computes."""

    def qkv(self, m, x: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        bias = self.of_padding(m, x)
        if bias is None:
            qkv = m.qkv(x)
        elif hasattr(m.qkv, "with_bias"):  # of onednn
            qkv = m.qkv.with_bias(x, bias)
        else:
            qkv = F.linear(x, m.qkv.weight, bias)
        q, k, v = qkv.unflatten(-1, (3, m.num_heads, -1)).unbind(-3)
        return of_length(q, m.logit_scale), of_length(k), v

    def of_padding(self, m, x: Tensor) -> Tensor | None:
        if m.q_bias is None:
            return None
        return torch.cat((m.q_bias, torch.zeros_like(m.v_bias), m.v_bias))

    def table(self, m) -> Tensor:
        return bias_of_mlp(m.cpb_mlp(m.relative_coords_table), m.num_heads)

    def scale(self, m) -> float:
        return 1.0


class HuggingFaceSwin(Swin):
    def _layers(self, m) -> tuple[nn.Module, nn.Module, nn.Module]:
        return m.q_proj, m.k_proj, m.v_proj

    def qkv(self, m, x: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        return tuple([layer(x).unflatten(-1, self.heads(m)) for layer in self._layers(m)])

    def of_padding(self, m, x: Tensor) -> Tensor | None:
        given = [at_zero(layer, x) for layer in self._layers(m)]
        if all([bias is None for bias in given]):
            return None
        zeros = x.new_zeros(math.prod(self.heads(m)))
        return torch.cat([zeros if bias is None else bias for bias in given])

    def table(self, m) -> Tensor:
        return m.relative_position_bias.relative_position_bias_table

    def scale(self, m) -> float:
        return m.scaling

    def output(self, m, x: Tensor) -> Tensor:
        return m.o_proj(x)

    def heads(self, m) -> tuple[int, int]:
        return m.num_attention_heads, m.head_dim

    def window(self, m) -> Sequence[int]:
        return m.relative_position_bias.window_size

    def dropout(self, m) -> float:
        return m.attention_dropout

    def shows_maps(self, m) -> bool:
        # Eager attention returns them, and a hook sees what is returned.
        return m.config._attn_implementation == "eager" and has_hooks(m)


class HuggingFaceSelfAttention(HuggingFaceSwin):
    """Swin before transformers 5, Donut's, MaskFormer's and CLAP's: the projection is elsewhere."""

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

    def window(self, m) -> Sequence[int]:
        return m.window_size

    def dropout(self, m) -> float:
        return m.dropout.p

    def shows_maps(self, m) -> bool:
        return has_hooks(m.dropout)


class HuggingFaceSwinV2(HuggingFaceSelfAttention):
    def qkv(self, m, x: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        q, k, v = super().qkv(m, x)
        return of_length(q, m.logit_scale), of_length(k), v

    def table(self, m) -> Tensor:
        table = m.continuous_position_bias_mlp(m.relative_coords_table)
        return bias_of_mlp(table, m.num_attention_heads)

    def scale(self, m) -> float:
        return 1.0


class Torchvision(Swin):
    """It takes the weights of its layers, not the layers."""

    def qkv(self, m, x: Tensor) -> Any:
        return F.linear(x, m.qkv.weight, self.of_padding(m, x))

    def of_padding(self, m, x: Tensor) -> Tensor | None:
        return m.qkv.bias

    def output(self, m, x: Tensor) -> Tensor:
        x = F.linear(x, m.proj.weight, m.proj.bias)
        return F.dropout(x, p=m.dropout, training=m.training)

    def scale(self, m) -> float:
        return self.heads(m)[1] ** -0.5

    def dropout(self, m) -> float:
        return m.attention_dropout

    def shows_maps(self, m) -> bool:
        return False


class TorchvisionV2(Torchvision):
    def qkv(self, m, x: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        q, k, v = super().qkv(m, x).unflatten(-1, (3, *self.heads(m))).unbind(-3)
        return of_length(q, m.logit_scale), of_length(k), v

    def of_padding(self, m, x: Tensor) -> Tensor | None:
        if m.qkv.bias is None:
            return None
        q, k, v = m.qkv.bias.chunk(3)
        return torch.cat((q, torch.zeros_like(k), v))  # that of the keys counts for nothing

    def table(self, m) -> Tensor:
        return bias_of_mlp(m.cpb_mlp(m.relative_coords_table), m.num_heads)

    def scale(self, m) -> float:
        return 1.0


class TimmMaxVit(Swin):
    """AttentionCl, whose bias is one of three modules."""

    def qkv(self, m, x: Tensor) -> Tensor | tuple[Tensor, Tensor, Tensor]:
        if not m.head_first:
            return m.qkv(x)
        return m.qkv(x).unflatten(-1, (m.num_heads, -1)).chunk(3, dim=-1)

    def table(self, m) -> Tensor:
        bias = m.rel_pos
        if hasattr(bias, "mlp"):  # RelPosMlp
            return bias.mlp(bias.rel_coords_log).view(-1, m.num_heads)
        table = bias.relative_position_bias_table
        if table.dim() == 3:  # RelPosBiasTf, [heads, rows per axis ...]: of the key less the query
            return table.flip(1, 2).flatten(1).T
        return table

    def scale(self, m) -> float:
        return m.dim_head**-0.5 if m.fused_attn else m.scale

    def windows(self, x: Tensor) -> Tensor:
        return x.flatten(1, -2)

    def heads(self, m) -> tuple[int, int]:
        return m.num_heads, m.dim_head

    def window(self, m) -> Sequence[int]:
        return m.rel_pos.window_size


class TorchvisionMaxVit(Swin):
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

    def window(self, m) -> Sequence[int]:
        return m.size, m.size

    def dropout(self, m) -> float:
        return 0.0

    def shows_maps(self, m) -> bool:
        return False


def at_zero(layer: nn.Module, x: Tensor) -> Tensor | None:
    """What a linear layer gives where its input is zero; None: zeros."""
    bias = layer.bias
    if bias is None or type(bias) in (Tensor, nn.Parameter):
        return bias
    return layer(x.new_zeros(1, x.shape[-1]))[0]  # one that is quantised or sharded


def has_hooks(m: nn.Module | None) -> bool:
    return m is not None and bool(m._forward_hooks or m._forward_pre_hooks)


def of_length(x: Tensor, logit_scale: Tensor | None = None) -> Tensor:
    """x [..., heads, D] with rows of length 1; or exp of SwinV2's parameter [heads, 1, 1]."""
    length = None if logit_scale is None else logit_scale.view(-1, 1).clamp(max=math.log(100)).exp()
    return _OfLength.apply(x, length)[0]


class _OfLength(torch.autograd.Function):
    """In a third of the passes over memory that `F.normalize` and a product take."""

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
        """A gradient of the factor comes only from another backward pass."""
        y, factor, length = ctx.saved_tensors
        if grad is None and grad_factor is None:
            return None, None
        dtype, y = y.dtype, y.to(factor.dtype)
        grad = torch.zeros_like(y) if grad is None else grad.to(factor.dtype)
        along, of_length = (grad * y).sum(-1, keepdim=True), None
        if grad_factor is not None:
            along = along + grad_factor * factor
        if length is not None:
            if ctx.needs_input_grad[1]:
                of_length = (along.flatten(0, -3).sum(0) / length).to(length.dtype)
            along = along / length.to(along.dtype) ** 2
        across = torch.addcmul(grad, y, along, value=-1)
        return (across * factor).to(dtype), of_length


def bias_of_mlp(table: Tensor, num_heads: int) -> Tensor:
    """SwinV2's table [1, rows per axis ..., heads] -> [rows, heads] between 0 and 16."""
    return 16 * table.view(-1, num_heads).to(accumulation_dtype(table.dtype)).sigmoid()

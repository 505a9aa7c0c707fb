"""Training in float32 on x86 CPUs: linear layers by oneDNN, and few steps of Python between them.

PyTorch gives float32 products to MKL. With the shapes of a training step on a CPU (few rows, and a
weight that comes from memory) oneDNN, which every x86 build of PyTorch holds too, took a seventh
less time on an AMD EPYC. An MLP is one operator, whose GELU costs no pass of its own backwards. The
operators are in csrc/cpu/linear.cpp. A block is one node of autograd: between two products, which
fill the caches with weights, Python is several times slower than in a loop of its own.

    use_onednn(model)  # any model with nn.Linear, before its first step

Calls that are not in float32, not on a CPU or under autocast are the layers' own.
"""

from __future__ import annotations

import functools
from typing import TYPE_CHECKING

import torch
from timm.layers import DropPath, Mlp
from torch import Tensor, nn
from torch.autograd.function import once_differentiable
from torch.nn import functional as F

from .backends import available_backends, choose_backend
from .ops import operator
from .partition import GroupPartition

_linear, _linear_backward = operator("onednn_linear"), operator("onednn_linear_backward")
_mlp, _mlp_backward = operator("onednn_mlp"), operator("onednn_mlp_backward")
_attention = operator("group_window_attention")
_attention_backward = operator("group_window_attention_backward")
_norm = torch.ops.aten.native_layer_norm.default
_norm_backward = torch.ops.aten.native_layer_norm_backward.default


def available() -> bool:
    """Whether the operators are there, and both libraries: on Arm there is no MKL to avoid."""
    return (
        available_backends()["cpp"] is None
        and torch.backends.mkldnn.is_available()
        and torch.backends.mkl.is_available()
        and hasattr(torch.ops.mkldnn, "_linear_pointwise")
    )


class OneDNNLinear(nn.Linear):
    """A linear layer for float32 tensors on a CPU; parameters and names are nn.Linear's."""

    def forward(self, x: Tensor) -> Tensor:
        if _fit(x, self):
            return _Linear.apply(x, self.weight, self.bias)
        return super().forward(x)

    def with_bias(self, x: Tensor, bias: Tensor) -> Tensor:
        """The same with a bias [out] that is made in each pass, in place of its own."""
        if _fit(x, self) and bias.dtype == torch.float32 and bias.is_cpu:
            return _Linear.apply(x, self.weight, bias)
        return F.linear(x, self.weight, bias)


class OneDNNMlp(Mlp):
    """timm's MLP of two `OneDNNLinear` with GELU between them and nothing else that is at work."""

    def forward(self, x: Tensor) -> Tensor:
        first, second = self.fc1, self.fc2
        if self.is_plain() and _fit(x, first, second):
            return _Mlp.apply(x, first.weight, first.bias, second.weight, second.bias)
        return super().forward(x)

    def is_plain(self) -> bool:
        """Whether it still is what the operator computes, and nothing looks into it."""
        drops = any(drop.p > 0 and drop.training for drop in (self.drop1, self.drop2))
        modules = self.fc1, self.act, self.drop1, self.norm, self.fc2, self.drop2
        return not drops and _is_plain(self) and not any(map(_has_hooks, modules))


# What its other base is.
if TYPE_CHECKING:
    _Beside = nn.Module
else:
    _Beside = object


class OneDNNBlock(_Beside):
    """A Swin block that is one node of autograd, of such layers.

    A base of a class beside the block's own, which has `_run(x, part)` and the names of timm's.
    """

    def _run(self, x: Tensor, part: GroupPartition) -> Tensor:
        if not self._takes(x, part):
            # The other base has it; it also says what does not fit.
            return super()._run(x, part)  # type: ignore[misc]
        attention = self.attn
        parameters = []
        for layer in self._layers():
            parameters += [layer.weight, layer.bias]
        heads = attention.num_heads
        return _Block.apply(
            x,
            *parameters,
            attention.relative_position_bias_table,
            *part.tensors,
            (heads, part.window_slots, (x.shape[-1] // heads) ** -0.5),
            (self.norm1.eps, self.norm2.eps),
        )

    def _layers(self) -> tuple[nn.Module, ...]:
        """In the order of use."""
        attention, mlp = self.attn, self.mlp
        return self.norm1, attention.qkv, attention.proj, self.norm2, mlp.fc1, mlp.fc2

    def _takes(self, x: Tensor, part: GroupPartition) -> bool:
        """Whether it still is what the node computes, nothing looks into it, and the input fits."""
        attention, paths = self.attn, (self.drop_path1, self.drop_path2)
        modules = self.norm1, attention, attention.qkv, attention.proj, self.norm2, self.mlp
        if not _has_onednn(self) or any(map(_has_hooks, (*modules, *paths))):
            return False
        if not self.mlp.is_plain() or not all(map(_passes_on, paths)) or x.dim() != 3:
            return False
        heads, table = attention.num_heads, attention.relative_position_bias_table
        fit = (
            part.num_tokens == x.shape[1]
            and part.token_index.shape[0] in (1, x.shape[0])
            and all(tensor.device == x.device for tensor in part.tensors)
            and table.dtype == torch.float32
            and table.is_cpu
            and table.shape == (part.table_rows, heads)
        )
        if not fit or not _fit(x, *self._layers()):
            return False
        sizes = (x.shape[2] // heads, part.group_size, part.table_rows)
        return choose_backend("group_window_attention", x.device, x.dtype, *sizes) == "cpp"


def use_onednn(model: nn.Module, block_class: type[nn.Module] | None = None) -> None:
    """Make every nn.Linear of a float32 model on a CPU an `OneDNNLinear`, where available.

    A timm Mlp with the exact GELU becomes an `OneDNNMlp`. What is changed inside of one later, or
    has hooks there, runs layer by layer. Parameters, names and the state dict stay.

    Args:
        model: Changed in place.
        block_class: Blocks of exactly this class, of such layers, become an `OneDNNBlock`, too.
    """
    if not available():
        return
    for module in list(model.modules()):
        if type(module) is nn.Linear and module.weight.numel():
            module.__class__ = OneDNNLinear
    for module in list(model.modules()):
        if type(module) is Mlp and _is_plain(module):
            module.__class__ = OneDNNMlp
    for module in list(model.modules()):
        if type(module) is block_class and _has_onednn(module):
            module.__class__ = _one_node(block_class)  # type: ignore[arg-type]  # it is hashable


@functools.cache
def _one_node(block_class: type[nn.Module]) -> type[nn.Module]:
    return type(f"OneDNN{block_class.__name__}", (OneDNNBlock, block_class), {})


def _is_plain(mlp: Mlp) -> bool:
    layers = type(mlp.fc1) is type(mlp.fc2) is OneDNNLinear
    exact = type(mlp.act) is nn.GELU and mlp.act.approximate == "none"
    return layers and exact and type(mlp.norm) is nn.Identity


def _has_onednn(block: nn.Module) -> bool:
    linear = type(block.attn.qkv) is type(block.attn.proj) is OneDNNLinear
    norms = type(block.norm1) is type(block.norm2) is nn.LayerNorm
    return linear and norms and type(block.mlp) is OneDNNMlp


def _passes_on(path: nn.Module) -> bool:
    """Whether stochastic depth is not at work."""
    return type(path) is nn.Identity or type(path) is DropPath and not path.training


def _has_hooks(module: nn.Module) -> bool:
    """Whether something is to be called beside the module itself."""
    forward = module._forward_hooks or module._forward_pre_hooks
    return bool(forward or module._backward_hooks or module._backward_pre_hooks)


def _fit(x: Tensor, *layers: nn.Module) -> bool:
    """Whether the operators take it."""
    tensors = [x]
    for layer in layers:
        tensors += [tensor for tensor in (layer.weight, layer.bias) if tensor is not None]
    fit = all(tensor.dtype == torch.float32 and tensor.is_cpu for tensor in tensors)
    return fit and not torch.is_autocast_enabled("cpu")


def _needed(grads: tuple[Tensor, ...], needed: tuple[bool, ...]) -> tuple[Tensor | None, ...]:
    """None in the place of those that were not asked for."""
    return tuple(g if need else None for g, need in zip(grads, needed, strict=True))


class _Linear(torch.autograd.Function):
    @staticmethod
    def forward(ctx, x: Tensor, weight: Tensor, bias: Tensor | None) -> Tensor:
        ctx.save_for_backward(x, weight)
        return _linear(x, weight, bias)

    @staticmethod
    @once_differentiable
    def backward(ctx, grad: Tensor):
        needed = ctx.needs_input_grad
        return _needed(_linear_backward(grad, *ctx.saved_tensors, *needed), needed)


class _Mlp(torch.autograd.Function):
    @staticmethod
    def forward(ctx, x: Tensor, *parameters: Tensor | None) -> Tensor:
        out, hidden, slope = _mlp(x, *parameters)
        ctx.save_for_backward(x, hidden, slope, parameters[0], parameters[2])
        return out

    @staticmethod
    @once_differentiable
    def backward(ctx, grad: Tensor):
        needed = ctx.needs_input_grad
        return _needed(_mlp_backward(grad, *ctx.saved_tensors, *needed), needed)


class _Block(torch.autograd.Function):
    """x + attention of the norm, then x + MLP of the norm; parameters in the order of use.

    Nothing is added in place: compiled by PyTorch 2.11, the gradients would be zeros, silently.
    """

    @staticmethod
    def forward(ctx, x: Tensor, *others) -> Tensor:
        *parameters, table, token_index, window_id, query_row, key_row = others[:-2]
        sizes, (eps1, eps2) = others[-2:]
        norm1, qkv, proj, norm2, fc1, fc2 = zip(parameters[::2], parameters[1::2], strict=True)
        partition, shape = (token_index, window_id, query_row, key_row), x.shape[-1:]
        normed1, *statistics1 = _norm(x, shape, *norm1, eps1)
        projected = _linear(normed1, *qkv)
        attended, lse = _attention(projected, None, None, table, None, *partition, *sizes)
        middle = _linear(attended, *proj) + x
        normed2, *statistics2 = _norm(middle, shape, *norm2, eps2)
        out, hidden, slope = _mlp(normed2, *fc1, *fc2)
        ctx.sizes = sizes
        ctx.save_for_backward(
            *(x, normed1, *statistics1, projected, attended, lse, *partition),
            *(middle, normed2, *statistics2, hidden, slope),
            *(*norm1, *norm2, qkv[0], proj[0], fc1[0], fc2[0], table),
        )
        return out + middle

    @staticmethod
    @once_differentiable
    def backward(ctx, grad: Tensor):
        saved = ctx.saved_tensors
        x, normed1, mean1, rstd1, projected, attended, lse, *partition = saved[:11]
        middle, normed2, mean2, rstd2, hidden, slope = saved[11:17]
        norm1, norm2 = saved[17:19], saved[19:21]
        qkv, proj, fc1, fc2, table = saved[21:]
        needed, shape = ctx.needs_input_grad, x.shape[-1:]
        need_norm1, need_qkv, need_proj, need_norm2 = (needed[i : i + 2] for i in (1, 3, 5, 7))
        need_mlp, need_table = needed[9:13], needed[13]

        layers = (normed2, hidden, slope, fc1, fc2)
        of_normed2, *of_mlp = _mlp_backward(grad, *layers, True, *need_mlp)
        statistics2 = (mean2, rstd2, *norm2, (True, *need_norm2))
        of_middle, *of_norm2 = _norm_backward(of_normed2, middle, shape, *statistics2)
        of_middle = of_middle + grad
        of_attended, *of_proj = _linear_backward(of_middle, attended, proj, True, *need_proj)
        of_projected, _, _, of_table, _ = _attention_backward(
            *(of_attended, projected, None, None, table, None, attended, lse, *partition),
            *(*ctx.sizes, True, need_table, False),
        )
        of_normed1, *of_qkv = _linear_backward(of_projected, normed1, qkv, True, *need_qkv)
        statistics1 = (mean1, rstd1, *norm1, (True, *need_norm1))
        of_x, *of_norm1 = _norm_backward(of_normed1, x, shape, *statistics1)
        grads = (of_x + of_middle, *of_norm1, *of_qkv, *of_proj, *of_norm2, *of_mlp, of_table)
        return *_needed(grads, needed[:14]), *(None,) * 6

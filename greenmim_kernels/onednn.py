"""Training in float32 on x86 CPUs: linear layers by oneDNN, with little Python between them.

PyTorch gives float32 products to MKL. With the shapes of a training step on a CPU (few rows, and a
weight that comes from memory), oneDNN, which every x86 build of PyTorch has too, took a seventh
less time on an AMD EPYC. An MLP is one operator, whose backward pass needs no separate pass for
GELU; the operators are in csrc/cpu/linear.cpp. A block is one autograd node: products fill the
caches with weights, and Python between them runs several times slower than it does alone.

    use_onednn(model)  # any model with nn.Linear, before its first step

Calls in another dtype, on another device or under autocast run the layers' own code. Needs timm.
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
from .ops import if_needed, operator
from .partition import GroupPartition

_linear, _linear_backward = operator("onednn_linear"), operator("onednn_linear_backward")
_mlp, _mlp_backward = operator("onednn_mlp"), operator("onednn_mlp_backward")
_attention = operator("group_window_attention")
_attention_backward = operator("group_window_attention_backward")
_norm = torch.ops.aten.native_layer_norm.default
_norm_backward = torch.ops.aten.native_layer_norm_backward.default


def available() -> bool:
    """Whether the operators and both libraries exist; without MKL, on Arm, they save nothing."""
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
        """The same with another bias [out_features], which was computed in this pass."""
        if _fit(x, self) and bias.dtype == torch.float32 and bias.is_cpu:
            return _Linear.apply(x, self.weight, bias)
        return F.linear(x, self.weight, bias)


class OneDNNMlp(Mlp):
    """timm's MLP: two `OneDNNLinear` with the exact GELU between them, and nothing else active."""

    def forward(self, x: Tensor) -> Tensor:
        first, second = self.fc1, self.fc2
        if self.is_plain() and _fit(x, first, second):
            return _Mlp.apply(x, first.weight, first.bias, second.weight, second.bias)
        return super().forward(x)

    def is_plain(self) -> bool:
        """Whether the MLP is still what the operator computes, without hooks inside."""
        drops = any(drop.p > 0 and drop.training for drop in (self.drop1, self.drop2))
        modules = self.fc1, self.act, self.drop1, self.norm, self.fc2, self.drop2
        return not drops and _is_plain(self) and not any(map(_has_hooks, modules))


# The block's own class, the other base, is a Module, which a type checker must be told.
if TYPE_CHECKING:
    _BlockBase = nn.Module
else:
    _BlockBase = object


class OneDNNBlock(_BlockBase):
    """Mixin that runs a Swin block of such layers as one autograd node.

    The block's own class, beside it, has `_run(x, part)` and timm's attribute names.
    """

    def _run(self, x: Tensor, part: GroupPartition) -> Tensor:
        if not self._takes(x, part):
            # The other base has it; it also raises the errors.
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
        """The layers with parameters, in the order of use."""
        attention, mlp = self.attn, self.mlp
        return self.norm1, attention.qkv, attention.proj, self.norm2, mlp.fc1, mlp.fc2

    def _takes(self, x: Tensor, part: GroupPartition) -> bool:
        """Whether the block is still what the node computes, without hooks, and the input fits."""
        attention, paths = self.attn, (self.drop_path1, self.drop_path2)
        modules = self.norm1, attention, attention.qkv, attention.proj, self.norm2, self.mlp
        if not _has_onednn(self) or any(map(_has_hooks, (*modules, *paths))):
            return False
        if not self.mlp.is_plain() or not all(map(_is_inactive, paths)) or x.dim() != 3:
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

    A timm Mlp with the exact GELU becomes an `OneDNNMlp`. One that is changed later, or has hooks
    inside, runs layer by layer. Parameters, names and the state dict stay.

    Args:
        model: changed in place.
        block_class: blocks of exactly this class, with such layers, become an `OneDNNBlock`.
    """
    if not available():
        return
    for module in list(model.modules()):
        # The operators refuse an empty weight.
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


def _is_inactive(path: nn.Module) -> bool:
    """Whether stochastic depth is off."""
    return type(path) is nn.Identity or type(path) is DropPath and not path.training


def _has_hooks(module: nn.Module) -> bool:
    """Whether hooks are to be called: the module's own, or of all modules."""
    forward = module._forward_hooks or module._forward_pre_hooks
    own = forward or module._backward_hooks or module._backward_pre_hooks
    return bool(own or torch.nn.modules.module._has_any_global_hook())


def _fit(x: Tensor, *layers: nn.Module) -> bool:
    """Whether x and the layers' parameters are float32, on the CPU and outside autocast."""
    tensors = [x]
    for layer in layers:
        tensors += [tensor for tensor in (layer.weight, layer.bias) if tensor is not None]
    fit = all(tensor.dtype == torch.float32 and tensor.is_cpu for tensor in tensors)
    return fit and not torch.is_autocast_enabled("cpu")


class _Linear(torch.autograd.Function):
    @staticmethod
    def forward(ctx, x: Tensor, weight: Tensor, bias: Tensor | None) -> Tensor:
        ctx.save_for_backward(x, weight)
        return _linear(x, weight, bias)

    @staticmethod
    @once_differentiable
    def backward(ctx, grad: Tensor):
        needed = ctx.needs_input_grad
        return if_needed(_linear_backward(grad, *ctx.saved_tensors, *needed), needed, 3)


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
        return if_needed(_mlp_backward(grad, *ctx.saved_tensors, *needed), needed, 5)


class _Block(torch.autograd.Function):
    """x + attention(norm(x)), then x + MLP(norm(x)); parameters in the order of use.

    Nothing is added in place: compiled by PyTorch 2.11, the gradients would silently be zero.
    """

    @staticmethod
    def forward(ctx, x: Tensor, *others) -> Tensor:
        *parameters, table, token_index, window_id, query_row, key_row = others[:-2]
        scalars, (eps1, eps2) = others[-2:]
        norm1, qkv, proj, norm2, fc1, fc2 = zip(parameters[::2], parameters[1::2], strict=True)
        partition, shape = (token_index, window_id, query_row, key_row), x.shape[-1:]
        normed1, *statistics1 = _norm(x, shape, *norm1, eps1)
        projected = _linear(normed1, *qkv)
        attended, lse = _attention(projected, None, None, table, None, *partition, *scalars)
        middle = _linear(attended, *proj) + x
        normed2, *statistics2 = _norm(middle, shape, *norm2, eps2)
        out, hidden, slope = _mlp(normed2, *fc1, *fc2)
        ctx.scalars = scalars
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
        grad_normed2, *grad_mlp = _mlp_backward(grad, *layers, True, *need_mlp)
        statistics2 = (mean2, rstd2, *norm2, (True, *need_norm2))
        grad_middle, *grad_norm2 = _norm_backward(grad_normed2, middle, shape, *statistics2)
        grad_middle = grad_middle + grad
        grad_attended, *grad_proj = _linear_backward(grad_middle, attended, proj, True, *need_proj)
        grad_projected, _, _, grad_table, _ = _attention_backward(
            *(grad_attended, projected, None, None, table, None, attended, lse, *partition),
            *(*ctx.scalars, True, need_table, False),
        )
        grad_normed1, *grad_qkv = _linear_backward(grad_projected, normed1, qkv, True, *need_qkv)
        statistics1 = (mean1, rstd1, *norm1, (True, *need_norm1))
        grad_x, *grad_norm1 = _norm_backward(grad_normed1, x, shape, *statistics1)
        grads = (
            *(grad_x + grad_middle, *grad_norm1, *grad_qkv, *grad_proj),
            *(*grad_norm2, *grad_mlp, grad_table),
        )
        return if_needed(grads, needed[:14], 20)

"""Linear layers in float32 on x86 CPUs by oneDNN; all other calls of them are nn.Linear's.

PyTorch gives float32 products to MKL. With the shapes of a training step on a CPU (few rows, and a
weight that comes from memory) oneDNN, which every x86 build of PyTorch holds too, took a seventh
less time on an AMD EPYC. An MLP is one operator, whose GELU costs no pass of its own backwards. The
operators are in csrc/cpu/linear.cpp.
"""

from __future__ import annotations

import torch
from timm.layers import Mlp
from torch import Tensor, nn
from torch.autograd.function import once_differentiable

from greenmim_kernels.backends import load_library
from greenmim_kernels.ops import operator

_linear, _linear_backward = operator("onednn_linear"), operator("onednn_linear_backward")
_mlp, _mlp_backward = operator("onednn_mlp"), operator("onednn_mlp_backward")


def available() -> bool:
    """Whether the operators are there, and both libraries: on Arm there is no MKL to avoid."""
    return (
        load_library("_C") is None
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


class OneDNNMlp(Mlp):
    """timm's MLP of two `OneDNNLinear` with GELU between them and nothing else that is at work."""

    def forward(self, x: Tensor) -> Tensor:
        if _fit(x, self.fc1, self.fc2) and not (self.training and self.drops):
            first, second = self.fc1, self.fc2
            return _Mlp.apply(x, first.weight, first.bias, second.weight, second.bias)
        return super().forward(x)

    @property
    def drops(self) -> bool:
        """Whether there is dropout in training."""
        return self.drop1.p > 0 or self.drop2.p > 0


def use_onednn(model: nn.Module) -> None:
    """Make every nn.Linear of a float32 model on a CPU an `OneDNNLinear`, where available.

    An MLP of timm's with the exact GELU becomes an `OneDNNMlp`: hooks of its layers are not called.
    """
    if available():
        for module in list(model.modules()):
            if type(module) is nn.Linear and module.weight.numel():
                module.__class__ = OneDNNLinear
        for module in list(model.modules()):
            if type(module) is Mlp and _is_plain(module):
                module.__class__ = OneDNNMlp


def _is_plain(mlp: Mlp) -> bool:
    layers = type(mlp.fc1) is type(mlp.fc2) is OneDNNLinear
    exact = type(mlp.act) is nn.GELU and mlp.act.approximate == "none"
    return layers and exact and type(mlp.norm) is nn.Identity


def _fit(x: Tensor, *layers: nn.Linear) -> bool:
    """Whether the operators take it."""
    tensors = [x]
    for layer in layers:
        tensors += [layer.weight] if layer.bias is None else [layer.weight, layer.bias]
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
        grads = _linear_backward(grad, *ctx.saved_tensors, *needed)
        return tuple(g if need else None for g, need in zip(grads, needed, strict=True))


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
        grads = _mlp_backward(grad, *ctx.saved_tensors, *needed)
        return tuple(g if need else None for g, need in zip(grads, needed, strict=True))

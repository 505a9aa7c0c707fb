"""Linear layers in float32 on x86 CPUs by oneDNN; all other calls of them are nn.Linear's.

PyTorch gives float32 products to MKL. With the shapes of a training step on a CPU (few rows, and a
weight that comes from memory) oneDNN, which every x86 build of PyTorch holds too, took a seventh
less time on an AMD EPYC. The operators are in csrc/cpu/linear.cpp.
"""

from __future__ import annotations

import torch
from torch import Tensor, nn
from torch.autograd.function import once_differentiable

from greenmim_kernels.backends import load_library
from greenmim_kernels.ops import operator

_product, _gradients = operator("onednn_linear"), operator("onednn_linear_backward")


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
        tensors = (x, self.weight) if self.bias is None else (x, self.weight, self.bias)
        fits = all(tensor.dtype == torch.float32 and tensor.is_cpu for tensor in tensors)
        if fits and not torch.is_autocast_enabled("cpu"):
            return _Linear.apply(x, self.weight, self.bias)
        return super().forward(x)


def use_onednn(model: nn.Module) -> None:
    """Make every nn.Linear of a float32 model on a CPU an `OneDNNLinear`, where available."""
    if available():
        for module in model.modules():
            if type(module) is nn.Linear:
                module.__class__ = OneDNNLinear


class _Linear(torch.autograd.Function):
    @staticmethod
    def forward(ctx, x: Tensor, weight: Tensor, bias: Tensor | None) -> Tensor:
        ctx.save_for_backward(x, weight)
        return _product(x, weight, bias)

    @staticmethod
    @once_differentiable
    def backward(ctx, grad: Tensor):
        needed = ctx.needs_input_grad
        grads = _gradients(grad, *ctx.saved_tensors, *needed)
        return tuple(g if need else None for g, need in zip(grads, needed, strict=True))

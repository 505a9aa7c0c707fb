"""Linear layers in float32 on x86 CPUs by oneDNN; all other calls of them are nn.Linear's.

PyTorch gives float32 products to MKL. With the shapes of a training step on a CPU (few rows, and a
weight that comes from memory) oneDNN, which every x86 build of PyTorch holds too, took a seventh
less time on an AMD EPYC.
"""

from __future__ import annotations

import torch
from torch import Tensor, nn
from torch.autograd.function import once_differentiable

# oneDNN wants one factor of a weight's gradient transposed, a copy that costs as much as this many
# columns of the product gain: narrower ones stay with MKL, which needs no copy.
MIN_COLUMNS = 256


def available() -> bool:
    """Whether this build of PyTorch has both libraries (on Arm it has no MKL to avoid)."""
    return (
        torch.backends.mkldnn.is_available()
        and torch.backends.mkl.is_available()
        and hasattr(torch.ops.mkldnn, "_linear_pointwise")
    )


class OneDNNLinear(nn.Linear):
    """A linear layer for float32 tensors on a CPU; parameters and names are nn.Linear's."""

    def forward(self, x: Tensor) -> Tensor:
        weight = self.weight
        float32 = x.dtype == weight.dtype == torch.float32 and x.device.type == "cpu"
        if float32 and weight.device.type == "cpu" and not torch.is_autocast_enabled("cpu"):
            return _Linear.apply(x, weight, self.bias)
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
        ctx.has_bias = bias is not None
        return _product(x, weight, bias)

    @staticmethod
    @once_differentiable
    def backward(ctx, grad: Tensor):
        x, weight = ctx.saved_tensors
        rows, columns = grad.reshape(-1, grad.shape[-1]), x.reshape(-1, x.shape[-1])
        need_x, need_weight, need_bias = ctx.needs_input_grad
        return (
            _product(grad, weight.t()) if need_x else None,
            _weight_gradient(rows, columns) if need_weight else None,
            rows.sum(0) if ctx.has_bias and need_bias else None,
        )


def _weight_gradient(grad: Tensor, x: Tensor) -> Tensor:
    """[M, O], [M, I] -> [O, I]"""
    if x.shape[1] < MIN_COLUMNS or len(x) == 0:  # oneDNN refuses a sum over nothing
        return grad.t() @ x
    return _product(grad.t().contiguous(), x.t())


def _run(x: Tensor, weight: Tensor, bias: Tensor | None) -> Tensor:
    # What torch.compile itself calls for the linear layers of a frozen model.
    return torch.ops.mkldnn._linear_pointwise(x, weight, bias, "none", [], "")


def _fake(x: Tensor, weight: Tensor, bias: Tensor | None) -> Tensor:
    return x.new_empty(*x.shape[:-1], weight.shape[0])


def _product(x: Tensor, weight: Tensor, bias: Tensor | None = None) -> Tensor:
    # Inductor refuses the operator itself where the weight is not a constant; it may call it
    # under another name.
    if torch.compiler.is_compiling():
        return torch.ops.greenmim.onednn_linear(x, weight, bias)
    return _run(x, weight, bias)


_library = torch.library.Library("greenmim", "FRAGMENT")
_library.define("onednn_linear(Tensor x, Tensor weight, Tensor? bias) -> Tensor")
_library.impl("onednn_linear", _run, "CPU")
torch.library.register_fake("greenmim::onednn_linear", _fake, lib=_library)

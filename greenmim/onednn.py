"""Linear layers in float32 on x86 CPUs by oneDNN.

PyTorch gives float32 products to MKL. With the shapes of a training step on a CPU (few rows, and a
weight that comes from memory) oneDNN, which every x86 build of PyTorch holds too, took a quarter
less time for outputs and for gradients of inputs on an AMD EPYC; MKL stays the faster one for
gradients of weights.
"""

from __future__ import annotations

import torch
from torch import Tensor, nn

_library = torch.library.Library("greenmim", "FRAGMENT")
_library.define("onednn_linear(Tensor x, Tensor weight, Tensor? bias) -> Tensor")


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
        return _linear(x, self.weight, self.bias)


def use_onednn(model: nn.Module) -> None:
    """Make every nn.Linear of a float32 model on a CPU an `OneDNNLinear`, where available."""
    if available():
        for module in model.modules():
            if type(module) is nn.Linear:
                module.__class__ = OneDNNLinear


def _run(x: Tensor, weight: Tensor, bias: Tensor | None) -> Tensor:
    # What torch.compile itself calls for the linear layers of a frozen model.
    return torch.ops.mkldnn._linear_pointwise(x, weight, bias, "none", [], "")


def _fake(x: Tensor, weight: Tensor, bias: Tensor | None) -> Tensor:
    return x.new_empty(*x.shape[:-1], weight.shape[0])


def _setup(ctx, inputs, output) -> None:
    x, weight, bias = inputs
    ctx.save_for_backward(x, weight)
    ctx.has_bias = bias is not None


def _backward(ctx, grad: Tensor):
    x, weight = ctx.saved_tensors
    rows = grad.reshape(-1, grad.shape[-1])
    need_x, need_weight, need_bias = ctx.needs_input_grad
    return (
        _linear(grad, weight.t(), None) if need_x else None,
        rows.t() @ x.reshape(-1, x.shape[-1]) if need_weight else None,
        rows.sum(0) if ctx.has_bias and need_bias else None,
    )


_library.impl("onednn_linear", _run, "CPU")
torch.library.register_fake("greenmim::onednn_linear", _fake, lib=_library)
torch.library.register_autograd(
    "greenmim::onednn_linear", _backward, setup_context=_setup, lib=_library
)
_linear = torch.ops.greenmim.onednn_linear.default

"""group_gather and group_scatter of the compiled backend against the reference, bit by bit."""

from __future__ import annotations

import pytest
import torch

import greenmim_kernels as gk
from greenmim_kernels.testing import Case, make_inputs


@pytest.mark.usefixtures("poisoned_memory")
@pytest.mark.parametrize("dtype", [torch.float64, torch.float32, torch.bfloat16])
@pytest.mark.parametrize("channels", [1, 7, 96])
@pytest.mark.parametrize("per_image", [False, True])
def test_agrees_with_the_reference(dtype, channels, per_image):
    inputs = make_inputs(Case(batch=3, per_image=per_image, shifted=True))
    part = inputs.part
    x = torch.randn(3, part.num_tokens, channels).to(dtype)
    grad = torch.randn(3, part.num_groups, part.group_size, channels).to(dtype)
    results = {}
    for backend in ("reference", "cpp"):
        with gk.use_backend(backend):
            leaf = x.clone().requires_grad_()
            gathered = gk.group_gather(leaf, part)
            (grad_x,) = torch.autograd.grad(gathered, leaf, grad)
            leaf = grad.clone().requires_grad_()
            scattered = gk.group_scatter(leaf, part)
            (grad_groups,) = torch.autograd.grad(scattered, leaf, x)
        results[backend] = gathered.detach(), grad_x, scattered.detach(), grad_groups
    for ours, expected in zip(results["cpp"], results["reference"], strict=True):
        assert torch.equal(ours, expected)


@pytest.mark.gpu
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
@pytest.mark.parametrize("channels", [1, 2, 7, 96])
@pytest.mark.parametrize("per_image", [False, True])
def test_agrees_with_the_reference_on_a_gpu(dtype, channels, per_image):
    inputs = make_inputs(Case(batch=3, per_image=per_image, shifted=True), device="cuda")
    part = inputs.part
    x = torch.randn(3, part.num_tokens, channels, device="cuda").to(dtype)
    results = {}
    for backend in ("reference", "cuda"):
        with gk.use_backend(backend):
            gathered = gk.group_gather(x, part)
            results[backend] = gathered, gk.group_scatter(gathered + 1, part)
    for ours, expected in zip(results["cuda"], results["reference"], strict=True):
        assert torch.equal(ours, expected)

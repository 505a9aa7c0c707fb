"""Fused models on a GPU: their numbers, compiled, in a CUDA graph."""

from __future__ import annotations

import copy

import pytest
import torch
from torch import Tensor, nn

from greenmim_kernels.integrations import fuse_window_attention

from .cases import CLASSES, LIBRARIES, first, randomized, segment_mask

pytestmark = pytest.mark.gpu


@pytest.fixture(autouse=True)
def no_tf32(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(torch.backends.cuda.matmul, "allow_tf32", False)
    monkeypatch.setattr(torch.backends.cudnn, "allow_tf32", False)


def results(model: nn.Module, x: Tensor, *more) -> list[Tensor]:
    """Output and gradients."""
    model.zero_grad()
    x = x.clone().requires_grad_()
    out = first(model(x, *more))
    out.backward(torch.linspace(-1, 1, out.numel(), device=out.device).sin().view(out.shape))
    gradients = [p.grad.flatten() for p in model.parameters() if p.grad is not None]
    return [out.detach().double(), x.grad.double(), torch.cat(gradients).double()]


def close(found: list[Tensor], expected: list[Tensor], limit: float) -> None:
    for one, other in zip(found, expected, strict=True):
        assert (one - other).abs().max() <= limit * other.abs().max()


@pytest.mark.parametrize("name", LIBRARIES)
def test_a_library(name: str) -> None:
    library = LIBRARIES[name]
    original = randomized(library.make()).cuda()
    fused = copy.deepcopy(original)
    assert fuse_window_attention(fused).fused
    for shape in library.inputs:
        x = torch.randn(shape, device="cuda")
        expected = results(original, x)
        close(results(fused, x), expected, 1e-4)
        with torch.autocast("cuda", torch.bfloat16):
            ours, theirs = results(fused, x), results(original, x)
        for one, other, true in zip(ours, theirs, expected, strict=True):
            assert (one - true).abs().max() <= 2 * (other - true).abs().max()


@pytest.mark.parametrize("name", CLASSES)
def test_a_class_from_its_structure(name: str) -> None:
    original = CLASSES[name]().cuda()
    fused = copy.deepcopy(original)
    assert fuse_window_attention(fused).fused
    slots = torch.tensor(original.window_size).prod().item()
    x = torch.randn(6, slots, 16, device="cuda")
    for mask in (None, segment_mask(3, slots).cuda(), segment_mask(3, slots).flip(0).cuda()):
        close(results(fused, x, mask), results(original, x, mask), 1e-4)


def test_compiled_and_in_a_graph() -> None:
    model = randomized(LIBRARIES["timm"].make()).cuda()
    assert fuse_window_attention(model).fused
    x = torch.randn(2, 3, 56, 56, device="cuda")
    expected = results(model, x)
    close(results(torch.compile(model, fullgraph=True), x), expected, 1e-4)
    graph = torch.cuda.CUDAGraph()
    model.eval()
    with torch.no_grad():
        model(x)
        with torch.cuda.graph(graph):
            out = model(x)
        x.copy_(torch.randn_like(x))
        graph.replay()
        close([out.double()], [model(x).double()], 1e-5)

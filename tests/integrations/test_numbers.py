"""Fused models give the numbers of the libraries: outputs, and gradients of all they learn."""

from __future__ import annotations

import copy
from functools import partial

import pytest
import torch
from torch import Tensor, nn

from greenmim_kernels import use_backend
from greenmim_kernels.integrations import attention, fuse_window_attention
from greenmim_kernels.integrations.readers import with_length

from .cases import (
    BLOCKS,
    CLASSES,
    LIBRARIES,
    SwinTransformerBlock3D,
    first,
    monai,
    randomized,
    segment_mask,
    spandrel,
    torchvision_maxvit,
    torchvision_swin,
)


def results(model: nn.Module, x: Tensor, *more) -> dict[str, Tensor]:
    """Output and gradients, in float64."""
    model.zero_grad()
    x = x.clone().requires_grad_()
    out = first(model(x, *more))
    draw = torch.Generator().manual_seed(1)
    weight = torch.randn(out.shape, generator=draw, dtype=torch.float64).to(out.dtype)
    (out * weight).sum().backward()
    found = {"output": out, "input": x.grad}
    for name, parameter in model.named_parameters():
        # What a model does not use, it does not use when fused.
        found[name] = parameter.grad
    return {name: None if x is None else x.detach().double() for name, x in found.items()}


def errors(found: dict[str, Tensor], true: dict[str, Tensor]) -> dict[str, float]:
    """Of the output, of the input's gradient and the worst of the parameters', relative.

    Each relative to its largest value, or to a thousandth of the largest of all parameters: the
    gradient of the keys' bias is zero but for rounding.
    """
    assert {name for name, x in found.items() if x is None} == {
        name for name, x in true.items() if x is None
    }
    off = {name: (found[name] - x).abs().max() for name, x in true.items() if x is not None}
    largest = {name: x.abs().max() for name, x in true.items() if x is not None}
    floor = max(x for name, x in largest.items() if name not in ("output", "input")) / 1e3
    parameters = [off[name] / max(largest[name], floor) for name in off]
    return {
        "output": float(off["output"] / largest["output"]),
        "input": float(off["input"] / largest["input"]),
        "parameters": float(max(parameters[2:])),
    }


@pytest.mark.parametrize("name", LIBRARIES)
def test_a_library(name: str) -> None:
    library = LIBRARIES[name]
    original = randomized(library.make()).double()
    fused = copy.deepcopy(original)
    report = fuse_window_attention(fused)
    assert report.fused and not report.left
    assert all(text.startswith(library.fused + ",") for text in report.fused.values())
    assert list(fused.state_dict()) == list(original.state_dict())
    # The softmax of transformers' eager attention is in float32 in any case.
    double = 1e-6 if name == "hugging_face" else 1e-12
    for shape in library.inputs:
        budget = {"output": 2e-6, "input": 5e-6, "parameters": 1e-5}
        x = torch.randn(shape, dtype=torch.float64)
        true = results(original, x)
        assert max(errors(results(fused, x), true).values()) < double
        single = errors(results(copy.deepcopy(fused).float(), x.float()), true)
        if library.is_cosine:
            theirs = errors(results(copy.deepcopy(original).float(), x.float()), true)
            budget = {key: max(limit, 2 * theirs[key]) for key, limit in budget.items()}
        assert all(single[key] < limit for key, limit in budget.items()), (single, budget)


@pytest.mark.parametrize("name", CLASSES)
@pytest.mark.parametrize("masked", [False, True])
def test_a_class_from_its_structure(name: str, masked: bool) -> None:
    original = randomized(CLASSES[name]()).double()
    fused = copy.deepcopy(original)
    assert "attention alone" in fuse_window_attention(fused).fused[""]
    high, *others = original.window_size
    counts = [high * torch.tensor(others).prod().item()]
    if name == "video_swin":
        counts.append(counts[0] // 2)  # of a clip with fewer frames
    else:  # others say what is wrong
        fewer = torch.randn(6, counts[0] - 1, 16, dtype=torch.float64)
        with (
            pytest.warns(UserWarning, match="windows are of another size"),
            pytest.raises(RuntimeError),
        ):
            fused(fewer)
    for slots in counts:
        x = torch.randn(6, slots, 16, dtype=torch.float64)
        mask = segment_mask(3, slots).double() if masked else None
        for _ in range(2):  # with a mask that is known the second time
            assert max(errors(results(fused, x, mask), results(original, x, mask)).values()) < 1e-12


@pytest.mark.parametrize("name", BLOCKS)
@pytest.mark.parametrize("shift", [0, 1])
def test_a_block_from_its_structure(name: str, shift: int) -> None:
    original = randomized(BLOCKS[name](shift)).double()
    fused = copy.deepcopy(original)
    assert "with windows" in fuse_window_attention(fused).fused[""]
    x = torch.randn(3, 96, 16, dtype=torch.float64)
    assert max(errors(results(fused, x), results(original, x)).values()) < 1e-12
    with pytest.raises(AssertionError, match="wrong size"):
        fused(x[:, :48])


@pytest.mark.parametrize("shift", [(0, 0, 0), (1, 1, 2)])
def test_a_block_of_video_swin(shift: tuple[int, ...]) -> None:
    original = randomized(SwinTransformerBlock3D(16, 2, (2, 3, 4), shift)).double()
    fused = copy.deepcopy(original)
    assert "with padding and windows" in fuse_window_attention(fused).fused[""]
    for grid in ((4, 6, 8), (3, 7, 6), (1, 5, 9), (2, 3, 4)):
        x = torch.randn(2, *grid, 16, dtype=torch.float64)
        assert max(errors(results(fused, x), results(original, x)).values()) < 1e-12


@pytest.mark.parametrize("name", BLOCKS)
def test_a_mask_of_its_own(name: str) -> None:
    """Of the second of two blocks; and one that is loaded."""
    plain, odd = (randomized(BLOCKS[name](1)).double() for _ in range(2))
    odd.attn_mask.zero_()
    fused = copy.deepcopy(nn.ModuleList([plain, odd]))
    assert list(fuse_window_attention(fused).fused) == ["0", "1.attn"]
    x = torch.randn(3, 96, 16, dtype=torch.float64)
    torch.testing.assert_close(fused[1](x), odd(x), atol=1e-12, rtol=1e-12)
    assert (odd(x) - plain(x)).abs().max() > 0.01
    with pytest.warns(UserWarning, match="mask was loaded; fuse it again"):
        fused[0].load_state_dict(odd.state_dict())
    torch.testing.assert_close(fused[0](x), odd(x), atol=1e-12, rtol=1e-12)


def test_a_mask_that_swin_ir_keeps() -> None:
    block = next(m for m in spandrel("SwinIR").modules() if getattr(m, "shift_size", 0))
    block.attn_mask.zero_()
    report = fuse_window_attention(block)
    assert list(report.fused) == ["attn"] and "something else" in report.left[""]


def test_parts_that_are_not_known_leave_the_attention_alone() -> None:
    class Regularized(BLOCKS["microsoft"].func):
        def __init__(self, *sizes):
            super().__init__(*sizes)
            self.more = nn.Dropout(0.5)

        def forward(self, x):
            return self.more(super().forward(x))

    model = Regularized(16, (12, 8), 2, 4, 2)
    assert list(fuse_window_attention(model).fused) == ["attn"]
    x = torch.randn(1, 96, 16)
    assert not torch.equal(model(x), model(x))


def test_an_index_that_comes_with_a_call() -> None:
    model = spandrel("HAT", squeeze_factor=4).double()
    original = next(m for m in model.modules() if type(m).__name__ == "WindowAttention")
    fused = copy.deepcopy(original)
    assert "attention alone" in fuse_window_attention(fused).fused[""]
    x, index = torch.randn(4, 16, 16, dtype=torch.float64), model.relative_position_index_SA
    mask = segment_mask(2, 16).double()
    for other in (index, index.clone(), index):
        found, true = (results(m, x, other, mask) for m in (fused, original))
        assert max(errors(found, true).values()) < 1e-12
    with pytest.warns(UserWarning, match="its relative position index is not Swin's"):
        other = index.T.contiguous()
        assert torch.equal(fused(x, other), original(x, other))
    fused(x, index)
    index.copy_(index.T.clone())  # in place, after it was looked at
    assert torch.equal(fused(x, index, mask), original(x, index, mask))
    compiled = torch.compile(fused, fullgraph=True, backend="aot_eager")
    with pytest.raises(RuntimeError, match="relative position index is not Swin's"):
        compiled(x, index)
    index.copy_(index.T.clone())
    true = original(x, index, mask)
    torch.testing.assert_close(compiled(x, index, mask), true, atol=1e-12, rtol=1e-12)


def test_a_mask_is_read_again_after_it_was_written_to() -> None:
    original = CLASSES["microsoft"]().double()
    fused = copy.deepcopy(original)
    fuse_window_attention(fused)
    x, mask = torch.randn(4, 16, 16, dtype=torch.float64), segment_mask(2, 16).double()
    for change in (lambda: None, lambda: mask.zero_(), lambda: mask.copy_(segment_mask(2, 16))):
        change()
        torch.testing.assert_close(fused(x, mask), original(x, mask), atol=1e-12, rtol=1e-12)
    for other in (segment_mask(4, 16).double(), segment_mask(1, 16).double(), None):
        torch.testing.assert_close(fused(x, other), original(x, other), atol=1e-12, rtol=1e-12)


def test_which_masks_are_trusted_where_checks_wait_for_the_device(monkeypatch) -> None:
    """All of a module but the first; a call without a mask checks none."""
    original = CLASSES["microsoft"]().double()
    original.relative_position_index.copy_(original.relative_position_index.T.clone())
    fused = copy.deepcopy(original)
    fuse_window_attention(fused)
    trusted, real = [], attention._make
    monkeypatch.setattr(attention, "_waits", lambda device: True)
    monkeypatch.setattr(attention, "_make", lambda *args: trusted.append(args[-1]) or real(*args))
    x = torch.randn(4, 16, 16, dtype=torch.float64)
    causal = torch.full((16, 16), -100.0, dtype=torch.float64).triu(1).expand(2, 16, 16)
    torch.testing.assert_close(fused(x), original(x), atol=1e-12, rtol=1e-12)
    with pytest.warns(UserWarning, match="does not cut windows into segments"):
        assert torch.equal(fused(x, causal), original(x, causal))
    masks = [segment_mask(count, 16).double() for count in (2, 4)]
    for mask in masks:
        torch.testing.assert_close(fused(x, mask), original(x, mask), atol=1e-12, rtol=1e-12)
    assert trusted == [False, False, False, True]
    with pytest.raises(RuntimeError, match="the mask does not cut windows into segments"):
        fused(x, causal.clone())


def test_an_index_of_another_kind() -> None:
    """Any that is a term of the query plus a term of the key; with others nothing is done."""
    original = CLASSES["microsoft"]().double()
    original.relative_position_index.copy_(original.relative_position_index.T.clone())
    fused = copy.deepcopy(original)
    assert fuse_window_attention(fused).fused
    for mask in (None, segment_mask(2, 16).double()):
        x = torch.randn(4, 16, 16, dtype=torch.float64)
        assert max(errors(results(fused, x, mask), results(original, x, mask)).values()) < 1e-12
        compiled = torch.compile(fused, fullgraph=True, backend="aot_eager")
        torch.testing.assert_close(compiled(x, mask), original(x, mask), atol=1e-12, rtol=1e-12)
    mask = segment_mask(2, 16).double()
    x, plain = torch.randn(4, 16, 16, dtype=torch.float64), original.relative_position_index.clone()
    both = []
    for index in (plain, plain.flip(0)):  # modules that share a mask
        original.relative_position_index.copy_(index)
        both.append((copy.deepcopy(original), copy.deepcopy(original)))
        assert fuse_window_attention(both[-1][0]).fused
    for one, other in 2 * both:
        torch.testing.assert_close(one(x, mask), other(x, mask), atol=1e-12, rtol=1e-12)
    one, other = both[0]
    with pytest.warns(UserWarning, match="another relative_position_index or mask was loaded"):
        one.load_state_dict(both[1][1].state_dict())
    torch.testing.assert_close(one(x, mask), both[1][1](x, mask), atol=1e-12, rtol=1e-12)
    assert type(one) is type(other)
    # Compiled, an index is checked where it is read.
    one = both[1][0]
    compiled = torch.compile(one, fullgraph=True, backend="aot_eager")
    for value in (0, 10**6):
        compiled(x, mask)
        before = int(one.relative_position_index[3, 5])
        one.relative_position_index[3, 5] = value
        with pytest.raises(RuntimeError, match="the relative position index is no sum"):
            compiled(x, mask)
        one.relative_position_index[3, 5] = before
    original.relative_position_index[0, 1] = 0
    report = fuse_window_attention(original)
    assert "must be the sum of a term of the query and a term of the key" in report.left[""]
    assert type(original).__name__ == "WindowAttention"


# SwinV2 of the libraries gives NaN in padding in float16, where ours does not.
@pytest.mark.parametrize(
    ("name", "precision"),
    [
        ("timm", torch.bfloat16),
        ("timm", torch.float16),
        ("timm_v2", torch.bfloat16),
        ("timm_maxvit_mlp", torch.bfloat16),
        ("torchvision_maxvit", torch.float16),
        ("monai_3d", torch.bfloat16),
        ("monai_3d", torch.float16),
    ],
)
def test_half_precision(name: str, precision: torch.dtype) -> None:
    """`model.half()`, and autocast: no further from float64 than the library is, or hardly."""
    library = LIBRARIES[name]
    original = randomized(library.make())
    fused = copy.deepcopy(original)
    fuse_window_attention(fused)
    x = torch.randn(8, *library.inputs[0][1:])
    with torch.no_grad():
        true = first(copy.deepcopy(original).double()(x.double()))
        off = []
        for model in (fused, original):
            cast = first(copy.deepcopy(model).to(precision)(x.to(precision)))
            with torch.autocast("cpu", precision):
                automatic = first(model(x))
            assert cast.dtype == automatic.dtype == precision or name == "monai_3d"
            off.append([(out.double() - true).norm() for out in (cast, automatic)])
    assert all(ours < 1.5 * theirs for ours, theirs in zip(*off, strict=True)), off


def test_a_logit_scale_at_its_limit() -> None:
    """Its gradient is the difference of large numbers."""
    original = CLASSES["microsoft_v2"]()
    with torch.no_grad():
        original.logit_scale.fill_(4.6)
    fused = copy.deepcopy(original)
    fuse_window_attention(fused)
    double, off = copy.deepcopy(original).double(), []
    for _ in range(8):
        x = torch.randn(64, 16, 16)
        true = results(double, x.double())["logit_scale"]
        off.append([(results(m, x)["logit_scale"] - true).norm() for m in (fused, original)])
    ours, theirs = torch.tensor(off).norm(dim=0)
    assert ours < 3 * theirs


def test_an_index_that_is_loaded() -> None:
    original, other = CLASSES["microsoft"](), CLASSES["microsoft"]()
    fused = copy.deepcopy(original)
    fuse_window_attention(fused)
    fused.load_state_dict(original.state_dict())
    assert type(fused).__name__ == "FusedWindowAttention"
    other.relative_position_index.copy_(other.relative_position_index.T.clone())
    with pytest.warns(UserWarning, match="another relative_position_index or mask was loaded"):
        fused.load_state_dict(other.state_dict())
    x = torch.randn(2, 16, 16)
    assert torch.equal(fused(x), other(x))
    assert fuse_window_attention(fused).fused
    torch.testing.assert_close(fused(x), other(x))


@pytest.mark.parametrize(
    ("make", "shape"),
    [
        (partial(BLOCKS["microsoft"], 2), (2, 96, 16)),
        (partial(monai, 2), (2, 1, 64, 32)),
        (torchvision_swin, (2, 3, 32, 32)),
        (torchvision_maxvit, (2, 3, 48, 48)),
    ],
)
def test_an_index_that_is_loaded_into_a_block(make, shape) -> None:
    original = randomized(make())
    fused = copy.deepcopy(original)
    assert fuse_window_attention(fused).fused
    other = {
        name: x.flip(0) if name.endswith("position_index") else x
        for name, x in original.state_dict().items()
    }
    original.load_state_dict(other)
    fused.load_state_dict(other)
    x = torch.randn(shape)
    assert torch.equal(fused.eval()(x), original.eval()(x))
    fuse_window_attention(fused)  # as the warning says: what can be with the other index
    torch.testing.assert_close(fused(x), original(x), atol=1e-5, rtol=1e-5)


def test_second_derivatives() -> None:
    """Of what stands around the operator; the reference has those of the operator."""
    x = torch.randn(2, 3, 2, 4, dtype=torch.float64, requires_grad=True)
    parameter = torch.randn(2, 1, 1, dtype=torch.float64, requires_grad=True)
    for arguments in ((x,), (x, parameter)):
        assert torch.autograd.gradcheck(with_length, arguments)
        assert torch.autograd.gradgradcheck(with_length, arguments)
    for name in ("microsoft", "microsoft_v2"):
        original = CLASSES[name]().double()
        fused = copy.deepcopy(original)
        fuse_window_attention(fused)
        found = []
        for model in (fused, original):
            y = torch.randn(3, 16, 16, dtype=torch.float64, generator=torch.manual_seed(2))
            with use_backend("reference"):
                out = model(y.requires_grad_()).square().sum()
                (first_one,) = torch.autograd.grad(out, y, create_graph=True)
                found.append(torch.autograd.grad(first_one.square().sum(), y)[0])
        torch.testing.assert_close(*found, atol=1e-9, rtol=1e-9)

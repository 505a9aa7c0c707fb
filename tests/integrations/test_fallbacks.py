"""What the kernels do not do goes to the library's own code, and is said."""

from __future__ import annotations

import warnings

import pytest
import torch
from torch._subclasses.fake_tensor import FakeTensorMode

from greenmim_kernels import use_backend
from greenmim_kernels.integrations import attention

from .cases import (
    CLASSES,
    LIBRARIES,
    close,
    donut,
    first,
    fused_copy,
    hugging_face,
    monai,
    randomized,
    segment_mask,
    step,
    timm_maxvit,
    timm_swin,
    torchvision_swin,
)

pytestmark = pytest.mark.slow


@pytest.mark.parametrize(
    "make",
    [
        lambda: timm_swin(attn_drop_rate=0.3),
        lambda: torchvision_swin(attention_dropout=0.3),
        lambda: hugging_face(attention_probs_dropout_prob=0.3),
        lambda: hugging_face(2, attention_probs_dropout_prob=0.3),
        lambda: monai(2, attn_drop_rate=0.3),
        lambda: timm_maxvit(attn_drop=0.3),
    ],
)
def test_attention_dropout(make, calls: list[str]) -> None:
    model = randomized(make()).train()
    x = torch.randn(2, *((1, 64, 32) if "UNETR" in type(model).__name__ else (3, 36, 36)))
    if hasattr(model, "layers") and hasattr(model, "set_input_size"):
        x = torch.randn(2, 3, 56, 56)
    if type(model).__name__ == "MaxxVit":
        x = torch.randn(2, 3, 96, 64)
    fused = fused_copy(model)
    calls.clear()
    with warnings.catch_warnings(record=True) as said:
        warnings.simplefilter("always")
        for _ in range(2):
            assert torch.equal(step(fused, x), step(model, x))
    texts = {str(one.message) for one in said if "fused kernels" in str(one.message)}
    assert len(texts) == len([one for one in said if "fused kernels" in str(one.message)]) == 1
    assert "attention dropout is above 0 in training" in texts.pop() and not calls
    close(first(fused.eval()(x)), first(model.eval()(x)))
    assert calls


@pytest.mark.parametrize("version", [1, 2])
def test_attention_maps(version: int, calls: list[str]) -> None:
    model = randomized(hugging_face(version)).eval()
    fused, x = fused_copy(model), torch.randn(2, 3, 36, 36)
    calls.clear()
    with pytest.warns(UserWarning, match="asks for attention maps"):
        found = fused(x, output_attentions=True).attentions
    expected = model(x, output_attentions=True).attentions
    assert len(found) == len(expected) > 0 and not calls
    for one, other in zip(found, expected, strict=True):
        assert torch.equal(one, other)
    seen = []
    layer = fused.encoder.layers[0].blocks[0].attention
    layer = layer if version == 1 else layer.self.dropout
    hook = layer.register_forward_hook(lambda m, inputs, out: seen.append(out[1]))
    fused(x)
    assert seen[0] is not None
    hook.remove()
    calls.clear()
    fused.config.output_attentions = True
    assert all(torch.equal(*pair) for pair in zip(fused(x).attentions, expected, strict=True))
    assert not calls


def test_masks_of_another_kind(calls: list[str]) -> None:
    model = CLASSES["microsoft"]()
    fused, x = fused_copy(model), torch.randn(4, 16, 16)
    causal = torch.full((16, 16), -100.0).triu(1).expand(2, 16, 16)
    soft = segment_mask(2, 16) / 100  # a bias of -1
    calls.clear()
    for mask, reason in (
        (causal, "cannot be used .*does not cut windows into segments"),
        (torch.zeros(4, 16, 1), r"its mask is not \[windows, n, n\]"),
        (torch.zeros(2, 16, 16).requires_grad_(), "its mask requires a gradient"),
    ):
        with pytest.warns(UserWarning, match=reason):
            assert torch.equal(fused(x, mask), model(x, mask))
    with warnings.catch_warnings():
        warnings.simplefilter("error")  # this reason was given already
        for mask in (soft, soft.flip(1)):
            assert torch.equal(fused(x, mask), model(x, mask))
    assert not calls


def test_maps_that_hooks_look_at(calls: list[str]) -> None:
    utils = pytest.importorskip("timm").utils
    if not hasattr(utils, "AttentionExtract"):
        pytest.skip("this timm has no AttentionExtract")
    model, x = randomized(timm_swin()).eval(), torch.randn(1, 3, 56, 56)
    for module in model.modules():
        if hasattr(module, "fused_attn"):
            module.fused_attn = False
    fused = fused_copy(model)
    calls.clear()
    names = ["*softmax"]
    expected = utils.AttentionExtract(model, names=names, method="hook")(x)
    with pytest.warns(UserWarning, match="a hook looks at attention maps"):
        found = utils.AttentionExtract(fused, names=names, method="hook")(x)
    assert len(found) == len(expected) > 0 and not calls
    assert all(torch.equal(found[name], expected[name]) for name in expected)


def test_what_is_left_to_the_library_while_tracing(calls: list[str]) -> None:
    model = fused_copy(CLASSES["microsoft"](attn_drop=0.5)).train()
    calls.clear()
    with pytest.warns(UserWarning, match="attention dropout is above 0"):
        torch.compile(model, fullgraph=True, backend="aot_eager")(torch.randn(2, 16, 16))
    assert not calls


@pytest.mark.parametrize("name", ["timm", "timm_maxvit", "torchvision_maxvit", "swin_ir", "hat"])
def test_what_no_backend_takes(
    name: str, monkeypatch: pytest.MonkeyPatch, calls: list[str]
) -> None:
    monkeypatch.setattr(attention, "_warned", set())
    library = LIBRARIES[name]
    model, x = randomized(library.make()), torch.randn(library.inputs[0])
    fused = fused_copy(model)
    with use_backend("reference"):  # a forced backend is used, whichever it is
        close(fused(x), model(x))
    assert calls
    calls.clear()
    monkeypatch.setattr(attention, "choose_backend", lambda *_: "reference")
    fused.to("meta")(x.to("meta"))  # as the library's
    fused = fused_copy(model)
    calls.clear()
    with pytest.warns(UserWarning, match="no backend takes its head dim and window"):
        assert torch.equal(fused(x), model(x))
    assert not calls


def test_an_index_of_a_call_in_fake_mode(calls: list[str]) -> None:
    model = fused_copy(randomized(LIBRARIES["hat"].make()))
    alone = next(m for m in model.modules() if hasattr(m, "reader"))
    index = model.relative_position_index_SA
    with FakeTensorMode(allow_non_fake_inputs=True) as mode:
        assert model(torch.randn(2, 3, 16, 16)).shape == (2, 3, 32, 32)
        for one, count in ((index, 1), (mode.from_tensor(index), 0)):
            calls.clear()
            assert alone(torch.randn(4, 16, 16), one).shape == (4, 16, 16)
            assert len(calls) == count


def test_a_window_that_may_not_follow_the_grid() -> None:
    """always_partition, by position and by name."""
    for make, grid in ((hugging_face, (3, 9)), (donut, (3, 9))):
        model = make().eval()
        fused = fused_copy(model)
        x = torch.randn(1, 27, 16)
        for one in (model, fused):
            layer = one.encoder.layers[0].blocks[1]
            more = (True,) if make is hugging_face else (False, True)
            layer(x, grid, *more)
            layer(x, grid, always_partition=True)
            assert (layer.window_size, layer.shift_size) == (4, 2)

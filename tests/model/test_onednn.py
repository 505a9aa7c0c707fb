"""oneDNN's layers are nn.Linear and timm's Mlp, with their parameters, and compile."""

from __future__ import annotations

import os
import subprocess
import sys

import numpy as np
import pytest
import torch
from timm.layers import Mlp
from torch import nn

import greenmim_kernels as gk
from greenmim.encoders.swin import SwinBlock
from greenmim_kernels.onednn import OneDNNBlock, OneDNNLinear, OneDNNMlp, available, use_onednn

from .conftest import images_for, small, some_visible

pytestmark = pytest.mark.skipif(not available(), reason="this PyTorch has no oneDNN beside MKL")


def assert_same_values_and_gradients(plain, ours, x):
    """Of layers with 7 outputs; the plain one, in float64, says what is right."""
    results = []
    for layer in (plain.double(), ours):
        leaf = x.to(next(layer.parameters()).dtype).requires_grad_()
        out = layer(leaf)
        (out * torch.linspace(1, 2, 7, dtype=out.dtype)).sum().backward()
        results.append([out, leaf.grad, *(p.grad for p in layer.parameters())])
    for actual, exact in zip(results[1], results[0], strict=True):
        torch.testing.assert_close(actual.double(), exact, rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize("bias", [True, False])
@pytest.mark.parametrize(
    "shape", [(5,), (2, 3, 5), (0, 5), (4, 1, 5), (2, 0, 5), (37, 64), (300, 5)]
)
@pytest.mark.parametrize("strided", [False, True])
def test_values_and_gradients_are_those_of_a_linear_layer(shape, bias, strided):
    torch.manual_seed(0)
    columns = shape[-1]
    plain = nn.Linear(columns, 7, bias=bias)
    ours = nn.Sequential(nn.Linear(columns, 7, bias=bias))
    ours[0].load_state_dict(plain.state_dict())
    use_onednn(ours)
    assert type(ours[0]) is OneDNNLinear
    x = torch.randn(*shape[:-1], 2 * columns)[..., ::2] if strided else torch.randn(shape)
    assert_same_values_and_gradients(plain, ours, x)


@pytest.mark.parametrize("need", [(True, False), (False, True)])
def test_only_the_gradient_that_is_asked_for(need):
    layer = OneDNNLinear(5, 7).requires_grad_(need[1])
    x = torch.randn(3, 5, requires_grad=need[0])
    layer(x).sum().backward()
    assert (x.grad is not None) == need[0] and (layer.weight.grad is not None) == need[1]


@pytest.mark.parametrize("bias", [True, False])
@pytest.mark.parametrize("shape", [(5,), (2, 3, 5), (0, 5)])
def test_values_and_gradients_are_those_of_an_mlp(shape, bias):
    torch.manual_seed(0)
    plain = Mlp(5, 20, 7, bias=bias)
    ours = nn.Sequential(Mlp(5, 20, 7, bias=bias))
    ours[0].load_state_dict(plain.state_dict())
    use_onednn(ours)
    assert type(ours[0]) is OneDNNMlp and list(ours[0].state_dict()) == list(plain.state_dict())
    x = torch.randn(shape)
    assert_same_values_and_gradients(plain, ours, x)


@pytest.mark.parametrize("trained", range(4))
def test_only_the_gradient_of_an_mlp_that_is_asked_for(trained):
    mlp = nn.Sequential(Mlp(5, 20, 7))
    use_onednn(mlp)
    names = [name for name, _ in mlp.named_parameters()]
    mlp.requires_grad_(False).get_parameter(names[trained]).requires_grad_()
    mlp(torch.randn(3, 5)).sum().backward()
    assert [p.grad is not None for p in mlp.parameters()] == [n == trained for n in range(4)]


@pytest.mark.parametrize(
    "options",
    [
        {"act_layer": nn.ReLU},
        {"act_layer": lambda: nn.GELU(approximate="tanh")},
        {"norm_layer": nn.LayerNorm},
        {"use_conv": True},
    ],
)
def test_an_mlp_that_is_another_stays_what_it_is(options):
    mlp = nn.Sequential(Mlp(5, 20, 7, **options))
    use_onednn(mlp)
    assert type(mlp[0]) is Mlp


def test_an_mlp_keeps_its_dropout():
    torch.manual_seed(0)
    mlp = nn.Sequential(Mlp(5, 20, 7, drop=0.5))
    plain = Mlp(5, 20, 7, drop=0.5)
    plain.load_state_dict(mlp[0].state_dict())
    use_onednn(mlp)
    assert type(mlp[0]) is OneDNNMlp
    x = torch.randn(300, 5)
    assert 0.4 < (mlp(x) == 0).float().mean() < 0.6
    torch.testing.assert_close(mlp.eval()(x), plain.eval()(x), rtol=1e-5, atol=1e-6)


def test_a_layer_of_no_width_is_left_to_pytorch():
    layers = nn.Sequential(nn.Linear(5, 0), nn.Linear(0, 3))
    use_onednn(layers)
    assert layers(torch.randn(2, 5)).shape == (2, 3)


def test_what_it_is_not_made_for_is_left_to_pytorch():
    layer, plain = OneDNNLinear(5, 7), nn.Linear(5, 7)
    plain.load_state_dict(layer.state_dict())
    x = torch.randn(3, 5)
    with torch.autocast("cpu", torch.bfloat16):
        for value in (x, x.bfloat16()):
            out = layer(value)
            assert out.dtype == torch.bfloat16
            assert torch.equal(out, plain(value))
    assert torch.equal(layer.double()(x.double()), plain.double()(x.double()))
    with torch.device("meta"):
        assert OneDNNLinear(5, 7)(torch.empty(3, 5)).shape == (3, 7)


def test_a_second_derivative_of_a_block_is_refused():
    block, x, part = block_call(small().float())
    (grad,) = torch.autograd.grad(block(x, part).square().sum(), x, create_graph=True)
    with pytest.raises(RuntimeError, match="once_differentiable"):
        grad.square().sum().backward()


@pytest.mark.parametrize("module", [nn.Linear(5, 7), Mlp(5, 20, 7)])
def test_a_second_derivative_is_refused(module):
    layer, x = nn.Sequential(module), torch.randn(3, 5, requires_grad=True)
    use_onednn(layer)
    (grad,) = torch.autograd.grad(layer(x).square().sum(), x, create_graph=True)
    with pytest.raises(RuntimeError, match="once_differentiable"):
        grad.square().sum().backward()


def test_without_the_kernels_for_a_processor_nothing_is_changed():
    """As attention, which then runs in the reference."""
    program = (
        "from torch import nn; from greenmim_kernels.onednn import use_onednn;"
        "layers = nn.Sequential(nn.Linear(2, 3)); use_onednn(layers);"
        "print(type(layers[0]).__name__)"
    )
    environment = {**os.environ, "GREENMIM_CPU_CAPABILITY": "none such"}
    command = [sys.executable, "-c", program]
    done = subprocess.run(command, env=environment, capture_output=True, text=True)
    assert done.stdout.strip() == "Linear", done.stderr[-1000:]


def test_a_model_that_sees_everything_trains_with_it():
    """Its decoder predicts no unit: products of no rows."""
    model = small().float()
    use_onednn(model, SwinBlock)
    plan = model.plan(np.ones(model.config.num_units, dtype=bool))
    loss = model(images_for(model), plan=plan, loss_only=True).loss
    loss.backward()
    assert loss.item() == 0
    assert not any(p.grad.any() for p in model.parameters() if p.grad is not None)


def whole_gradients(model, images, plan):
    model.zero_grad()
    loss = model(images, plan=plan, loss_only=True).loss
    loss.backward()
    return {name: p.grad for name, p in model.named_parameters() if p.grad is not None}


@pytest.mark.parametrize("masks", ["shared", "one per image"])
@pytest.mark.parametrize("way", ["eager", "recomputed", "compiled"])
def test_every_gradient_of_a_model_is_the_exact_one(masks, way):
    exact, model = small(), small()
    exact.load_state_dict(model.state_dict())
    model.float()
    use_onednn(model, SwinBlock)
    images = images_for(exact)
    plan = model.plan(some_visible(exact, None if masks == "shared" else len(images)))
    expected = whole_gradients(exact, images, plan)
    model.set_grad_checkpointing(way == "recomputed")
    called = model
    if way == "compiled":
        torch._dynamo.reset()
        called = torch.compile(model, fullgraph=True, backend="aot_eager")
    found = whole_gradients(called, images.float(), plan)
    found = {name.removeprefix("_orig_mod."): grad for name, grad in found.items()}
    assert found.keys() == expected.keys()
    for name, grad in found.items():
        # The largest of all, as some of a small model's gradients are sums that nearly cancel.
        size = max(expected[name].abs().max().item(), 1e-3)
        error = (grad.double() - expected[name]).abs().max().item() / size
        assert error < 2e-5, f"{name} {error:.1e}"


def block_call(model):
    """A call of a block of the third stage, in training."""
    use_onednn(model, SwinBlock)
    block = model.encoder.layers[2].blocks[0]
    part = model.plan(some_visible(model)).partitions[2][0]
    channels = block.norm1.weight.shape[0]
    x = torch.randn(2, part.num_tokens, channels, requires_grad=True)
    return block, x, part


def is_one_node(out):
    return type(out.grad_fn).__name__ == "_BlockBackward"


def test_a_block_is_one_node_where_it_may_be():
    block, x, part = block_call(small().float())
    assert isinstance(block, OneDNNBlock) and is_one_node(block(x, part))
    with gk.use_backend("reference"):
        other = block(x, part)
    assert not is_one_node(other)
    torch.testing.assert_close(other, block(x, part), rtol=1e-5, atol=1e-5)
    with torch.autocast("cpu", torch.bfloat16):
        assert not is_one_node(block(x, part))


def test_what_does_not_fit_a_block_is_refused_in_words():
    block, x, part = block_call(small().float())
    other_window = small(window_size=2).float()
    other = other_window.plan(some_visible(other_window)).partitions[2][0]
    assert other.num_tokens == part.num_tokens
    for call, said in (
        ((x[:, 1:], part), "make the partition from the grid"),
        ((x[0], part), r"must be \[B, N, C\]"),
        ((x, other), "the bias table of windows 2 x 2"),
        ((x, part.to("meta")), "the partition is on meta"),
    ):
        with pytest.raises(ValueError, match=said):
            block(*call)


def changed(block, how):
    if how == "activation":
        block.mlp.act = nn.ReLU()
    if how == "dropout":
        block.mlp.drop1.p = 0.5
    if how == "dropout alone in training":
        block.eval().mlp.drop1 = nn.Dropout(0.5).train()
    if how == "path":
        block.drop_path1 = nn.Dropout(0.5)
    if how == "hook":
        block.attn.qkv.register_forward_hook(lambda module, inputs, out: 2 * out)
    if how == "hook before":
        block.mlp.fc2.register_forward_pre_hook(lambda module, inputs: (2 * inputs[0],))
    if how == "spectral norm":
        nn.utils.spectral_norm(block.mlp.fc1)
    if how == "parametrization":
        nn.utils.parametrizations.weight_norm(block.attn.proj)


@pytest.mark.parametrize(
    "how",
    ["activation", "dropout", "dropout alone in training", "path", "hook", "hook before",
     "spectral norm", "parametrization"],
)  # fmt: skip
def test_what_is_changed_inside_a_block_later_counts(how):
    block, x, part = block_call(small().float())
    expected_model = small().float()
    expected = expected_model.encoder.layers[2].blocks[0]
    for one in (block, expected):
        torch.manual_seed(3)
        changed(one, how)
    outs = []
    for one in (block, expected):
        torch.manual_seed(4)
        outs.append(one(x, part))
    assert not is_one_node(outs[0])
    torch.testing.assert_close(*outs, rtol=1e-5, atol=1e-5)


def test_hooks_of_all_modules_are_called():
    """As profilers and counters of FLOPs register them."""
    block, x, part = block_call(small().float())
    assert is_one_node(block(x, part))
    seen = []
    handle = nn.modules.module.register_module_forward_hook(lambda m, *_: seen.append(m))
    try:
        assert not is_one_node(block(x, part))
    finally:
        handle.remove()
    assert {block.norm1, block.attn.qkv, block.mlp, block.mlp.fc1, block.mlp.act} <= set(seen)
    assert is_one_node(block(x, part))


def test_a_block_keeps_its_stochastic_depth():
    model = small(drop_path=0.5).float()
    use_onednn(model, SwinBlock)
    block = model.encoder.layers[3].blocks[0]
    part = model.plan(some_visible(model)).partitions[3][0]
    x = torch.randn(2, part.num_tokens, block.norm1.weight.shape[0], requires_grad=True)
    assert isinstance(block, OneDNNBlock) and not is_one_node(block(x, part))
    assert is_one_node(block.eval()(x, part))


NAMES = [name for name, _ in small().encoder.layers[2].blocks[0].named_parameters()]


@pytest.mark.parametrize("trained", [*NAMES, "x"])
def test_only_the_gradient_of_a_block_that_is_asked_for(trained):
    block, x, part = block_call(small().float())
    weights = torch.linspace(-1, 1, x.numel()).view_as(x)
    (block(x, part) * weights).sum().backward()
    inputs = {**dict(block.named_parameters()), "x": x}
    expected = inputs[trained].grad
    for name, tensor in inputs.items():
        tensor.grad = None
        tensor.requires_grad_(name == trained)
    (block(x, part) * weights).sum().backward()
    assert torch.equal(inputs.pop(trained).grad, expected)
    assert all(tensor.grad is None for tensor in inputs.values())


def test_a_model_trains_and_compiles_with_it():
    model = small().float()
    images, plan = images_for(model), model.plan(some_visible(model))
    names = list(model.state_dict())
    expected = model(images, plan=plan).loss
    use_onednn(model, SwinBlock)
    assert list(model.state_dict()) == names
    blocks = [*model.encoder.visible_blocks(), *model.decoder_blocks]
    assert all(type(block.mlp) is OneDNNMlp for block in blocks)
    torch.testing.assert_close(model(images, plan=plan).loss, expected, rtol=1e-5, atol=0)
    torch._dynamo.reset()
    compiled = torch.compile(model, fullgraph=True, backend="aot_eager")
    loss = compiled(images, plan=plan, loss_only=True).loss
    torch.testing.assert_close(loss, expected, rtol=1e-5, atol=0)
    loss.backward()
    assert model.encoder.layers[0].blocks[0].mlp.fc1.weight.grad.abs().max() > 0


def test_layers_compile_with_their_gradients():
    # Inductor refuses oneDNN's own operator where the weight is trained.
    torch.manual_seed(0)
    layers = nn.Sequential(nn.Linear(8, 12, bias=False), Mlp(12, 24, 8))
    use_onednn(layers)
    x = torch.randn(2, 3, 8, requires_grad=True)
    results = []
    for forward in (layers, torch.compile(layers, fullgraph=True)):
        layers.zero_grad()
        x.grad = None
        forward(x).square().sum().backward()
        results.append([x.grad, *(p.grad for p in layers.parameters())])
    for compiled, eager in zip(*results, strict=True):
        torch.testing.assert_close(compiled, eager, rtol=1e-5, atol=1e-6)

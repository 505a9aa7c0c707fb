"""SwinV2 on visible tokens: timm's own network, dense, is what it has to agree with."""

from __future__ import annotations

import dataclasses
import math

import pytest
import timm
import torch
from timm.models.swin_transformer_v2 import SwinTransformerV2, window_partition

from greenmim import GreenMIM, ModelConfig, convert_checkpoint, create_model
from greenmim.checkpoint import kind_of
from greenmim.classifier import Classifier
from greenmim.encoders.swinv2 import SwinV2Encoder
from greenmim.flops import forward_flops
from greenmim.initial import config_of, continued, initialise
from greenmim_kernels import onednn
from greenmim_kernels.onednn import use_onednn

from .conftest import (
    assert_drops_as_timm,
    assert_equals_timm,
    assert_grads_are,
    grads,
    images_for,
    some_visible,
)

SIZES = {"embed_dim": 16, "depths": (1, 2, 1, 1), "num_heads": (1, 2, 4, 8)}


def small(**changes) -> GreenMIM:
    """A small model in float64 whose every parameter counts: norms after a block begin as 0."""
    torch.manual_seed(0)
    config = {"image_size": 64, "window_size": 4, "norm_eps": 1e-5, "encoder": "swinv2"}
    decoder = {"decoder_dim": 32, "decoder_heads": 2}
    model = GreenMIM(ModelConfig(**{**SIZES, **config, **decoder, **changes})).double()
    with torch.no_grad():
        for parameter in model.parameters():
            if parameter.requires_grad:
                parameter.add_(0.2 * torch.randn_like(parameter))
    return model.eval()


def timm_s(model: GreenMIM, **more) -> torch.nn.Module:
    """timm's network with the same weights, as `greenmim export` names it."""
    arguments = SwinV2Encoder.timm_arguments(model.config)
    network = timm.create_model(**arguments, num_classes=0, global_pool="", **more).double()
    weights = convert_checkpoint(model.state_dict(), source="greenmim", target="timm")
    network.load_state_dict(weights, strict=True)
    return network.eval()


@pytest.mark.parametrize(
    ("image_size", "window", "before"),
    [
        ((64, 64), 4, (0, 0, 0, 0)),
        ((256, 128), 8, (0, 0, 0, 0)),
        ((192, 192), 12, (0, 0, 0, 0)),
        ((256, 256), 16, (12, 12, 12, 6)),
        ((384, 384), 24, (12, 12, 12, 6)),
    ],
)
def test_equals_timm_with_everything_visible(image_size, window, before, backend):
    model = small(image_size=image_size, window_size=window, pretrained_window_sizes=before)
    assert_equals_timm(model, timm_s(model))


@pytest.mark.parametrize(("image_size", "window"), [((96, 96), 3), ((64, 128), 4), ((128, 128), 8)])
def test_equals_timm_that_masks_the_hidden_tokens(image_size, window, backend):
    model = small(image_size=image_size, window_size=window)
    network = timm_s(model)
    visible = some_visible(model)
    units = torch.from_numpy(visible.reshape(model.config.unit_grid))
    for number, stage in enumerate(network.layers):
        scale = 2 ** (3 - number)
        tokens = units.repeat_interleave(scale, 0).repeat_interleave(scale, 1)
        for block in stage.blocks:
            shift = [-by for by in block.shift_size]
            rolled = tokens[None, :, :, None].double().roll(shift, (1, 2))
            seen = window_partition(rolled, block.window_size).flatten(1)  # [windows, tokens]
            mask = torch.where(seen > 0, 0.0, -1e9)[:, None]
            block.attn_mask = mask if block.attn_mask is None else block.attn_mask + mask
            # Where nothing is shifted there is one mask for all windows' queries alike.
            block.attn_mask = block.attn_mask.expand(-1, seen.shape[1], -1)
    images = images_for(model)
    latent = model(images, visible=visible).latent
    final = network(images).flatten(1, 2)[:, visible]
    torch.testing.assert_close(latent, final, rtol=0, atol=1e-9)
    ours, theirs = grads(latent.sin().sum(), model.encoder), grads(final.sin().sum(), network)
    assert_grads_are(ours, theirs)


def test_paths_are_dropped_as_timm_does():
    """After the norm, by the same draws."""
    model = small(image_size=64, window_size=4, drop_path=0.6)
    assert_drops_as_timm(model, timm_s(model, drop_path_rate=0.6))


@pytest.mark.skipif(not onednn.available(), reason="needs oneDNN")
def test_products_of_a_cpu_are_onednn_s(monkeypatch):
    model = small(image_size=(96, 96)).float()
    images, plan = images_for(model), model.plan(some_visible(model))
    loss = model(images, plan=plan, loss_only=True).loss
    expected = grads(loss, model)
    use_onednn(model, model.encoder.one_node_block)
    calls, real = [], onednn.OneDNNLinear.with_bias
    monkeypatch.setattr(onednn.OneDNNLinear, "with_bias", lambda *a: calls.append(1) or real(*a))
    again = model(images, plan=plan, loss_only=True).loss
    assert len(calls) == sum(model.config.depths)
    torch.testing.assert_close(again, loss, rtol=1e-6, atol=0)
    for name, grad in grads(again, model).items():
        torch.testing.assert_close(grad, expected[name], rtol=1e-3, atol=1e-5, msg=name)
    exact, bias = torch.randn(3, 16).double(), torch.randn(48).double()
    layer = next(model.encoder.visible_blocks()).attn.qkv
    with pytest.raises(RuntimeError):  # of PyTorch's own layer: other types do not mix
        layer.with_bias(exact, bias)


@pytest.mark.parametrize(
    ("size", "window", "before", "had", "own", "expected"),
    [
        (128, 8, (64, 4), (0, 0, 0, 0), (0, 0, 0, 0), (4, 4, 4, 2)),
        (64, 4, (64, 4), (0, 0, 0, 0), (0, 0, 0, 0), (0, 0, 0, 0)),
        (256, 16, (128, 8), (4, 4, 4, 2), (0, 0, 0, 0), (4, 4, 4, 2)),
        (256, 16, (192, 12), (6, 6, 6, 0), (0, 0, 0, 0), (6, 6, 6, 6)),
        (128, 8, (64, 4), (0, 0, 0, 0), (3, 0, 0, 0), (3, 4, 4, 2)),
        # A stage whose window is as it was keeps its positions, square or not.
        ((256, 128), 8, ((256, 128), 8), (0, 0, 0, 0), (0, 0, 0, 0), (0, 0, 0, 0)),
        ((256, 128), 8, ((128, 64), 4), (0, 0, 0, 0), (0, 0, 0, 0), (4, 4, 4, 4)),
    ],
)
def test_windows_before(size, window, before, had, own, expected):
    config = ModelConfig(
        **SIZES, encoder="swinv2", image_size=size, window_size=window, pretrained_window_sizes=own
    )
    sizes = {"encoder": "swinv2", "image_size": before[0], "window_size": before[1]}
    sizes |= {**SIZES, "pretrained_window_sizes": had, "classes": None}
    assert continued(config, sizes).pretrained_window_sizes == expected
    assert continued(config, {}) == continued(config, {"encoder": "swinv2"}) == config
    with pytest.raises(ValueError, match="it has the encoder swin, and this recipe swinv2"):
        continued(config, {"image_size": 64, "window_size": 4})


def test_windows_of_one_token(monkeypatch):
    """timm before 1.0.31 divides by zero there: it says so, or works."""
    try:
        model = small(image_size=32)
    except ValueError as error:
        assert "install timm>=1.0.31" in str(error)
    else:
        assert model(torch.randn(1, 3, 32, 32).double(), mask_ratio=0.0).latent.isfinite().all()
    real = SwinTransformerV2.__init__

    def with_nan(self, *arguments, **options):
        real(self, *arguments, **options)
        self.layers[0].blocks[0].attn.relative_coords_table.fill_(math.nan)

    monkeypatch.setattr(SwinTransformerV2, "__init__", with_nan)
    with pytest.raises(ValueError, match="install timm>=1.0.31"):
        small()


def test_a_mask_per_image_is_each_image_alone():
    model = small(image_size=(96, 96))
    images, visible = images_for(model, batch=3), some_visible(model, batch=3)
    together = model(images, visible=visible).latent
    for i in range(3):
        alone = model(images[i : i + 1], visible=visible[i]).latent
        torch.testing.assert_close(together[i], alone[0], rtol=0, atol=1e-12)


def test_memory_saved_and_graphs_change_nothing():
    model = small(image_size=(96, 96)).train()
    images, plan = images_for(model), model.plan(some_visible(model))
    loss = model(images, plan=plan, loss_only=True).loss
    expected = grads(loss, model)
    model.set_grad_checkpointing()
    saving = model(images, plan=plan, loss_only=True).loss
    assert torch.equal(saving, loss)
    for name, grad in grads(saving, model).items():
        torch.testing.assert_close(grad, expected[name], rtol=1e-10, atol=1e-12, msg=name)
    model.set_grad_checkpointing(False)
    compiled = torch.compile(model, fullgraph=True, backend="aot_eager")
    whole = compiled(images, plan=plan, loss_only=True).loss
    torch.testing.assert_close(whole, loss, rtol=1e-12, atol=0)


def test_half_precision():
    model = small(image_size=(96, 96))
    images, plan = images_for(model), model.plan(some_visible(model))
    exact = model(images, plan=plan).latent
    model.float()
    with torch.autocast("cpu", torch.bfloat16):
        latent = model(images.float(), plan=plan).latent
    assert (latent.double() - exact).norm() < 0.03 * exact.norm()


def test_what_decays_is_timm_s():
    model = small()
    theirs = timm_s(model).no_weight_decay()
    one_axis = {n for n, p in model.encoder.named_parameters() if p.ndim <= 1}
    assert model.encoder.no_weight_decay() == theirs | one_axis
    more = {"mask_token", "decoder_pos_embed"}
    decoder = {n for n, p in model.named_parameters() if p.ndim <= 1 and "decoder" in n}
    named = {f"encoder.{name}" for name in theirs | one_axis}
    assert model.no_weight_decay() == named | more | decoder
    classifier = Classifier(model.config, 3)
    assert classifier.no_weight_decay() == named | {"head.fc.bias"}


def test_conversion():
    model = small(image_size=(64, 96))
    ours = model.state_dict()
    theirs = convert_checkpoint(ours, source="greenmim", target="timm")
    assert kind_of(ours) == "greenmim" and kind_of(theirs) == "timm"
    back = convert_checkpoint(theirs, source="timm", target="greenmim")
    assert back.keys() == {name for name in ours if name.startswith("encoder.")}
    assert all(torch.equal(tensor, ours[name]) for name, tensor in back.items())
    # Microsoft's file has patch merging at the end of a stage, and buffers.
    microsoft = {"layers.0.blocks.0.attn.relative_coords_table": torch.zeros(1, 7, 7, 2)}
    for name, tensor in theirs.items():
        stage = int(name[7]) if ".downsample." in name else None
        microsoft[name if stage is None else f"layers.{stage - 1}{name[8:]}"] = tensor
    read = convert_checkpoint(microsoft, source="timm", target="timm")
    assert read.keys() == theirs.keys()
    assert all(torch.equal(tensor, theirs[name]) for name, tensor in read.items())
    moved = {f"encoder.{name}": tensor for name, tensor in microsoft.items()}
    with pytest.raises(ValueError, match="holds a SwinV2, which was never published"):
        convert_checkpoint(moved, source="official", target="greenmim")
    with pytest.raises(ValueError, match="no SwinV2 of GreenMIM was published"):
        convert_checkpoint(ours, source="greenmim", target="official")
    with pytest.raises(ValueError, match="only weights of a Swin have another order"):
        convert_checkpoint(theirs, source="timm", target="timm", merge_order="row-major")


def test_sizes_from_weights():
    """Nothing in the weights is as large as the windows: a file has to say it."""
    model = small(image_size=(64, 96), pretrained_window_sizes=(3, 3, 3, 2))
    weights = convert_checkpoint(model.state_dict(), source="greenmim", target="timm")
    with pytest.raises(ValueError, match="do not tell how large its windows are"):
        config_of(weights, {})
    facts = {"image_size": "[64, 96]", "window_size": "4", "norm_eps": "1e-5"}
    found = config_of(weights, facts | {"pretrained_window_sizes": "[3, 3, 3, 2]"})
    for name in ("image_size", "window_size", "pretrained_window_sizes", "encoder", *SIZES):
        assert getattr(found, name) == getattr(model.config, name), name


def test_any_window_starts_from_the_same_weights(tmp_path):
    first = small(image_size=64, window_size=4)
    torch.save({"model": first.state_dict()}, tmp_path / "first.pth")
    other = small(image_size=128, window_size=8, pretrained_window_sizes=(4, 4, 4, 2))
    said = initialise(other, tmp_path / "first.pth")
    assert len(said) == 1 and "encoder and decoder" in said[0]
    assert all(
        torch.equal(tensor, first.encoder.state_dict()[name])
        for name, tensor in other.encoder.state_dict().items()
    )
    # Two tokens side by side see the same bias in windows of either size.
    near, far = first.encoder.layers[0].blocks[0].attn, other.encoder.layers[0].blocks[0].attn
    assert torch.equal(near.relative_coords_table[0, 3, 4], far.relative_coords_table[0, 7, 8])
    swin = GreenMIM(ModelConfig(**SIZES, image_size=64, window_size=4))
    with pytest.raises(ValueError, match="it is of another model"):
        initialise(swin, tmp_path / "first.pth")


@pytest.mark.parametrize("size", ["tiny", "small", "base"])
def test_named_models_are_timm_s(size):
    with torch.device("meta"):
        model = create_model(f"greenmim_swinv2_{size}_patch4_window8_256")
        theirs = timm.create_model(f"swinv2_{size}_window8_256", num_classes=0)
    arguments = SwinV2Encoder.timm_arguments(model.config)
    assert arguments["model_name"] == f"swinv2_{size}_window8_256" and "depths" not in arguments
    shapes = {name: p.shape for name, p in model.encoder.named_parameters()}
    assert shapes == {name: p.shape for name, p in theirs.named_parameters()}


def test_operations_are_those_of_a_swin_and_of_the_network_of_the_bias():
    v2 = small(image_size=96, window_size=3).float()
    swin = GreenMIM(dataclasses.replace(v2.config, encoder="swin"))
    plan = v2.plan(some_visible(v2))
    bias = 0
    for stage, heads in zip(v2.encoder.layers, v2.config.num_heads, strict=True):
        for block in stage.blocks:
            rows = block.attn.relative_coords_table.numel() // 2
            bias += 2 * rows * 512 * (2 + heads)
    assert forward_flops(v2, plan) == forward_flops(swin, plan) + bias


def test_what_means_nothing_is_refused():
    with pytest.raises(ValueError, match="encoder must be one of swin, swinv2, twins_svt, got 'v"):
        ModelConfig(encoder="vit")
    with pytest.raises(ValueError, match="the encoder swin has no pretrained_window_sizes"):
        ModelConfig(pretrained_window_sizes=(7, 7, 7, 7))
    with pytest.raises(ValueError, match="pretrained_window_sizes must be 4 integers of at least"):
        ModelConfig(encoder="swinv2", pretrained_window_sizes=(7, 7, 7))

"""Twins-SVT on visible tokens: timm's own network, dense, is what it has to agree with."""

from __future__ import annotations

import dataclasses

import numpy as np
import pytest
import timm
import torch
from timm.optim import param_groups_layer_decay
from torch import nn

from greenmim import GreenMIM, ModelConfig, convert_checkpoint, create_model
from greenmim.checkpoint import kind_of
from greenmim.classifier import Classifier
from greenmim.encoders.twins_svt import TwinsSVTEncoder
from greenmim.flops import forward_flops
from greenmim.initial import config_of, continued, with_usual
from greenmim.tools.export import padded_stages
from greenmim_kernels import onednn
from greenmim_kernels.onednn import use_onednn

from .conftest import (
    assert_drops_as_timm,
    assert_equals_timm,
    grads,
    images_for,
    some_visible,
)

SIZES = {"embed_dim": (16, 32, 48, 80), "depths": (2, 1, 3, 2), "num_heads": (1, 2, 3, 5)}


def small(**changes) -> GreenMIM:
    """A small model in float64 whose every parameter counts."""
    torch.manual_seed(0)
    config = {"image_size": 64, "window_size": 2, "encoder": "twins_svt"}
    decoder = {"decoder_dim": 32, "decoder_heads": 2}
    model = GreenMIM(ModelConfig(**{**SIZES, **config, **decoder, **changes})).double()
    with torch.no_grad():
        for parameter in model.parameters():
            if parameter.requires_grad:
                parameter.add_(0.2 * torch.randn_like(parameter))
    return model.eval()


def with_epsilon(network: nn.Module, eps: float) -> nn.Module:
    """timm has another one in the norms of patch embeddings and of keys."""
    for module in network.modules():
        if isinstance(module, nn.LayerNorm):
            module.eps = eps
    return network


def timm_s(model: GreenMIM, **more) -> nn.Module:
    """timm's network with the same weights, as `greenmim export` names it."""
    arguments = TwinsSVTEncoder.timm_arguments(model.config)
    network = timm.create_model(**arguments, num_classes=0, global_pool="", **more).double()
    weights = convert_checkpoint(model.state_dict(), source="greenmim", target="timm")
    network.load_state_dict(weights, strict=True)
    return with_epsilon(network, model.config.norm_eps).eval()


@pytest.mark.parametrize(
    ("image_size", "window", "ratios"),
    [
        ((64, 64), 2, (8, 4, 2, 1)),
        ((224, 224), 7, (8, 4, 2, 1)),
        ((128, 256), 4, (8, 4, 2, 1)),
        ((96, 96), 3, (4, 4, 1, 1)),
    ],
)
def test_equals_timm_with_everything_visible(image_size, window, ratios, backend):
    model = small(image_size=image_size, window_size=window, sr_ratios=ratios)
    assert_equals_timm(model, timm_s(model))


def test_paths_are_dropped_as_timm_does():
    model = small(drop_path=0.6)
    assert_drops_as_timm(model, timm_s(model, drop_path_rate=0.6))


@pytest.mark.parametrize("visible_units", [1, 3, 6])
def test_hidden_units_are_not_read_and_each_image_has_its_own_mask(visible_units, backend):
    model = small(image_size=(64, 96))
    rng = np.random.default_rng(0)
    masks = np.zeros((3, 6), dtype=bool)
    for row in masks:
        row[rng.permutation(6)[:visible_units]] = True
    images = images_for(model, batch=3)
    together = model(images, visible=masks).latent
    for number, mask in enumerate(masks):
        other = images[number : number + 1].clone()
        units = torch.from_numpy(mask.reshape(2, 3))
        pixels = units.repeat_interleave(32, 0).repeat_interleave(32, 1)
        other[..., ~pixels] = torch.nan
        alone = model(other, visible=mask).latent
        torch.testing.assert_close(alone[0], together[number], rtol=0, atol=1e-12)


def test_activations_computed_again_give_the_same_gradients():
    model = small(drop_path=0.3).train()
    images, plan = images_for(model), model.plan(some_visible(model))
    found = []
    for enable in (False, True):
        model.set_grad_checkpointing(enable)
        torch.manual_seed(0)
        found.append(grads(model(images, plan=plan, loss_only=True).loss, model))
    for name, grad in found[0].items():
        assert torch.equal(grad, found[1][name]), name


def test_compiles_whole():
    model = small().float()
    images, plan = images_for(model), model.plan(some_visible(model))
    expected = model(images, plan=plan).loss
    torch._dynamo.reset()
    compiled = torch.compile(model, fullgraph=True, backend="aot_eager")
    torch.testing.assert_close(compiled(images, plan=plan).loss, expected)


@pytest.mark.skipif(not onednn.available(), reason="needs oneDNN")
def test_products_of_a_cpu_are_onednn_s():
    model = small(image_size=96).float()
    images, plan = images_for(model), model.plan(some_visible(model))
    expected = grads(model(images, plan=plan, loss_only=True).loss, model)
    use_onednn(model, model.encoder.one_node_block)
    linears = [m for m in model.encoder.modules() if isinstance(m, nn.Linear)]
    assert linears and all(isinstance(layer, onednn.OneDNNLinear) for layer in linears)
    for name, grad in grads(model(images, plan=plan, loss_only=True).loss, model).items():
        torch.testing.assert_close(grad, expected[name], rtol=1e-4, atol=1e-6, msg=name)


def test_a_classifier_is_timm_s():
    torch.manual_seed(0)
    config = dataclasses.replace(small().config, image_size=64)
    ours = Classifier(config, 5).double()
    for parameter in ours.parameters():
        nn.init.normal_(parameter, std=0.2)
    theirs = timm.create_model(**TwinsSVTEncoder.timm_arguments(config), num_classes=5).double()
    theirs.load_state_dict(ours.to_timm(), strict=True)
    with_epsilon(theirs, config.norm_eps)
    images = torch.randn(2, 3, 64, 64, dtype=torch.float64)
    torch.testing.assert_close(ours(images), theirs(images), rtol=0, atol=1e-9)
    found = []
    for model, without in ((ours, ours.no_weight_decay()), (theirs, theirs.no_weight_decay())):
        names = {id(p): n.removeprefix("encoder.") for n, p in model.named_parameters()}
        groups = param_groups_layer_decay(model, 0.05, without, layer_decay=0.8)
        found.append(
            {
                names[id(p)].replace("head.fc", "head"): (g["lr_scale"], g["weight_decay"])
                for g in groups
                for p in g["params"]
            }
        )
    assert found[0] == found[1] and len({scale for scale, _ in found[0].values()}) > 8


def test_what_decays_is_timm_s():
    model = small()
    theirs = timm_s(model).no_weight_decay()
    assert "pos_block.0.proj.0.weight" in theirs
    one_axis = {n for n, p in model.encoder.named_parameters() if p.ndim <= 1}
    assert model.encoder.no_weight_decay() == theirs | one_axis


def test_conversion():
    model = small()
    ours = model.state_dict()
    official = convert_checkpoint(ours, source="greenmim", target="official")
    theirs = convert_checkpoint(ours, source="greenmim", target="timm")
    assert kind_of(ours) == "greenmim" and kind_of(theirs) == "timm"
    assert kind_of(official) == "official"
    assert official["encoder.patch_embeds.1.proj.weight"].shape == (32, 2, 2, 16)
    assert official["encoder.blocks.0.1.attn.sr.weight"].shape == (16, 8, 8, 16)
    back = convert_checkpoint(official, source="official", target="greenmim")
    assert back.keys() == ours.keys()
    assert all(torch.equal(tensor, ours[name]) for name, tensor in back.items())
    # timm's has a head, and the input of a positional convolution beside it.
    theirs |= {"head.weight": torch.zeros(3, 80), "head.bias": torch.zeros(3)}
    back = convert_checkpoint(theirs, source="timm", target="greenmim")
    assert back.keys() == {name for name in ours if name.startswith("encoder.")}
    for name, tensor in back.items():
        torch.testing.assert_close(tensor, ours[name], rtol=0, atol=1e-15)
    assert "pos_block.0.proj.0.weight" in theirs  # what was given is as it was
    middle = theirs["pos_block.0.proj.0.weight"] - ours["encoder.pos_block.0.proj.0.weight"]
    expected = torch.zeros_like(middle)
    expected[..., 1, 1] = -1
    torch.testing.assert_close(middle, expected)


@pytest.mark.parametrize("dims", [8, 32])
def test_kinds_are_told_apart_by_their_convolutions(dims):
    """At 8 channels a convolution of 8 x 8 cells has four axes of one length."""
    ours = small(embed_dim=dims, num_heads=(1, 1, 1, 1)).state_dict()
    official = convert_checkpoint(ours, source="greenmim", target="official")
    assert (kind_of(ours), kind_of(official)) == ("greenmim", "official")
    with pytest.raises(ValueError, match=r"has weights of cells that are not \[out, in, s, s\]"):
        convert_checkpoint(official, source="greenmim", target="timm")
    with pytest.raises(ValueError, match=r"has weights of cells that are not \[out, s, s, in\]"):
        convert_checkpoint(ours, source="official", target="timm")


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (
            lambda w: w.pop("encoder.patch_embeds.1.proj.weight"),
            "has no patch_embeds.1",
        ),
        (lambda w: w.update({"encoder.cls_token": torch.zeros(1)}), "holds 'cls_token'"),
        (lambda w: w.update({"encoder.blocks.0.1.attn.sr.weight": torch.zeros(4)}), "has 1 axes"),
        (lambda w: w.pop("encoder.pos_block.0.proj.0.weight"), "has no encoder that is known"),
    ],
)
def test_what_is_not_whole_is_refused(change, message):
    weights = small().state_dict()
    change(weights)
    with pytest.raises(ValueError, match=message):
        convert_checkpoint(weights, source="greenmim", target="timm")
    pcpvt = timm.create_model("twins_pcpvt_small")
    with pytest.raises(ValueError, match="like a Twins-PCPVT, which has no windows"):
        kind_of(pcpvt.state_dict())


def test_sizes_from_weights():
    """Heads of other than 32 channels, and windows of other than 7, a file has to tell."""
    model = small(sr_ratios=(4, 4, 1, 1), window_size=3)
    weights = convert_checkpoint(model.state_dict(), source="greenmim", target="timm")
    with pytest.raises(ValueError, match="do not tell its heads"):
        config_of(weights, {})
    facts = {"image_size": "[64, 96]", "window_size": "3", "num_heads": "[1, 2, 3, 5]"}
    found = config_of(weights, facts)
    assert found.image_hw == (64, 96) and found.norm_eps == 1e-6
    for name in ("window_size", "encoder", *SIZES):
        assert getattr(found, name) == getattr(model.config, name), name
    assert found.sr_ratios == (4, 1, 1, 1)  # of the second stage no block has global attention
    plain = small(embed_dim=32, num_heads=(1, 2, 4, 8), window_size=7, image_size=224)
    found = config_of(convert_checkpoint(plain.state_dict(), "greenmim", "official"), {})
    for name in ("image_hw", "window_size", "encoder", "embed_dim", "depths", "num_heads"):
        assert getattr(found, name) == getattr(plain.config, name), name


@pytest.mark.parametrize("size", ["small", "base", "large"])
def test_named_models_are_timm_s(size):
    with torch.device("meta"):
        model = create_model(f"greenmim_twins_svt_{size}_patch4_224")
        theirs = timm.create_model(f"twins_svt_{size}", num_classes=0)
    arguments = TwinsSVTEncoder.timm_arguments(model.config)
    assert arguments["model_name"] == f"twins_svt_{size}" and "depths" not in arguments
    shapes = {name: p.shape for name, p in model.encoder.named_parameters()}
    assert shapes == {name: p.shape for name, p in theirs.named_parameters()}
    other = TwinsSVTEncoder.timm_arguments(
        dataclasses.replace(model.config, sr_ratios=(4, 4, 2, 1))
    )
    assert other["sr_ratios"] == (4, 4, 2, 1) and other["embed_dims"] == model.config.stage_dims
    heads = [block.attn.num_heads for stage in theirs.blocks for block in stage]
    assert heads == [block.attn.num_heads for block in model.encoder.visible_blocks()]


def test_positional_convolutions_begin_as_published_or_as_timm_s():
    published, with_input = (
        GreenMIM(ModelConfig(**SIZES, image_size=64, encoder="twins_svt", pos_conv_residual=value))
        for value in (False, True)
    )
    for model, middle in ((published, 0), (with_input, 1)):
        for block in model.encoder.pos_block:
            weight = block.proj[0].weight
            assert abs(weight[:, :, 1, 1].mean().item() - middle) < 0.3
            assert abs(weight[:, :, 0, 0].mean().item()) < 0.3


def test_operations():
    """Of a convolution, those of neighbours that are there; a unit is one key."""
    model = small(image_size=32, depths=(2, 2, 2, 2)).float()
    plan = model.plan(np.ones(1, dtype=bool))
    total = 2 * 64 * 48 * 16  # patch embedding
    for stage, dim in enumerate(model.config.stage_dims):
        tokens = 64 // 4**stage
        side, window = 8 // 2**stage, min(2, 8 // 2**stage)
        total += 2 * tokens * 12 * dim**2  # linear layers of a block
        total += 4 * tokens * window**2 * dim  # attention
        total += 2 * tokens * 10 * dim**2 + 2 * 2 * dim**2  # those of the other block, and of a key
        total += 2 * tokens * dim**2 if tokens > 1 else 0  # the convolution that makes it
        total += 4 * tokens * dim
        total += 2 * (3 * side - 2) ** 2 * dim  # positional convolution
        if stage:
            total += 2 * tokens * 4 * model.config.stage_dims[stage - 1] * dim
    with_decoder = forward_flops(model, plan)
    decoder = forward_flops(Decoder(model), plan)
    assert with_decoder - decoder == total


class Decoder(nn.Module):
    """A model without its encoder."""

    def __init__(self, model: GreenMIM) -> None:
        super().__init__()
        self.model, self.config = model, model.config

    def forward(self, images, plan):
        latent = images.new_zeros(len(images), plan.unit_index.shape[1], self.config.stage_dims[-1])
        return self.model.decode(latent, plan)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (
            {"sr_ratios": (8, 4, 2, 2)},
            r"powers of two and at most \(8, 4, 2, 1\)",
        ),
        ({"sr_ratios": (3, 4, 2, 1)}, "sr_ratios must be powers of two"),
        ({"sr_ratios": (8, 4, 2)}, "sr_ratios must be 4 positive integers"),
        ({"embed_dim": (16, 32, 64)}, "embed_dim must be 4 positive integers"),
        ({"embed_dim": (16, 32, 48, 81)}, "the 81 channels of stage 4 cannot be split"),
        ({"pretrained_window_sizes": (7, 7, 7, 7)}, "twins_svt has no pretrained_window_sizes"),
        ({"encoder": "swin", "embed_dim": (16, 32, 48, 80)}, "takes one embed_dim"),
        ({"encoder": "swin", "sr_ratios": (4, 4, 2, 1)}, "the encoder swin has no sr_ratios"),
        ({"encoder": "swinv2", "pos_conv_residual": True}, "the encoder swinv2 has no pos_conv"),
        ({"window_size": 1}, "windows of at least 2 tokens"),
    ],
)
def test_sizes_that_cannot_be(change, message):
    with pytest.raises(ValueError, match=message):
        small(**change)


@pytest.mark.parametrize(("image", "stages"), [(224, []), (256, [1, 2, 3, 4]), (96, [1, 2, 3, 4])])
def test_stages_that_timm_pads(image, stages):
    """Also where the grid is smaller than a window."""
    assert padded_stages(ModelConfig(encoder="twins_svt", image_size=image)) == stages


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
def test_what_is_moved_keeps_its_digits(dtype):
    ours = {name: tensor.to(dtype) for name, tensor in small().state_dict().items()}
    theirs = convert_checkpoint(ours, source="greenmim", target="timm")
    back = convert_checkpoint(theirs, source="timm", target="greenmim")
    for stage in range(4):
        name = f"encoder.pos_block.{stage}.proj.0.weight"
        torch.testing.assert_close(back[name], ours[name].float(), rtol=0, atol=2e-7)


def test_other_heads_are_refused_where_they_are_told():
    config = small().config
    told = {"encoder": "twins_svt", "window_size": 2, **SIZES}
    assert continued(config, told) == config
    with pytest.raises(ValueError, match=r"it has \(1, 2, 3, 1\) heads, and this recipe"):
        continued(config, told | {"num_heads": (1, 2, 3, 1)})
    # Weights alone do not tell: whoever names heads is believed.
    del told["num_heads"]
    assert continued(config, told) == config and "num_heads" not in with_usual(told)
    known = {"encoder": "twins_svt", "embed_dim": (64, 128, 256, 512)}
    assert with_usual(known)["num_heads"] == (2, 4, 8, 16)
    assert with_usual(known | {"num_heads": (1, 2, 4, 8)})["num_heads"] == (1, 2, 4, 8)


def test_channels_that_double_are_one_number():
    both = [ModelConfig(encoder="twins_svt", embed_dim=dim) for dim in (64, [64, 128, 256, 512])]
    assert both[0] == both[1] and both[1].stage_dims == (64, 128, 256, 512)


def test_a_plan_of_another_encoder_is_refused():
    twins = small()
    swin = GreenMIM(dataclasses.replace(twins.config, encoder="swin", embed_dim=16,
                                        num_heads=(1, 2, 4, 8))).double()  # fmt: skip
    images, visible = images_for(twins), some_visible(twins)
    for model, other in ((twins, swin), (swin, twins)):
        with pytest.raises(ValueError, match="the plan is for another encoder"):
            model(images, plan=other.plan(visible))
    # Without a bias table nothing else would tell.
    with pytest.raises(ValueError, match=r"windows of \[\(4, 4\), .* this model has \[\(2, 2\)"):
        twins(images, plan=small(window_size=4).plan(visible))

"""The classifier: timm's Swin with a head, number for number."""

from __future__ import annotations

import re

import pytest
import timm
import torch
from timm.optim import param_groups_layer_decay

from greenmim.checkpoint import convert_checkpoint, kind_of
from greenmim.classifier import Classifier, head_of
from greenmim.config import ModelConfig
from greenmim.mim import GreenMIM

SIZES = {"embed_dim": 16, "depths": (2, 2, 3, 1), "num_heads": (1, 2, 4, 8)}
CONFIG = ModelConfig(image_size=64, window_size=2, norm_eps=1e-5, **SIZES)
CLASSES = 5


def pair() -> tuple[Classifier, torch.nn.Module]:
    """Ours and timm's with the same weights, tables that are not zero, in float64."""
    torch.manual_seed(0)
    ours = Classifier(CONFIG, CLASSES).double().eval()
    for name, parameter in ours.named_parameters():
        torch.nn.init.normal_(parameter, std=0.1 if "table" in name else 0.3)
    theirs = timm.create_model(
        "swin_base_patch4_window7_224", img_size=64, window_size=2, num_classes=CLASSES, **SIZES
    )
    theirs = theirs.double().eval()
    theirs.load_state_dict(ours.to_timm(), strict=True)
    return ours, theirs


def with_timm_s_names(values: dict) -> dict:
    return {name.removeprefix("encoder."): value for name, value in values.items()}


def test_scores_and_gradients_are_those_of_timm():
    ours, theirs = pair()
    images = torch.randn(3, 3, 64, 64, dtype=torch.float64)
    expected, scores = theirs(images), ours(images)
    torch.testing.assert_close(scores, expected, rtol=1e-9, atol=1e-9)
    pull = torch.randn_like(expected)
    expected.backward(pull)
    scores.backward(pull)
    gradients = with_timm_s_names({name: p.grad for name, p in ours.named_parameters()})
    for name, parameter in theirs.named_parameters():
        torch.testing.assert_close(gradients[name], parameter.grad, rtol=1e-8, atol=1e-8, msg=name)


def test_a_plan_made_ahead_is_the_same():
    ours, _ = pair()
    images = torch.randn(2, 3, 64, 64, dtype=torch.float64)
    assert torch.equal(ours(images, ours.plan()), ours(images))


def test_what_does_not_fit_is_refused():
    ours, _ = pair()
    with pytest.raises(ValueError, match=re.escape("images must be [B, 3, 64, 64]")):
        ours(torch.zeros(1, 3, 32, 64))
    other = Classifier(ModelConfig(image_size=(64, 96), window_size=2, **SIZES), 2)
    with pytest.raises(ValueError, match="plan is for 16 x 24 patches"):
        ours(torch.zeros(1, 3, 64, 64), other.plan())


def test_it_starts_as_timm_s_does():
    torch.manual_seed(0)
    model = Classifier(ModelConfig(image_size=64, window_size=2, **SIZES), 400)
    weight, bias = head_of(model.state_dict())
    assert weight.shape == (400, 128) and not bias.any()
    assert weight.std().item() == pytest.approx(0.02, rel=0.02) and weight.abs().max() < 0.12


def test_layers_learn_and_decay_as_timm_s_do():
    ours, theirs = pair()
    found = []
    for model, without in ((ours, ours.no_weight_decay()), (theirs, theirs.no_weight_decay())):
        names = {
            id(p): name for name, p in with_timm_s_names(dict(model.named_parameters())).items()
        }
        groups = param_groups_layer_decay(model, 0.05, without, layer_decay=0.8)
        found.append(
            {names[id(p)]: (g["lr_scale"], g["weight_decay"]) for g in groups for p in g["params"]}
        )
    assert found[0] == found[1] and len({scale for scale, _ in found[0].values()}) == 10
    assert found[0]["head.fc.weight"] == (1.0, 0.05)
    assert found[0]["patch_embed.proj.weight"][0] == min(scale for scale, _ in found[0].values())


def test_its_encoder_is_found_in_its_state_dict():
    ours, _ = pair()
    weights = ours.state_dict()
    assert kind_of(weights) == "greenmim"
    converted = convert_checkpoint(weights, "greenmim", "greenmim")
    assert not any("head" in name for name in converted)
    network = GreenMIM(CONFIG).double()
    missing, strange = network.load_state_dict(converted, strict=False)
    assert not strange and all(not name.startswith("encoder.") for name in missing)
    images = torch.randn(1, 3, 64, 64, dtype=torch.float64)
    weight, bias = head_of(weights)
    scores = network.eval().embed(images) @ weight.T + bias
    torch.testing.assert_close(scores, ours(images), rtol=1e-12, atol=1e-12)


@pytest.mark.parametrize("name", ["head.fc", "head"])
def test_heads_of_timm_and_of_microsoft(name):
    weights = {f"{name}.weight": torch.zeros(3, 4), f"{name}.bias": torch.ones(3)}
    weight, bias = head_of(weights)
    assert weight is weights[f"{name}.weight"] and bias is weights[f"{name}.bias"]
    wrapped = {f"module.{name}": tensor for name, tensor in weights.items()}  # as of DDP
    assert head_of(wrapped) is not None
    del weights[f"{name}.bias"]
    assert head_of(weights) is None

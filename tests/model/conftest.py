"""Golden numbers and small models, shared by the model tests."""

from __future__ import annotations

import json
import pathlib

import numpy as np
import pytest
import torch

import greenmim
from greenmim.checkpoint import load_state_dict_file
from greenmim.masking import random_visible
from greenmim_kernels import use_backend

DATA = pathlib.Path(__file__).parent.parent / "data"
SMALL = {
    "image_size": 64, "window_size": 4, "embed_dim": 16, "depths": (1, 2, 1, 1),
    "num_heads": (1, 2, 4, 8), "decoder_dim": 32, "decoder_heads": 2,
}  # fmt: skip


def load_json(name: str) -> dict:
    return json.loads((DATA / name).read_text())


def load_arrays(name: str) -> dict[str, np.ndarray]:
    with np.load(DATA / name) as file:
        return dict(file)


def golden_model(weights: str, config: dict, **overrides) -> greenmim.GreenMIM:
    """One of the small official models, converted; float64."""
    twins = {"encoder": "twins_svt", "sr_ratios": config["sr"]} if "sr" in config else {}
    model = greenmim.GreenMIM(
        greenmim.ModelConfig(
            image_size=config["img_px"],
            window_size=config["window"],
            embed_dim=config["dims"] if twins else config["embed_dim"],
            depths=config["depths"],
            num_heads=config["heads"],
            decoder_dim=config["dec_dim"],
            decoder_depth=config.get("dec_depth", 1),
            decoder_heads=config["dec_heads"],
            **twins,
            **overrides,
        )
    )
    state = load_state_dict_file(DATA / weights)
    converted = greenmim.convert_checkpoint(state, source="official", target="greenmim")
    model.double().load_state_dict(converted, strict=True)
    return model


def official_names(model: greenmim.GreenMIM) -> dict[str, str]:
    """Our parameter name -> the official one."""
    numbers = {name: torch.tensor(i) for i, name in enumerate(dict(model.named_parameters()))}
    with_tables = {
        name: torch.zeros(parameter.shape) if name.endswith("table") else numbers[name].expand(4)
        for name, parameter in model.named_parameters()
    }
    # The conversion keeps the order of the parameters and adds buffers.
    official = greenmim.convert_checkpoint(with_tables, source="greenmim", target="official")
    names = [name for name in official if not name.endswith("relative_position_index")]
    encoder_first = sorted(with_tables, key=lambda name: not name.startswith("encoder."))
    return dict(zip(encoder_first, names, strict=True))


def small(**overrides) -> greenmim.GreenMIM:
    torch.manual_seed(0)
    model = greenmim.GreenMIM(greenmim.ModelConfig(**{**SMALL, **overrides}))
    for parameter in model.parameters():  # biases and norms away from their plain initial values
        if parameter.requires_grad:
            torch.nn.init.normal_(parameter, std=0.1)
    return model.double()


def images_for(model: greenmim.GreenMIM, batch: int = 2) -> torch.Tensor:
    generator = torch.Generator().manual_seed(1)
    return torch.randn(batch, 3, *model.config.image_hw, generator=generator).to(
        next(model.parameters()).dtype
    )


def some_visible(model: greenmim.GreenMIM, batch: int | None = None, seed: int = 0) -> np.ndarray:
    return random_visible(np.random.default_rng(seed), model.config.num_units, 0.5, batch)


def grads(loss: torch.Tensor, model: torch.nn.Module) -> dict[str, torch.Tensor]:
    named = {n: p for n, p in model.named_parameters() if p.requires_grad}
    found = torch.autograd.grad(loss, named.values(), allow_unused=True)
    return {name: grad for name, grad in zip(named, found, strict=True) if grad is not None}


def assert_grads_are(ours: dict[str, torch.Tensor], theirs: dict[str, torch.Tensor]) -> None:
    for name, grad in ours.items():
        torch.testing.assert_close(grad, theirs[name], rtol=1e-8, atol=1e-8, msg=name)


def assert_equals_timm(model: greenmim.GreenMIM, network: torch.nn.Module) -> None:
    """Everything visible, in float64: maps, latent, gradients."""
    images = images_for(model, batch=1)
    expected = network.forward_intermediates(images, intermediates_only=True, output_fmt="NCHW")
    for ours, theirs in zip(model.encode(images), expected, strict=True):
        torch.testing.assert_close(ours, theirs, rtol=0, atol=1e-9)
    whole = model.plan(np.ones(model.config.num_units, dtype=bool))
    latent, final = model.encoder(images, whole), network(images)
    final = final.reshape(latent.shape)  # [B, h, w, C] of some
    torch.testing.assert_close(latent, final, rtol=0, atol=1e-9)
    ours, theirs = grads(latent.sin().sum(), model.encoder), grads(final.sin().sum(), network)
    assert ours.keys() == theirs.keys()
    assert_grads_are(ours, theirs)


def assert_drops_as_timm(model: greenmim.GreenMIM, network: torch.nn.Module) -> None:
    """By the same draws; images of 64 px."""
    images, whole = images_for(model, batch=8), model.plan(np.ones(4, dtype=bool))
    found = []
    for run in (lambda: model.encoder.train()(images, whole), lambda: network.train()(images)):
        torch.manual_seed(3)
        found.append(run().flatten(1))
    assert not torch.allclose(found[0], model.encoder.eval()(images, whole).flatten(1))
    torch.testing.assert_close(found[0], found[1], rtol=0, atol=1e-9)


@pytest.fixture(autouse=True)
def small_models(one_thread):
    """All models here are small."""


@pytest.fixture(params=["reference", "cpp"])
def backend(request):
    """Run the test in each backend."""
    with use_backend(request.param):
        yield request.param

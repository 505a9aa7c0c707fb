"""On a GPU: a recorded step is the step, in every precision, and no step waits for the device."""

from __future__ import annotations

import functools

import numpy as np
import pytest
import torch
from torch._functorch import config as functorch_config

from greenmim import GreenMIM, ModelConfig
from greenmim.classifier import Classifier
from greenmim.config import ENCODERS
from greenmim.launch import World
from greenmim.masking import random_visible
from greenmim.processes import Processes, Reports
from greenmim.training.passes import (
    GraphedPasses,
    Passes,
    classification_loss,
    reconstruction_loss,
)

UPDATES, BATCH = 6, 8
DTYPES = {"fp32": torch.float32, "bf16": torch.bfloat16, "fp16": torch.float16}


def train(
    graphed: bool,
    compiled: bool,
    precision: str,
    per_image: bool,
    strict: bool,
    parts: int = 2,
    classes: int = 0,
    encoder: str = "swin",
):
    """Losses of a few updates, of a classifier if there are classes; `strict` raises where anything
    waits for the device."""
    torch.manual_seed(0)
    device = torch.device("cuda")
    sizes = {"embed_dim": 64, "depths": (2, 2, 2, 2), "num_heads": (2, 4, 8, 16)}
    config = ModelConfig(**sizes, decoder_dim=64, encoder=encoder)
    model = (Classifier(config, classes) if classes else GreenMIM(config)).to(device)
    loss = classification_loss if classes else reconstruction_loss
    trained = [p for p in model.parameters() if p.requires_grad]
    optimizer = torch.optim.AdamW(trained, lr=1e-3, fused=True)
    scaler = torch.amp.GradScaler("cuda", enabled=precision == "fp16")
    autocast = functools.partial(
        torch.autocast, "cuda", DTYPES[precision], enabled=precision != "fp32"
    )
    processes = Processes(World(), device)
    make = functools.partial(GraphedPasses, processes) if graphed else Passes
    forward = torch.compile(model, fullgraph=True) if compiled else model
    work = make(loss, forward, trained, autocast, scaler, parts)
    reports = Reports(processes, parts)
    rng, generator = np.random.default_rng(0), torch.Generator().manual_seed(0)
    batches = []
    for _ in range(UPDATES * parts):
        images = torch.randn(BATCH, 3, 224, 224, generator=generator).pin_memory()
        if classes:
            targets = torch.rand(BATCH, classes, generator=generator).softmax(1)
            batches.append((images, model.plan().pin_memory(), targets.pin_memory()))
        else:
            masks = random_visible(rng, 49, 0.75, BATCH if per_image else None)
            batches.append((images, model.plan(masks).pin_memory()))
    losses = []
    try:
        for update in range(UPDATES):
            if update == 1 and strict:  # the first compiles, records and allocates
                torch.cuda.set_sync_debug_mode("error")
            for part in range(parts):
                batch = batches[update * parts + part]
                there = [x.to(device, non_blocking=True) for x in batch]
                losses.append(work.forward_backward(there, part))
            norm = work.clip(optimizer, limit=1.0)
            scale = None
            if scaler.is_enabled():
                scale = scaler.scale(torch.ones((), device=device))
            bad = reports.send(update, losses[-parts:], norm, scale=scale)
            if not scaler.is_enabled():
                optimizer.found_inf = bad.float()
            scaler.step(optimizer)
            scaler.update()
            work.zero_grad(optimizer)
    finally:
        torch.cuda.set_sync_debug_mode("default")
    assert not any(report.skipped for report in reports.read(UPDATES))
    return torch.stack(losses).cpu()


@pytest.mark.gpu
@pytest.mark.parametrize("per_image", [False, True])
@pytest.mark.parametrize("precision", DTYPES)
@pytest.mark.parametrize("parts", [1, 2])
def test_a_recorded_step_is_the_step(parts, precision, per_image):
    expected = train(False, False, precision, per_image, strict=True, parts=parts)
    actual = train(True, False, precision, per_image, strict=True, parts=parts)
    # The same kernels on the same numbers; only the norm sums in another order.
    torch.testing.assert_close(actual, expected, rtol=1e-3 if precision != "fp32" else 1e-5, atol=0)


@pytest.mark.gpu
@pytest.mark.parametrize("per_image", [False, True])
@pytest.mark.parametrize("encoder", [name for name in ENCODERS if name != "swin"])
def test_a_recorded_step_of_other_encoders_is_the_step(encoder, per_image):
    expected = train(False, False, "bf16", per_image, strict=True, encoder=encoder)
    actual = train(True, False, "bf16", per_image, strict=True, encoder=encoder)
    torch.testing.assert_close(actual, expected, rtol=1e-3, atol=0)


@pytest.mark.gpu
@pytest.mark.parametrize("precision", DTYPES)
def test_a_recorded_step_of_a_classifier_is_the_step(precision):
    expected = train(False, False, precision, False, strict=True, classes=10)
    actual = train(True, False, precision, False, strict=True, classes=10)
    torch.testing.assert_close(actual, expected, rtol=1e-3 if precision != "fp32" else 1e-5, atol=0)


@pytest.mark.gpu
@pytest.mark.parametrize("parts", [1, 2])
@pytest.mark.parametrize("recompute", [False, True])
def test_a_compiled_and_recorded_step_follows_the_step(recompute, parts):
    torch._dynamo.reset()
    expected = train(False, False, "bf16", False, strict=False, parts=parts)
    with (
        torch._dynamo.config.patch(error_on_recompile=True),
        functorch_config.patch(ban_recompute_materialized_backward=not recompute),
    ):
        actual = train(True, True, "bf16", False, strict=True, parts=parts)
    torch.testing.assert_close(actual, expected, rtol=0.02, atol=0)

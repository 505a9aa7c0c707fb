"""Three hundred optimiser steps in bfloat16 on a GPU: fused kernels beside the reference."""

from __future__ import annotations

import pytest
import torch

import greenmim
import greenmim_kernels as gk

STEPS = 300


def losses_of(backend: str) -> torch.Tensor:
    torch.manual_seed(0)
    config = greenmim.ModelConfig(
        image_size=224, window_size=7, embed_dim=64, depths=(2, 2, 2, 2), num_heads=(2, 4, 8, 16),
        decoder_dim=128, decoder_heads=4, norm_pix_loss=False,
    )  # fmt: skip
    model = greenmim.GreenMIM(config).cuda()
    optimizer = torch.optim.AdamW(model.parameters(), lr=1e-3, weight_decay=0.05)
    generator = torch.Generator().manual_seed(1)
    # Smooth pictures, so that there is something to learn.
    images = torch.randn(64, 3, 14, 14, generator=generator)
    images = torch.nn.functional.interpolate(images, size=224, mode="bicubic").cuda()
    losses = []
    with gk.use_backend(backend):
        for step in range(STEPS):
            batch = images[step * 16 % 64 : step * 16 % 64 + 16]
            visible = torch.zeros(49, dtype=torch.bool)
            visible[torch.randperm(49, generator=generator)[:12]] = True
            with torch.autocast("cuda", torch.bfloat16):
                loss = model(batch, visible=visible).loss
            optimizer.zero_grad()
            loss.backward()
            optimizer.step()
            losses.append(loss.detach())
    return torch.stack(losses).cpu()


@pytest.mark.gpu
@pytest.mark.parametrize("backend", ["cuda", "triton"])
def test_the_loss_follows_the_reference(backend):
    expected, actual = losses_of("reference"), losses_of(backend)
    assert expected[-50:].mean() < 0.8 * expected[:10].mean(), "nothing was learnt"
    assert actual.isfinite().all()
    # Rounding makes the two drift apart slowly; a wrong gradient does so at once.
    torch.testing.assert_close(actual[:20], expected[:20], rtol=0.02, atol=0)
    torch.testing.assert_close(actual[-50:].mean(), expected[-50:].mean(), rtol=0.03, atol=0)

"""What steps keep for their backward pass, counted."""

from __future__ import annotations

import numpy as np
import pytest
import torch
from torch import nn

from benchmarks import kept
from greenmim import GreenMIM, ModelConfig
from greenmim.config import model_config

pytestmark = pytest.mark.slow

SMALL = ModelConfig(
    image_size=96, window_size=7, embed_dim=16, depths=(2, 2, 2, 1), num_heads=(1, 2, 4, 8),
    decoder_dim=32, decoder_heads=2,
)  # fmt: skip


def test_each_step_keeps_less_than_the_one_before():
    rows = {row.name: row for row in kept.kept_by_all(SMALL, 0.75)}
    order = ["simmim", "naive", "ours", "ours, compiled", "ours, compiled, pointwise recomputed"]
    assert set(rows) == set(order)
    per_image = [rows[name].per_image for name in order]
    assert per_image == sorted(per_image, reverse=True) and per_image[-1] > 0
    assert per_image[-1] < 0.7 * per_image[1] and per_image[-1] < 0.3 * per_image[0]
    # Weights in 16 bits are kept too, unless they are cast again.
    weights = rows["ours"].state // kept.STATE_BYTES
    assert weights < rows["ours, compiled"].fixed < 3 * weights
    assert rows[order[-1]].fixed < 0.5 * weights
    assert rows["ours"].total(3) == 3 * rows["ours"].per_image + rows["ours"].fixed + 12 * weights


def kept_bytes(model, forward) -> int:
    with kept.counting_kept(model) as found:
        forward()
    return sum(found.values())


def test_kept_bytes_grow_with_the_batch_and_count_each_tensor_once():
    model = nn.Sequential(nn.Linear(8, 16), nn.GELU(), nn.Linear(16, 4))
    one, two = (kept_bytes(model, lambda n=n: model(torch.ones(n, 8)).sum()) for n in (1, 2))
    assert one == 4 * (8 + 16 + 16) and two == 2 * one


def test_activation_checkpointing_keeps_less_than_half():
    model = GreenMIM(model_config("greenmim_swin_tiny_patch4_window7_224")).train()
    plan, images = model.plan(np.arange(49) % 4 == 0), torch.zeros(2, 3, 224, 224)
    for precision in (torch.float32, torch.bfloat16):
        found = []
        for wanted in (False, True):
            model.set_grad_checkpointing(wanted)
            with kept.autocast_as_on("cuda", precision):
                step = lambda: model(images, plan=plan, loss_only=True)  # noqa: E731
                found.append(kept_bytes(model, step))
        assert 0 < found[1] < found[0] / 2


def test_norms_are_in_float32_as_on_cuda_and_the_sums_they_take():
    norm, x, original = (
        nn.LayerNorm(8),
        torch.ones(2, 8, dtype=torch.bfloat16),
        nn.functional.layer_norm,
    )
    types = {}
    for device in ("cpu", "cuda"):
        with kept.autocast_as_on(device, torch.bfloat16):
            types[device] = norm(x).dtype, nn.functional.linear(norm(x), torch.ones(8, 8)).dtype
    assert types["cuda"] == (torch.float32, torch.bfloat16)
    assert types["cpu"] == (torch.bfloat16, torch.bfloat16)
    assert norm(x.float()).dtype == torch.float32 and nn.functional.layer_norm is original

"""The reference against plain loops over the formulas, in float64."""

from __future__ import annotations

import math

import numpy as np
import pytest
import torch

import greenmim_kernels as gk
from greenmim_kernels import reference
from greenmim_kernels.testing import Case, make_inputs, run, visible_tokens


def attention_by_loops(qkv, table, grid_visible, window, shift, num_heads, segment=None):
    """One image; token by token, as the formulas say. qkv [N, 3C] -> [N, C]."""
    labels = None if segment is None else segment[grid_visible]
    coords = np.argwhere(grid_visible)
    channels = qkv.shape[1] // 3
    head_dim = channels // num_heads
    q, k, v = (qkv[:, i * channels : (i + 1) * channels] for i in range(3))

    def window_of(token):
        return tuple(
            (place + (side - moved) % side) // side
            for place, side, moved in zip(coords[token], window, shift, strict=True)
        ) + (() if labels is None else (labels[token],))

    out = np.zeros((len(coords), channels))
    for i in range(len(coords)):
        peers = [j for j in range(len(coords)) if window_of(j) == window_of(i)]
        for head in range(num_heads):
            part = slice(head * head_dim, (head + 1) * head_dim)
            scores = []
            for j in peers:
                row = 0
                for offset, side in zip(coords[i] - coords[j], window, strict=True):
                    row = row * (2 * side - 1) + offset + side - 1
                scores.append(head_dim**-0.5 * (q[i, part] @ k[j, part]) + table[row, head])
            weights = np.exp(np.array(scores) - max(scores))
            weights /= weights.sum()
            for weight, j in zip(weights, peers, strict=True):
                out[i, part] += weight * v[j, part]
    return out


@pytest.mark.parametrize(
    ("grid", "window", "shift", "labels"),
    [
        ((8, 8), (4, 4), (2, 2), None),
        ((7, 10), (3, 5), (0, 2), None),
        ((5, 9), (7, 4), (3, 0), 3),
        ((4, 5, 6), (2, 3, 4), (1, 0, 2), None),
        ((4, 5, 6), (4, 5, 3), (0, 1, 1), 2),
        ((40,), (7,), (3,), None),
    ],
)
def test_reference_equals_loops(grid, window, shift, labels):
    rng = np.random.default_rng(0)
    visible = rng.random(grid) < 0.5
    num_heads, channels = 2, 6
    tokens = int(visible.sum())
    qkv = rng.standard_normal((1, tokens, 3 * channels))
    segment = rng.integers(0, labels, grid) if labels else None
    part = gk.group_partition(visible, window, shift, segment=segment)
    table = rng.standard_normal((part.table_rows, num_heads))
    with gk.use_backend("reference"):
        out = gk.group_window_attention(
            torch.from_numpy(qkv), torch.from_numpy(table), part, num_heads
        )
    expected = attention_by_loops(qkv[0], table, visible, window, shift, num_heads, segment)
    np.testing.assert_allclose(out[0].numpy(), expected, rtol=0, atol=1e-13)


def test_gather_then_scatter_is_identity_and_padding_is_zero():
    case = Case(batch=3, per_image=True, num_heads=1, head_dim=3)
    inputs = make_inputs(case)
    x = inputs.qkv
    index = inputs.part.token_index
    gathered = reference.group_gather(x, index)
    padding = (index < 0)[..., None].expand_as(gathered)
    assert padding.any()
    assert (gathered[padding] == 0).all()
    for image, group, slot in [(0, 0, 0), (1, 2, 5), (2, 3, 1)]:
        token = index[image, group, slot]
        torch.testing.assert_close(gathered[image, group, slot], x[image, token])
    gathered[padding] = math.nan
    torch.testing.assert_close(reference.group_scatter(gathered, index, x.shape[1]), x)


def test_gradients_are_those_of_finite_differences():
    case = Case(image_size=(64, 96), stage=2, window_size=3, shifted=True, mask_ratio=0.5,
                num_heads=2, head_dim=3, dtype=torch.float64)  # fmt: skip
    inputs = make_inputs(case)

    def attention(qkv, table):
        with gk.use_backend("reference"):
            return gk.group_window_attention(qkv, table, inputs.part, inputs.num_heads)

    arguments = (inputs.qkv.requires_grad_(), inputs.table.requires_grad_())
    assert torch.autograd.gradcheck(attention, arguments, fast_mode=True)
    assert torch.autograd.gradgradcheck(attention, arguments, fast_mode=True)


def test_the_packing_of_groups_does_not_matter():
    case = Case(dtype=torch.float64)
    inputs = make_inputs(case)
    window, shift = case.window_and_shift()
    with gk.use_backend("reference"):
        expected = run(inputs)
        for size in (49, 64, 200):
            inputs.part = gk.group_partition(visible_tokens(case), window, shift, size)
            for name, value in run(inputs).items():
                torch.testing.assert_close(value, expected[name], rtol=0, atol=1e-12, msg=name)


def test_shapes_on_the_meta_device():
    inputs = make_inputs(Case(stage=3))
    part = inputs.part.to("meta")
    with gk.use_backend("reference"):
        out = gk.group_window_attention(
            inputs.qkv.to("meta"), inputs.table.to("meta"), part, inputs.num_heads
        )
    assert out.shape == (2, inputs.part.num_tokens, 64)

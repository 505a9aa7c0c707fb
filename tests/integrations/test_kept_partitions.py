"""Partitions that are made once: of dense grids, and of masks."""

from __future__ import annotations

import copy

import pytest
import torch
from torch._subclasses.fake_tensor import FakeTensorMode

from greenmim_kernels.integrations import attention, grids, unfuse_window_attention

from .cases import (
    CLASSES,
    LIBRARIES,
    close,
    fused_copy,
    randomized,
    segment_mask,
    step,
    timm_swin,
)

pytestmark = pytest.mark.slow


def test_a_mask_that_blocks_share_is_cut_once(monkeypatch: pytest.MonkeyPatch) -> None:
    cut, real = [], attention._make
    monkeypatch.setattr(attention, "_make", lambda *args: cut.append("here") or real(*args))
    model = randomized(LIBRARIES["hat"].make(depths=[4], num_heads=[2]))
    fused, x = fused_copy(model), torch.randn(1, 3, 16, 16)
    cut.clear()
    for count in (1, 2):  # HAT makes a mask for each call
        close(fused(x), model(x))
        assert len(cut) == count
    assert len(attention._kept) == 0


@pytest.mark.parametrize("mode", ["inference", "fake", "device"])
def test_whatever_mode_a_partition_is_made_in(mode: str) -> None:
    for known in (grids._on_device, grids._arrays):
        known.kept.clear()
    grids._kept_for_good.cache_clear()
    model = fused_copy(randomized(timm_swin()))
    alone, mask = fused_copy(CLASSES["microsoft"]()), segment_mask(2, 16)
    if mode == "inference":
        with torch.inference_mode():
            model(torch.randn(2, 3, 56, 56))
            alone(torch.randn(4, 16, 16), mask)
    elif mode == "fake":
        with FakeTensorMode(allow_non_fake_inputs=True):
            assert model(torch.randn(2, 3, 56, 56)).shape == (2, 5)
            x = torch.randn(4, 16, 16)
            assert alone(x, torch.zeros(2, 16, 16)).shape == x.shape
    else:
        x = torch.randn(2, 3, 56, 56)
        with torch.device("meta"):
            model(x)
    unfused = copy.deepcopy(model)
    unfuse_window_attention(unfused)
    close(step(model, x := torch.randn(2, 3, 56, 56)), step(unfused, x))
    alone(torch.randn(4, 16, 16), mask).sum().backward()


def test_partitions_that_are_kept(monkeypatch: pytest.MonkeyPatch) -> None:
    known, device = grids._on_device.kept, torch.device("cpu")

    def ask(side: int) -> torch.Tensor:
        return grids.grid_partition((side, 4), (4, 4), (0, 0), (4, 4), device).token_index

    known.clear()
    one = ask(400)
    monkeypatch.setattr(grids, "MIN_KEPT", 2)
    monkeypatch.setattr(grids, "MAX_BYTES", 3 * one.untyped_storage().nbytes())
    assert ask(400).data_ptr() == one.data_ptr() and len(known) == 1
    for number, side in enumerate(range(360, 400, 4)):
        ask(side)
        assert ask(400).data_ptr() == one.data_ptr()  # it was asked for last
        assert len(known) == min(number + 2, 3)
    ask(4000)
    assert len(known) == 2  # the fewest, although larger than the limit
    monkeypatch.setattr(grids, "MAX_KEPT", 3)
    for side in range(4, 40, 4):
        ask(side)
    assert len(known) == 3

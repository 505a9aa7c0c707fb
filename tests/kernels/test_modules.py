"""GroupWindowAttention against timm's WindowAttention on whole windows."""

from __future__ import annotations

import numpy as np
import pytest
import torch
from timm.models.swin_transformer import WindowAttention

import greenmim_kernels as gk
from greenmim_kernels.modules import GroupWindowAttention


@pytest.mark.parametrize("backend", ["reference", "cpp"])
def test_equals_timm_on_whole_windows(backend):
    torch.manual_seed(0)
    theirs = WindowAttention(dim=24, num_heads=3, window_size=(4, 4)).double()
    ours = GroupWindowAttention(24, 4, 3).double()
    ours.load_state_dict(theirs.state_dict())
    x = torch.randn(2, 8, 12, 24, dtype=torch.float64)
    windows = x.unflatten(1, (2, 4)).unflatten(3, (3, 4)).transpose(2, 3)  # [2, 2, 3, 4, 4, 24]
    expected = theirs(windows.flatten(0, 2).flatten(1, 2)).reshape(windows.shape)
    part = gk.group_partition(np.ones((8, 12), dtype=bool), 4)
    with gk.use_backend(backend):
        out = ours(x.flatten(1, 2), part).unflatten(1, (8, 12))
    out = out.unflatten(1, (2, 4)).unflatten(3, (3, 4)).transpose(2, 3)
    torch.testing.assert_close(out, expected, rtol=0, atol=1e-13)


def test_errors():
    with pytest.raises(ValueError, match="num_heads must divide dim = 10, got 3"):
        GroupWindowAttention(10, 7, 3)
    part = gk.group_partition(np.ones((8, 8), dtype=bool), 4)
    with pytest.raises(ValueError, match="windows of"):
        GroupWindowAttention(8, 7, 2)(torch.zeros(1, 64, 8), part)


def test_window_sizes_of_any_integer_type():
    for size in (7, np.int64(7), (7, 7), [7, 7]):
        assert gk.modules.GroupWindowAttention(8, size, 2).window_size == (7, 7)
    with pytest.raises(ValueError, match="window_size=0"):
        gk.modules.GroupWindowAttention(8, 0, 2)

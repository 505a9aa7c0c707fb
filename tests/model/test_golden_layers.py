"""Window attention and patch merging against the published code's numbers (float64 oracle runs).

Tolerances are those written beside the golden files: 1e-9 in float64, 1e-4 in float32.
"""

from __future__ import annotations

import numpy as np
import pytest
import torch
from timm.models.swin_transformer import PatchMerging

import greenmim_kernels as gk
from greenmim import ModelConfig
from greenmim.encoders.swin import SwinEncoder
from greenmim.planning import Planner
from greenmim_kernels.modules import GroupWindowAttention

from .conftest import DATA, load_arrays, load_json

TOLERANCE = {torch.float64: 1e-9, torch.float32: 1e-4}
MERGINGS = sorted(path.name for path in DATA.glob("patchmerging_*.npz"))


def upsample(unit_mask: np.ndarray, grid: tuple[int, int]) -> np.ndarray:
    """Golden masks have 1 = masked; tokens here are True = visible."""
    visible = unit_mask == 0
    return visible.repeat(grid[0] // visible.shape[0], 0).repeat(grid[1] // visible.shape[1], 1)


def load_parameters(module: torch.nn.Module, arrays: dict[str, np.ndarray]) -> None:
    prefix = "param."
    state = {
        name.removeprefix(prefix): torch.from_numpy(value).to(next(module.parameters()).dtype)
        for name, value in arrays.items()
        if name.startswith(prefix)
    }
    module.load_state_dict(state, strict=True)


def check(module, out, x, arrays, dtype) -> None:
    """Compare an output and, where the file has them, all gradients of sum(out * g)."""
    compare = {"rtol": 0, "atol": TOLERANCE[dtype]}
    torch.testing.assert_close(out.double(), torch.from_numpy(arrays["out"]), **compare)
    if "grad_x" not in arrays:
        return
    (out * torch.from_numpy(arrays["g"]).to(dtype)).sum().backward()
    torch.testing.assert_close(x.grad.double(), torch.from_numpy(arrays["grad_x"]), **compare)
    for name, parameter in module.named_parameters():
        expected = torch.from_numpy(arrays[f"grad.{name}"])
        torch.testing.assert_close(parameter.grad.double(), expected, **compare)


@pytest.mark.parametrize("dtype", TOLERANCE, ids=str)
@pytest.mark.parametrize(
    "case", load_json("attention_index.json")["cases"], ids=lambda case: case["file"]
)
def test_window_attention(case, dtype, backend):
    arrays = load_arrays(case["file"])
    grid = (case["resolution"],) * 2
    visible = upsample(arrays["unit_mask"], grid)
    np.testing.assert_array_equal(np.argwhere(visible), arrays["coords"])
    layer = GroupWindowAttention(case["dim"], case["window"], case["heads"]).to(dtype)
    load_parameters(layer, arrays)
    part = gk.group_partition(visible, case["window"], case["shift"])
    x = torch.from_numpy(arrays["x"]).to(dtype).requires_grad_()
    check(layer, layer(x, part), x, arrays, dtype)


@pytest.mark.parametrize("dtype", TOLERANCE, ids=str)
@pytest.mark.parametrize("file", MERGINGS)
def test_patch_merging(file, dtype):
    """The files hold tokens in row-major order, the encoder another one."""
    arrays = load_arrays(file)
    grid, mask = arrays["resolution_hw"], arrays["unit_mask"]
    planner = Planner(ModelConfig(image_size=tuple(32 * side for side in mask.shape)))
    units, scale = (mask == 0).reshape(1, -1), int(grid[0]) // mask.shape[0]
    fine, coarse = (planner.positions(units, side)[0] for side in (scale, scale // 2))
    row, column = np.divmod(np.sort(fine), grid[1])
    np.testing.assert_array_equal(np.stack([row, column], 1), arrays["coords"])
    merge = PatchMerging(arrays["x"].shape[-1]).to(dtype)
    merge.norm.eps = 1e-6
    load_parameters(merge, arrays)
    x = torch.from_numpy(arrays["x"]).to(dtype).requires_grad_()
    out = SwinEncoder.merge(merge, x[:, fine.argsort().argsort()])[:, coarse.argsort()]
    check(merge, out, x, arrays, dtype)
    if "official_out_wrong" in arrays:  # wider than high: the published code errs here
        wrong = torch.from_numpy(arrays["official_out_wrong"])
        assert (out.double() - wrong).abs().max() > 0.1


def test_all_golden_files_are_there():
    assert len(load_json("attention_index.json")["cases"]) == 11
    assert len(MERGINGS) == 4

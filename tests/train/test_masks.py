"""Masks of every kind and ratio."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest
from crew import command, records
from hypothesis import given, settings
from hypothesis import strategies as st

from greenmim.checkpoint import load_checkpoint
from greenmim.cli import main
from greenmim.masking import block_visible, draw_visible, num_visible_units, random_visible


@settings(max_examples=60, deadline=None)
@given(
    seed=st.integers(0, 10_000),
    grid=st.tuples(st.integers(1, 12), st.integers(1, 12)),
    ratio=st.floats(0, 0.99),
    batch=st.none() | st.integers(1, 4),
)
def test_blocks_hide_as_many_units_as_random_masks(seed, grid, ratio, batch) -> None:
    units = grid[0] * grid[1]
    try:
        count = num_visible_units(units, ratio)
    except ValueError:
        with pytest.raises(ValueError, match="hides all"):
            block_visible(np.random.default_rng(seed), grid, ratio, batch)
        return
    visible = block_visible(np.random.default_rng(seed), grid, ratio, batch)
    assert visible.dtype == bool and visible.shape == (() if batch is None else (batch,)) + (units,)
    assert (visible.sum(-1) == count).all()
    again = block_visible(np.random.default_rng(seed), grid, ratio, batch)
    assert np.array_equal(visible, again)


def test_kinds_of_masks() -> None:
    for kind, make in (("random", lambda rng: random_visible(rng, 6, 0.5)),
                       ("block", lambda rng: block_visible(rng, (2, 3), 0.5))):  # fmt: skip
        drawn = draw_visible(np.random.default_rng(1), (2, 3), 0.5, kind=kind)
        assert np.array_equal(drawn, make(np.random.default_rng(1)))
    with pytest.raises(ValueError, match="kind must be random or block, got 'blocks'"):
        draw_visible(np.random.default_rng(1), (2, 3), 0.5, kind="blocks")


def test_blocks_are_blocks_and_everywhere() -> None:
    rng = np.random.default_rng(0)
    masks = block_visible(rng, (14, 14), 0.4, batch=400).reshape(-1, 14, 14)
    alike = (masks[:, 1:] == masks[:, :-1]).mean()  # neighbours that are both visible or hidden
    assert alike > 0.85  # 0.52 for single units
    hidden = 1 - masks.mean(0)
    # Every unit now and then; the corners, which few blocks cover, least.
    assert 0.05 < hidden.min() == hidden[[0, 0, -1, -1], [0, -1, 0, -1]].min()
    assert hidden.max() < 0.7


@pytest.mark.parametrize("kind", ["random", "block"])
@pytest.mark.parametrize("ratio", ["0.2", "0.8"])
def test_masks_of_every_kind_train(
    kind: str, ratio: str, tiny: Path, photos: Path, tmp_path: Path
) -> None:
    more = ("--mask.kind", kind, "--mask.ratio", ratio, "--epochs", "1")
    for name, extra in (("batch", ()), ("image", ("--mask-per-image",))):
        assert main(command(tiny, photos, tmp_path / name, *more, *extra)) == 0
        state = load_checkpoint(tmp_path / name / "checkpoints" / "last.pth")
        assert state["recipe"]["mask"] == {
            "ratio": float(ratio), "kind": kind, "per_image": name == "image",
        }  # fmt: skip
        found = records(tmp_path / name, "train")
        assert all(r["loss"] > 0 for r in found)

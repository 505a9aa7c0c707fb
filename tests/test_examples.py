"""The examples learn, in fewer than 60 lines each."""

from __future__ import annotations

import importlib
import itertools
import pathlib
import sys

import pytest
import torch

pytestmark = pytest.mark.slow

EXAMPLES = pathlib.Path(__file__).parents[1] / "examples"


@pytest.mark.parametrize("name", ["mixed_images", "masked_volume", "simmim_step", "monai_step"])
def test_it_learns(name, capsys):
    if name == "monai_step":
        pytest.importorskip("monai")
        pytest.importorskip("einops")
    losses = importlib.import_module(f"examples.{name}").main(
        steps=30 if name == "monai_step" else 60
    )
    assert sum(losses[-10:]) < 0.8 * sum(losses[:10])
    said = capsys.readouterr().out
    assert said.splitlines()[-1].startswith("loss 0.")
    assert ("fused: 4 x" in said) == name.endswith("_step")
    assert len((EXAMPLES / f"{name}.py").read_text().splitlines()) < 60


@pytest.mark.parametrize("grid", [(3,), (2, 3), (2, 3, 2)])
def test_patches_are_cut_from_a_whole(grid):
    """A wave is one across patches: its neighbours' sum is a fixed multiple of it."""
    from examples.waves import waves

    torch.manual_seed(0)
    x = waves(grid, 4, 1)[0]
    whole = torch.empty([4 * side for side in grid])
    for token, place in enumerate(itertools.product(*map(range, grid))):
        whole[tuple(slice(4 * p, 4 * p + 4) for p in place)] = x[token].view([4] * len(grid))
    for axis in range(len(grid)):
        line = whole.movedim(axis, -1).double()
        inner = line[..., 1:-1]
        sums = (line[..., :-2] + line[..., 2:])[inner.abs() > 0.1]
        ratio = sums / inner[inner.abs() > 0.1]
        assert ratio.std() < 1e-4 and line.std() > 0.01


def test_the_demo_takes_a_preset(tmp_path, monkeypatch):
    pytest.importorskip("skimage")
    demo = importlib.import_module("examples.demo")
    taken = []
    monkeypatch.setattr(demo.cli, "main", lambda argv: taken.append(argv) or 2)
    argv = ["demo.py", "--preset", "mine", "--out", str(tmp_path), "--epochs", "3"]
    monkeypatch.setattr(sys, "argv", argv)
    assert demo.auto_cli(demo.demo) == 2
    assert taken[0][:3] == ["pretrain", "--config", "mine"] and taken[0][-2:] == ["--epochs", "3"]

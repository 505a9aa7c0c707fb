"""The small runs of docs/findings.md: their data, the arm that is as published, their table."""

from __future__ import annotations

import json
import re

import numpy as np
import pytest
import torch
from PIL import Image

from benchmarks import findings, plots, tables
from greenmim.config import ModelConfig
from greenmim.mim import GreenMIM

SMALL = ModelConfig(
    image_size=96, window_size=3, embed_dim=16, depths=(1, 1, 1, 1), num_heads=(1, 2, 4, 8),
    decoder_dim=32, decoder_depth=1, decoder_heads=2,
)  # fmt: skip


@pytest.fixture
def data(tmp_path, monkeypatch):
    """Thirty drawings of two kinds, prepared, for a small model and batches of six."""
    rng = np.random.default_rng(0)
    for number in range(30):
        folder = tmp_path / "drawings" / ("animals", "tools")[number % 2] / "nested"
        folder.mkdir(parents=True, exist_ok=True)
        pixels = rng.integers(0, 256, (20, 30, 4), dtype=np.uint8)
        pixels[..., number % 2] = 255
        Image.fromarray(pixels).save(folder / f"{number}.png")
    (tmp_path / "drawings" / "logos").mkdir()
    Image.new("RGB", (9, 900)).save(tmp_path / "drawings" / "logos" / "too_long.png")
    findings.prepare(tmp_path / "drawings", tmp_path / "data")
    monkeypatch.setattr(findings, "MODEL", SMALL)
    monkeypatch.setattr(findings, "BATCH", 6)
    monkeypatch.setattr(findings, "LABELS", (2,))
    tuned = {
        "untrained": findings.Tuning("untrained", 1.0, {"2": 1, "all": 2}),
        "longer": findings.Tuning("correct", 0.8, {"all": 1}, 3e-4, 0.5),
    }
    monkeypatch.setattr(findings, "TUNED", tuned)
    return tmp_path / "data"


def test_what_is_held_out_is_nowhere_else(data, tmp_path):
    names = {
        place: {f"{f.parent.name}/{f.name}" for f in (data / place).rglob("*.jpg")}
        for place in ("all", "val", "labelled", "labelled-val")
    }
    assert {place: len(found) for place, found in names.items()} == {
        "all": 24, "val": 6, "labelled": 24, "labelled-val": 6,
    }  # fmt: skip
    assert not names["all"] & names["val"] and names["labelled"] == names["all"]
    with Image.open(next((data / "all").rglob("*.jpg"))) as picture:
        assert min(picture.size) == findings.SIDE
    findings.prepare(tmp_path / "drawings", tmp_path / "again")
    assert len(list((tmp_path / "again" / "val").rglob("*.jpg"))) == 6


def test_the_published_placement_mixes_latents_and_nothing_else(monkeypatch):
    torch.manual_seed(0)
    model, images = findings.PublishedPlacement(SMALL).eval(), torch.randn(2, 3, 96, 96)
    plain = GreenMIM(SMALL).eval()
    plain.load_state_dict(model.state_dict())
    visible = np.arange(9) < 3
    with torch.no_grad():
        monkeypatch.setattr(torch, "randperm", torch.arange)
        assert torch.equal(model(images, visible).loss, plain(images, visible).loss)
        monkeypatch.setattr(torch, "randperm", lambda n: torch.arange(n).roll(1))
        for loss_only in (False, True):
            mixed = model(images, visible, loss_only=loss_only)
            assert mixed.loss != plain(images, visible).loss
            assert torch.equal(mixed.latent, plain(images, visible).latent)


def test_arms_are_trained_and_measured_and_done_once(data, tmp_path, capsys):
    out = tmp_path / "findings.json"
    findings.run(data, tmp_path / "runs", 2, [0], out)
    assert capsys.readouterr().out.count("'arm'") == 4
    findings.run(data, tmp_path / "runs", 2, [0], out)
    assert "'arm'" not in capsys.readouterr().out
    result = json.loads(out.read_text())
    arms = ["untrained", *findings.ARMS]
    assert [(row["arm"], row["seed"]) for row in result["rows"]] == [(arm, 0) for arm in arms]
    assert result["images"]["labelled-val"] == 6
    for row in result["rows"]:
        assert ("held_out_loss" in row) == (row["arm"] != "untrained")
        assert list(row["top1"]) == ["2", "all"]
        assert all(0 <= x <= 1 for found in row["top1"].values() for x in found.values())
    losses = {row["held_out_loss"] for row in result["rows"] if "held_out_loss" in row}
    assert len(losses) == 3  # arms are different runs
    result["rows"] += [{**row, "seed": 1} for row in result["rows"]]
    table = tables.findings_table(result)
    assert re.search(r"^\| untrained \| 2 \|  \| \d+\.\d ± \d+\.\d \|", table, re.M), table
    assert re.search(r"^\| mask per image \| 2 \| \d\.\d{4} ± 0\.\d{4} \|", table, re.M), table
    findings.tune(data, tmp_path / "runs", [0], out)
    findings.tune(data, tmp_path / "runs", [0], out)
    result |= {"finetuned": json.loads(out.read_text())["finetuned"]}
    assert [(row["arm"], row["labels"], row["epoch"]) for row in result["finetuned"]] == [
        ("untrained", "2", 1), ("untrained", "all", 2), ("longer", "all", 1),
    ]  # fmt: skip
    assert len(list((tmp_path / "runs" / "labelled-2").rglob("*.jpg"))) == 4
    assert len({row["loss"] for row in result["finetuned"]}) == 3
    table = tables.finetuned_table(result)
    assert re.search(r"^\| longer \|  \| \d+\.\d ± 0\.0 \(1 seeds\) \|", table, re.M), table
    assert {file.name for file in plots.draw_findings(result, tmp_path)} == {
        "findings.png", "findings.svg",
    }  # fmt: skip

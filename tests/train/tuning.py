"""The small run of fine-tuning that tests are on."""

from __future__ import annotations

from pathlib import Path

from greenmim.checkpoint import load_checkpoint
from greenmim.cli import main

TINY = """
epochs: 2
device: cpu
threads: 1
model:
  image_size: [96, 64]
  window_size: 2
  embed_dim: 16
  depths: [1, 2, 1, 1]
  num_heads: [1, 2, 4, 8]
data:
  batch_size: 4
  workers: 0
optim:
  lr: 2.0e-3
schedule:
  warmup_epochs: 0.5
log:
  every_steps: 1
"""
SIZE = (96, 64)  # of TINY


def command(recipe_file: Path, root: Path, work_dir: Path, *more: str) -> list[str]:
    return [
        *("finetune", "--config", str(recipe_file), "--data.root", str(root)),
        *("--work-dir", str(work_dir), *more),
    ]


def newest(run: Path) -> dict:
    return load_checkpoint(run / "checkpoints" / "last.pth")


def complaint(capsys, *arguments: str) -> str:
    assert main(list(arguments)) == 2
    text = capsys.readouterr().err
    assert text.startswith("greenmim: error: ") and text.count("\n") == 1, text
    return text

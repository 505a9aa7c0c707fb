"""A folder of small pictures and the command line of a run that takes seconds."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
from crew import EVERY
from PIL import Image
from tar_files import encoded, name_of
from train_pictures import coloured, picture
from tuning import TINY as TUNING

from tests.archives import write_tar

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
  decoder_dim: 32
  decoder_depth: 1
  decoder_heads: 2
data:
  batch_size: 3
  repeats: 2
  workers: 0
mask:
  ratio: 0.5
optim:
  lr: 1.0e-3
schedule:
  warmup_epochs: 0.5
log:
  every_steps: 1
"""


@pytest.fixture(scope="session")
def photos(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Six pictures, some in class folders: 12 positions, 4 updates per epoch of the tiny run."""
    folder = tmp_path_factory.mktemp("data") / "photos"
    for index, place in enumerate((".", ".", "cats", "cats", "dogs/big", "dogs/big")):
        (folder / place).mkdir(parents=True, exist_ok=True)
        Image.fromarray(picture(index)).save(folder / place / f"{index}.png")
    return folder


@pytest.fixture(scope="session")
def tiny(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The recipe file of the tiny run."""
    path = tmp_path_factory.mktemp("config") / "tiny.yaml"
    path.write_text(TINY)
    return path


@pytest.fixture
def resumable(tiny: Path, photos: Path, tmp_path: Path):
    """Makes commands: a run in `tmp_path / name`, where two processes have the batches of one."""

    def make(name: str, size: int, *more: str, data: Path = photos) -> list[str]:
        return [
            *("pretrain", "--config", str(tiny), "--data.root", str(data)),
            *("--work-dir", str(tmp_path / name), "--optim.accumulate", str(max(2 // size, 1))),
            *("--checkpoint.every-steps", str(EVERY), "--resume", *more),
        ]

    return make


@pytest.fixture
def tar(tmp_path: Path) -> Path:
    """Twelve pictures and what is none of them."""
    members = {f"class{n % 3}/{name_of(n)}": encoded(n) for n in range(12)}
    return write_tar(tmp_path / "t.tar", {"readme.txt": b"text", "a/._0.png": b"mac", **members})


@pytest.fixture
def shards(tmp_path: Path) -> Path:
    """Four shards of three samples, each a label and an image between two that do not count."""
    for shard in range(4):
        members = {}
        for number in range(3 * shard, 3 * shard + 3):
            key = f"{number:02d}"
            members |= {
                f"{key}.cls": b"7",
                f"{key}.seg.png": b"no",
                name_of(number): encoded(number),
            }
            members[f"{key}.webp"] = b"no"
        write_tar(tmp_path / "shards" / f"train-{shard}.tar", members)
    return tmp_path / "shards"


@pytest.fixture(params=["tar", "wds"])
def root(request, tmp_path: Path) -> str:
    if request.param == "tar":
        return f"tar/{request.getfixturevalue('tar')}"
    return f"wds/{request.getfixturevalue('shards')}/train-{{0..3}}.tar"


@pytest.fixture(autouse=True)
def _threads_left_alone():
    before = torch.get_num_threads()
    yield
    torch.set_num_threads(before)


@pytest.fixture(scope="session")
def finished_run(photos: Path, tiny: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The folder of a tiny run that went through, with a checkpoint after each of its 8 updates."""
    from greenmim.cli import main

    folder = tmp_path_factory.mktemp("runs") / "finished"
    code = main(
        ["pretrain", "--config", str(tiny), "--data.root", str(photos), "--work-dir", str(folder)]
        + ["--checkpoint.every-steps", "1", "--checkpoint.keep-last", "8"]
    )
    assert code == 0
    return folder


@pytest.fixture(scope="session")
def recipe_file(tmp_path_factory) -> Path:
    path = tmp_path_factory.mktemp("config") / "finetune.yaml"
    path.write_text(TUNING)
    return path


@pytest.fixture(scope="session")
def labelled(tmp_path_factory) -> tuple[Path, Path]:
    """18 images of three colours to learn from: 4 updates an epoch; and 9 others."""
    folder = tmp_path_factory.mktemp("labelled")
    return coloured(folder / "train", 6), coloured(folder / "val", 3, first=50)

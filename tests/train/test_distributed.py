"""Runs of 2 and 4 processes (Gloo) are the run of one process that accumulates their batches."""

from __future__ import annotations

import json
from collections import Counter
from pathlib import Path

import pytest
import torch
from crew import losses, run_crew, weights
from PIL import Image
from torch.distributed.checkpoint import FileSystemReader
from train_pictures import picture

from greenmim.data.dataset import AugmentedImages
from greenmim.data.sampler import EpochSampler
from greenmim.training.log import read_log


@pytest.fixture(scope="module")
def ten_photos(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Ten pictures: 20 positions, 2 updates of 8 per epoch, 4 left out."""
    folder = tmp_path_factory.mktemp("ten")
    for index in range(10):
        Image.fromarray(picture(index)).save(folder / f"{index}.png")
    return folder


@pytest.fixture(scope="module")
def command(tiny: Path, ten_photos: Path):
    """The command of a run whose global batch is always 4 micro-batches of 2 images."""

    def make(work_dir: Path, size: int, *more: str) -> list[str]:
        return [
            *("pretrain", "--config", str(tiny), "--data.root", str(ten_photos)),
            *("--work-dir", str(work_dir), "--data.batch-size", "2", "--optim.accumulate"),
            *(str(4 // size), "--epochs", "3", "--schedule.warmup-epochs", "0", *more),
        ]

    return make


def logged(folder: Path, name: str) -> dict[int, float]:
    return {r["step"]: r[name] for r in read_log(folder / "log.jsonl") if r["event"] == "train"}


def assert_close(a: Path, b: Path, first: int = 1) -> None:
    """The same run but for the order in which float32 sums are taken."""
    # The norm, too: AdamW hides a gradient that is a multiple of the right one.
    for name, tolerance in (("loss", 2e-6), ("grad_norm", 2e-5)):
        ours, theirs = logged(a, name), logged(b, name)
        assert sorted(ours) == list(range(first, 7))
        assert ours == pytest.approx({step: theirs[step] for step in ours}, rel=tolerance)
    for name, weight in weights(a).items():
        torch.testing.assert_close(weight, weights(b)[name], rtol=0, atol=2e-5, msg=name)


# Stochastic depth is drawn in the forward pass: it must not depend on the process either.
MORE = ("--model.drop-path", "0.2", "--mask-per-image", "--optim.clip", "0.05")


EVERY = ("--checkpoint.every-steps", "1", "--checkpoint.keep-last", "6")


@pytest.fixture(scope="module")
def alone(command, made_once) -> Path:
    """One process; a checkpoint after every update."""

    def train(folder: Path) -> None:
        run_crew(command(folder / "run", 1, *MORE, *EVERY), 1, folder)

    return made_once("alone", train) / "run"


@pytest.mark.parametrize(
    ("size", "more"),
    [
        (2, ()),
        (4, ()),
        (2, ("--strategy", "fsdp")),
        (4, ("--strategy", "fsdp", "--activation-checkpointing", "true")),
        (1, ("--activation-checkpointing", "true")),
        (2, ("--activation-checkpointing", "true", "--data.workers", "1")),
    ],
    ids=[
        "ddp-2",
        "ddp-4",
        "fsdp-2",
        "fsdp-4-checkpointing",
        "checkpointing",
        "ddp-2-checkpointing",
    ],
)
def test_any_number_of_processes_gives_the_same_run(
    size: int, more: tuple[str, ...], command, alone: Path, tmp_path: Path
) -> None:
    text = run_crew(command(tmp_path / "run", size, *MORE, *more), size, tmp_path)
    assert_close(tmp_path / "run", alone)
    assert f"updates of 8 (2 x {4 // size} accumulated x {size} processes); left out: 4," in text
    start = read_log(tmp_path / "run" / "log.jsonl")[0]
    assert start["processes"] == size and start["left_out_per_epoch"] == 4


@pytest.mark.parametrize(
    ("size", "more"),
    [(1, ()), (4, ()), (4, ("--strategy", "fsdp"))],
    ids=["1", "4", "4-fsdp"],
)
@pytest.mark.parametrize("saved", ["ddp", "fsdp"])
def test_saved_on_two_resumed_on_any(
    saved: str,
    size: int,
    more: tuple[str, ...],
    command,
    alone: Path,
    saved_on_two: dict[str, Path],
    tmp_path: Path,
) -> None:
    resume = ("--resume", str(saved_on_two[saved] / "checkpoints" / "step_00000003.pth"))
    text = run_crew(command(tmp_path / "run", size, *MORE, *more, *resume), size, tmp_path)
    assert "resumed after update 3" in text
    assert_close(tmp_path / "run", alone, first=4)


@pytest.fixture(scope="module")
def saved_on_two(command, made_once) -> dict[str, Path]:
    """Runs of two processes with a checkpoint after every update."""
    found = {}
    for strategy in ("ddp", "fsdp"):

        def train(folder: Path, strategy: str = strategy) -> None:
            more = (*MORE, *EVERY, "--strategy", strategy)
            run_crew(command(folder / "run", 2, *more), 2, folder)

        found[strategy] = made_once(f"saved_on_two_{strategy}", train) / "run"
    return found


def test_two_processes_resume_to_the_last_bit(
    command, saved_on_two: dict[str, Path], tmp_path: Path
) -> None:
    whole = saved_on_two["ddp"]
    resume = ("--resume", str(whole / "checkpoints" / "step_00000003.pth"))
    run_crew(command(tmp_path / "run", 2, *MORE, *resume), 2, tmp_path)
    assert losses(tmp_path / "run") == {step: losses(whole)[step] for step in (4, 5, 6)}
    assert all(torch.equal(w, weights(whole)[n]) for n, w in weights(tmp_path / "run").items())


def test_fsdp_keeps_slices_and_ddp_copies(saved_on_two: dict[str, Path]) -> None:
    """Each process writes what it holds: a moment in two chunks, or in one."""
    for strategy, chunks in (("ddp", 1), ("fsdp", 2)):
        folder = saved_on_two[strategy] / "checkpoints" / "step_00000003.optimizer"
        entries = FileSystemReader(folder).read_metadata().state_dict_metadata
        moment = entries["encoder.layers.2.blocks.0.mlp.fc1.weight/exp_avg"]
        assert len(moment.chunks) == chunks
        files = {file.name for file in folder.glob("*.distcp")}
        assert {name.split("_")[2] for name in files} == {"0", "1"}  # both wrote


def test_the_files_of_both_strategies_are_alike(saved_on_two: dict[str, Path]) -> None:
    """What reads a checkpoint (reconstruct, convert, export) need not know how it was trained."""
    a, b = weights(saved_on_two["ddp"]), weights(saved_on_two["fsdp"])
    assert {n: (t.shape, t.dtype) for n, t in a.items()} == {
        n: (t.shape, t.dtype) for n, t in b.items()
    }


def note_items(rank: int) -> None:
    """In every process: write down which images are asked for (loader processes are forks)."""
    real = AugmentedImages.__getitem__

    def __getitem__(self, item):
        sample = real(self, item)
        line = json.dumps([*item, float(sample.image.double().sum())])
        with open(f"{self.note_folder}/items_{rank}.jsonl", "a") as file:
            file.write(line + "\n")
        return sample

    AugmentedImages.note_folder = note_folder()
    AugmentedImages.__getitem__ = __getitem__


def note_folder() -> str:
    """Where `note_items` writes: beside the outputs of the process."""
    return str(Path("/proc/self/fd/1").resolve().parent)


def items(folder: Path) -> list[tuple]:
    lines = [line for file in folder.glob("items_*.jsonl") for line in file.open()]
    return [tuple(json.loads(line)) for line in lines]


def test_every_image_is_seen_once_per_epoch_with_the_same_crop(command, tmp_path: Path) -> None:
    seen = {}
    for size, workers in ((1, "0"), (2, "2"), (4, "1")):
        folder = tmp_path / str(size)
        argv = command(folder / "run", size, "--data.workers", workers)
        run_crew(argv, size, folder, setup=note_items)
        # A loader asks ahead for nothing beyond the last update.
        seen[size] = sorted(items(folder))
    for epoch in range(3):
        positions = Counter(item[3] for item in seen[1] if item[2] == epoch)
        assert len(positions) == 16 and set(positions.values()) == {1}
    assert seen[1] == seen[2] == seen[4]


@pytest.mark.parametrize("size", [2, 3, 5])
def test_ranks_take_an_epoch_apart_without_overlap(size: int) -> None:
    samplers = [
        EpochSampler(101, 3, epochs=2, accumulate=2, seed=7, rank=rank, world_size=size)
        for rank in range(size)
    ]
    for epoch in range(2):
        found = [i.position for s in samplers for batch in s for i in batch if i.epoch == epoch]
        assert len(found) == len(set(found)) == 101 // (6 * size) * 6 * size

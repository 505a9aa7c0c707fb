"""What is particular to slices: graphs of blocks, pictures of a model that no process has whole."""

from __future__ import annotations

import functools
from pathlib import Path

import pytest
import torch
from crew import command, losses, run_crew
from tensorboard.backend.event_processing.event_accumulator import EventAccumulator
from test_watch import TINY

from greenmim import pictures
from greenmim.config import ENCODERS
from greenmim.data.dataset import AugmentedImages
from greenmim.data.images import Folder
from greenmim.mim import GreenMIM
from greenmim.recipe import DataConfig, MaskConfig
from greenmim.training import passes
from greenmim.training.passes import whole_weights

# Twelve blocks with one function between them: more than the compiler's own limit.
MANY = ("--model.depths", "[2,3,4,2]", "--model.drop-path", "0.1")


def eager_graphs(rank: int) -> None:
    """Trace and check guards as ever, but run the graphs as they are."""
    torch.compile = functools.partial(torch.compile, backend="eager")


def pictures_in(run: Path) -> list[int]:
    events = EventAccumulator(str(run / "tensorboard"))
    events.Reload()
    return [e.step for tag in events.Tags()["images"] for e in events.Images(tag)]


@pytest.mark.parametrize("encoder", ENCODERS)
def test_compiled_blocks_train_and_draw_as_plain_ones(
    encoder: str, tiny: Path, photos: Path, tmp_path: Path
) -> None:
    many = (*MANY, "--model.encoder", encoder)
    for name, more in (("plain", ()), ("compiled", ("--compile", "true"))):
        argv = command(tiny, photos, tmp_path / name, "--strategy", "fsdp", *many, *more)
        argv += ["--log.pictures-every-epochs", "1"]
        text = run_crew(argv, 2, tmp_path / "outputs", setup=eager_graphs)
        assert "picture" not in text, text
        assert pictures_in(tmp_path / name) == [2, 4]
    ours, theirs = losses(tmp_path / "compiled"), losses(tmp_path / "plain")
    assert ours == pytest.approx(theirs, rel=2e-6)


def nothing_to_draw(rank: int) -> None:
    """The second process could read no image; the first one fails in drawing."""

    def fails(*arguments):
        raise OSError("Stale file handle" if rank else "no room for a picture")

    pictures.open_fitted = fails
    pictures.draw_visible = fails


@pytest.mark.parametrize("strategy", ["ddp", "fsdp"])
def test_a_picture_that_fails_ends_no_run(
    strategy: str, tiny: Path, photos: Path, tmp_path: Path
) -> None:
    argv = command(tiny, photos, tmp_path / "run", "--strategy", strategy)
    argv += ["--log.pictures-every-epochs", "1"]
    text = run_crew(argv, 2, tmp_path / "outputs", setup=nothing_to_draw)
    told = "no more pictures are drawn, for one failed: no room for a picture"
    assert text.count(told) == 1 and "finished: 2 epochs, 4 updates" in text


def test_a_model_goes_on_learning_after_a_picture_that_failed(photos: Path, monkeypatch) -> None:
    data = DataConfig(root=str(photos))
    dataset = AugmentedImages(Folder(str(photos)), data, (96, 64), 0)
    album = pictures.Album(dataset, 2, MaskConfig(0.5))

    def fails(*arguments):
        raise RuntimeError("out of memory")

    monkeypatch.setattr(pictures, "shown", fails)
    model = GreenMIM(TINY)
    with pytest.raises(RuntimeError, match="out of memory"):
        album.draw(model.train())
    assert model.training and model.encoder.training


def test_whole_weights_come_to_the_cpu_one_by_one(monkeypatch) -> None:
    """At no time is more than one whole tensor where the slices are."""
    on_device = most = 0

    class Whole:
        def cpu(self) -> str:
            nonlocal on_device
            on_device -= 1
            return "whole"

    class Slice:
        def full_tensor(self) -> Whole:
            nonlocal on_device, most
            on_device += 1
            most = max(most, on_device)
            return Whole()

    class Model:
        def state_dict(self) -> dict:
            return {"a": Slice(), "b": Slice(), "c": "plain"}

    monkeypatch.setattr(passes, "DTensor", Slice)
    assert whole_weights(Model(), keep=True) == {"a": "whole", "b": "whole", "c": "plain"}
    assert most == 1
    assert whole_weights(Model(), keep=False) == {}

"""Runs on tars and shards: resume, processes, what cannot be read, messages."""

from __future__ import annotations

import json
import sys
import tarfile
from pathlib import Path

import pytest
import torch
from crew import losses, run_crew
from tar_files import ALL, name_of, read, source_of

from greenmim.cli import main
from greenmim.data.dataset import AugmentedImages
from greenmim.data.sampler import EpochSampler, Item
from greenmim.data.sources import find_source, open_shard
from greenmim.mim import GreenMIM
from greenmim.pictures import Album
from greenmim.recipe import DataConfig, MaskConfig, Recipe
from tests.archives import write_tar

# ---- runs ---------------------------------------------------------------------------------------


def command(tiny: Path, root: str, work_dir: Path, *more: str) -> list[str]:
    return [
        *("pretrain", "--config", str(tiny), "--data.root", root, "--data.repeats", "1"),
        *("--work-dir", str(work_dir), *more),
    ]


def log_of(folder: Path) -> list[dict]:
    return [json.loads(line) for line in (folder / "log.jsonl").read_text().splitlines()]


def test_a_run_is_the_same_after_a_stop(tiny: Path, root: str, tmp_path: Path, capsys) -> None:
    every = ("--checkpoint.every-steps", "3", "--log.pictures-every-epochs", "1")
    assert main(command(tiny, root, tmp_path / "one", *every)) == 0
    assert main(command(tiny, root, tmp_path / "two", *every)) == 0
    (tmp_path / "two" / "checkpoints" / "step_00000008.pth").unlink()
    again = command(tiny, root, tmp_path / "two", *every, "--data.workers", "2")
    assert main([*again, "--resume"]) == 0
    assert "resumed after update 6" in capsys.readouterr().out
    a, b = (
        torch.load(tmp_path / name / "checkpoints" / "last.pth", weights_only=True)["model"]
        for name in ("one", "two")
    )
    assert all(torch.equal(weight, b[name]) for name, weight in a.items())
    start = log_of(tmp_path / "one")[0]
    assert (start["images"], start["steps_per_epoch"]) == (12, 4)


@pytest.mark.parametrize(("prefix", "lengths"), [("wds", [3, 3, 3, 3]), ("tar", None)])
def test_a_run_keeps_neighbours_in_shards_together(
    prefix: str, lengths: list | None, shards: Path
) -> None:
    recipe = Recipe(work_dir="run", data=DataConfig(root=f"{prefix}/{shards}", batch_size=3))
    sampler = EpochSampler.of(recipe, find_source(recipe.data), 0, 1)
    assert (None if sampler.shards is None else sampler.shards.tolist()) == lengths


def test_two_processes_are_as_good_as_one(tiny: Path, root: str, tmp_path: Path) -> None:
    for size in (1, 2):
        more = ("--optim.accumulate", str(2 // size), "--data.workers", str(size - 1))
        run_crew(command(tiny, root, tmp_path / f"{size}", *more), size, tmp_path)
    one, two = losses(tmp_path / "1"), losses(tmp_path / "2")
    assert sorted(one) == [1, 2, 3, 4] and two == pytest.approx(one, rel=2e-6)


def test_the_images_of_a_skipped_update_are_named(
    tiny: Path, root: str, tmp_path: Path, monkeypatch
) -> None:
    calls, real = [], GreenMIM.forward

    def forward(self, *args, **kwargs):
        calls.extend([None] * torch.is_grad_enabled())  # operations are counted without
        out = real(self, *args, **kwargs)
        return out._replace(loss=out.loss * float("nan")) if len(calls) == 6 else out

    monkeypatch.setattr(GreenMIM, "forward", forward)
    assert main(command(tiny, root, tmp_path / "run")) == 0
    (skipped,) = (r for r in log_of(tmp_path / "run") if r["event"] == "skipped")
    source = source_of(root)
    sampler = EpochSampler(12, 3, epochs=2, shards=source.shards)
    assert skipped["step"] == 6
    assert skipped["files"] == [source.path(i.position) for i in list(sampler)[5]]


def test_dry_run(tiny: Path, root: str, tmp_path: Path, capsys) -> None:
    assert main(command(tiny, root, tmp_path / "run", "--dry-run")) == 0
    assert f"12 in {root}" in capsys.readouterr().out


def test_the_album_takes_spread_images_or_the_first_of_a_shard(tar: Path, shards: Path) -> None:
    for root, expected in ((f"tar/{tar}", [0, 4, 8]), (f"wds/{shards}", [0, 1, 2])):
        config = DataConfig(root=root)
        dataset = AugmentedImages(find_source(config), config, (96, 64), 0)
        assert dataset.source.some(3) == expected
        album = Album(dataset, 3, MaskConfig(0.5))
        assert album.images.shape == (3, 3, 96, 64)


# ---- what cannot be read ------------------------------------------------------------------------


def damage(path: Path, number: int) -> None:
    """Overwrite one image in a tar."""
    data = path.read_bytes()
    assert data.count(ALL[name_of(number)]) == 1
    rubbish = b"x" * len(ALL[name_of(number)])
    path.write_bytes(data.replace(ALL[name_of(number)], rubbish))


def test_an_unreadable_image_is_named_and_replaced(
    tiny: Path, root: str, tmp_path: Path, capsys
) -> None:
    path = tmp_path / ("t.tar" if root.startswith("tar") else "shards/train-1.tar")
    damage(path, 5)
    assert main(command(tiny, root, tmp_path / "run", "--data.workers", "2")) == 0
    name = f"{path}/class2/05.jpg" if root.startswith("tar") else f"{path}/05.jpg"
    named = [r for r in log_of(tmp_path / "run") if r["event"] == "unreadable_image"]
    assert [r["path"] for r in named] == [name]
    assert "1 unreadable images" in capsys.readouterr().out


def item(position: int) -> Item:
    return Item(0, 0, 0, position)


def test_a_shard_that_is_lost_is_replaced_by_others(shards: Path, monkeypatch) -> None:
    """Not by its own other images, or a run would end for one shard."""
    monkeypatch.setattr("greenmim.data.dataset.MAX_BAD_IN_A_ROW", 2)
    config = DataConfig(root=f"wds/{shards}")
    dataset = AugmentedImages(find_source(config), config, (96, 64), 0)
    (shards / "train-2.tar").unlink()
    for position in range(6, 9):
        sample = dataset[item(position)]
        assert sample.image is not None
        ((path, reason),) = sample.failures
        assert path == f"{shards}/train-2.tar/{position - 6}" and "No such file" in reason
    assert dataset.source.path(6) == f"{shards}/train-2.tar/0"
    tried = {dataset.source.stand_in(6, step) for step in range(12)}
    assert tried == set(range(12))


def test_a_shard_that_was_cut_short_keeps_its_first_images(shards: Path) -> None:
    path = shards / "train-1.tar"
    with tarfile.open(path) as archive:
        last = archive.getmember("05.jpg")
    source = source_of(f"wds/{shards}")
    path.write_bytes(path.read_bytes()[: last.offset_data + 100])
    assert read(source, 4) == ALL["04.png"]
    with pytest.raises(OSError, match="holds 2 images, not 3; it is damaged after 10 whole files"):
        source.open(5)
    path.write_bytes(path.read_bytes()[: last.offset + 100])
    assert [image.name for image in open_shard(str(path)).images] == ["03.jpg", "04.png"]


@pytest.mark.parametrize(
    ("given", "message"),
    [
        ("tar/{}/none.tar", "there is no tar file or folder {}/none.tar"),
        ("{}/none.tar", "there is no tar file or folder {}/none.tar"),
        ("tar/{}/empty.tar", "there is no image in it"),
        ("tar/{}/nothing", "there is no tar file"),
        ("tar/{}/text.tar", "it is no tar file, or a compressed one"),
        ("tar/{}/small.tar.gz", "without compression"),
        ("wds/{}/none-{{0..3}}.tar", "there is no shard {}/none-0.tar"),
        ("wds/{}/nothing", "there is no shard {}/nothing/*.tar"),
        ("wds/{}/empty.tar", "empty.tar: there is no image in it"),
        ("wds/{}/text.tar", "text.tar: it is no tar file"),
        ("wds/{}/bad/t.tar", "bad/_info.json has no splits.train"),
        ("hfids/a/b", "there is no reader for hfids/"),
        ("tar/{}/folders", "there is no tar file (*.tar) in it"),
        ("hfds/{}/nothing", "cannot be loaded"),
    ],
)
def test_bad_input_is_one_sentence(
    given: str, message: str, tiny: Path, tmp_path: Path, capsys
) -> None:
    (tmp_path / "nothing").mkdir()
    (tmp_path / "bad").mkdir()
    (tmp_path / "bad" / "_info.json").write_text('{"splits": {}}')
    write_tar(tmp_path / "empty.tar", {"notes.txt": b"none"})
    (tmp_path / "text.tar").write_text("this is no tar")
    (tmp_path / "folders" / "a.tar").mkdir(parents=True)
    with tarfile.open(tmp_path / "small.tar.gz", "w:gz") as archive:
        archive.add(tmp_path / "text.tar")
    root = given.format(tmp_path)
    assert main(command(tiny, root, tmp_path / "run")) == 2
    error = capsys.readouterr().err.strip().splitlines()[-1]
    assert error.startswith(f"greenmim: error: --data.root {root}")
    assert message.format(tmp_path) in error
    assert not (tmp_path / "run").exists()


@pytest.mark.parametrize(
    ("package", "prefix", "install"),
    [("webdataset", "wds", "'greenmim[data]'"), ("datasets", "hfds", "datasets")],
)
def test_a_missing_package(
    package: str, prefix: str, install: str, tiny: Path, tmp_path: Path, monkeypatch, capsys
) -> None:
    monkeypatch.setitem(sys.modules, package, None)
    assert main(command(tiny, f"{prefix}//data/x.tar", tmp_path / "run")) == 2
    error = capsys.readouterr().err
    assert f"needs the package {package}: pip install {install}" in error


def test_a_number_of_samples_is_for_shards(tiny: Path, tar: Path, tmp_path: Path, capsys) -> None:
    more = ("--data.num-samples", "12")
    assert main(command(tiny, f"tar/{tar}", tmp_path / "run", *more)) == 2
    assert "--data.num-samples goes with shards" in capsys.readouterr().err

"""Images from tars, shards and Hugging Face datasets: order, resume, replacements, messages."""

from __future__ import annotations

import io
import json
import os
import pickle
import sys
import tarfile
from collections import Counter
from pathlib import Path

import numpy as np
import pytest
import torch
from crew import losses, run_crew
from PIL import Image
from train_pictures import picture

from greenmim.augment import Finish
from greenmim.cli import main
from greenmim.config import ModelConfig
from greenmim.data import Batch, Collate, ImageFolder, make_loader
from greenmim.mim import GreenMIM
from greenmim.pictures import Album
from greenmim.planning import Planner
from greenmim.recipe import DataConfig, MaskConfig, Recipe, UserError
from greenmim.run import make_sampler
from greenmim.sampler import EpochSampler, Item, shard_order
from greenmim.shards import open_shard
from greenmim.sources import Source, find_source
from greenmim.world import World

CONFIG = ModelConfig(
    image_size=(96, 64), window_size=2, embed_dim=16, depths=(1, 2, 1, 1), num_heads=(1, 2, 4, 8)
)


def encoded(number: int) -> bytes:
    """PNG and JPEG in turn."""
    file = io.BytesIO()
    Image.fromarray(picture(number)).save(file, ("PNG", "JPEG")[number % 2])
    return file.getvalue()


def name_of(number: int) -> str:
    return f"{number:02d}.{('png', 'jpg')[number % 2]}"


def write_tar(path: Path, members: dict[str, bytes]) -> Path:
    path.parent.mkdir(parents=True, exist_ok=True)
    with tarfile.open(path, "w") as archive:
        for name, data in members.items():
            info = tarfile.TarInfo(name)
            info.size = len(data)
            archive.addfile(info, io.BytesIO(data))
    return path


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


def source_of(root: str, **data) -> Source:
    return find_source(DataConfig(root=root, **data))


def load(root: str, workers: int = 0, first: int = 0, rank: int = 0, size: int = 1) -> list[Batch]:
    """Two epochs of two updates, each of two micro-batches of three."""
    config = DataConfig(root=root, batch_size=3)
    source = find_source(config)
    sampler = EpochSampler(
        len(source),
        3,
        epochs=2,
        accumulate=2 // size,
        seed=3,
        rank=rank,
        world_size=size,
        first_update=first,
        shards=source.shards,
    )
    collate = Collate(Planner(CONFIG), MaskConfig(0.5), 3, Finish(config))
    dataset = ImageFolder(source, config, (96, 64), 3)
    return list(make_loader(dataset, sampler, collate, workers, pin_memory=False))


def same(a: list[Batch], b: list[Batch]) -> bool:
    return len(a) == len(b) and all(
        torch.equal(x.images, y.images) and torch.equal(x.plan.visible, y.plan.visible)
        for x, y in zip(a, b, strict=True)
    )


# ---- what is in them ----------------------------------------------------------------------------


def read(source: Source, index: int) -> bytes:
    file = source.open(index)
    return Path(file).read_bytes() if isinstance(file, str) else file.read()


def content(source: Source) -> dict[str, bytes]:
    """The bytes of every image, by the last part of its name."""
    return {Path(source.path(i)).name: read(source, i) for i in range(len(source))}


ALL = {name_of(number): encoded(number) for number in range(12)}


def test_every_image_is_found_whole_and_by_its_name(root: str, tmp_path: Path) -> None:
    source = source_of(root)
    assert content(source) == ALL and len(source) == 12
    first = source.path(0)
    assert first == str(
        tmp_path / ("t.tar/class0/00.png" if "tar/" == root[:4] else "shards/train-0.tar/00.png")
    )
    # As a process of the run gets it from the main one.
    assert content(pickle.loads(pickle.dumps(source))) == ALL


def test_tars_in_a_folder_and_in_a_tar(tmp_path: Path) -> None:
    """ImageNet comes as a tar of a tar for each class."""
    parts = [
        write_tar(tmp_path / "parts [1]" / f"n{part}.tar", dict(list(ALL.items())[part::3]))
        for part in range(3)
    ]
    assert content(source_of(f"tar/{tmp_path}/parts [1]")) == ALL
    nested = write_tar(tmp_path / "all.tar", {f"./{p.name}": p.read_bytes() for p in parts})
    source = source_of(str(nested))
    assert content(source) == ALL
    assert source.path(0) == f"{nested}/n0.tar/00.png"


def test_a_folder_that_is_called_like_a_prefix_is_a_folder(tmp_path: Path, monkeypatch) -> None:
    (tmp_path / "tar" / "x").mkdir(parents=True)
    (tmp_path / "tar" / "x" / "1.png").write_bytes(encoded(0))
    monkeypatch.chdir(tmp_path)
    assert source_of("tar/x").path(0) == "tar/x/1.png"


def test_a_folder_of_shards_and_its_info_file(shards: Path) -> None:
    assert source_of(f"wds/{shards}").shards.tolist() == [3, 3, 3, 3]
    (shards / "_info.json").write_text(
        json.dumps(
            {
                "splits": {
                    "train": {
                        "name": "train",
                        "num_samples": 7,
                        "filenames": ["train-0.tar", "train-2.tar"],
                        "shard_lengths": [3, 4],
                    }
                }
            }
        )
    )
    source = source_of(f"wds/{shards}")
    assert source.shards.tolist() == [3, 4]
    assert [Path(source.path(i)).name for i in (0, 3, 5)] == ["00.png", "06.png", "08.png"]
    with pytest.raises(OSError, match="holds 3 images, not 4"):
        source.open(6)


def test_a_stated_number_is_spread_over_the_shards_without_counting(shards: Path) -> None:
    source = source_of(f"wds/{shards}/train-{{0..3}}.tar", num_samples=14)
    assert source.shards.tolist() == [4, 4, 3, 3]
    assert read(source, 3) == read(source, 0) == ALL["00.png"]


def test_shards_behind_a_url(shards: Path) -> None:
    root = f"wds/pipe:cat {shards}/train-{{0..3}}.tar"
    with pytest.raises(UserError, match="--data.num-samples"):
        source_of(root)
    source = source_of(root, num_samples=12)
    # A name is not worth a download.
    assert source.path(4) == f"pipe:cat {shards}/train-1.tar/1"
    assert read(source, 4) == ALL["04.png"]
    assert source.path(4) == f"pipe:cat {shards}/train-1.tar/04.png"
    assert [read(source, number) for number in range(12)] == list(ALL.values())
    broken = source_of(f"wds/pipe:false {shards}/train-0.tar", num_samples=3)
    with pytest.raises(OSError):
        broken.open(0)


def test_hugging_face(tmp_path: Path, monkeypatch) -> None:
    """Their form of a folder; the label comes from the folders' names and is not asked for."""
    monkeypatch.setattr("datasets.config.HF_DATASETS_CACHE", tmp_path / "cache")
    for number, (name, data) in enumerate(ALL.items()):
        folder = tmp_path / "hub" / "train" / f"class{number % 2}"
        folder.mkdir(parents=True, exist_ok=True)
        (folder / name).write_bytes(data)
    source = source_of(f"hfds/{tmp_path}/hub")
    for given in (source, pickle.loads(pickle.dumps(source))):
        assert sorted(read(given, i) for i in range(len(given))) == sorted(ALL.values())
    assert source.path(3) == f"hfds/{tmp_path}/hub/3"


# ---- order --------------------------------------------------------------------------------------


def test_neither_workers_nor_processes_nor_a_new_start_change_the_batches(root: str) -> None:
    alone = load(root)
    assert len(alone) == 8
    assert same(alone, load(root, workers=2))
    assert same(alone[4:], load(root, workers=1, first=2))  # at an epoch's end
    assert same(alone[2:], load(root, workers=2, first=1))  # and within one
    for rank in range(2):
        assert same(alone[rank::2], load(root, rank=rank, size=2, workers=rank))
    images = torch.cat([batch.images for batch in alone]).flatten(1)
    assert len(images.unique(dim=0)) == 24  # no crop comes twice


@pytest.mark.parametrize("size", [1, 2, 3])
def test_processes_take_an_epoch_of_shards_apart(size: int) -> None:
    lengths = np.array([5, 40, 0, 17, 31, 9])
    options = {"epochs": 3, "accumulate": 2, "seed": 7, "repeats": 2, "shards": lengths}
    samplers = [EpochSampler(102, 3, rank=rank, world_size=size, **options) for rank in range(size)]
    assert len({len(sampler) for sampler in samplers}) == 1
    left = []
    for epoch in range(3):
        seen = Counter(i.position for s in samplers for b in s for i in b if i.epoch == epoch)
        assert set(seen.values()) == {1} and set(seen) <= set(range(204))
        assert len(seen) == 204 // (6 * size) * 6 * size
        left.append(set(range(204)) - set(seen))
    if samplers[0].left_out:
        assert left[0] != left[1]
    if size == 2:
        assert samplers[1].items(3, 1) == list(samplers[1])[6]


def test_processes_and_accumulated_parts_of_an_update_see_the_same_shards() -> None:
    options = {"epochs": 2, "seed": 7, "shards": np.full(30, 20)}
    one = EpochSampler(600, 5, accumulate=4, **options)
    crew = [EpochSampler(600, 5, accumulate=2, rank=r, world_size=2, **options) for r in range(2)]
    batches = [list(sampler) for sampler in crew]
    for step in range(60):
        for part in range(2):
            for rank in range(2):
                micro = 2 * part + rank
                assert batches[rank][2 * step + part] == one.items(step, micro)


def test_a_place_goes_through_its_shards_one_after_the_other() -> None:
    """What makes reading fast: what one of 8 loader processes reads, batch by batch."""
    lengths, places = np.full(64, 100), 8
    order = shard_order(np.random.default_rng(0), lengths, 640, 10, places).reshape(640, 10) // 100
    # Each has its own, but for one that the end of its part may cut.
    assert sum(len(np.unique(order[worker::8])) for worker in range(8)) <= 64 + 8
    assert np.mean([len(np.unique(batch)) for batch in order]) > 4  # and they are mixed

    long = shard_order(np.random.default_rng(0), np.full(8, 5000), 4000, 10, 1).reshape(4000, 10)
    assert max(len(np.unique(batch // 5000)) for batch in long) <= 2
    again = shard_order(np.random.default_rng(0), np.full(8, 5000), 4000, 10, 1)
    other = shard_order(np.random.default_rng(1), np.full(8, 5000), 4000, 10, 1)
    assert np.array_equal(long.reshape(-1), again) and not np.array_equal(again, other)


def open_paths() -> set[str]:
    found = set()
    for number in os.listdir("/proc/self/fd"):
        try:
            found.add(os.readlink(f"/proc/self/fd/{number}"))
        except OSError:  # the one of the listing
            continue
    return found


def test_files_are_opened_by_each_process_for_itself(root: str, tmp_path: Path) -> None:
    source = source_of(root)
    names = {str(p) for p in tmp_path.rglob("*.tar")}
    assert not names & open_paths()  # none is held before the workers start
    source.open(0)
    opened = source._opened
    ours = opened[0]
    assert opened[0] is ours and names & open_paths()
    reader, writer = os.pipe()
    child = os.fork()
    if not child:
        os.write(writer, b"shared" if opened[0] is ours else b"own")
        os._exit(0)
    os.waitpid(child, 0)
    assert os.read(reader, 10) == b"own"
    os.close(reader), os.close(writer)


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
    sampler = make_sampler(recipe, find_source(recipe.data), World(), first_update=0)
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
        calls.append(None)
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
        dataset = ImageFolder(find_source(config), config, (96, 64), 0)
        assert dataset.source.some(3) == expected
        album = Album(dataset, 3, MaskConfig(0.5), (96, 64))
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
    monkeypatch.setattr("greenmim.data.MAX_BAD_IN_A_ROW", 2)
    config = DataConfig(root=f"wds/{shards}")
    dataset = ImageFolder(find_source(config), config, (96, 64), 0)
    (shards / "train-2.tar").unlink()
    for position in range(6, 9):
        sample = dataset[item(position)]
        assert sample.image is not None and "train-2.tar" not in sample.path
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
    with pytest.raises(OSError, match="ends after 100 of"):
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
        ("tar/{}/text.tar", "is no tar file, a compressed or a damaged one"),
        ("tar/{}/small.tar.gz", "without compression"),
        ("wds/{}/none-{{0..3}}.tar", "there is no shard {}/none-0.tar"),
        ("wds/{}/nothing", "there is no shard {}/nothing/*.tar"),
        ("wds/{}/empty.tar", "empty.tar: there is no image in it"),
        ("wds/{}/text.tar", "text.tar: it is no tar file"),
        ("wds/{}/bad/t.tar", "bad/_info.json has no splits.train"),
        ("hfids/a/b", "there is no reader for hfids/"),
        ("hfds/{}/nothing", "cannot be loaded"),
    ],
)
def test_bad_input_is_one_sentence(
    given: str, message: str, tiny: Path, tmp_path: Path, capsys
) -> None:
    (tmp_path / "nothing").mkdir()
    (tmp_path / "bad").mkdir()
    (tmp_path / "bad" / "_info.json").write_text("{}")
    write_tar(tmp_path / "empty.tar", {"notes.txt": b"none"})
    (tmp_path / "text.tar").write_text("this is no tar")
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

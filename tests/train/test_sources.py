"""Images from tars, shards and Hugging Face datasets: what is in them, and their order."""

from __future__ import annotations

import json
import os
import pickle
from collections import Counter
from pathlib import Path

import numpy as np
import pytest
import torch
from tar_files import ALL, encoded, read, source_of

from greenmim.config import ModelConfig
from greenmim.data.dataset import AugmentedImages, Finish
from greenmim.data.images import Source
from greenmim.data.loader import Batch, Collate, make_loader
from greenmim.data.sampler import EpochSampler, shard_order
from greenmim.data.sources import HuggingFace, find_source
from greenmim.data.tars import read_part
from greenmim.guards import UserError
from greenmim.planning import Planner
from greenmim.recipe import DataConfig, ImagesConfig, MaskConfig
from tests.archives import write_tar

CONFIG = ModelConfig(
    image_size=(96, 64), window_size=2, embed_dim=16, depths=(1, 2, 1, 1), num_heads=(1, 2, 4, 8)
)


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
    dataset = AugmentedImages(source, config, (96, 64), 3)
    return list(make_loader(dataset, sampler, collate, workers, pin_memory=False))


def same(a: list[Batch], b: list[Batch]) -> bool:
    return len(a) == len(b) and all(
        torch.equal(x.images, y.images) and torch.equal(x.plan.visible, y.plan.visible)
        for x, y in zip(a, b, strict=True)
    )


# ---- what is in them ----------------------------------------------------------------------------


def content(source: Source) -> dict[str, bytes]:
    """The bytes of every image, by the last part of its name."""
    return {Path(source.path(i)).name: read(source, i) for i in range(len(source))}


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


def test_the_splits_of_an_info_file(shards: Path) -> None:
    def info(**splits: int) -> None:
        """A shard for each split, and a split of which less is said."""
        known = {
            name: {"filenames": [f"train-{number}.tar"], "shard_lengths": [3]}
            for name, number in splits.items()
        }
        more = {"other": {"num_samples": 5}} if len(splits) > 1 else {}
        (shards / "_info.json").write_text(json.dumps({"splits": known | more}))

    def taken(val_root: bool = False) -> str:
        config = DataConfig(root=f"wds/{shards}")
        if val_root:
            config = ImagesConfig(root="-", val_root=config.root)
        source = find_source(config, "data.val_root" if val_root else "data.root")
        return "".join(Path(url).name[6] for url in source.urls)

    for name in ("validation", "val", "test"):
        info(train=0, **{name: 2})
        assert (taken(), taken(val_root=True)) == ("0", "2")
    info(train=0, dev=2)
    assert taken() == taken(val_root=True) == "0"
    info(validation=3)
    assert taken() == "3"
    info(a=0, b=2)
    with pytest.raises(UserError, match="_info.json has no splits.train with"):
        taken()
    (shards / "_info.json").unlink()
    for text in ('{"version": 1}', "[1]"):  # of something else
        (shards / "info.json").write_text(text)
        assert taken() == "0123"


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


def test_a_label_of_hugging_face_reads_no_image(monkeypatch) -> None:
    datasets = pytest.importorskip("datasets")
    features = {"image": datasets.Image(), "label": datasets.ClassLabel(names=["a", "b"])}
    rows = {"image": [{"bytes": ALL["00.png"], "path": None}, None], "label": [1, 0]}
    data = datasets.Dataset.from_dict(rows, features=datasets.Features(features))
    monkeypatch.setattr(datasets, "load_dataset", lambda name, split: data)
    source = source_of("hfds/x")
    with pytest.raises(OSError, match="the row has no image"):
        source.open(1)
    assert read(source, 0) == ALL["00.png"]
    given = pickle.loads(pickle.dumps(source))
    assert given._classes.column_names == ["label"]
    monkeypatch.setattr(HuggingFace, "_data", None)
    assert [given.label(0), given.label(1)] == ["b", "a"]


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


def test_a_read_that_comes_in_pieces_is_whole(tmp_path: Path, monkeypatch) -> None:
    """One call reads 2 GiB at most, and some file systems give less."""
    (tmp_path / "file").write_bytes(bytes(range(250)))
    real = os.pread
    monkeypatch.setattr(os, "pread", lambda file, size, offset: real(file, min(size, 40), offset))
    with open(tmp_path / "file", "rb") as file:
        assert read_part(file, 5, 200) == bytes(range(5, 205))
        with pytest.raises(OSError, match="ends after 150 of 151 bytes"):
            read_part(file, 100, 151)

"""Shards: what is kept of them and for how long, stated numbers, info files behind URLs."""

from __future__ import annotations

import errno
import functools
import http.server
import json
import os
import shutil
import threading
from collections import Counter
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import pytest
from tar_files import ALL, read, source_of
from test_augment import loader_of

from greenmim.data import dataset as dataset_module
from greenmim.data import images as images_module
from greenmim.data import sources, tars
from greenmim.data.dataset import AugmentedImages
from greenmim.data.images import Unavailable
from greenmim.data.loader import make_loader
from greenmim.data.sampler import EpochSampler, Item
from greenmim.data.sources import Shards, open_shard
from greenmim.data.tars import Opened
from greenmim.guards import UserError
from greenmim.recipe import DataConfig
from tests.archives import write_tar

# ---- what cannot be opened ----------------------------------------------------------------------


def open_files() -> int:
    return len(os.listdir("/proc/self/fd"))


def test_a_shard_that_cannot_be_used_leaves_no_file_open(shards: Path) -> None:
    (shards / "text.tar").write_bytes(b"this is no tar" * 1000)
    urls = (
        str(shards / "text.tar"),
        f"pipe:cat {shards}/text.tar",
        f"pipe:head -c 5000 {shards}/train-0.tar; false",  # cut off on its way
    )
    for url in urls:
        found, before = [], open_files()
        for _ in range(3):
            with pytest.raises(OSError) as told:
                open_shard(url)
            found.append(told)  # an error holds on to what it came from
        assert open_files() == before


def test_what_could_not_be_opened_is_told_anew_and_tried_again_later(monkeypatch) -> None:
    clock, calls, working = [0.0], [], [False]
    monkeypatch.setattr(tars, "time", SimpleNamespace(monotonic=lambda: clock[0]))

    def open_one(number: int) -> str:
        calls.append(number)
        if not working[0]:
            raise OSError("HTTP 503")
        return "file"

    opened, told = Opened(open_one, most=2), []
    for _ in range(3):
        with pytest.raises(Unavailable, match="HTTP 503") as error:
            opened[0]
        told.append(error.value)
    assert calls == [0] and 0 not in opened
    assert len({id(error) for error in told}) == 3
    # What is kept holds on to nothing that led to it, which grew with every visit.
    assert all(error.__cause__ is None and error.__context__ is None for error in told)
    working[0] = True
    clock[0] = tars.AGAIN_AFTER
    assert opened[0] == "file" and 0 in opened and calls == [0, 0]


def test_a_file_whose_handle_is_stale_is_opened_anew(shards: Path, monkeypatch) -> None:
    monkeypatch.setattr(images_module, "PAUSES", (0.0,))
    config = DataConfig(root=f"wds/{shards}")
    images = AugmentedImages(source_of(config.root), config, (96, 64), 0)
    real, handles = tars.read_part, []

    def read_part(file, offset, size):
        handles.append(file)
        if file is handles[0]:
            raise OSError(errno.ESTALE, "Stale file handle")
        return real(file, offset, size)

    monkeypatch.setattr(dataset_module.AugmentedImages, "_index", lambda self, item: 4)
    monkeypatch.setattr("greenmim.data.sources.read_part", read_part)
    sample = images[Item(0, 0, 0, 4)]
    assert sample.image is not None and not sample.failures and len(handles) == 2


# ---- how many are kept --------------------------------------------------------------------------


def order_of(lengths: np.ndarray, workers: int) -> tuple[Shards, list[list[Item]]]:
    """Shards that are opened in name only, and the batches of one of the loader processes."""
    urls = [f"pipe:{number}" for number in range(len(lengths))]
    source = Shards("wds", urls, lengths, assumed=False)
    sampler = EpochSampler(int(lengths.sum()), 128, seed=2, shards=lengths)
    dataset = AugmentedImages(source, DataConfig(root="wds"), (96, 64), 0)
    make_loader(dataset, sampler, None, workers, False)
    return source, list(sampler)[:: workers or 1]


@pytest.mark.parametrize(
    ("length", "workers", "most"),
    [(1000, 8, 4), (1000, 4, 7), (1000, 0, 25), (5000, 8, 3), (200, 8, 8)],
)
def test_no_more_shards_are_kept_than_are_in_use(length, workers, most, monkeypatch) -> None:
    lengths = np.full(64000 // length, length)
    source, batches = order_of(lengths, workers)
    opened, kept = Counter(), set()

    def open_one(url: str) -> sources.Shard:
        opened[url] += 1
        kept.add(len(source._opened._open))
        return sources.Shard(None, [], [], Counter(), None)

    monkeypatch.setattr(sources, "open_shard", open_one)
    for batch in batches:
        for item in batch:
            source._opened[source._find(item.position)[0]]
    assert source._opened.most == most and max(kept) < most
    # One that the end of a place cuts is opened twice, and of short ones a few that lie in two
    # windows.
    places = 8 if workers == 0 else 8 // workers
    assert opened.total() <= 1.1 * len(opened) + places and max(opened.values()) <= 2


def test_tars_and_folders_need_not_know(photos: Path) -> None:
    assert len(loader_of(photos).dataset) == 6


# ---- a stated number ----------------------------------------------------------------------------


@pytest.fixture
def uneven(tmp_path: Path) -> Path:
    """Shards of 100, 100, 100 and 10."""
    number = 0
    for shard, length in enumerate((100, 100, 100, 10)):
        members = {f"{number + i:03d}.jpg": b"%03d" % (number + i) for i in range(length)}
        write_tar(tmp_path / "uneven" / f"{shard}.tar", members)
        number += length
    return tmp_path / "uneven"


def test_a_stated_number_leaves_no_image_out_for_ever(uneven: Path) -> None:
    source = source_of(f"wds/{uneven}/{{0..3}}.tar", num_samples=310)
    assert source.shards.tolist() == [78, 78, 77, 77]
    seen = Counter()
    for turn in range(10):
        drawn = [source.at(position, turn) for position in range(310)]
        found = [read(source, index) for index in drawn]
        assert len(set(found[:78])) == 78  # none twice in a pass but where a shard is shorter
        seen.update(found)
    assert len(seen) == 310
    for shard in range(3):  # all of a shard alike
        times = [seen[b"%03d" % number] for number in range(100 * shard, 100 * shard + 100)]
        assert max(times) - min(times) <= 1
    assert source.path(source.at(0, 1)).endswith("0.tar/078.jpg")
    (note,) = source.notes()
    assert "0.tar holds 100 images" in note and "--data.num-samples is 78" in note


def test_epochs_and_repeats_are_passes(uneven: Path) -> None:
    config = DataConfig(root=f"wds/{uneven}/{{0..3}}.tar", num_samples=310, repeats=2)
    images = AugmentedImages(source_of(config.root, num_samples=310), config, (96, 64), 0)
    names = [
        images.path(Item(0, 0, *place))[-7:-4] for place in ((0, 0), (0, 310), (1, 0), (1, 310))
    ]
    assert names == ["000", "078", "056", "034"]
    # Where lengths are known, there is one image at a position.
    known = AugmentedImages(source_of(f"wds/{uneven}"), DataConfig(root="-"), (96, 64), 0)
    assert {known.path(Item(0, 0, e, p))[-7:-4] for e in (0, 1) for p in (0, 310)} == {"000"}
    assert not known.source.notes()


def test_a_stand_in_is_of_the_same_pass(uneven: Path) -> None:
    source = source_of(f"wds/{uneven}/{{0..3}}.tar", num_samples=310)
    tried = {source.stand_in(source.at(5, 3), step) for step in range(310)}
    assert tried == {source.at(position, 3) for position in range(310)}


# ---- info files behind URLs ---------------------------------------------------------------------


def write_info(folder: Path) -> None:
    train = {"filenames": [f"train-{n}.tar" for n in range(4)], "shard_lengths": [3] * 4}
    (folder / "_info.json").write_text(json.dumps({"splits": {"train": train}}))


class Quiet(http.server.SimpleHTTPRequestHandler):
    def log_message(self, *_: object) -> None:
        pass


@pytest.fixture(params=["file", "http"])
def url(request, shards: Path):
    if request.param == "file":
        yield f"file:{shards}"
        return
    if shutil.which("curl") is None:
        pytest.skip("webdataset fetches with curl")
    handler = functools.partial(Quiet, directory=str(shards))
    with http.server.ThreadingHTTPServer(("127.0.0.1", 0), handler) as server:
        threading.Thread(target=server.serve_forever, daemon=True).start()
        yield f"http://127.0.0.1:{server.server_port}"
        server.shutdown()


def test_an_info_file_beside_shards_behind_a_url_is_read(shards: Path, url: str) -> None:
    root = f"wds/{url}/train-{{0..3}}.tar"
    with pytest.raises(UserError, match="no _info.json beside them.*--data.num-samples"):
        source_of(root)
    write_info(shards)
    source = source_of(root)
    assert source.shards.tolist() == [3, 3, 3, 3] and not source.assumed
    info = json.loads((shards / "_info.json").read_text())
    for split in ("validation", "test"):
        info["splits"][split] = info["splits"]["train"]
    del info["splits"]["train"]
    (shards / "_info.json").write_text(json.dumps(info))
    assert source_of(root).shards.tolist() == [3, 3, 3, 3]
    assert [read(source, number) for number in range(12)] == list(ALL.values())
    (shards / "_info.json").write_text("<html>")
    with pytest.raises(UserError, match="_info.json has no splits.train"):
        source_of(root)
    assert source_of(root, num_samples=12).assumed  # which needs no file

"""What goes wrong while images are read: with a file, with the machine, with a loader process."""

from __future__ import annotations

import contextlib
import errno
import os
import resource
import signal
import time
from collections.abc import Iterator
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch
from PIL import Image, UnidentifiedImageError
from test_augment import feed_of, loader_of
from test_errors import complaint, pretrain
from torch.utils.data._utils import signal_handling
from train_pictures import picture

from greenmim.data import dataset as dataset_module
from greenmim.data import images as images_module
from greenmim.data import loader
from greenmim.data.dataset import AugmentedImages
from greenmim.data.images import Folder
from greenmim.data.loader import Feed, check_shared_memory
from greenmim.data.sampler import Item
from greenmim.guards import UserError
from greenmim.recipe import DataConfig

PLACE = Item(0, 0, 0, 2)


@contextlib.contextmanager
def within(seconds: int) -> Iterator[None]:
    """A test that waits for ever fails instead."""

    def late(*_: object) -> None:
        raise TimeoutError(f"not done within {seconds} s")

    before = signal.signal(signal.SIGALRM, late)
    signal.alarm(seconds)
    try:
        yield
    finally:
        signal.alarm(0)
        signal.signal(signal.SIGALRM, before)


@contextlib.contextmanager
def feeding(*arguments, **data) -> Iterator[Feed]:
    """A feed whose loader processes are ended, and which has not for ever."""
    feed = feed_of(*arguments, **data)
    try:
        with within(60):
            yield feed
    finally:
        getattr(feed._batches, "_shutdown_workers", lambda: None)()


def failing(monkeypatch, error: Exception, times: int, name: str = "") -> list[str]:
    """Reading raises so many times, of files called so; the list fills with what is read."""
    monkeypatch.setattr(images_module, "PAUSES", (0.0, 0.0, 0.0))
    real, left, read = dataset_module.read_crop, [times], []

    def read_crop(file, *arguments):
        read.append(os.path.basename(file))
        if left[0] and name in read[-1]:
            left[0] -= 1
            raise error
        return real(file, *arguments)

    monkeypatch.setattr(dataset_module, "read_crop", read_crop)
    return read


def images_of(folder: Path) -> AugmentedImages:
    return AugmentedImages(Folder(str(folder)), DataConfig(root=str(folder)), (96, 64), 5)


# ---- of files -----------------------------------------------------------------------------------


def test_a_hiccup_of_the_network_loses_no_image(photos, monkeypatch) -> None:
    images = images_of(photos)
    expected = images[PLACE].image
    read = failing(monkeypatch, OSError(errno.EIO, "Input/output error"), 3, "2.png")
    sample = images[PLACE]
    assert torch.equal(sample.image, expected) and not sample.failures
    assert read == ["2.png"] * 4


def test_a_file_that_the_system_cannot_read_is_replaced_this_time_only(photos, monkeypatch) -> None:
    images = images_of(photos)
    expected = images[PLACE].image
    read = failing(monkeypatch, OSError(errno.ESTALE, "Stale file handle"), 4, "2.png")
    sample = images[PLACE]
    ((path, reason),) = sample.failures
    assert path.endswith("cats/2.png") and "Stale file handle" in reason
    assert sample.image is not None and read == ["2.png"] * 4 + ["3.png"]
    again = images[PLACE]
    assert torch.equal(again.image, expected) and not again.failures


@pytest.mark.parametrize(
    "error",
    [
        UnidentifiedImageError("cannot identify"),
        OSError("image file is truncated"),
        SyntaxError("broken PNG file"),
        FileNotFoundError(errno.ENOENT, "No such file"),
        PermissionError(errno.EACCES, "Permission denied"),
    ],
)
def test_what_would_come_again_is_not_tried_again_at_once(error, photos, monkeypatch) -> None:
    read = failing(monkeypatch, error, 1, "2.png")
    assert len(images_of(photos)[PLACE].failures) == 1 and read == ["2.png", "3.png"]


# ---- of the machine -----------------------------------------------------------------------------


@pytest.mark.parametrize("workers", [0, 1])
@pytest.mark.parametrize(
    ("error", "advice"),
    [
        (OSError(errno.ENOSPC, "No space left on device"), "TMPDIR"),
        (OSError(errno.EMFILE, "Too many open files"), "ulimit -n"),
        (MemoryError(), "--data.workers"),
        (RuntimeError("DefaultCPUAllocator: not enough memory"), "--data.workers"),
    ],
)
def test_what_no_other_file_would_fare_better_with_ends_the_run(
    error, advice, workers, photos, monkeypatch
) -> None:
    read = failing(monkeypatch, error, 10**6, "2.png")
    with feeding(photos, workers) as feed, pytest.raises(UserError) as told:
        for _ in range(4):
            feed.next()
    text = str(told.value)
    assert "cats/2.png cannot be read, for " in text and advice in text and "\n" not in text
    assert read.count("2.png") < 3  # once for each repeat in the batch: it is not tried again


# ---- shared memory ------------------------------------------------------------------------------


@pytest.mark.parametrize("most", [1_000, 100_000])  # not even the plan; the plan, not the images
def test_a_batch_that_shared_memory_has_no_room_for_ends_the_run(most, photos, monkeypatch) -> None:
    """As a full /dev/shm; PyTorch by itself loses the batch, and the run waits for ever."""
    real, main = AugmentedImages.__getitem__, os.getpid()

    def item(self, place):
        if os.getpid() != main:
            resource.setrlimit(resource.RLIMIT_FSIZE, (most, resource.RLIM_INFINITY))
        return real(self, place)

    monkeypatch.setattr(AugmentedImages, "__getitem__", item)
    with (
        feeding(photos, workers=1) as feed,
        pytest.raises(UserError, match="MB of shared memory.*--shm-size"),
    ):
        feed.next()


@pytest.mark.parametrize("data", [{}, {"augment_on_device": True}])
def test_everything_that_travels_is_made_in_shared_memory(data, tmp_path, monkeypatch) -> None:
    """What is not would be brought there by the thread whose errors are lost."""
    for index in range(7):
        Image.fromarray(picture(index)).save(tmp_path / f"{index}.jpg")
    monkeypatch.setattr(loader, "get_worker_info", lambda: object())
    feed = feed_of(tmp_path, **data)
    batch = next(iter(feed.loader))
    parts = [batch.images, batch.plan.memory, batch.flips]
    assert all(part.is_shared() for part in parts if part is not None)


def shm(monkeypatch, free: int, blocks: int = 10**6) -> None:
    real, found = os.statvfs, SimpleNamespace(f_bavail=free, f_frsize=1, f_blocks=blocks)
    monkeypatch.setattr(os, "statvfs", lambda at: found if at == loader.SHARED_MEMORY else real(at))


def test_shared_memory_is_counted_before_the_run(photos, tiny, tmp_path, monkeypatch, capsys):
    # 2 workers x 2 batches ahead, and one: of 3 images of 96 x 64 px in float32, and the plan.
    images = 5 * 3 * 3 * 96 * 64 * 4
    shm(monkeypatch, images)
    arguments = pretrain(tiny, photos, tmp_path / "run", "--data.workers", "2")
    text = complaint(capsys, *arguments)
    assert "/dev/shm has 1 MB" in text and "--shm-size" in text and "--data.workers" in text
    assert not (tmp_path / "run").exists()


def test_how_much_shared_memory_is_enough(photos, monkeypatch) -> None:
    pixels = 3 * 3 * 96 * 64
    cases = ((1, {}, 3 * 4 * pixels), (3, {"augment_on_device": True}, 7 * pixels))
    for workers, data, least in cases:
        one = loader_of(photos, workers, **data)
        plan = one.collate_fn.batch_bytes(3) - least // (2 * workers + 1)
        assert 0 < plan < 20_000
        needed = least + (2 * workers + 1) * plan
        shm(monkeypatch, needed)
        check_shared_memory(one, 1)
        with pytest.raises(UserError, match="shared memory left"):
            check_shared_memory(one, 2)  # two processes of the run share it
        shm(monkeypatch, needed - 1)
        with pytest.raises(UserError):
            check_shared_memory(one, 1)
        shm(monkeypatch, 0, blocks=0)  # no limit
        check_shared_memory(one, 1)
    shm(monkeypatch, 0)
    check_shared_memory(loader_of(photos, 0), 1)


# ---- loader processes ---------------------------------------------------------------------------


def in_workers(monkeypatch, act) -> None:
    main = os.getpid()

    def item(self, place):
        assert os.getpid() != main
        act()

    monkeypatch.setattr(AugmentedImages, "__getitem__", item)


def test_a_loader_process_that_is_killed_is_told_as_such(photos, monkeypatch) -> None:
    in_workers(monkeypatch, lambda: os.kill(os.getpid(), signal.SIGKILL))
    with (
        feeding(photos, workers=1) as feed,
        pytest.raises(UserError, match="A loader process died .*memory"),
    ):
        feed.next()


@pytest.mark.parametrize("before", ["default", "ignored", "pytorch"])
@pytest.mark.parametrize(
    ("number", "said"),
    [
        (signal.SIGKILL, r"exit code -9\); most often memory ran out"),
        (signal.SIGSEGV, r"exit code -11\); its own output may say why"),
    ],
)
def test_a_loader_process_that_dies_interrupts_nothing(
    before, number, said, photos, monkeypatch
) -> None:
    """It is told when a batch is waited for, and not in the middle of a save, say."""
    in_workers(monkeypatch, lambda: time.sleep(60))
    monkeypatch.setattr(signal_handling, "_SIGCHLD_handler_set", False)
    handler = {"default": signal.SIG_DFL, "ignored": signal.SIG_IGN}.get(before, signal.SIG_DFL)
    found = signal.signal(signal.SIGCHLD, handler)
    if before == "pytorch":
        signal_handling._set_SIGCHLD_handler()
    try:
        with feeding(photos, workers=1) as feed:
            feed.start()
            (worker,) = feed._workers
            os.kill(worker.pid, number)
            time.sleep(0.5)  # a handler would run here
            with pytest.raises(UserError, match=f"A loader process died .*{said}"):
                feed.next()
    finally:
        signal.signal(signal.SIGCHLD, found)


@pytest.mark.parametrize("error", [ValueError("a bug"), RuntimeError("it is killed by signal")])
def test_an_error_in_a_loader_process_is_told_as_it_is(error, photos, monkeypatch) -> None:
    def act() -> None:
        raise error

    in_workers(monkeypatch, act)
    with (
        feeding(photos, workers=1) as feed,
        pytest.raises(type(error), match=f"(?s)in DataLoader worker.*{error}"),
    ):
        feed.next()

"""Crops are the same however a picture is decoded, and wherever a batch is finished."""

from __future__ import annotations

import io
import math
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image
from torch.utils.data import DataLoader
from torchvision.transforms import RandomResizedCrop, v2
from train_pictures import picture

from greenmim.cli import main
from greenmim.data import dataset as dataset_module
from greenmim.data.dataset import (
    AugmentedImages,
    Crop,
    Finish,
    draw_crop,
    finishes_in_loader,
    read_crop,
)
from greenmim.data.images import Folder
from greenmim.data.loader import Batch, Collate, Feed, make_loader
from greenmim.data.sampler import EpochSampler
from greenmim.planning import Planner
from greenmim.recipe import DataConfig, MaskConfig

from test_data import CONFIG  # isort: skip

SIZE = (32, 48)


def large(height: int = 480, width: int = 640) -> Image.Image:
    """A smooth picture, every part of it another."""
    rows, columns = np.mgrid[:height, :width] / max(height, width)
    channels = [np.sin(9 * rows + 3 * columns), np.cos(7 * columns), np.sin(11 * rows * columns)]
    return Image.fromarray((127 * np.stack(channels, -1) + 128).astype(np.uint8))


def saved(image: Image.Image, form: str = "JPEG", **options) -> io.BytesIO:
    file = io.BytesIO()
    image.save(file, form, **options)
    file.seek(0)
    return file


def middle(height: int, width: int) -> Crop:
    return Crop(height // 8, width // 4, 3 * height // 4, width // 2, flip=False)


def sizes_decoded(monkeypatch) -> list[tuple[int, int]]:
    """Filled with the size of every picture that is decoded."""
    sizes, real = [], dataset_module.upright

    def upright(image: Image.Image, lies: int) -> Image.Image:
        turned = real(image, lies)
        sizes.append(turned.size)
        return turned

    monkeypatch.setattr(dataset_module, "upright", upright)
    return sizes


def psnr(a: torch.Tensor, b: torch.Tensor) -> float:
    error = (a.double() - b.double()).square().mean().item()
    return 10 * math.log10(255**2 / error) if error else math.inf


@pytest.mark.parametrize("orientation", [1, 3, 6, 8])
@pytest.mark.parametrize("mode", ["RGB", "L", "CMYK"])
@pytest.mark.parametrize("progressive", [False, True])
def test_a_reduced_decode_gives_the_same_crop(monkeypatch, orientation, mode, progressive):
    exif = Image.Exif()
    exif[0x0112] = orientation
    file = saved(large().convert(mode), quality=95, exif=exif, progressive=progressive)
    loaded = sizes_decoded(monkeypatch)
    whole, _ = read_crop(file, SIZE, middle, reduce=False)
    file.seek(0)
    reduced, _ = read_crop(file, SIZE, middle, reduce=True)
    full = (640, 480) if orientation in (1, 3) else (480, 640)
    assert loaded[0] == full
    assert loaded[1][0] < full[0] / 3  # the decoder did less
    assert whole.shape == reduced.shape == (3, *SIZE) and whole.dtype == torch.uint8
    assert psnr(whole, reduced) > 38


def test_a_reduced_decode_is_never_smaller_than_the_crop(monkeypatch):
    file = saved(large(480, 640))
    loaded = sizes_decoded(monkeypatch)
    for side in (60, 61, 119, 120, 121, 240, 480):
        file.seek(0)
        read_crop(file, (60, 60), lambda h, w, s=side: Crop(0, 0, s, s, False), reduce=True)
        scale = loaded[-1][1] / 480
        assert side * scale >= 60 and (side * scale < 121 or scale <= 1 / 8), (side, scale)


def test_the_crop_is_torchvisions(tmp_path):
    """Same region and same flip as RandomResizedCrop and a flip after it, seed by seed."""
    config = DataConfig(root="-", flip=0.5)
    image = large()
    transform = v2.Compose(
        [
            v2.RandomResizedCrop(
                SIZE, config.crop_scale, config.crop_ratio, v2.InterpolationMode.BICUBIC
            ),
            v2.RandomHorizontalFlip(config.flip),
        ]
    )
    flips = set()
    for seed in range(8):
        torch.manual_seed(seed)
        expected = transform(v2.functional.pil_to_tensor(image))
        torch.manual_seed(seed)
        pillows = v2.functional.pil_to_tensor(transform(image))
        torch.manual_seed(seed)
        file = saved(image, "PNG")
        ours, flip = read_crop(file, SIZE, lambda h, w: draw_crop(h, w, config), reduce=True)
        ours = ours.flip(2) if flip else ours
        flips.add(flip)
        assert torch.equal(ours, expected)
        assert (ours.int() - pillows.int()).abs().max() <= 1
    assert flips == {False, True}


@pytest.mark.parametrize("scale", [(0.2, 1.0), (1.0, 1.0)])
@pytest.mark.parametrize("ratio", [(3 / 4, 4 / 3), (1.0, 1.0), (0.5, 0.6)])
def test_crops_of_any_shape_are_drawn_as_torchvision_draws_them(scale, ratio):
    config = DataConfig(root="-", crop_scale=scale, crop_ratio=ratio)
    for seed in range(40):
        # Of long ones and very small ones no draw fits: then it is the middle.
        for height, width in ((375, 500), (500, 375), (20, 3000), (3000, 20), (1, 1), (7, 9)):
            torch.manual_seed(seed)
            picture = torch.empty(1).expand(1, height, width)
            expected = RandomResizedCrop.get_params(picture, list(scale), list(ratio))
            flip = bool(torch.rand(()) < config.flip)
            torch.manual_seed(seed)
            assert draw_crop(height, width, config) == (*expected, flip)


@pytest.mark.parametrize(("height", "width", "ratio"), [(90, 1, (2, 3)), (1, 90, (0.2, 0.4))])
def test_the_largest_crop_of_a_line_is_not_empty(height, width, ratio):
    crop = draw_crop(height, width, DataConfig(root="-", crop_ratio=ratio))
    assert (crop.height, crop.width) == (1, 1)


@pytest.mark.parametrize("crop", [(0, 0, 1, 1), (479, 639, 1, 1), (0, 5, 480, 1), (7, 0, 1, 640)])
def test_crops_of_one_pixel_a_column_or_a_row(crop):
    box = Crop(*crop, flip=False)
    ours, _ = read_crop(saved(large(), "PNG"), SIZE, lambda h, w: box, reduce=False)
    assert ours.shape == (3, *SIZE)
    pillows = (
        large()
        .crop((box.left, box.top, box.left + box.width, box.top + box.height))
        .resize(SIZE[::-1], Image.Resampling.BICUBIC)
    )
    assert (ours.int() - v2.functional.pil_to_tensor(pillows).int()).abs().max() <= 1


@pytest.fixture
def jpegs(tmp_path: Path) -> Path:
    """JPEGs of several kinds, one a PNG and one turned by its tag."""
    for index in range(4):
        Image.fromarray(picture(index, 200, 160)).save(tmp_path / f"{index}.jpg", quality=95)
    Image.fromarray(picture(4, 200, 160)).convert("L").save(tmp_path / "4.jpg", quality=95)
    Image.fromarray(picture(5, 200, 160)).save(tmp_path / "5.png")
    exif = Image.Exif()
    exif[0x0112] = 6
    Image.fromarray(picture(6, 200, 160)).save(tmp_path / "6.jpg", quality=95, exif=exif)
    return tmp_path


def loader_of(folder: Path, workers: int = 0, batch_size: int = 3, **data) -> DataLoader:
    config = DataConfig(root=str(folder), batch_size=batch_size, repeats=2, **data)
    files = Folder(str(folder))
    dataset = AugmentedImages(files, config, (96, 64), 5)
    sampler = EpochSampler(len(files), batch_size, repeats=2, epochs=1, seed=5)
    finish = Finish(config) if finishes_in_loader(config, torch.device("cpu")) else None
    collate = Collate(Planner(CONFIG), MaskConfig(0.5), 5, finish)
    return make_loader(dataset, sampler, collate, workers, False)


def feed_of(folder: Path, workers: int = 0, **data) -> Feed:
    loader = loader_of(folder, workers, **data)
    return Feed(loader, torch.device("cpu"), Finish(loader.dataset.config))


def batches(folder: Path, workers: int = 0, **data) -> tuple[list[Batch], list]:
    feed = feed_of(folder, workers, **data)
    return [feed.next() for _ in range(14 // data.get("batch_size", 3))], feed.take_failures()


def test_a_batch_finished_on_the_device_is_the_batch(jpegs):
    here, _ = batches(jpegs)
    there, _ = batches(jpegs, augment_on_device=True)
    moved, _ = batches(jpegs, workers=2, augment_on_device=True)
    for a, b, c in zip(here, there, moved, strict=True):
        assert b.images.dtype == torch.float32 and b.flips is None
        assert torch.equal(a.images, b.images) and torch.equal(a.images, c.images)


@pytest.mark.parametrize(
    ("device", "asked", "in_loader"),
    [("cpu", None, True), ("cuda", None, False), ("cpu", True, False), ("cuda", False, True)],
)
def test_where_images_are_finished(device, asked, in_loader):
    config = DataConfig(augment_on_device=asked)
    assert finishes_in_loader(config, torch.device(device)) == in_loader


def test_one_image_is_finished_as_a_batch_is():
    """In another order in memory, too; the model gets the usual one."""
    finish = Finish(DataConfig())
    crops = torch.randint(0, 256, (4, 32, 48, 3), dtype=torch.uint8).permute(0, 3, 1, 2)
    flips = torch.tensor([True, False, True, False])
    expected = finish(crops.contiguous(), flips)
    assert expected.is_contiguous() and finish(crops, flips).is_contiguous()
    assert torch.equal(finish(crops, flips), expected)
    one_by_one = torch.empty(4, 3, 32, 48)
    for out, crop, flip in zip(one_by_one, crops, flips, strict=True):
        finish.into(out, crop, bool(flip))
    assert torch.equal(one_by_one, expected)


def test_images_travel_in_eight_bits(jpegs):
    config = DataConfig(root=str(jpegs), augment_on_device=True)
    dataset = AugmentedImages(Folder(str(jpegs)), config, (96, 64), 5)
    collate = Collate(Planner(CONFIG), MaskConfig(0.5), 5, None)
    items = next(iter(EpochSampler(7, 3, repeats=1, epochs=1, seed=5)))
    batch = collate([dataset[item] for item in items])
    assert batch.images.dtype == torch.uint8 and batch.flips.dtype == torch.bool
    assert batch.images.is_contiguous(memory_format=torch.channels_last)  # as crops come


def test_a_run_finished_on_the_device_is_the_run(tiny, photos, tmp_path):
    losses = []
    for name in ("true", "false"):
        work = tmp_path / name
        arguments = ["--config", str(tiny), "--data.root", str(photos), "--work-dir", str(work)]
        more = ["--data.augment-on-device", name, "--log.tensorboard", "false"]
        assert main(["pretrain", *arguments, *more]) == 0
        lines = (work / "log.jsonl").read_text().splitlines()
        losses.append([line.split('"loss"')[1][:24] for line in lines if '"loss"' in line])
    assert losses[0] == losses[1] and len(losses[0]) > 3

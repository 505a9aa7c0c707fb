"""Images of every kind, the order of batches, and that nothing depends on the number of workers."""

from __future__ import annotations

import struct
import zlib
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image
from train_pictures import picture

from greenmim.config import ModelConfig
from greenmim.data.dataset import AugmentedImages, Finish, Sample, finishes_in_loader
from greenmim.data.decode import open_rgb
from greenmim.data.images import Folder, find_images
from greenmim.data.loader import Batch, Collate, Feed, make_loader
from greenmim.data.sampler import EpochSampler, Item
from greenmim.guards import UserError
from greenmim.planning import Planner
from greenmim.recipe import DataConfig, MaskConfig

# ---- finding and opening ------------------------------------------------------------------------


def names(folder: Path) -> list[str]:
    return list(find_images(folder))


def test_images_are_found_at_any_depth_in_a_fixed_order(tmp_path: Path) -> None:
    for name in (
        "b.PNG",
        "a/deep/er/c.jpeg",
        "a/x.txt",
        ".hidden/d.png",
        "a/._e.jpg",
        "ünï/f g.webp",
    ):
        (tmp_path / name).parent.mkdir(parents=True, exist_ok=True)
        (tmp_path / name).touch()
    assert names(tmp_path) == ["a/deep/er/c.jpeg", "b.PNG", "ünï/f g.webp"]


def test_linked_folders_are_followed_once(tmp_path: Path) -> None:
    (tmp_path / "data").mkdir()
    (tmp_path / "elsewhere").mkdir()
    (tmp_path / "elsewhere" / "a.png").touch()
    (tmp_path / "data" / "link").symlink_to(tmp_path / "elsewhere")
    (tmp_path / "elsewhere" / "loop").symlink_to(tmp_path / "data")
    assert names(tmp_path / "data") == ["link/a.png"]


def test_nothing_to_find(tmp_path: Path) -> None:
    (tmp_path / "notes.txt").touch()
    with pytest.raises(UserError, match="no image in"):
        find_images(tmp_path)
    with pytest.raises(UserError, match="no folder"):
        find_images(tmp_path / "missing")
    with pytest.raises(UserError, match="is a file"):
        find_images(tmp_path / "notes.txt")


def opened(path: Path) -> np.ndarray:
    image = open_rgb(path)
    assert image.mode == "RGB"
    return np.asarray(image).astype(int)


def test_grey_palette_and_one_bit_pictures(tmp_path: Path) -> None:
    rgb = picture(0)
    grey = Image.fromarray(rgb).convert("L")
    grey.save(tmp_path / "grey.png")
    assert np.array_equal(opened(tmp_path / "grey.png"), np.asarray(grey)[..., None].repeat(3, -1))
    palette = Image.fromarray(rgb).quantize(64)
    palette.save(tmp_path / "palette.png")
    assert np.array_equal(opened(tmp_path / "palette.png"), np.asarray(palette.convert("RGB")))
    grey.point(lambda v: 255 * (v > 100), "1").save(tmp_path / "bits.png")
    assert set(np.unique(opened(tmp_path / "bits.png"))) == {0, 255}


@pytest.mark.parametrize("mode", ["RGBA", "LA", "P"])
def test_transparency_is_laid_on_white(tmp_path: Path, mode: str) -> None:
    image = Image.fromarray(np.full((8, 8, 3), 40, np.uint8)).convert("RGBA")
    image.putalpha(Image.fromarray(np.repeat(np.uint8([0, 255]), 32).reshape(8, 8)))
    if mode == "P":
        image = Image.new("P", (8, 8), 1)
        image.putpalette([10, 10, 10, 40, 40, 40])
        image.paste(0, (0, 0, 8, 4))
        image.save(tmp_path / "p.png", transparency=0)
    else:
        image.convert(mode).save(tmp_path / "p.png")
    got = opened(tmp_path / "p.png")
    assert (got[:4] == 255).all() and (got[4:] == 40).all()


def test_half_transparent_is_half_white(tmp_path: Path) -> None:
    image = Image.new("RGBA", (4, 4), (0, 0, 0, 128))
    image.save(tmp_path / "half.png")
    assert abs(opened(tmp_path / "half.png") - 127).max() <= 1


def test_cmyk(tmp_path: Path) -> None:
    Image.fromarray(np.full((16, 16, 3), (200, 60, 30), np.uint8)).convert("CMYK").save(
        tmp_path / "c.jpg"
    )
    assert abs(opened(tmp_path / "c.jpg") - (200, 60, 30)).max() < 12


@pytest.mark.parametrize("suffix", ["png", "tif"])
def test_sixteen_bits_are_scaled_not_clipped(tmp_path: Path, suffix: str) -> None:
    values = np.linspace(0, 65535, 64).astype(np.uint16).reshape(8, 8)
    Image.fromarray(values).save(tmp_path / f"x.{suffix}")
    got = opened(tmp_path / f"x.{suffix}")[..., 0]
    assert np.array_equal(got, np.round(values / 257).astype(int))


def test_float_tiff(tmp_path: Path) -> None:
    Image.fromarray(np.linspace(0, 1, 64, dtype=np.float32).reshape(8, 8)).save(tmp_path / "f.tif")
    got = opened(tmp_path / "f.tif")[..., 0]
    assert got.min() == 0 and got.max() == 255 and len(np.unique(got)) == 64


def test_exif_orientation_is_applied(tmp_path: Path) -> None:
    image = Image.fromarray(np.zeros((20, 40, 3), np.uint8))
    exif = image.getexif()
    exif[0x0112] = 6  # turned by 90 degrees
    image.save(tmp_path / "turned.jpg", exif=exif)
    assert opened(tmp_path / "turned.jpg").shape == (40, 20, 3)


# ---- order --------------------------------------------------------------------------------------


def batches(**options) -> list[list[Item]]:
    return list(EpochSampler(7, 2, repeats=3, epochs=3, seed=4, **options))


def test_an_epoch_takes_every_position_at_most_once_and_orders_differ() -> None:
    sampler = EpochSampler(7, 2, repeats=3, epochs=3, seed=4)
    assert (sampler.updates_per_epoch, sampler.left_out) == (10, 1)
    found = list(sampler)
    assert len(found) == len(sampler) == 30
    epochs = [
        [i.position for batch in found[10 * e : 10 * e + 10] for i in batch] for e in range(3)
    ]
    assert all(len(set(epoch)) == 20 and set(epoch) <= set(range(21)) for epoch in epochs)
    assert epochs[0] != epochs[1] != epochs[2]
    assert len({frozenset(range(21)) - set(epoch) for epoch in epochs}) > 1  # others are left out
    assert [batch[0].step for batch in found] == list(range(30))


@pytest.mark.parametrize("first", [1, 9, 10, 11, 29])
@pytest.mark.parametrize("accumulate", [1, 3])
def test_starting_later_gives_the_rest(first: int, accumulate: int) -> None:
    whole = batches(accumulate=accumulate)
    if first * accumulate < len(whole):
        sampler = EpochSampler(
            7, 2, repeats=3, epochs=3, seed=4, accumulate=accumulate, first_update=first
        )
        assert list(sampler) == whole[first * accumulate :]
        assert len(sampler) == len(whole) - first * accumulate


def test_ranks_share_an_update_whatever_their_number() -> None:
    one = EpochSampler(50, 8, epochs=2, seed=1)
    two = [EpochSampler(50, 4, epochs=2, seed=1, rank=r, world_size=2) for r in (0, 1)]
    parts = EpochSampler(50, 4, epochs=2, seed=1, accumulate=2)
    whole = [[i.position for i in batch] for batch in one]
    split = [[i.position for b in pair for i in b] for pair in zip(*two, strict=True)]
    assert split == whole
    # The very same items: with the step and the micro-batch come the masks.
    listed = list(parts)
    assert [list(pair) for pair in zip(*two, strict=True)] == [
        list(pair) for pair in zip(listed[::2], listed[1::2], strict=True)
    ]
    assert [(batch[0].step, batch[0].micro_batch) for batch in listed[:4]] == [
        (0, 0), (0, 1), (1, 0), (1, 1),
    ]  # fmt: skip
    assert all(parts.items(batch[0].step, batch[0].micro_batch) == batch for batch in listed)
    assert all(two[0].items(batch[0].step, batch[0].micro_batch) == batch for batch in listed)


def test_a_folder_smaller_than_an_update_is_refused_with_advice() -> None:
    with pytest.raises(
        ValueError, match=r"5 images .*lower --data.batch-size to 5 or less.*at least 2"
    ):
        EpochSampler(5, 8)
    with pytest.raises(ValueError, match="at least 7"):
        EpochSampler(5, 8, accumulate=4)
    assert len(EpochSampler(5, 8, repeats=2)) == 1


# ---- batches ------------------------------------------------------------------------------------


CONFIG = ModelConfig(
    image_size=(96, 64),
    window_size=2,
    embed_dim=16,
    depths=(1, 2, 1, 1),
    num_heads=(1, 2, 4, 8),
    decoder_dim=32,
    decoder_depth=1,
    decoder_heads=2,
)


def load(
    folder: Path, workers: int = 0, first: int = 0, per_image: bool = False, seed: int = 3, **data
) -> list[Batch]:
    config = DataConfig(root=str(folder), batch_size=3, repeats=2, workers=workers, **data)
    files = Folder(str(folder))
    dataset = AugmentedImages(files, config, (96, 64), seed)
    sampler = EpochSampler(len(files), 3, repeats=2, epochs=2, seed=seed, first_update=first)
    finish = Finish(config) if finishes_in_loader(config, torch.device("cpu")) else None
    collate = Collate(Planner(CONFIG), MaskConfig(0.5, per_image=per_image), seed, finish)
    return list(make_loader(dataset, sampler, collate, workers, pin_memory=False))


def same(a: Batch, b: Batch) -> bool:
    return torch.equal(a.images, b.images) and torch.equal(a.plan.visible, b.plan.visible)


def test_batches_do_not_depend_on_workers_or_on_where_the_run_was_taken_up(photos: Path) -> None:
    alone, helped, later = load(photos), load(photos, workers=2), load(photos, workers=1, first=3)
    assert len(alone) == len(helped) == 8 and len(later) == 5
    assert all(map(same, alone, helped)) and all(map(same, alone[3:], later))
    assert alone[0].images.shape == (3, 3, 96, 64) and alone[0].images.dtype == torch.float32
    other = load(photos, seed=4)
    assert not torch.equal(alone[0].images, other[0].images)


def test_loading_leaves_the_global_generator_alone(photos: Path) -> None:
    torch.manual_seed(7)
    before = torch.get_rng_state()
    load(photos)
    assert torch.equal(torch.get_rng_state(), before)


def test_masks_per_batch_and_per_image(photos: Path) -> None:
    shared, own = load(photos), load(photos, per_image=True)
    assert all(batch.plan.visible.shape == (1, 6) for batch in shared)
    assert all(batch.plan.visible.shape == (3, 6) for batch in own)
    assert all((batch.plan.visible.sum(1) == 3).all() for batch in shared + own)
    # The four batches of one epoch, too, have masks of their own, and so have those of one update.
    parts = EpochSampler(6, 1, repeats=2, epochs=2, accumulate=6, seed=3)
    collate = Collate(Planner(CONFIG), MaskConfig(0.5), 3, None)
    black = torch.zeros(3, 96, 64, dtype=torch.uint8)
    drawn = {
        tuple(collate([Sample(items[0], black, False, ())]).plan.visible[0].tolist())
        for items in list(parts)[:6]
    }
    assert len(drawn) > 2
    assert len({tuple(batch.plan.visible[0].tolist()) for batch in shared[:4]}) > 1
    assert any(len(batch.plan.visible.unique(dim=0)) > 1 for batch in own)


def test_repeats_and_epochs_see_other_crops(photos: Path) -> None:
    files = Folder(str(photos))
    dataset = AugmentedImages(files, DataConfig(root=str(photos)), (96, 64), 0)
    crops = [
        dataset[Item(0, 0, epoch, position)].image
        for epoch in (0, 1)
        for position in (2, 2 + len(files))
    ]
    assert all(not torch.equal(crops[0], crop) for crop in crops[1:])
    assert torch.equal(crops[0], dataset[Item(9, 1, 0, 2)].image)


def test_normalisation(tmp_path: Path) -> None:
    Image.new("RGB", (64, 64), (255, 0, 51)).save(tmp_path / "flat.png")
    dataset = AugmentedImages(Folder(str(tmp_path)), DataConfig(root=str(tmp_path)), (32, 32), 0)
    image = Finish(dataset.config)(dataset[Item(0, 0, 0, 0)].image[None], torch.tensor([False]))[0]
    expected = (torch.tensor([1.0, 0.0, 0.2]) - torch.tensor([0.485, 0.456, 0.406])) / torch.tensor(
        [0.229, 0.224, 0.225]
    )
    torch.testing.assert_close(image, expected.view(3, 1, 1).expand(3, 32, 32), atol=1e-6, rtol=0)


# ---- corrupt files ------------------------------------------------------------------------------


def spoil(folder: Path) -> dict[str, Path]:
    """Two good pictures and one of each kind of broken file; returns the broken ones."""
    for index in (0, 4):
        Image.fromarray(picture(index)).save(folder / f"{index}-good.png")
    broken = {
        kind: folder / name
        for kind, name in {
            "cut": "1-cut.jpg",
            "text": "2-text.png",
            "empty": "3-empty.jpg",
            "crc": "5-crc.png",
        }.items()
    }
    Image.fromarray(picture(9, 300, 300)).save(broken["cut"], quality=95)
    broken["cut"].write_bytes(broken["cut"].read_bytes()[:9000])
    broken["text"].write_text("this is no picture")
    broken["empty"].touch()
    data = b"\x89PNG\r\n\x1a\n"
    for kind, body in (
        (b"IHDR", struct.pack(">IIBBBBB", 8, 8, 8, 2, 0, 0, 0)),
        (b"IDAT", b"rubbish"),
    ):
        data += (
            struct.pack(">I", len(body)) + kind + body + struct.pack(">I", zlib.crc32(kind + body))
        )
    broken["crc"].write_bytes(data)
    return broken


@pytest.mark.parametrize("workers", [0, 2])
def test_corrupt_files_are_replaced_by_the_next_and_named(tmp_path: Path, workers: int) -> None:
    broken = spoil(tmp_path)
    found = load(tmp_path, workers=workers)
    failures = {path: reason for batch in found for path, reason in batch.failures}
    assert set(failures) == {str(path) for path in broken.values()}
    assert all(reason and "\n" not in reason for reason in failures.values())
    assert all(torch.isfinite(batch.images).all() for batch in found)
    if workers:
        assert all(map(same, found, load(tmp_path)))


def test_a_file_that_stays_corrupt_is_named_once(tmp_path: Path) -> None:
    """To name it all processes wait for each other: not again in every epoch."""
    spoil(tmp_path)
    dataset = AugmentedImages(Folder(str(tmp_path)), DataConfig(root="-"), (96, 64), 0)
    sampler = EpochSampler(len(dataset), 3, epochs=4)
    collate = Collate(Planner(CONFIG), MaskConfig(0.5), 0, Finish(dataset.config))
    feed = Feed(make_loader(dataset, sampler, collate, 0, False), torch.device("cpu"))
    named = []
    for _ in range(len(sampler)):
        feed.next()
        named.append([path for path, _ in feed.take_failures()])
    flat = [path for update in named for path in update]
    assert flat and len(flat) == len(set(flat)) and not any(named[len(sampler) // 4 :])


def test_the_stand_in_is_the_next_readable_file(tmp_path: Path) -> None:
    spoil(tmp_path)
    files = Folder(str(tmp_path))
    config = DataConfig(
        root=str(tmp_path), crop_scale=(1.0, 1.0), crop_ratio=(4 / 3, 4 / 3), flip=0.0
    )
    dataset = AugmentedImages(files, config, (96, 64), 0)
    stand_in, good = dataset[Item(0, 0, 0, 1)], dataset[Item(0, 0, 0, 4)]
    assert torch.equal(stand_in.image, good.image)
    assert [Path(path).name for path, _ in stand_in.failures] == [
        "1-cut.jpg",
        "2-text.png",
        "3-empty.jpg",
    ]
    assert (
        dataset[Item(0, 0, 0, 5)].failures[0][0].endswith("5-crc.png")
    )  # wraps round to the first


def test_a_batch_without_a_readable_file_says_so(tmp_path: Path) -> None:
    for index in range(3):
        (tmp_path / f"{index}.png").write_text("no picture")
    batch = load(tmp_path)[0]
    assert batch.images is None and batch.plan is None
    assert {Path(path).name for path, _ in batch.failures} == {"0.png", "1.png", "2.png"}

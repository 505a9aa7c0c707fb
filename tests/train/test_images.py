"""How a picture lies, what is said of those that cannot be opened, and names of files."""

from __future__ import annotations

import io
import multiprocessing
import pickle
import struct
from pathlib import Path

import numpy as np
import pytest
from PIL import Image, ImageOps
from test_augment import large, saved, sizes_decoded
from test_faults import powerless
from train_pictures import picture

from greenmim.data.dataset import Crop, read_crop
from greenmim.data.decode import open_rgb, upright
from greenmim.data.images import Names, find_images
from greenmim.guards import UserError

# ---- orientation --------------------------------------------------------------------------------


def everything(height: int, width: int) -> Crop:
    return Crop(0, 0, height, width, flip=False)


def lying(orientation: int, form: str) -> io.BytesIO:
    """A picture of 64 x 96 px whose EXIF block says so."""
    exif = Image.Exif()
    exif[0x0112] = orientation
    options = {"save_all": True, "append_images": [large(64, 96)]} if form == "MPO" else {}
    return saved(large(64, 96), form, exif=exif, **options)


@pytest.mark.parametrize("form", ["JPEG", "MPO", "PNG", "TIFF", "WEBP"])
@pytest.mark.parametrize("orientation", range(1, 9))
def test_a_picture_is_turned_as_its_tag_says(orientation: int, form: str) -> None:
    file = lying(orientation, form)
    with Image.open(file) as image:
        expected = np.asarray(ImageOps.exif_transpose(image))
    assert expected.shape == ((64, 96, 3) if orientation < 5 else (96, 64, 3))
    for reduce in (False, True):
        file.seek(0)
        crop, _ = read_crop(file, expected.shape[:2], everything, reduce)
        assert np.array_equal(crop.permute(1, 2, 0).numpy(), expected)
    file.seek(0)
    assert np.array_equal(np.asarray(open_rgb(file)), expected)


def test_a_picture_that_is_not_turned_is_not_copied() -> None:
    image = large()
    assert upright(image, 1) is image


def test_a_broken_exif_block_does_not_turn_the_crop() -> None:
    """Pillow reads the tag, and fails to write the block anew without it."""
    exif = Image.Exif()
    exif[0x010F], exif[0x0112], exif[0x011A] = "Maker", 6, 72.0
    data = bytearray(saved(large(64, 96), exif=exif, quality=95).getvalue())
    start = data.index(b"Exif\0\0") + 6
    assert data[start + 11] == 0x0F  # the low byte of the tag for the maker
    data[start + 11] = 7  # one whose value has to be a number
    with Image.open(io.BytesIO(data)) as image:
        assert image.getexif()[0x0112] == 6
        with pytest.raises(struct.error):
            ImageOps.exif_transpose(image)
        expected = np.asarray(image.transpose(Image.Transpose.ROTATE_270))
    crop, _ = read_crop(io.BytesIO(data), (96, 64), everything, reduce=True)
    assert np.array_equal(crop.permute(1, 2, 0).numpy(), expected)
    assert np.array_equal(np.asarray(open_rgb(io.BytesIO(data))), expected)


def test_the_first_picture_of_a_phones_file_is_decoded_at_a_reduced_scale(monkeypatch) -> None:
    file = saved(large(480, 640), "MPO", save_all=True, append_images=[large(480, 640)])
    sizes = sizes_decoded(monkeypatch)
    read_crop(file, (60, 80), everything, reduce=True)
    assert sizes == [(80, 60)]


# ---- what cannot be opened ----------------------------------------------------------------------


def test_a_folder_that_cannot_be_listed_is_named(tmp_path: Path) -> None:
    """Its images would be missing silently."""
    (tmp_path / "locked").mkdir()
    (tmp_path / "a.png").touch()
    (tmp_path / "locked" / "b.png").touch()

    def look(answers) -> None:
        powerless(0)  # else root may list it all the same
        try:
            answers.put(list(find_images(tmp_path)))
        except UserError as error:
            answers.put(str(error))

    context = multiprocessing.get_context("fork")
    answers = context.Queue()
    (tmp_path / "locked").chmod(0)
    process = context.Process(target=look, args=(answers,))
    process.start()
    answer = answers.get(timeout=60)
    process.join()
    (tmp_path / "locked").chmod(0o755)
    assert f"The folder {tmp_path}/locked cannot be listed (Permission denied)" in answer
    assert sorted(find_images(tmp_path)) == ["a.png", "locked/b.png"]


# ---- names --------------------------------------------------------------------------------------


def test_one_long_name_takes_no_more_memory_than_itself() -> None:
    written = [b"%d.png" % number for number in range(10_000)] + [b"x" * 4000, b"", b"\xff.png"]
    names = Names(iter(written))
    assert len(names) == len(written)
    assert [name.encode(errors="surrogateescape") for name in names] == written
    assert names[10_001] == "" and names[10_000] == "x" * 4000
    stored = pickle.dumps(names)
    assert len(stored) < sum(map(len, written)) + 9 * len(written)
    assert list(pickle.loads(stored)) == list(names)


def test_images_of_every_kind_can_be_used_after_they_were_opened(tmp_path: Path) -> None:
    for form in ("JPEG", "PNG", "WEBP", "TIFF", "BMP", "PPM", "GIF"):
        path = tmp_path / f"p.{form.lower()}"
        Image.fromarray(picture(1)).save(path)
        assert np.abs(np.asarray(open_rgb(path)).astype(int) - picture(1)).mean() < 20  # palettes

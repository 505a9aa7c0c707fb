"""What people's folders, tars and shards hold: read right, or named with the reason."""

from __future__ import annotations

import concurrent.futures
import contextlib
import io
import multiprocessing
import os
import socket
import struct
import tarfile
import time
import warnings
import zlib
from collections import Counter
from pathlib import Path

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from PIL import Image
from test_augment import saved
from test_errors import complaint
from train_pictures import picture

from greenmim.data import dataset, decode, images
from greenmim.data.decode import MAX_PIXELS, named_chatter, open_rgb
from greenmim.data.images import Folder, find_images, is_image
from greenmim.data.loader import Feed
from greenmim.data.sources import Tars, find_source, of_samples, open_shard
from greenmim.data.tars import DamagedTar, Member, members_in
from greenmim.guards import UserError
from greenmim.recipe import DataConfig

# ---- pictures -----------------------------------------------------------------------------------


def png(pixels: np.ndarray, transparent: int | None = None) -> io.BytesIO:
    """Grey of 16 bits; Pillow writes no colour that is transparent in one."""

    def chunk(name: bytes, data: bytes) -> bytes:
        crc = zlib.crc32(name + data)
        return struct.pack(">I", len(data)) + name + data + struct.pack(">I", crc)

    height, width = pixels.shape
    rows = b"".join(b"\0" + row.astype(">u2").tobytes() for row in pixels)
    data = b"\x89PNG\r\n\x1a\n" + chunk(
        b"IHDR", struct.pack(">IIBBBBB", width, height, 16, *[0] * 4)
    )
    if transparent is not None:
        data += chunk(b"tRNS", struct.pack(">H", transparent))
    return io.BytesIO(data + chunk(b"IDAT", zlib.compress(rows)) + chunk(b"IEND", b""))


def tiff(pixels: np.ndarray, kind: int = 1, photometric: int = 1, bits: int | None = None):
    """Grey, in the byte order of the pixels; of kind 1 unsigned, 2 signed, 3 floating point."""
    order = ">" if pixels.dtype.byteorder == ">" else "<"
    (height, width), data = pixels.shape, pixels.tobytes()
    tags = {256: width, 257: height, 258: bits or 8 * pixels.itemsize, 259: 1, 262: photometric}
    tags |= {273: 8 + 2 + 12 * 10 + 4, 277: 1, 278: height, 279: len(data), 339: kind}
    head = (b"II" if order == "<" else b"MM") + struct.pack(order + "HIH", 42, 8, len(tags))
    entries = b"".join(struct.pack(order + "HHII", tag, 4, 1, tags[tag]) for tag in tags)
    return io.BytesIO(head + entries + bytes(4) + data)


def full(value: float, kind: str) -> np.ndarray:
    return np.full((8, 9), value, kind)


@pytest.mark.parametrize(
    "file, expected",
    [
        (png(full(40000, "u2")), 156),
        (png(full(40000, "u2"), transparent=40000), 255),  # laid on white
        (png(full(40000, "u2"), transparent=0), 156),
        (tiff(full(40000, "<u2")), 156),
        (tiff(full(40000, ">u2")), 156),
        (tiff(full(40000, "<u2"), photometric=0), 255 - 156),  # 0 is white
        (tiff(full(0, "<u2"), photometric=0), 255),
        (tiff(full(100, "u1"), photometric=0), 155),
        (tiff(full(0.5, "<f4"), kind=3), 128),
        (io.BytesIO(b"P5 9 8 4095\n" + full(2048, ">u2").tobytes()), 128),  # 12 bits
        (saved(Image.fromarray(full(40000, "u2")), "JPEG2000"), 156),
    ],
)
def test_many_bits_are_scaled_to_eight(file: io.BytesIO, expected: int) -> None:
    pixels = np.asarray(open_rgb(file))
    assert pixels.shape == (8, 9, 3) and (pixels == expected).all()


def test_twelve_bits_of_a_tiff_are_scaled_by_what_is_white_there() -> None:
    """Pillow unpacks them into 16 bits, as they are."""
    packed = np.frombuffer(bytes([0x80, 0x08, 0x00] * 32), "u1").reshape(8, 12)  # 2048, 2048
    file = tiff(packed, bits=12).getvalue()
    width = struct.pack("<HHI", 256, 4, 1)
    file = file.replace(width + struct.pack("<I", 12), width + struct.pack("<I", 8))
    assert (np.asarray(open_rgb(io.BytesIO(file))) == 128).all()


@pytest.mark.parametrize(
    "file, reason",
    [
        (tiff(full(20000, "<i2"), kind=2), "its pixels are signed numbers"),
        (tiff(full(-1, "i1"), kind=2), "its pixels are signed numbers"),
        (tiff(full(2**30, "<i4"), kind=2), "its pixels are signed numbers"),
        (tiff(full(2**31, "<u4")), "its pixels have 32 bits"),
        (tiff(full(5, "<f4"), kind=3), "fractions from 0 to 5, of which none is white"),
        (tiff(full(-0.5, "<f4"), kind=3), "fractions from -0.5 to 0,"),
        (tiff(full(np.nan, "<f4"), kind=3), "fractions from nan to nan"),
        (io.BytesIO(b"Pf 9 8 -1\n" + full(2000, "<f4").tobytes()), "fractions from 0 to 2000"),
    ],
)
def test_numbers_of_which_none_is_white_are_refused(file: io.BytesIO, reason: str) -> None:
    with pytest.raises(OSError, match=reason):
        open_rgb(file)


@pytest.mark.parametrize(
    "suffix", ["avif", "webp", "jp2", "j2k", "tga", "qoi", "jpe", "pbm", "dib"]
)
def test_what_pillow_reads_is_found_and_read(tmp_path: Path, suffix: str) -> None:
    Image.fromarray(picture(1)).save(tmp_path / f"a.{suffix.upper()}")
    (name,) = find_images(tmp_path)
    assert name == f"a.{suffix.upper()}"
    difference = np.abs(np.asarray(open_rgb(tmp_path / name)).astype(int) - picture(1)).mean()
    assert difference < (130 if suffix == "pbm" else 10)  # black and white


def test_heic_is_read_where_its_package_is(tmp_path: Path) -> None:
    pytest.importorskip("pillow_heif")
    Image.fromarray(picture(1)).save(tmp_path / "a.heic")
    (name,) = find_images(tmp_path)
    difference = np.asarray(open_rgb(tmp_path / name)).astype(int) - picture(1)
    assert np.abs(difference).mean() < 10


def test_a_package_that_would_read_heic_is_named(tmp_path: Path, monkeypatch) -> None:
    monkeypatch.setattr(images, "IMAGE_SUFFIXES", frozenset({".png"}))
    Image.fromarray(picture(1)).save(tmp_path / "a.png")
    (tmp_path / "b.HEIC").touch()
    (note,) = Folder(str(tmp_path)).notes()
    assert note == f"ignored in {tmp_path}: 1 .heic; pip install pillow-heif reads HEIC"


@pytest.mark.parametrize("pixels", [MAX_PIXELS + 1, 3 * MAX_PIXELS])  # Pillow stops at the second
def test_a_picture_of_too_many_pixels_is_not_decoded(pixels: int) -> None:
    data = saved(Image.new("L", (8, 8)), "PNG").getvalue()
    head = struct.pack(">II", pixels, 1)
    crc = zlib.crc32(b"IHDR" + head + data[24:29])
    wide = io.BytesIO(data[:16] + head + data[24:29] + struct.pack(">I", crc) + data[33:])
    with pytest.raises(OSError, match=r"^it has more than 120 million pixels$"):
        open_rgb(wide)
    wide.seek(0)
    with pytest.raises(OSError, match=r"more than 120 million pixels; raise --data.max-pixels to"):
        dataset.read_crop(wide, (8, 8), None, False)


def test_the_limit_of_pixels_can_be_raised_above_pillows(monkeypatch) -> None:
    monkeypatch.setattr(Image, "MAX_IMAGE_PIXELS", 10)
    assert open_rgb(saved(Image.new("L", (8, 8)), "PNG"), 64).size == (8, 8)
    with pytest.raises(OSError, match="more than 63 pixels"):
        open_rgb(saved(Image.new("L", (8, 8)), "PNG"), 63)
    # It is others' limit, too, and they are told of it by us alone.
    assert Image.MAX_IMAGE_PIXELS == 10
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        with pytest.raises(OSError, match="more than 15 pixels"):
            open_rgb(saved(Image.new("L", (4, 4)), "PNG"), 15)


def test_what_a_decoder_prints_is_shown_once_with_the_files_name(capfd, monkeypatch) -> None:
    monkeypatch.setattr(decode, "_chatter", set())
    for name in ("a.tif", "b.tif"):
        with named_chatter(lambda name=name: name):
            os.write(2, b"TIFFReadDirectory: Warning,\nUnknown field 33550.\n")
    with named_chatter(lambda: "c.tif"):
        os.write(2, b"another")
    os.write(2, b"after\n")
    assert capfd.readouterr().err == (
        "a.tif: TIFFReadDirectory: Warning, Unknown field 33550.\nc.tif: another\nafter\n"
    )


def test_what_a_decoder_prints_of_an_image_in_a_tar_names_it(tmp_path, capfd, monkeypatch) -> None:
    monkeypatch.setattr(decode, "_chatter", set())
    tar_of({"a.png": saved(Image.new("L", (64, 64)), "PNG").getvalue()}, tmp_path / "t.tar")
    real = dataset.read_crop

    def read_crop(*arguments):
        os.write(2, b"libpng warning\n")
        return real(*arguments)

    monkeypatch.setattr(dataset, "read_crop", read_crop)
    config = DataConfig(root=str(tmp_path / "t.tar"))
    dataset.AugmentedImages(find_source(config), config, (32, 32), 0).check_readable()
    assert capfd.readouterr().err == f"{tmp_path}/t.tar/a.png: libpng warning\n"


# ---- folders ------------------------------------------------------------------------------------


def test_what_is_no_image_is_counted_by_kind_and_pipes_are_left_alone(tmp_path: Path) -> None:
    Image.fromarray(picture(1)).save(tmp_path / "a.png")
    os.mkfifo(tmp_path / "b.png")
    (tmp_path / "linked.png").symlink_to(tmp_path / "b.png")
    with socket.socket(socket.AF_UNIX) as server:
        server.bind(str(tmp_path / "c.png"))
        for name in ("d.txt", "e.TXT", "README", ".hidden.png", "f.tar.gz"):
            (tmp_path / name).touch()
        (tmp_path / "broken.png").symlink_to(tmp_path / "nowhere")
        (tmp_path / "loop.png").symlink_to(tmp_path / "loop.png")
        ignored = Counter()
        assert list(find_images(tmp_path, ignored)) == ["a.png", "broken.png", "loop.png"]
    assert ignored == {
        ".txt": 2,
        "without a suffix": 1,
        "hidden": 1,
        ".gz": 1,
        "pipe, socket or device": 3,
    }
    assert Folder(str(tmp_path)).notes() == [
        f"ignored in {tmp_path}: 3 pipe, socket or device, 2 .txt, 1 hidden, 1 without a suffix,"
        " 1 .gz"
    ]


def test_a_folder_without_images_says_what_is_in_it(tmp_path: Path) -> None:
    for number in range(12):
        (tmp_path / f"a.{number}").touch()
    with pytest.raises(UserError, match=r"ignored in it: (1 \.\d+, ){8}4 of 4 other kinds"):
        find_images(tmp_path)


@pytest.mark.parametrize(
    "arguments",
    [
        ["pretrain", "--config", "greenmim_swin-demo-cpu", "--data.root", ".", "--work-dir", "{}"],
        ["pretrain", "--config", "{}", "--data.root", ".", "--work-dir", "."],
        ["convert", "--input", "{}", "--output", "a.pth"],
        ["reconstruct", "--checkpoint", "{}", "--images", ".", "--output", "a.png"],
    ],
)
def test_a_name_that_is_too_long_is_told_in_a_line(arguments: list[str], capsys) -> None:
    name = "x" * 300
    assert name in complaint(capsys, *(argument.format(name) for argument in arguments))


# ---- tars and shards ----------------------------------------------------------------------------


def tar_of(files: dict[str, bytes], path: Path | None = None) -> bytes:
    data = io.BytesIO()
    with tarfile.open(fileobj=data, mode="w") as archive:
        for name, content in files.items():
            member = tarfile.TarInfo(name)
            member.size = len(content)
            archive.addfile(member, io.BytesIO(content))
    if path is not None:
        path.write_bytes(data.getvalue())
    return data.getvalue()


FILES = {"a.jpg": bytes(700), "b.jpg": b"x" * 512, "c.json": b"", "d.jpg": b"y"}


@pytest.mark.parametrize("nested", [False, True])
def test_a_tar_is_damaged_wherever_it_was_cut(nested: bool) -> None:
    files = {"in.tar": tar_of(FILES), "z.jpg": b"z"} if nested else FILES
    whole = tar_of(files)
    everything = list(members_in(io.BytesIO(whole)))
    end = len(whole.rstrip(b"\0"))
    end += -end % tarfile.BLOCKSIZE
    for length in range(0, end + tarfile.BLOCKSIZE, 128):
        found = []
        with pytest.raises(DamagedTar):
            for member in members_in(io.BytesIO(whole[:length])):
                found.append(member)
        assert found == everything[: len(found)]
        assert all(member.offset + member.size <= length for member in found)
    for length in range(end + tarfile.BLOCKSIZE, len(whole) + 1, tarfile.BLOCKSIZE):
        assert list(members_in(io.BytesIO(whole[:length]))) == everything


@given(st.data())
@settings(max_examples=60, deadline=None)
def test_a_header_that_was_overwritten_is_damage(data) -> None:
    whole = bytearray(tar_of(FILES))
    starts = [0, 512 * 3, 512 * 5, 512 * 6]
    start = data.draw(st.sampled_from(starts))
    at = data.draw(st.integers(0, 511).filter(lambda at: at not in (154, 155)))  # end the checksum
    whole[start + at] ^= data.draw(st.integers(1, 255))
    with pytest.raises(DamagedTar):
        list(members_in(io.BytesIO(whole)))


@pytest.mark.parametrize("kind", [tarfile.GNUTYPE_LONGNAME, tarfile.XHDTYPE, tarfile.REGTYPE])
@pytest.mark.parametrize("size", [2**70, 2**40, 2**25, -1024])
def test_a_header_that_claims_more_than_there_is_is_damage(kind: bytes, size: int) -> None:
    """tarfile reads such headers whole, and goes round for ever where a file ends before it."""
    header = tarfile.TarInfo("a.jpg")
    header.type, header.size = kind, size
    tar = tar_of(FILES).rstrip(b"\0")
    tar += bytes(-len(tar) % tarfile.BLOCKSIZE) + header.tobuf(tarfile.GNU_FORMAT)
    with pytest.raises(DamagedTar, match="damaged after 4 whole files"):
        list(members_in(io.BytesIO(tar + tar_of({}))))
    with pytest.raises(DamagedTar):
        list(members_in(io.BytesIO(header.tobuf(tarfile.GNU_FORMAT) + tar_of({}))))


@pytest.mark.parametrize("size", ["-1024", str(2**70)])
@pytest.mark.parametrize("kind", [tarfile.REGTYPE, tarfile.GNUTYPE_SPARSE])
def test_a_size_of_an_extended_header_is_checked(kind: bytes, size: str) -> None:
    header = tarfile.TarInfo("a.jpg")
    header.type, header.pax_headers = kind, {"size": size}
    whole = header.tobuf(tarfile.PAX_FORMAT) + tar_of(FILES)
    with pytest.raises(DamagedTar):
        list(members_in(io.BytesIO(whole)))


def test_hidden_folders_and_links_in_a_tar_are_counted(tmp_path: Path) -> None:
    names = ["./a.jpg", ".thumbs/1.jpg", "d/.cache/e/2.jpg", "d/.3.jpg", "../b.jpg"]
    with tarfile.open(tmp_path / "a.tar", "w") as archive:
        for name in names:
            archive.addfile(tarfile.TarInfo(name))
        for name, kind in (("c.jpg", tarfile.LNKTYPE), ("d.jpg", tarfile.SYMTYPE)):
            link = tarfile.TarInfo(name)
            link.type, link.linkname = kind, "a.jpg"
            archive.addfile(link)
    source = Tars("tar/x", str(tmp_path / "a.tar"))
    assert list(source.names) == ["a.jpg", "../b.jpg"]
    assert source.notes() == ["ignored in tar/x: 3 hidden, 2 link"]
    shard = open_shard(str(tmp_path / "a.tar"))
    shard.file.close()
    assert shard.ignored == {"hidden": 3, "link": 2}


def test_a_cut_tar_is_refused_with_what_is_left(tmp_path: Path) -> None:
    path = tmp_path / "a.tar"
    path.write_bytes(tar_of(FILES)[: 512 * 5])
    for root in (str(path), f"tar/{tmp_path}"):
        with pytest.raises(UserError, match=r"a\.tar: it is damaged after 2 whole files"):
            find_source(DataConfig(root=root))


def test_a_pipe_among_tars_is_left_alone(tmp_path: Path) -> None:
    tar_of(FILES, tmp_path / "a.tar")
    os.mkfifo(tmp_path / "b.tar")
    source = Tars("tar/x", str(tmp_path))
    assert len(source) == 3 and source.notes() == ["ignored in tar/x: 1 .json"]


@pytest.mark.parametrize("name", ["a.tar.gz", "a.tgz", "a.zip", "a.txt"])
def test_an_archive_that_is_no_tar_is_told_what_to_do(tmp_path: Path, name: str) -> None:
    path = tmp_path / name
    path.write_bytes(zlib.compress(tar_of(FILES)))
    with pytest.raises(UserError, match="folder with the images, or a tar file that is not com"):
        find_source(DataConfig(root=str(path)))


def names_of(names: list[str]) -> list[Member]:
    return [Member(name, 0, 0) for name in names]


@pytest.mark.parametrize(
    "names, taken, ignored",
    [
        (["a.jpg", "a.json", "b.jpg"], ["a.jpg", "b.jpg"], {".json": 1}),
        (["a.seg.png", "a.jpg"], ["a.jpg"], {".seg.png": 1}),
        (["a.2020.jpg", "b.01.02.JPG"], ["a.2020.jpg", "b.01.02.JPG"], {}),
        (["a.left.jpg", "a.right.jpg", "b.jpg"], ["b.jpg"], {".left.jpg": 1, ".right.jpg": 1}),
        (["x.y/a.jpg", "x.z/a.jpg"], ["x.y/a.jpg", "x.z/a.jpg"], {}),
        (["a.jpg", "b.jpg", "a.jpg"], ["a.jpg", "b.jpg", "a.jpg"], {}),
        (["a.jpg", "a.png"], ["a.jpg"], {".png": 1}),
        (["a.1.jpg", "a.1.JPG"], ["a.1.jpg"], {".1.jpg": 1}),
        (["__meta__", "__more__/a.jpg", "b.jpg"], ["b.jpg"], {}),
        (["a.img", "b"], [], {".img": 1, "without a suffix": 1}),
        (["a.cls", "a.jpg", "a.txt"], ["a.jpg"], {".txt": 1}),
    ],
)
def test_an_image_is_taken_of_each_sample(names, taken, ignored) -> None:
    found = Counter()
    samples = list(of_samples(names_of(names), found))
    assert [image.name for image, _ in samples] == taken
    assert found == ignored
    assert all((label is None) == ("a.cls" not in names) for _, label in samples)


@given(
    st.lists(
        st.tuples(
            st.sampled_from(["", "d/", "d.e/", "__m__/"]),
            st.sampled_from(["a", "b", "a.1", "a.1.2", "__x"]),
            st.sampled_from([".jpg", ".seg.png", ".json", ".JPG", ""]),
        ),
        max_size=12,
    )
)
def test_samples_are_those_of_webdataset(parts) -> None:
    tariterators = pytest.importorskip("webdataset.tariterators")
    names = ["".join(part) for part in parts]
    tar = tar_of(dict.fromkeys(names, b"x"))
    names = list(dict.fromkeys(names))
    files = tariterators.tar_file_iterator(io.BytesIO(tar))
    files = ({**file, "__url__": ""} for file in files)
    expected = 0
    for sample in tariterators.group_by_keys(files, handler=lambda error: True):
        fields = [name for name in sample if not name.startswith("__")]
        pictures = [name for name in fields if is_image("x." + name)]
        expected += len(pictures) == 1 or any("." not in name for name in pictures)
    assert len(list(of_samples(names_of(names), Counter()))) == expected


def test_a_cut_shard_is_named_and_used_as_far_as_it_goes(tmp_path: Path) -> None:
    pytest.importorskip("webdataset")
    jpeg = saved(Image.fromarray(picture(1)), "JPEG").getvalue()
    for name in ("s-0.tar", "s-1.tar"):
        whole = tar_of({f"{number}.jpg": jpeg for number in range(4)}, tmp_path / name)
    block = 512 + len(jpeg) + -len(jpeg) % 512
    for length in (block * 2, block * 2 + 100, block * 2 + 700):  # between, and inside of members
        (tmp_path / "s-0.tar").write_bytes(whole[:length])
        assert len(open_shard(str(tmp_path / "s-0.tar")).images) == 2
        source = find_source(DataConfig(root=f"wds/{tmp_path}"))
        assert len(source) == 6 and source.take_damaged() == []
        (note,) = source.notes()
        assert "s-0.tar: it is damaged after 2 whole files" in note
        assert note.endswith("the 2 images that are left are used")
        far = DataConfig(root=f"wds/pipe:cat {tmp_path}/s-{{0..1}}.tar", num_samples=8)
        far = find_source(far)
        assert open_rgb(far.open(0)).size == open_rgb(far.open(4)).size
        ((path, reason),) = far.take_damaged()
        assert path.endswith("s-0.tar") and "after 2 whole files" in reason
        assert far.take_damaged() == []


# ---- memory -------------------------------------------------------------------------------------


class Heavy(torch.utils.data.Dataset):
    def __len__(self) -> int:
        return 100  # more than are taken: who has none left ends, and nobody knows of its memory

    def __getitem__(self, index: int) -> torch.Tensor:
        time.sleep(0.2)  # longer than it takes to look at the process as it starts
        return torch.ones(50_000_000)[:1].clone()  # 200 MB for a moment


def _memory_of_two_loaders() -> int:
    held = np.ones(40_000_000)  # 320 MB that a fork shares, as it does the files of libraries
    loader = torch.utils.data.DataLoader(Heavy(), num_workers=2, multiprocessing_context="fork")
    feed = Feed(loader, torch.device("cpu"))
    feed.start()
    with contextlib.closing(feed):
        for _ in range(4):
            next(feed._batches)
        memory = feed.memory()
    del held
    return memory


def test_the_memory_of_the_loaders_is_their_own() -> None:
    # In a new process: loaders use what this one has freed and kept before their peak rises.
    spawn = multiprocessing.get_context("spawn")
    with concurrent.futures.ProcessPoolExecutor(1, mp_context=spawn) as process:
        assert 380e6 < process.submit(_memory_of_two_loaders).result() < 700e6

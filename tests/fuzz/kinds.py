"""Files of every kind that the package reads: how small ones are made, and how each is read."""

from __future__ import annotations

import argparse
import contextlib
import dataclasses
import io
import json
import os
import shutil
import struct
from collections.abc import Callable, Iterator
from pathlib import Path

import numpy as np
import torch
from PIL import Image, features

import greenmim_kernels as gk
from greenmim.checkpoint import convert_checkpoint
from greenmim.cli import main
from greenmim.config import ModelConfig
from greenmim.data.dataset import AugmentedImages
from greenmim.data.decode import IMAGE_SUFFIXES
from greenmim.data.labelled import LabelledImages, find_classes, find_labelled
from greenmim.data.sampler import Item
from greenmim.data.sources import find_source
from greenmim.evaluation.features import Features, load_features, save_features
from greenmim.guards import UserError, first_line
from greenmim.initial import initialise, safetensors_facts, sizes_in
from greenmim.mim import GreenMIM
from greenmim.planning import Layout, Plan
from greenmim.recipe import DataConfig
from greenmim.tools.convert import convert_file
from greenmim.tools.export import export, timm_line
from greenmim.tools.loading import is_classifier, load_classifier, load_encoder, load_model
from greenmim.tools.measured import ClassifiedData, read_as_trained
from tests.archives import write_tar

SIZES = {
    "image_size": 64, "window_size": 2, "embed_dim": 4, "depths": (1, 1, 1, 1),
    "num_heads": (1, 1, 1, 1), "decoder_dim": 8, "decoder_depth": 1, "decoder_heads": 1,
}  # fmt: skip
RECIPE = """
epochs: 1
device: cpu
threads: 1
seed: 1
model:
  image_size: 64
  window_size: 2
  embed_dim: 4
  depths: [1, 1, 1, 1]
  num_heads: [1, 1, 1, 1]
  {decoder}
data:
  root: {root}
  batch_size: 2
  repeats: 1
  workers: 0
  crop_scale: [0.2, 1.0]
optim:
  lr: 1.0e-3
  betas: [0.9, 0.95]
schedule:
  warmup_epochs: 0
work_dir: {work_dir}
"""
DECODER = "decoder_dim: 8\n  decoder_depth: 1\n  decoder_heads: 1"
MOST_PIXELS = 10_000  # of an image: what is larger is refused, however small its file is


class Refused(Exception):
    """A reader said no, as its documentation has it."""


@dataclasses.dataclass(frozen=True)
class Kind:
    """A kind of files.

    Attributes:
        make: fills an empty folder with one sample.
        read: reads it; raises `UserError` or `Refused` where it cannot.
        broken: the files in it that are damaged, as a pattern of pathlib.
        share: of all cases, so many parts.
    """

    make: Callable[[Path], None]
    read: Callable[[Path], None]
    broken: str
    share: int = 1


def run_main(*arguments: str | Path) -> None:
    """The command line, in this process; Refused where it says no in one line."""
    out, err = io.StringIO(), io.StringIO()
    with contextlib.redirect_stdout(out), contextlib.redirect_stderr(err):
        code = main(list(map(str, arguments)))
    if code == 0:
        return
    last = err.getvalue().rstrip("\n").rpartition("\n")[2]
    if code != 2 or not last.startswith("greenmim: error: "):
        raise AssertionError(f"exit code {code}: {err.getvalue()[-500:]!r}")
    raise Refused(last)


def picture(number: int) -> Image.Image:
    rng = np.random.default_rng(number)
    return Image.fromarray(rng.integers(0, 255, (12, 10, 3), dtype=np.uint8))


def encoded(kind: str, number: int = 0) -> bytes:
    file = io.BytesIO()
    picture(number).save(file, kind)
    return file.getvalue()


def class_folders(folder: Path) -> Path:
    for number in range(4):
        place = folder / "ab"[number % 2] / f"{number}.png"
        place.parent.mkdir(parents=True, exist_ok=True)
        place.write_bytes(encoded("PNG", number))
    return folder


# ---- checkpoints --------------------------------------------------------------------------------


def _run(folder: Path, command: str = "pretrain") -> None:
    class_folders(folder / "images")
    decoder = DECODER if command == "pretrain" else "norm_eps: 1.0e-6"
    text = RECIPE.format(decoder=decoder, root=folder / "images", work_dir=folder / "run")
    (folder / "recipe.yaml").write_text(text)
    run_main(command, "--config", folder / "recipe.yaml")
    shutil.rmtree(folder / "run" / "tensorboard", ignore_errors=True)


def _resumed(folder: Path) -> None:
    options = ("--data.root", folder / "images", "--work-dir", folder / "run", "--resume")
    run_main("pretrain", "--config", folder / "recipe.yaml", *options)


def _one_file(folder: Path) -> Path:
    return next(path for path in folder.iterdir() if path.name.startswith("file."))


def _read_checkpoint(folder: Path) -> None:
    """Whoever reads a checkpoint gets it or a UserError; Refused where nobody gets its encoder."""
    path = next(folder.rglob("step_*.pth"), None) or _one_file(folder)
    refused = []
    for read in (
        lambda: _as_images_are_read(load_encoder(path)),
        lambda: _as_images_are_read(load_classifier(path)),
        lambda: load_model(path),
        lambda: is_classifier(path),
        lambda: convert_file(path, folder / "converted.pth", source="official", overwrite=True),
        lambda: export(path, folder / "exported.safetensors", overwrite=True),
        lambda: initialise(_model(), path),
        lambda: sizes_in(path),
    ):
        refused.append(None)
        try:
            read()
        except UserError as error:
            refused[-1] = error
        except (ValueError, OSError) as error:  # as documented of the last two
            refused[-1] = Refused(first_line(error))
            if read.__code__.co_names[0] not in ("initialise", "sizes_in"):
                raise
    if refused[0]:
        raise refused[0]


def _as_images_are_read(loaded: tuple) -> None:
    read_as_trained(ClassifiedData(), loaded[1])


def _model() -> GreenMIM:
    torch.manual_seed(0)
    return GreenMIM(ModelConfig(**SIZES))


def _official(folder: Path) -> None:
    weights = convert_checkpoint(_model().state_dict(), "greenmim", "official")
    arguments = argparse.Namespace(model="x", output_dir=Path("/out"), lr=1.0)
    torch.save({"model": weights, "args": arguments, "epoch": 3}, folder / "file.pth")


def _timm(folder: Path) -> None:
    weights = convert_checkpoint(_model().state_dict(), "greenmim", "timm")
    weights |= {"head.fc.weight": torch.zeros(3, 32), "head.fc.bias": torch.zeros(3)}
    torch.save(weights, folder / "file.pth")


def _legacy(folder: Path) -> None:
    weights = convert_checkpoint(_model().state_dict(), "greenmim", "timm")
    torch.save({"model": weights}, folder / "file.pth", _use_new_zipfile_serialization=False)


def _exported(folder: Path) -> None:
    _run(folder, "finetune")
    export(next(folder.rglob("step_*.pth")), folder / "file.safetensors")
    for path in (folder / "run", folder / "images"):
        shutil.rmtree(path)
    (folder / "recipe.yaml").unlink()
    _in_order(folder / "file.safetensors")


def _in_order(path: Path) -> None:
    """Its header as it is in every run: safetensors writes metadata in an order drawn by chance."""
    data = path.read_bytes()
    (length,) = struct.unpack("<Q", data[:8])
    header = json.dumps(json.loads(data[8 : 8 + length]), sort_keys=True).encode()
    header += b" " * (-len(header) % 8)
    path.write_bytes(struct.pack("<Q", len(header)) + header + data[8 + length :])


def _read_exported(folder: Path) -> None:
    _read_checkpoint(folder)
    try:
        timm_line(safetensors_facts(folder / "file.safetensors"), "x")
    except (KeyError, ValueError, AttributeError, TypeError) as error:
        raise Refused("its facts are not what `export` wrote") from error


# ---- what is kept of a run ----------------------------------------------------------------------


def _features(folder: Path) -> None:
    values = torch.linspace(-1, 1, 60).view(10, 6)
    save_features(Features(values, list("abcabcabca"), 1), folder / "file.safetensors")
    _in_order(folder / "file.safetensors")


def _read_features(folder: Path) -> None:
    found = load_features(folder / "file.safetensors")
    if found is None:
        raise Refused("they are made anew")
    assert found.values.dtype == torch.float32 and found.values.dim() == 2, found.values
    assert len(found.labels) == len(found.values), (len(found.labels), found.values.shape)
    assert all(isinstance(label, str) for label in found.labels), found.labels
    assert isinstance(found.without_label, int), found.without_label


# ---- images -------------------------------------------------------------------------------------


def _read_images(root: str | Path) -> None:
    """All of them, to learn from and to measure with."""
    config = DataConfig(root=str(root), max_pixels=MOST_PIXELS)
    problems = []
    source = find_source(config)
    for images in (AugmentedImages(source, config, (32, 32), 0),
                   LabelledImages(source, config, (32, 32))):  # fmt: skip
        for position in range(min(len(images), 8)):
            sample = images[Item(0, 0, 0, position)]
            problems += [*sample.failures, *([sample.stop] if sample.stop else [])]
    source.notes()
    source.fingerprint()
    if source.knows_labels:
        source.classes()
    with contextlib.suppress(UserError):
        find_labelled(config, "data.root")
    if problems:
        raise Refused(str(problems[0]))


_FORMATS = {
    "png": "PNG", "jpg": "JPEG", "gif": "GIF", "bmp": "BMP", "tif": "TIFF", "webp": "WEBP",
    "ppm": "PPM", "tga": "TGA", "pcx": "PCX", "sgi": "SGI", "qoi": "QOI", "jp2": "JPEG2000",
    "avif": "AVIF", "heic": "HEIF",
}  # fmt: skip


def _image(folder: Path, suffix: str) -> None:
    (folder / "images" / "a").mkdir(parents=True)
    (folder / "images" / "a" / f"file.{suffix}").write_bytes(encoded(_FORMATS[suffix]))


def _can_write(suffix: str) -> bool:
    needs = {"webp": "webp", "jp2": "jpg_2000", "avif": "avif"}
    known = f".{suffix}" in IMAGE_SUFFIXES and _FORMATS[suffix] in Image.SAVE
    return known and (suffix not in needs or features.check(needs[suffix]))


def _tar(folder: Path) -> None:
    images = {
        f"{'ab'[n % 2]}/{n}.{k}": encoded(_FORMATS[k], n) for n, k in enumerate(("png", "jpg"))
    }
    write_tar(folder / "inner.tar", images)
    inner = (folder / "inner.tar").read_bytes()
    write_tar(folder / "file.tar", {**images, "c/inner.tar": inner, "readme.txt": b"x"})
    (folder / "inner.tar").unlink()


def _shards(folder: Path) -> None:
    for shard in range(2):
        members = {}
        for number in range(2 * shard, 2 * shard + 2):
            members |= {f"{number}.cls": b"%d" % number, f"{number}.jpg": encoded("JPEG", number)}
        write_tar(folder / "shards" / f"train-{shard}.tar", members)
    split = {"filenames": ["train-0.tar", "train-1.tar"], "shard_lengths": [2, 2]}
    (folder / "shards" / "_info.json").write_text(json.dumps({"splits": {"train": split}}))


# ---- plain text ---------------------------------------------------------------------------------


def _recipe_file(folder: Path, command: str) -> None:
    class_folders(folder / "images")
    decoder = DECODER if command == "pretrain" else "norm_eps: 1.0e-6"
    # Relative: the sample is copied, and read from within the copy.
    text = RECIPE.format(decoder=decoder, root="images", work_dir="run")
    (folder / "file.yaml").write_text(text)


def _read_recipe(folder: Path, command: str) -> None:
    with _within(folder):
        run_main(command, "--config", "file.yaml", "--dry-run")


@contextlib.contextmanager
def _within(folder: Path) -> Iterator[None]:
    before = os.getcwd()
    os.chdir(folder)
    try:
        yield
    finally:
        os.chdir(before)


def _classes(folder: Path) -> None:
    (folder / "file.txt").write_text("cat\ndog\nbird\n", encoding="utf-8")


def _read_classes(folder: Path) -> None:
    names = find_classes(None, str(folder / "file.txt"))
    assert len(set(names)) == len(names) >= 2


# ---- partitions and plans -----------------------------------------------------------------------


def _partition(images: int | None = None) -> tuple[gk.GroupPartition, torch.Tensor]:
    """And which tokens are beside each other."""
    rng = np.random.default_rng(0)
    grid = np.stack([rng.permutation(36).reshape(6, 6) < 18 for _ in range(images or 1)])
    grid = grid if images else grid[0]
    return gk.group_partition(grid, 3, 1), gk.grid_neighbours(grid)


def _partition_file(folder: Path, images: int | None) -> None:
    part, neighbours = _partition(images)
    arrays = [np.ascontiguousarray(tensor).tobytes() for tensor in (*part.tensors, neighbours)]
    (folder / f"file.{images or 0}").write_bytes(b"".join(arrays))


def _fitted(data: bytes, size: int) -> bytearray:
    return bytearray(data[:size].ljust(size, b"\xff"))


def _read_partition(folder: Path) -> None:
    """Every operator of the CPU with a partition whose numbers are anything."""
    path = _one_file(folder)
    images = int(path.suffix[1:]) or None
    part, neighbours = _partition(images)
    batch = images or 2
    whole = (*part.tensors, neighbours)
    data = _fitted(path.read_bytes(), sum(tensor.nbytes for tensor in whole))
    pieces = torch.frombuffer(data, dtype=torch.int32).split([t.numel() for t in whole])
    *tensors, neighbours = (p.view(t.shape) for p, t in zip(pieces, whole, strict=True))
    broken = dataclasses.replace(part, **dict(zip(gk.partition.TENSORS, tensors, strict=True)))
    qkv = torch.randn(batch, part.num_tokens, 24, requires_grad=True)
    table = torch.randn(part.table_rows, 2, requires_grad=True)
    grouped = torch.randn(batch, part.num_groups, part.group_size, 24, requires_grad=True)
    weight = torch.randn(24, 9, requires_grad=True)
    refused = None
    for work in (
        lambda: gk.group_gather(qkv, broken),
        lambda: gk.group_scatter(grouped, broken),
        lambda: gk.group_window_attention(qkv, table, broken, 2),
        lambda: gk.block_diagonal_attention(grouped, table, broken, 2),
        lambda: gk.sparse_depthwise_conv(qkv, weight, None, neighbours),
    ):
        try:
            with gk.use_backend("cpp"):
                work().sum().backward()
        except RuntimeError as error:
            refused = Refused(str(error).splitlines()[0])
    if refused:
        raise refused


def _plan_of_model(encoder: str) -> tuple[GreenMIM, Plan]:
    own = {"encoder": "twins_svt", "embed_dim": (4, 4, 4, 4)} if encoder == "twins" else {}
    torch.manual_seed(0)
    model = GreenMIM(ModelConfig(**{**SIZES, **own}))
    return model, model.plan(np.array([[True, False, True, False], [False, True, True, False]]))


def _plan_file(folder: Path, encoder: str) -> None:
    (folder / f"file.{encoder}").write_bytes(_plan_of_model(encoder)[1].memory.numpy().tobytes())


def _read_plan(folder: Path) -> None:
    """A step of a model whose plan's memory is anything."""
    path = _one_file(folder)
    model, plan = _plan_of_model(path.suffix[1:])
    layout: Layout = plan.layout
    memory = torch.frombuffer(_fitted(path.read_bytes(), len(plan.memory)), dtype=torch.uint8)
    try:
        model(torch.randn(2, 3, 64, 64), plan=Plan(memory, layout)).loss.backward()
    except (RuntimeError, IndexError, ValueError) as error:  # of PyTorch's own indexing, too
        raise Refused(str(error).splitlines()[0]) from error


# -------------------------------------------------------------------------------------------------

KINDS: dict[str, Kind] = {
    "run": Kind(_run, _resumed, "run/checkpoints/*.pth", 6),
    "moments": Kind(_run, _resumed, "run/checkpoints/*.optimizer/*", 6),
    "log": Kind(_run, _resumed, "run/log.jsonl", 3),
    "of a run": Kind(_run, _read_checkpoint, "run/checkpoints/*.pth", 6),
    "official": Kind(_official, _read_checkpoint, "file.pth", 6),
    "timm": Kind(_timm, _read_checkpoint, "file.pth", 6),
    "legacy": Kind(_legacy, _read_checkpoint, "file.pth", 4),
    "exported": Kind(_exported, _read_exported, "file.safetensors", 8),
    "features": Kind(_features, _read_features, "file.safetensors", 6),
    "tar": Kind(_tar, lambda folder: _read_images(folder / "file.tar"), "file.tar", 8),
    "shards": Kind(
        _shards, lambda folder: _read_images(f"wds/{folder / 'shards'}"), "shards/*.tar", 6
    ),
    "info": Kind(
        _shards, lambda folder: _read_images(f"wds/{folder / 'shards'}"), "shards/*.json", 4
    ),
    "recipe": Kind(
        lambda folder: _recipe_file(folder, "pretrain"),
        lambda folder: _read_recipe(folder, "pretrain"),
        "file.yaml",
        6,
    ),
    "finetuning": Kind(
        lambda folder: _recipe_file(folder, "finetune"),
        lambda folder: _read_recipe(folder, "finetune"),
        "file.yaml",
        3,
    ),
    "classes": Kind(_classes, _read_classes, "file.txt", 2),
    "partition": Kind(lambda folder: _partition_file(folder, None), _read_partition, "file.*", 4),
    "partitions": Kind(lambda folder: _partition_file(folder, 3), _read_partition, "file.*", 4),
    "plan": Kind(lambda folder: _plan_file(folder, "swin"), _read_plan, "file.*", 3),
    "plan of Twins": Kind(lambda folder: _plan_file(folder, "twins"), _read_plan, "file.*", 3),
    **{
        suffix: Kind(
            lambda folder, suffix=suffix: _image(folder, suffix),
            lambda folder: _read_images(folder / "images"),
            "images/a/*",
            1,
        )
        for suffix in _FORMATS
        if _can_write(suffix)
    },
}

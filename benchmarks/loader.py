"""How many images per second a loader process gives, beside what a step takes in.

    python -m benchmarks.loader                 # every path
    python -m benchmarks.loader --need 4000     # cores for so many images per second

One loader process makes batches as it does in a run, and the main process does nothing but
receive them: images over the time on the clock, and the processor time of the loader process.
Float32 images are finished in the loader, uint8 ones on the device, which is no part of this.

JPEGs are made from scikit-image's photographs: in an ImageNet-like size, and cut out of its larger
ones, never enlarged. A reduced decode begins where both sides of a crop are twice the output's, so
it is measured for the larger ones alone.
"""

from __future__ import annotations

import argparse
import itertools
import math
import os
import pathlib
import sys
import tarfile
import tempfile
import time

import numpy as np
import torch
from PIL import Image

from greenmim import ModelConfig, create_model
from greenmim.config import model_config
from greenmim.data.dataset import AugmentedImages, Finish, finishes_in_loader
from greenmim.data.decode import open_rgb
from greenmim.data.loader import Collate, check_shared_memory, make_loader
from greenmim.data.sampler import EpochSampler
from greenmim.data.sources import find_source
from greenmim.guards import UserError
from greenmim.planning import Planner
from greenmim.recipe import DataConfig, MaskConfig

from . import costs
from .environment import describe, folder_of, write_json

# Names of scikit-image's photographs, by the longer side of the JPEGs made of them.
PHOTOGRAPHS = {
    500: ("astronaut", "camera", "chelsea", "coffee", "hubble_deep_field", "motorcycle_left",
          "retina", "rocket"),
    1000: ("hubble_deep_field", "retina"),
    1400: ("retina",),
}  # fmt: skip
ENLARGED_BEYOND = 500  # px, of most of them
COPIES, QUALITY, BATCH, CROP = 4, 90, 128, (224, 224)
WARM_UP, LEAST = 3, 5  # batches
NEED_MODEL, NEED_BATCH = "greenmim_swin_base_patch4_window7_224", 128
PATHS = {
    "decoded whole, float32": {"decode": "full", "augment_on_device": False},
    "decoded whole, uint8": {"decode": "full", "augment_on_device": True},
    "reduced, float32": {"decode": "reduced", "augment_on_device": False},
    "reduced, uint8": {"decode": "reduced", "augment_on_device": True},
}
# Those other than a folder are read by the path of a run on a GPU.
SOURCES = {"folder": "{}", "a tar": "tar/{}/all.tar", "shards": "wds/{}/{{0..3}}.tar"}
DEFAULT = "reduced, uint8"


def needed() -> float:
    """Images per second of a step of Swin-B at twice its least time on an H100 (see `costs`)."""
    config = model_config(NEED_MODEL)
    parameters = sum(p.numel() for p in create_model(NEED_MODEL).parameters() if p.requires_grad)
    work = costs.step_work(config, NEED_BATCH, 0.75, parameters, costs.Widths())
    rates = costs.COPY_BYTES_PER_SECOND, costs.PRODUCT_FLOPS_PER_SECOND
    return NEED_BATCH / costs.floor_seconds(work, *rates) / 2


def make_photographs(folder: pathlib.Path, long_side: int) -> None:
    """JPEGs of at most so many px, 4:3 where they are cut out, from scikit-image's photographs."""
    import skimage.data

    source = pathlib.Path(skimage.data.__file__).parent
    names = PHOTOGRAPHS[long_side]
    found = sorted(
        path for name in names for path in source.glob(f"{name}.*") if path.suffix != ".py"
    )
    if len(found) < len(names):
        raise FileNotFoundError(f"{source} holds {len(found)} of {len(names)} photographs")
    for path, copy in itertools.product(found, range(COPIES)):
        picture = open_rgb(path)
        if long_side > ENLARGED_BEYOND:
            picture = cut_out(picture, long_side, 3 * long_side // 4, copy / (COPIES - 1))
        elif max(picture.size) > long_side:
            scale = long_side / max(picture.size)
            size = tuple(round(side * scale) for side in picture.size)
            picture = picture.resize(size, Image.Resampling.LANCZOS)
        if copy % 2:
            picture = picture.transpose(Image.Transpose.FLIP_LEFT_RIGHT)
        picture.save(folder / f"{path.stem}-{copy}.jpg", quality=QUALITY)


def cut_out(picture: Image.Image, width: int, height: int, where: float) -> Image.Image:
    """Part of a picture in its own pixels, from its first corner (0) to its last (1)."""
    left, top = (round(where * (a - b)) for a, b in zip(picture.size, (width, height), strict=True))
    return picture.crop((left, top, left + width, top + height))


def make_tars(folder: pathlib.Path) -> None:
    """The same JPEGs in one tar and in four shards."""
    files = sorted(folder.glob("*.jpg"))
    for name, part in (("all", files), *((str(shard), files[shard::4]) for shard in range(4))):
        with tarfile.open(folder / f"{name}.tar", "w") as archive:
            for file in part:
                archive.add(file, file.name)


def loader_of(root: str, options: dict, batch: int) -> torch.utils.data.DataLoader:
    """One loader process, as a run has it."""
    config = DataConfig(root=root, batch_size=batch, **options)
    source = find_source(config)
    dataset = AugmentedImages(source, config, CROP, seed=0)
    finish = Finish(config) if finishes_in_loader(config, torch.device("cpu")) else None
    collate = Collate(Planner(ModelConfig()), MaskConfig(), 0, finish)
    repeats = math.ceil(8 * batch / len(source))
    sampler = EpochSampler(len(source), batch, repeats=repeats, epochs=10_000, shards=source.shards)
    loader = make_loader(dataset, sampler, collate, 1, pin_memory=False)
    loader.timeout = 0  # a run looks at signals meanwhile (see `Feed`)
    return loader


def largest_batch(root: str, options: dict) -> int:
    """The batch size of a run, or a smaller one where shared memory has no room for it."""
    batch = BATCH
    while batch > 1:
        try:
            check_shared_memory(loader_of(root, options, batch), 1)
            break
        except UserError:
            batch //= 2
    return batch


def processor_seconds(process: int) -> float:
    """Processor time that a process has had so far."""
    # The name, which comes first, may hold blanks.
    fields = pathlib.Path(f"/proc/{process}/stat").read_text().rpartition(")")[2].split()
    return (int(fields[11]) + int(fields[12])) / os.sysconf("SC_CLK_TCK")


def rate_of(root: str, options: dict, seconds: float) -> dict:
    """Of one loader process: images over time, and the spread of batches."""
    batch = largest_batch(root, options)
    batches = iter(loader_of(root, options, batch))
    (process,) = (worker.pid for worker in batches._workers)
    for _ in range(WARM_UP):
        next(batches)
    used, start = processor_seconds(process), time.perf_counter()
    arrivals = [start]
    while arrivals[-1] - start < seconds or len(arrivals) <= LEAST:
        next(batches)
        arrivals.append(time.perf_counter())
    used, images = processor_seconds(process) - used, batch * (len(arrivals) - 1)
    low, high = np.percentile(batch / np.diff(arrivals), (20, 80))
    return {
        "batch": batch,
        "batches": len(arrivals) - 1,
        "images_per_second": images / (arrivals[-1] - start),
        "p20": low,
        "p80": high,
        "cpu_seconds_per_image": used / images,
    }


def psnr_of_reduced(folder: pathlib.Path) -> float:
    """Mean peak signal-to-noise ratio in dB of crops from reduced decodes, against whole ones."""
    crops = {}
    for decode in ("full", "reduced"):
        config = DataConfig(root=str(folder), batch_size=BATCH, decode=decode)
        source = find_source(config)
        dataset = AugmentedImages(source, config, CROP, seed=0)
        items = EpochSampler(len(source), len(source), repeats=4)
        crops[decode] = torch.stack([dataset[i].image for batch in items for i in batch]).double()
    error = (crops["full"] - crops["reduced"]).square().mean((1, 2, 3))
    return (10 * (255**2 / error.clamp(min=1e-3)).log10()).mean().item()


def measure(folder: pathlib.Path, long_side: int, seconds: float, result: dict) -> None:
    """Fill in the result for pictures of one size."""
    make_photographs(folder, long_side)
    make_tars(folder)
    sizes = [file.stat().st_size for file in folder.glob("*.jpg")]
    result["bytes_per_image"][str(long_side)] = sum(sizes) / len(sizes)
    paths = list(PATHS)
    if long_side < 2 * max(CROP) * 4 / 3:  # of 4:3, the shorter side counts
        paths = [name for name in paths if PATHS[name]["decode"] != "reduced"]
    else:
        result["psnr_db"][str(long_side)] = psnr_of_reduced(folder)
    cases = [("folder", name) for name in paths]
    # The same, where nothing is reduced.
    plain = DEFAULT if DEFAULT in paths else "decoded whole, uint8"
    cases += [(source, plain) for source in SOURCES if source != "folder"]
    for source, name in cases:
        row = rate_of(SOURCES[source].format(folder), PATHS[name], seconds)
        row["cores"] = result["need"] / row["images_per_second"]
        name += "" if source == "folder" else f", from {source}"
        result["rows"].append({"source": source, "long_side": long_side, "path": name, **row})
        print(
            f"{long_side:>5} px  {name:<38}{row['images_per_second']:8.0f} images/s"
            f" ({row['p20']:.0f} to {row['p80']:.0f}),"
            f" {1e3 * row['cpu_seconds_per_image']:.2f} ms of processor time each;"
            f" {row['cores']:.1f} cores for {result['need']:.0f} images/s",
            flush=True,
        )


def main(argv: list[str] | None = None) -> int:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument(
        "--need",
        type=float,
        help="images per second of a step; the default: of Swin-B at twice its least time",
    )
    parser.add_argument("--seconds", type=float, default=10.0, help="for each path")
    parser.add_argument("--no-save", action="store_true", help="print only")
    options = parser.parse_args(argv)
    torch.set_num_threads(1)
    result = {
        "environment": describe(1),
        "need": options.need or needed(),
        "need_of": None
        if options.need
        else f"{NEED_MODEL}, batch {NEED_BATCH}, at twice its least time",
        "rows": [],
        "bytes_per_image": {},
        "psnr_db": {},
    }
    for long_side in PHOTOGRAPHS:
        with tempfile.TemporaryDirectory() as folder:
            measure(pathlib.Path(folder), long_side, options.seconds, result)
    for side, psnr in result["psnr_db"].items():
        print(f"{side:>5} px  reduced against whole: {psnr:.1f} dB")
    if not options.no_save:
        file = folder_of(result["environment"]["device"]) / "loader.json"
        write_json(file, result)
        print(f"written to {file}")
    return 0


if __name__ == "__main__":
    sys.exit(main())

"""How many images per second a loader process delivers, beside what a training step takes in.

    python -m benchmarks.loader                 # every path, one loader process
    python -m benchmarks.loader --need 4000     # and the cores that so many images per second take

JPEGs are made from scikit-image's photographs, never enlarged: the sizes of ImageNet (500 px), and
the two that are large as they are. One loader process, as in a run: files, decoding, crops,
scaling, the end of the augmentation, masks and their plan, and the way to the main process through
shared memory, which only receives. Files are in the system's cache.
"""

from __future__ import annotations

import argparse
import contextlib
import itertools
import os
import pathlib
import sys
import tarfile
import tempfile
import time
from collections.abc import Iterator

import numpy as np
import torch
from PIL import Image

from greenmim import ModelConfig
from greenmim.data.augment import Finish, finishes_in_loader
from greenmim.data.dataset import AugmentedImages
from greenmim.data.images import open_rgb
from greenmim.data.loader import Batch, Collate, make_loader
from greenmim.data.sampler import EpochSampler
from greenmim.data.sources import find_source
from greenmim.planning import Planner
from greenmim.recipe import DataConfig, MaskConfig

from . import costs
from .environment import describe, folder_of, write_json

# Photographs, the longest side of the JPEGs (None: as they are), and copies of each.
SETS = {
    "500 px": (("astronaut", "camera", "coffee", "hubble_deep_field", "motorcycle_left", "retina",
                "rocket"), 500, 40),
    "1000 and 1411 px": (("hubble_deep_field", "retina"), None, 140),
}  # fmt: skip
QUALITY, BATCH, CROP, SKIPPED = 90, 128, (224, 224), 4
FLOAT, BYTES = {"augment_on_device": False}, {"augment_on_device": True}
PATHS = {
    "decoded whole, float32": {"decode": "full", **FLOAT},
    "decoded whole, 8 bits (finished on the device)": {"decode": "full", **BYTES},
    "decoded at a reduced scale, float32": {"decode": "reduced", **FLOAT},
    "decoded at a reduced scale, 8 bits": {"decode": "reduced", **BYTES},
    "files (decoded on the device)": {"decode": "device", **BYTES},
}
# Those other than a folder are read by this path.
OTHERS = "decoded whole, 8 bits (finished on the device)"
SOURCES = {"folder": "{}", "a tar": "tar/{}/all.tar", "shards": "wds/{}/{{0..3}}.tar"}


def make_photographs(folder: pathlib.Path, which: str) -> None:
    """The JPEGs of a set: each photograph as it is and mirrored, so many times."""
    import skimage.data

    names, side, copies = SETS[which]
    source = pathlib.Path(skimage.data.__file__).parent
    for name in names:
        (path,) = (p for p in source.glob(f"{name}.*") if p.suffix != ".py")
        picture = open_rgb(path)
        if side is not None:
            picture.thumbnail((side, side), Image.Resampling.LANCZOS)
        mirrored = picture.transpose(Image.Transpose.FLIP_LEFT_RIGHT)
        for copy in range(copies):
            (mirrored if copy % 2 else picture).save(folder / f"{name}-{copy}.jpg", quality=QUALITY)


def make_tars(folder: pathlib.Path) -> None:
    """The same JPEGs in one tar and in four shards."""
    files = sorted(folder.glob("*.jpg"))
    for name, part in (("all", files), *((str(shard), files[shard::4]) for shard in range(4))):
        with tarfile.open(folder / f"{name}.tar", "w") as archive:
            for file in part:
                archive.add(file, file.name)


def images_per_second(root: str, options: dict, seconds: float, batch_size: int = BATCH) -> dict:
    """What one loader process delivers: over the whole time, and the spread over batches."""
    config = DataConfig(root=root, batch_size=batch_size, **options)
    source = find_source(config)
    dataset = AugmentedImages(source, config, CROP, seed=0)
    on_device = torch.device("cuda")  # where it would go; nothing is copied there
    finish = Finish(config) if finishes_in_loader(config, on_device) else None
    collate = Collate(Planner(ModelConfig()), MaskConfig(), 0, finish)
    sampler = EpochSampler(len(source), batch_size, epochs=100_000, shards=source.shards)
    batches = iter(make_loader(dataset, sampler, collate, 1, pin_memory=False))
    worker = batches._workers[0].pid
    for _ in range(SKIPPED):  # the start, and what was made ahead meanwhile
        _receive(batches)
    arrivals, spent = [time.perf_counter()], _cpu_seconds(worker)
    while arrivals[-1] - arrivals[0] < seconds or len(arrivals) < 6:
        _receive(batches)
        arrivals.append(time.perf_counter())
    spent, images = _cpu_seconds(worker) - spent, batch_size * (len(arrivals) - 1)
    del batches
    low, high = np.percentile(batch_size / np.diff(arrivals), (20, 80))
    return {
        "images_per_second": images / (arrivals[-1] - arrivals[0]),
        "p20": low,
        "p80": high,
        "batches": len(arrivals) - 1,
        "cpu_ms_per_image": 1e3 * spent / images,
    }


def _receive(batches: Iterator[Batch]) -> None:
    batch = None
    while batch is None:
        try:
            batch = next(batches)
        except RuntimeError as error:  # a run looks at signals meanwhile, see `Feed`
            if "DataLoader timed out" not in str(error):
                raise
    if batch.stop or batch.failures:
        raise RuntimeError(batch.stop or str(batch.failures[0]))


def _cpu_seconds(pid: int) -> float:
    """Of a process so far; NaN where the system does not say."""
    with contextlib.suppress(OSError):
        fields = pathlib.Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()
        return (int(fields[11]) + int(fields[12])) / os.sysconf("SC_CLK_TCK")
    return float("nan")


def psnr_of_reduced(folder: pathlib.Path) -> float | None:
    """Mean peak signal-to-noise ratio in dB of crops from reduced decodes, against whole ones.

    Of those that differ; None where none does: a crop must be twice as large as its output.
    """
    crops = {}
    for decode in ("full", "reduced"):
        config = DataConfig(root=str(folder), batch_size=32, decode=decode)
        source = find_source(config)
        dataset = AugmentedImages(source, config, CROP, seed=0)
        items = itertools.islice(EpochSampler(len(source), 32), 2)
        crops[decode] = torch.stack([dataset[i].image for batch in items for i in batch]).double()
    error = (crops["full"] - crops["reduced"]).square().mean((1, 2, 3))
    error = error[error > 0]
    return (10 * (255**2 / error).log10()).mean().item() if len(error) else None


def need_of_a_step() -> float:
    """Images per second of Swin-B, batch 128, on an H100 at half the rate of its floor."""
    config = ModelConfig()
    work = costs.step_work(config, 128, 0.75, 91_997_880, costs.Widths())
    rates = costs.COPY_BYTES_PER_SECOND, costs.PRODUCT_FLOPS_PER_SECOND
    return 128 / costs.floor_seconds(work, *rates) / 2


def main(argv: list[str] | None = None) -> int:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--need", type=float, help="images per second of a step, instead of ours")
    parser.add_argument("--seconds", type=float, default=10.0, help="for each path")
    parser.add_argument("--no-save", action="store_true", help="print only")
    options = parser.parse_args(argv)
    torch.set_num_threads(1)
    need = options.need or need_of_a_step()
    result = {"environment": describe(1), "need": need, "batch": BATCH, "sets": {}, "rows": []}
    for which in SETS:
        with tempfile.TemporaryDirectory() as folder:
            path = pathlib.Path(folder)
            make_photographs(path, which)
            sizes = [file.stat().st_size for file in path.glob("*.jpg")]
            psnr = psnr_of_reduced(path)
            result["sets"][which] = {"mean_bytes": float(np.mean(sizes)), "psnr_db": psnr}
            make_tars(path)
            cases = [("folder", name) for name, how in PATHS.items()
                     if psnr is not None or how["decode"] != "reduced"]  # fmt: skip
            cases += [(source, OTHERS) for source in SOURCES if source != "folder"]
            for source, name in cases:
                root = SOURCES[source].format(path)
                row = {"set": which, "source": source, "path": name,
                       **images_per_second(root, PATHS[name], options.seconds)}  # fmt: skip
                row["processes"] = need / row["images_per_second"]
                result["rows"].append(row)
                said = (
                    f"{which:<18}{source:<8}{name:<48}{row['images_per_second']:6.0f} images/s"
                    f" ({row['p20']:.0f} to {row['p80']:.0f}), {row['cpu_ms_per_image']:.2f} ms of"
                    f" CPU each; {row['processes']:.1f} for {need:.0f}"
                )
                print(said, flush=True)
    if not options.no_save:
        file = folder_of(result["environment"]["device"]) / "loader.json"
        write_json(file, result)
        print(f"written to {file}")
    return 0


if __name__ == "__main__":
    sys.exit(main())

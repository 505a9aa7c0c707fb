"""How many images per second a core loads, beside what a step takes in.

    python -m benchmarks.loader                 # one core, every path
    python -m benchmarks.loader --need 4000     # and the cores that so many images per second take

JPEGs are made from scikit-image's photographs, in an ImageNet-like size (500 px) and as a camera
gives them (1600 px). One process reads a batch after another, in this process, exactly as a loader
process does it: file, decoding, crop, scaling, the end of the augmentation, masks and their plan.
"""

from __future__ import annotations

import argparse
import itertools
import pathlib
import sys
import tarfile
import tempfile
import time

import numpy as np
import torch
from PIL import Image

from greenmim import ModelConfig
from greenmim.data.augment import Finish
from greenmim.data.dataset import AugmentedImages
from greenmim.data.images import open_rgb
from greenmim.data.loader import Collate
from greenmim.data.sampler import EpochSampler
from greenmim.data.sources import find_source
from greenmim.planning import Planner
from greenmim.recipe import DataConfig, MaskConfig

from .environment import describe, folder_of, write_json

PHOTOGRAPHS = ("astronaut", "camera", "chelsea", "coffee", "hubble_deep_field", "motorcycle_left",
               "retina", "rocket")  # fmt: skip
COPIES, QUALITY, BATCH, CROP = 4, 90, 16, (224, 224)
LONG_SIDES = (500, 1600)
PATHS = {
    "decoded whole": {"decode": "full"},
    "decoded at a reduced scale": {"decode": "reduced"},
    "reduced, finished on the device": {"decode": "reduced", "augment_on_device": True},
    "decoded on the device (bytes alone)": {"decode": "device"},
}
# Those other than a folder are read by the second path.
SOURCES = {"folder": "{}", "a tar": "tar/{}/all.tar", "shards": "wds/{}/{{0..3}}.tar"}


def make_photographs(folder: pathlib.Path, long_side: int) -> None:
    """JPEGs whose longer side has so many px, from scikit-image's photographs."""
    import skimage.data

    source = pathlib.Path(skimage.data.__file__).parent
    found = sorted(
        path for name in PHOTOGRAPHS for path in source.glob(f"{name}.*") if path.suffix != ".py"
    )
    if len(found) < len(PHOTOGRAPHS):
        raise FileNotFoundError(f"{source} holds {len(found)} of {len(PHOTOGRAPHS)} photographs")
    for path, copy in itertools.product(found, range(COPIES)):
        picture = open_rgb(path)
        scale = long_side / max(picture.size)
        size = tuple(round(side * scale) for side in picture.size)
        picture = picture.resize(size, Image.Resampling.LANCZOS)
        if copy % 2:
            picture = picture.transpose(Image.Transpose.FLIP_LEFT_RIGHT)
        picture.save(folder / f"{path.stem}-{copy}.jpg", quality=QUALITY)


def make_tars(folder: pathlib.Path) -> None:
    """The same JPEGs in one tar and in four shards."""
    files = sorted(folder.glob("*.jpg"))
    for name, part in (("all", files), *((str(shard), files[shard::4]) for shard in range(4))):
        with tarfile.open(folder / f"{name}.tar", "w") as archive:
            for file in part:
                archive.add(file, file.name)


def images_per_second(root: str, options: dict, seconds: float) -> dict:
    """Of one core: median over batches, and the spread between slow and fast ones."""
    config = DataConfig(root=root, batch_size=BATCH, **options)
    source = find_source(config)
    dataset = AugmentedImages(source, config, CROP, seed=0)
    later = config.augment_on_device or config.decode == "device"
    collate = Collate(Planner(ModelConfig()), MaskConfig(), 0, None if later else Finish(config))
    sampler = EpochSampler(len(source), BATCH, epochs=10_000, shards=source.shards)
    rates, end = [], time.perf_counter() + seconds
    for number, items in enumerate(sampler):
        start = time.perf_counter()
        collate([dataset[item] for item in items])
        taken = time.perf_counter() - start
        if number:  # the first finds nothing in memory
            rates.append(BATCH / taken)
        if time.perf_counter() > end and len(rates) >= 5:
            break
    low, middle, high = np.percentile(rates, (20, 50, 80))
    return {"images_per_second": middle, "p20": low, "p80": high, "batches": len(rates)}


def psnr_of_reduced(folder: pathlib.Path) -> float:
    """Mean peak signal-to-noise ratio in dB of crops from reduced decodes, against whole ones."""
    crops = {}
    for decode in ("full", "reduced"):
        config = DataConfig(root=str(folder), batch_size=BATCH, decode=decode)
        source = find_source(config)
        dataset = AugmentedImages(source, config, CROP, seed=0)
        items = itertools.islice(EpochSampler(len(source), BATCH), 2)
        crops[decode] = torch.stack([dataset[i].image for batch in items for i in batch]).double()
    error = (crops["full"] - crops["reduced"]).square().mean((1, 2, 3))
    return (10 * (255**2 / error.clamp(min=1e-3)).log10()).mean().item()


def main(argv: list[str] | None = None) -> int:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--need", type=float, help="images per second of a step")
    parser.add_argument("--seconds", type=float, default=5.0, help="for each path")
    parser.add_argument("--no-save", action="store_true", help="print only")
    options = parser.parse_args(argv)
    torch.set_num_threads(1)
    result = {"environment": describe(1), "need": options.need, "rows": [], "psnr_db": {}}
    for long_side in LONG_SIDES:
        with tempfile.TemporaryDirectory() as folder:
            path = pathlib.Path(folder)
            make_photographs(path, long_side)
            make_tars(path)
            result["psnr_db"][str(long_side)] = psnr_of_reduced(path)
            plain = list(PATHS)[1]
            cases = [("folder", name) for name in PATHS]
            cases += [(source, plain) for source in SOURCES if source != "folder"]
            for source, name in cases:
                root, how = SOURCES[source].format(path), PATHS[name]
                name += "" if source == "folder" else f", from {source}"
                row = {"source": source, "long_side": long_side, "path": name,
                       **images_per_second(root, how, options.seconds)}  # fmt: skip
                low, high = row["p20"], row["p80"]
                cores = ""
                if options.need:
                    row["cores"] = options.need / row["images_per_second"]
                    cores = f"   {row['cores']:5.1f} cores for {options.need:.0f} images/s"
                result["rows"].append(row)
                print(f"{long_side:>5} px  {name:<38}{row['images_per_second']:8.0f} images/s per"
                      f" core ({low:.0f} to {high:.0f}){cores}", flush=True)  # fmt: skip
        print(f"       reduced against whole: {result['psnr_db'][str(long_side)]:.1f} dB")
    if not options.no_save:
        file = folder_of(result["environment"]["device"]) / "loader.json"
        write_json(file, result)
        print(f"written to {file}")
    return 0


if __name__ == "__main__":
    sys.exit(main())

"""Batches of augmented images with their masks planned ahead, the same for any number of workers.

What is random is a function of the run's seed and a place in the run, see `seeds`.
"""

from __future__ import annotations

import os
import signal
import time
import warnings
from dataclasses import dataclass, replace
from typing import NamedTuple

import numpy as np
import torch
from torch.utils.data import DataLoader, Dataset
from torchvision.transforms import v2
from torchvision.transforms.v2 import functional as F

from greenmim.guards import StopSignal
from greenmim.images import open_rgb
from greenmim.masking import block_visible, random_visible
from greenmim.planning import Plan, Planner
from greenmim.recipe import DataConfig, MaskConfig, UserError
from greenmim.sampler import EpochSampler, Item
from greenmim.seeds import CROP, MASK, generator, torch_seed

# A file that cannot be read is replaced by the next one; this many bad ones in a row are a broken
# data set.
MAX_BAD_IN_A_ROW = 100


class Sample(NamedTuple):
    """An augmented image float32 [3, H, W] (None: no file could be read), and failed files."""

    item: Item
    image: torch.Tensor | None
    failures: tuple[tuple[str, str], ...]


@dataclass(frozen=True, eq=False)
class Batch:
    """Images float32 [B, 3, H, W], the plan of their masks, and (path, reason) of unreadable files.

    `images` and `plan` are None when no readable file was found for some image.
    """

    images: torch.Tensor | None
    plan: Plan | None
    failures: tuple[tuple[str, str], ...]

    def to(self, device: torch.device, non_blocking: bool = False) -> Batch:
        """The batch on a device."""
        return replace(
            self,
            images=self.images.to(device, non_blocking=non_blocking),
            plan=self.plan.to(device, non_blocking=non_blocking),
        )

    def pin_memory(self) -> Batch:
        """The batch in page-locked memory; called by the loader."""
        if self.images is None:
            return self
        return replace(self, images=self.images.pin_memory(), plan=self.plan.pin_memory())


class ImageFolder(Dataset):
    """Augmented images of a folder, looked up by `Item`.

    Args:
        names: bytes array of file names relative to `config.root`, from `images.find_images`.
        config: Augmentation.
        image_size: (height, width) of the crops in px.
        seed: The run's seed.
    """

    def __init__(
        self, names: np.ndarray, config: DataConfig, image_size: tuple[int, int], seed: int
    ) -> None:
        self.names = names
        self.root = config.root
        self.seed = seed
        self.bad: dict[int, str] = {}
        self.augment = v2.Compose(
            [
                v2.RandomResizedCrop(
                    image_size,
                    scale=config.crop_scale,
                    ratio=config.crop_ratio,
                    interpolation=v2.InterpolationMode.BICUBIC,
                ),
                v2.RandomHorizontalFlip(config.flip),
            ]
        )
        self.mean, self.std = list(config.mean), list(config.std)

    def __len__(self) -> int:
        return len(self.names)

    def path(self, index: int) -> str:
        """Path of a file."""
        return os.path.join(self.root, os.fsdecode(self.names[index]))

    def check_readable(self) -> None:
        """Find out before the run starts whether anything can be read.

        Raises:
            UserError: the first files are all corrupt.
        """
        picture, failures = self._read(0)
        self.bad.clear()
        if picture is None:
            raise UserError(self.all_bad(failures))

    def all_bad(self, failures: tuple[tuple[str, str], ...]) -> str:
        """The message when no readable file takes the place of a bad one."""
        return (
            f"No image can be read: {len(failures)} files in a row under {self.root} are corrupt;"
            f" the first is {failures[0][0]} ({failures[0][1]})."
        )

    def __getitem__(self, item: Item) -> Sample:
        picture, failures = self._read(item.position % len(self.names))
        if picture is None:
            return Sample(item, None, failures)
        # torchvision draws from the global generator; forking it leaves the caller's stream alone.
        with torch.random.fork_rng(devices=[]):
            torch.manual_seed(torch_seed(self.seed, CROP, item.epoch, item.position))
            picture = self.augment(picture)
        return Sample(item, normalise(picture, self.mean, self.std), failures)

    def _read(self, index: int) -> tuple:
        """The picture of a file or of the next readable one, and the files that failed."""
        failures = []
        for step in range(min(len(self.names), MAX_BAD_IN_A_ROW)):
            candidate = (index + step) % len(self.names)
            if candidate not in self.bad:
                try:
                    with warnings.catch_warnings():
                        warnings.simplefilter("ignore")  # Pillow's notes on odd metadata
                        return open_rgb(self.path(candidate)), tuple(failures)
                except Exception as error:  # decoders raise anything on a broken file
                    self.bad[candidate] = " ".join(str(error).split()) or type(error).__name__
            failures.append((self.path(candidate), self.bad[candidate]))
        return None, tuple(failures)


def normalise(picture, mean: list[float], std: list[float]) -> torch.Tensor:
    """PIL picture to a normalised tensor float32 [3, H, W]."""
    return F.normalize(F.to_dtype(F.pil_to_tensor(picture), torch.float32, scale=True), mean, std)


class Collate:
    """Stacks samples, draws the masks and plans them: the host's work of a step, in the loader.

    Args:
        planner: Plans a mask for the model (picklable).
        mask: Ratio, kind, and whether every image has its own mask.
        seed: The run's seed.
    """

    def __init__(self, planner: Planner, mask: MaskConfig, seed: int) -> None:
        self.planner, self.mask, self.seed = planner, mask, seed

    def __call__(self, samples: list[Sample]) -> Batch:
        failures = tuple(
            dict.fromkeys(failure for sample in samples for failure in sample.failures)
        )
        if any(sample.image is None for sample in samples):
            return Batch(None, None, failures)
        item = samples[0].item
        rng = generator(self.seed, MASK, item.step, item.micro)
        count = len(samples) if self.mask.per_image else None
        visible = draw_visible(rng, self.planner.unit_grid, self.mask, count)
        images = torch.stack([sample.image for sample in samples])
        return Batch(images, self.planner(visible), failures)


def draw_visible(
    rng: np.random.Generator, grid: tuple[int, int], mask: MaskConfig, count: int | None
) -> np.ndarray:
    """Visible units as a recipe asks for: bool [L], or [count, L] with a count."""
    if mask.kind == "block":
        return block_visible(rng, grid, mask.ratio, batch=count)
    return random_visible(rng, grid[0] * grid[1], mask.ratio, batch=count)


def make_loader(
    dataset: ImageFolder, sampler: EpochSampler, collate: Collate, workers: int, pin_memory: bool
) -> DataLoader:
    """A loader over the rest of the run: its workers live until the end, not one epoch."""
    return DataLoader(
        dataset,
        batch_sampler=sampler,
        collate_fn=collate,
        num_workers=workers,
        pin_memory=pin_memory,
        worker_init_fn=_start_worker,
        # Its own generator: a loader draws a seed when it starts, which must not move the run's
        # stream.
        generator=torch.Generator().manual_seed(0),
    )


class Feed:
    """The batches of a loader, with the time spent waiting for them and the files that failed.

    Attributes:
        waited: Seconds spent waiting so far.
        failures: (path, reason) of files that could not be read, each once.
    """

    def __init__(self, loader: DataLoader) -> None:
        self.waited = 0.0
        self.failures: list[tuple[str, str]] = []
        self._dataset: ImageFolder = loader.dataset
        self._batches = iter(loader)
        self._named: set[str] = set()

    def next(self, device: torch.device) -> Batch:
        """The next batch, on a device.

        Raises:
            UserError: no image can be read any more, or a loader process died.
        """
        asked = time.perf_counter()
        try:
            batch = next(self._batches)
        except RuntimeError as error:
            if "DataLoader worker" not in str(error):
                raise
            raise UserError(
                f"A loader process died ({' '.join(str(error).split())}); most often memory ran"
                " out: lower --data.workers, or raise the limit of /dev/shm in a container."
            ) from error
        self.waited += time.perf_counter() - asked
        for path, reason in batch.failures:
            if path not in self._named:
                self._named.add(path)
                self.failures.append((path, reason))
        if batch.images is None:
            raise UserError(self._dataset.all_bad(batch.failures))
        return batch.to(device, non_blocking=True)

    def take_failures(self) -> list[tuple[str, str]]:
        """The failures since the last call."""
        taken, self.failures = self.failures, []
        return taken


def _start_worker(worker: int) -> None:
    # A scheduler signals the whole process group; only the main process may decide what happens,
    # and it still needs batches until the update under way is done.
    for number in StopSignal.HANDLED:
        signal.signal(number, signal.SIG_IGN)

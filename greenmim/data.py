"""Batches of augmented images with their masks planned ahead, the same for any number of workers.

Every random choice is a function of the run's seed and a place in the run: the order of an epoch of
(seed, epoch), a crop of (seed, epoch, position), a mask of (seed, batch, rank). So a run can be
taken up at any batch and goes on exactly as if it had never stopped.
"""

from __future__ import annotations

import os
import signal
import warnings
from collections.abc import Iterator
from dataclasses import dataclass, replace
from typing import NamedTuple

import numpy as np
import torch
from torch.utils.data import DataLoader, Dataset, Sampler
from torchvision.transforms import v2
from torchvision.transforms.v2 import functional as F

from greenmim.images import open_rgb
from greenmim.masking import random_visible
from greenmim.planning import Plan, Planner
from greenmim.recipe import DataConfig, MaskConfig, UserError

# Streams of random numbers that must not repeat one another.
_ORDER, _CROP, _MASK = 1, 2, 3
# A file that cannot be read is replaced by the next one; this many bad ones in a row are a broken
# data set.
MAX_BAD_IN_A_ROW = 100


class Item(NamedTuple):
    """One image of one batch: the batch's number in the run, the epoch, the position in it."""

    batch: int
    epoch: int
    position: int


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
            torch.manual_seed(_derived_seed(self.seed, _CROP, item.epoch, item.position))
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


class EpochSampler(Sampler[list[Item]]):
    """Yields the batches of one process, from a given batch of the run to its end.

    An epoch is a new order of `num_images * repeats` positions, cut into updates of
    `world_size * accumulate * batch_size` images; what is left at its end is dropped.

    Args:
        num_images: Files in the folder.
        batch_size: Images per batch of this process.
        repeats: Times the folder is gone through in an epoch.
        epochs: Epochs of the run.
        accumulate: Batches per update.
        seed: The run's seed.
        rank, world_size: This process and the number of processes.
        first_update: Update to start from.

    Raises:
        ValueError: an epoch does not fill one update.
    """

    def __init__(
        self,
        num_images: int,
        batch_size: int,
        *,
        repeats: int = 1,
        epochs: int = 1,
        accumulate: int = 1,
        seed: int = 0,
        rank: int = 0,
        world_size: int = 1,
        first_update: int = 0,
    ) -> None:
        self.positions = num_images * repeats
        self.batch_size, self.accumulate, self.epochs = batch_size, accumulate, epochs
        self.seed, self.rank, self.world_size = seed, rank, world_size
        self.first_update = first_update
        self.images_per_update = batch_size * accumulate * world_size
        self.updates_per_epoch = self.positions // self.images_per_update
        self.left_out = self.positions - self.updates_per_epoch * self.images_per_update
        if self.updates_per_epoch == 0:
            advice = f"raise --data.repeats to at least {-(-self.images_per_update // num_images)}"
            largest = self.positions // (accumulate * world_size)
            if largest:
                advice = f"lower --data.batch-size to {largest} or less, or {advice}"
            plural = "s" if num_images != 1 else ""
            raise ValueError(
                f"The folder holds {num_images} image{plural} (x {repeats} repeats), fewer than the"
                f" {self.images_per_update} of one update; {advice}."
            )

    def __len__(self) -> int:
        return (self.epochs * self.updates_per_epoch - self.first_update) * self.accumulate

    def __iter__(self) -> Iterator[list[Item]]:
        for epoch in range(self.first_update // self.updates_per_epoch, self.epochs):
            order = _generator(self.seed, _ORDER, epoch).permutation(self.positions)
            first = max(self.first_update - epoch * self.updates_per_epoch, 0)
            for update in range(first, self.updates_per_epoch):
                for part in range(self.accumulate):
                    batch = (epoch * self.updates_per_epoch + update) * self.accumulate + part
                    # Ranks take neighbouring slices, so the images of an update do not depend on
                    # how many processes share them.
                    start = update * self.images_per_update
                    start += (part * self.world_size + self.rank) * self.batch_size
                    chosen = order[start : start + self.batch_size]
                    yield [Item(batch, epoch, int(position)) for position in chosen]


class Collate:
    """Stacks samples, draws the masks and plans them: the host's work of a step, in the loader.

    Args:
        planner: Plans a mask for the model (picklable).
        mask: Ratio, and whether every image has its own mask.
        num_units: Units of 32 px in an image.
        seed, rank: Of the run and the process.
    """

    def __init__(
        self, planner: Planner, mask: MaskConfig, num_units: int, seed: int, rank: int
    ) -> None:
        self.planner, self.mask, self.num_units = planner, mask, num_units
        self.seed, self.rank = seed, rank

    def __call__(self, samples: list[Sample]) -> Batch:
        failures = tuple(
            dict.fromkeys(failure for sample in samples for failure in sample.failures)
        )
        if any(sample.image is None for sample in samples):
            return Batch(None, None, failures)
        rng = _generator(self.seed, _MASK, samples[0].item.batch, self.rank)
        count = len(samples) if self.mask.per_image else None
        visible = random_visible(rng, self.num_units, self.mask.ratio, batch=count)
        images = torch.stack([sample.image for sample in samples])
        return Batch(images, self.planner(visible), failures)


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


def _start_worker(worker: int) -> None:
    # A scheduler signals the whole process group; only the main process may decide what happens,
    # and it still needs batches until the update under way is done.
    for number in (signal.SIGTERM, signal.SIGINT, signal.SIGUSR1):
        signal.signal(number, signal.SIG_IGN)


def _generator(*key: int) -> np.random.Generator:
    return np.random.default_rng(key)


def _derived_seed(*key: int) -> int:
    return int(np.random.SeedSequence(key).generate_state(1, np.uint64)[0] >> np.uint64(1))

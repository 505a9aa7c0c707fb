"""Batches of augmented images with their masks planned ahead, the same for any number of workers.

What is random is a function of the run's seed and a place in the run, see `seeds`.
"""

from __future__ import annotations

import signal
import time
import warnings
from collections.abc import Callable
from dataclasses import dataclass, replace
from typing import NamedTuple

import numpy as np
import torch
from torch.utils.data import DataLoader, Dataset

from greenmim.augment import Crop, Encoded, Finish, draw_crop, read_crop, read_encoded
from greenmim.config import UNIT_PIXELS
from greenmim.device_decode import EncodedBatch, decode_into
from greenmim.guards import StopSignal
from greenmim.masking import block_visible, random_visible
from greenmim.planning import Plan, Planner
from greenmim.recipe import DataConfig, MaskConfig, UserError
from greenmim.sampler import EpochSampler, Item
from greenmim.seeds import CROP, MASK, generator, torch_seed
from greenmim.sources import Source

# A file that cannot be read is replaced by another one; this many bad ones in a row are a broken
# data set.
MAX_BAD_IN_A_ROW = 100


class Sample(NamedTuple):
    """A crop, and failed files.

    Attributes:
        item: Its place in the run.
        image: uint8 [3, H, W], or a JPEG to be decoded on the device; None: no file could be read.
        flip: Whether to flip it.
        failures: (path, reason) of files that could not be read.
        path: The file.
    """

    item: Item
    image: torch.Tensor | Encoded | None
    flip: bool
    failures: tuple[tuple[str, str], ...]
    path: str = ""


@dataclass(frozen=True, eq=False)
class Batch:
    """Images, the plan of their masks, and (path, reason) of unreadable files.

    Attributes:
        images: float32 [B, 3, H, W], or uint8 with flips still to be done. `images` and `plan` are
            None when no readable file was found for some image.
        plan: Of the masks.
        failures: (path, reason) of files that could not be read.
        flips: bool [B], which images to flip; None where all is done.
        encoded: Images still to be decoded.
    """

    images: torch.Tensor | None
    plan: Plan | None
    failures: tuple[tuple[str, str], ...]
    flips: torch.Tensor | None = None
    encoded: EncodedBatch | None = None

    def to(self, device: torch.device, non_blocking: bool = False) -> Batch:
        """The batch on a device; what is to be decoded stays."""
        return self._map(lambda part: part.to(device, non_blocking=non_blocking))

    def pin_memory(self) -> Batch:
        """The batch in page-locked memory; called by the loader."""
        return self if self.images is None else self._map(lambda part: part.pin_memory())

    def record_stream(self, stream: torch.cuda.Stream) -> None:
        """Keep the memory until `stream` has used it (see `Tensor.record_stream`)."""
        for tensor in (self.images, self.plan.memory, self.flips):
            if tensor is not None:
                tensor.record_stream(stream)

    def _map(self, change: Callable) -> Batch:
        flips = None if self.flips is None else change(self.flips)
        return replace(self, images=change(self.images), plan=change(self.plan), flips=flips)


class AugmentedImages(Dataset):
    """Augmented images of a source, looked up by `Item`.

    Args:
        source: Where they are from.
        config: Augmentation.
        image_size: (height, width) of the crops in px.
        seed: The run's seed.
    """

    def __init__(
        self, source: Source, config: DataConfig, image_size: tuple[int, int], seed: int
    ) -> None:
        self.source = source
        self.seed = seed
        self.bad: dict[int, str] = {}
        self.config, self.image_size = config, image_size
        self.mean, self.std = list(config.mean), list(config.std)

    def __len__(self) -> int:
        return len(self.source)

    def path(self, index: int) -> str:
        """An image's name for people."""
        return self.source.path(index)

    def check_readable(self) -> None:
        """Find out before the run starts whether anything can be read.

        Raises:
            UserError: the first files are all corrupt.
        """
        crop, failures = self._read(0, self._crop_of(Item(0, 0, 0, 0)))
        self.bad.clear()
        if crop is None:
            raise UserError(self.all_bad(failures))

    def all_bad(self, failures: tuple[tuple[str, str], ...]) -> str:
        """The message when no readable file takes the place of a bad one."""
        return (
            f"No image can be read: {len(failures)} files in a row under {self.source.root} are"
            f" corrupt; the first is {failures[0][0]} ({failures[0][1]})."
        )

    def __getitem__(self, item: Item) -> Sample:
        sample, failures = self._read(item.position % len(self), self._crop_of(item))
        return Sample(item, None, False, failures) if sample is None else sample

    def _crop_of(self, item: Item) -> Callable[[int, tuple[tuple[str, str], ...]], Sample]:
        """What makes the sample of a place in the run from an image of the source."""

        def draw(height: int, width: int) -> Crop:
            # torchvision draws from the global generator, which is left as it was. This is what
            # torch.random.fork_rng does, at a quarter of its time.
            before = torch.get_rng_state()
            try:
                seed = torch_seed(self.seed, CROP, item.epoch, item.position)
                torch.default_generator.manual_seed(seed)
                return draw_crop(height, width, self.config)
            finally:
                torch.set_rng_state(before)

        def read(index: int, failures: tuple[tuple[str, str], ...]) -> Sample:
            file, path = self.source.open(index), self.path(index)
            if self.config.decode == "device" and (encoded := read_encoded(file, draw)):
                return Sample(item, encoded, encoded.crop.flip, failures, path)
            reduced = self.config.decode == "reduced"
            return Sample(item, *read_crop(file, self.image_size, draw, reduced), failures, path)

        return read

    def _read(self, index: int, read: Callable) -> tuple:
        """The sample of an image or of the one that stands in, and the files that failed."""
        failures = []
        for step in range(min(len(self), MAX_BAD_IN_A_ROW)):
            candidate = self.source.stand_in(index, step)
            if candidate not in self.bad:
                try:
                    with warnings.catch_warnings():
                        warnings.simplefilter("ignore")  # Pillow's notes on odd metadata
                        return read(candidate, tuple(failures)), tuple(failures)
                except Exception as error:  # decoders raise anything on a broken file
                    self.bad[candidate] = " ".join(str(error).split()) or type(error).__name__
            failures.append((self.path(candidate), self.bad[candidate]))
        return None, tuple(failures)


class Collate:
    """Stacks samples, draws the masks and plans them: the host's work of a step, in the loader.

    Args:
        planner: Plans a mask for the model (picklable).
        mask: Ratio, kind, and whether every image has its own mask.
        seed: The run's seed.
        finish: The end of the augmentation; None leaves it to the device.
    """

    def __init__(
        self, planner: Planner, mask: MaskConfig, seed: int, finish: Finish | None
    ) -> None:
        self.planner, self.mask, self.seed, self.finish = planner, mask, seed, finish

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
        plan, encoded = self.planner(visible), join_encoded(samples)
        height, width = (side * UNIT_PIXELS for side in self.planner.unit_grid)
        images = torch.empty(len(samples), 3, height, width, dtype=torch.uint8)
        for place, sample in enumerate(samples):
            if not isinstance(sample.image, Encoded):
                here = sample.flip and self.finish is not None
                images[place] = sample.image.flip(2) if here else sample.image
        if self.finish is not None:
            return Batch(self.finish(images), plan, failures)
        flips = torch.tensor([sample.flip for sample in samples])
        return Batch(images, plan, failures, flips, encoded)


def join_encoded(samples: list[Sample]) -> EncodedBatch | None:
    """The images that are still files, in one piece of memory; None if there is none."""
    found = [
        (place, sample) for place, sample in enumerate(samples) if isinstance(sample.image, Encoded)
    ]
    if not found:
        return None
    files = [sample.image.data for _, sample in found]
    return EncodedBatch(
        data=torch.cat(files),
        sizes=[len(file) for file in files],
        places=[place for place, _ in found],
        crops=[sample.image.crop for _, sample in found],
        paths=[sample.path for _, sample in found],
    )


def draw_visible(
    rng: np.random.Generator, grid: tuple[int, int], mask: MaskConfig, count: int | None
) -> np.ndarray:
    """Visible units as a recipe asks for: bool [L], or [count, L] with a count."""
    if mask.kind == "block":
        return block_visible(rng, grid, mask.ratio, batch=count)
    return random_visible(rng, grid[0] * grid[1], mask.ratio, batch=count)


def make_loader(
    dataset: AugmentedImages,
    sampler: EpochSampler,
    collate: Collate,
    workers: int,
    pin_memory: bool,
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

    def __init__(self, loader: DataLoader, device: torch.device) -> None:
        self.device = device
        # Copies have a stream of their own: they run beside the update before.
        self._copies = torch.cuda.Stream(device) if device.type == "cuda" else None
        self.waited = 0.0
        self.failures: list[tuple[str, str]] = []
        self._dataset: AugmentedImages = loader.dataset
        self._finish = Finish(loader.dataset.config, device)
        self._batches = iter(loader)
        self._named: set[str] = set()

    def next(self) -> Batch:
        """The next batch, on the device, as the model takes it.

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
        self._name(batch.failures)
        if batch.images is None:
            raise UserError(self._dataset.all_bad(batch.failures))
        batch = self._to_device(batch)
        if batch.flips is None:
            return batch
        return replace(batch, images=self._finish(batch.images, batch.flips), flips=None)

    def _to_device(self, batch: Batch) -> Batch:
        if self._copies is None:
            return self._decode(batch.to(self.device))
        with torch.cuda.stream(self._copies):
            batch = self._decode(batch.to(self.device, non_blocking=True))
        current = torch.cuda.current_stream(self.device)
        current.wait_stream(self._copies)
        batch.record_stream(current)
        return batch

    def _decode(self, batch: Batch) -> Batch:
        if batch.encoded is None:
            return batch
        failures, any_good = decode_into(batch.images, batch.encoded)
        self._name(failures)
        if not any_good:
            raise UserError(self._dataset.all_bad(failures))
        return replace(batch, encoded=None)

    def _name(self, failures: tuple[tuple[str, str], ...]) -> None:
        for path, reason in failures:
            if path not in self._named:
                self._named.add(path)
                self.failures.append((path, reason))

    def take_failures(self) -> list[tuple[str, str]]:
        """The failures since the last call."""
        taken, self.failures = self.failures, []
        return taken


def _start_worker(worker: int) -> None:
    # A scheduler signals the whole process group; only the main process may decide what happens,
    # and it still needs batches until the update under way is done.
    for number in StopSignal.HANDLED:
        signal.signal(number, signal.SIG_IGN)

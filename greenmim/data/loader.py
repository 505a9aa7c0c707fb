"""Batches of augmented images with their masks planned ahead, the same for any number of workers.

What is random is a function of the run's seed and a place in the run, see `seeds`.
"""

from __future__ import annotations

import contextlib
import ctypes
import math
import signal
from collections.abc import Callable
from dataclasses import dataclass, replace

import numpy as np
import torch
from torch.utils.data import DataLoader

from greenmim.config import UNIT_PIXELS
from greenmim.data import shared
from greenmim.data.augment import Finish
from greenmim.data.dataset import AugmentedImages, Sample
from greenmim.data.sampler import PLACES, EpochSampler
from greenmim.guards import StopSignal
from greenmim.masking import block_visible, random_visible
from greenmim.planning import Plan, Planner
from greenmim.recipe import MaskConfig, UserError
from greenmim.seeds import MASK, generator
from greenmim_kernels.host_memory import give_back_freed_memory

# A wait for a batch looks so often whether the run was asked to stop.
_POLL_SECONDS = 2
_PR_SET_PDEATHSIG = 1  # of linux/prctl.h


@dataclass(frozen=True, eq=False)
class Batch:
    """Images, the plan of their masks, and (path, reason) of unreadable files.

    Attributes:
        images: float32 [B, 3, H, W], or uint8 with flips still to be done, channels last in memory.
            `images` and `plan` are None where there is a reason to `stop`.
        plan: Of the masks.
        failures: (path, reason) of files that could not be read.
        flips: bool [B], which images to flip; None where all is done.
        stop: Why the run cannot go on: as text, for an error loses its sentence between processes.
    """

    images: torch.Tensor | None
    plan: Plan | None
    failures: tuple[tuple[str, str], ...]
    flips: torch.Tensor | None = None
    stop: str | None = None

    def to(self, device: torch.device, non_blocking: bool = False) -> Batch:
        """The batch on a device."""
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
        stop = next((sample.stop for sample in samples if sample.stop), None)
        try:
            return (
                Batch(None, None, failures, stop=stop) if stop else self._batch(samples, failures)
            )
        except UserError as error:
            return Batch(None, None, failures, stop=str(error))

    def _batch(self, samples: list[Sample], failures: tuple[tuple[str, str], ...]) -> Batch:
        item = samples[0].item
        plan = self._plan(generator(self.seed, MASK, item.step, item.micro), len(samples))
        height, width = (side * UNIT_PIXELS for side in self.planner.unit_grid)
        if self.finish is not None:
            images = shared.empty((len(samples), 3, height, width), torch.float32)
            # One by one: an image stays in the processor's cache, a batch does not.
            for place, sample in enumerate(samples):
                self.finish.into(images[place], sample.image, sample.flip)
            return Batch(images, plan, failures)
        # Crops are channels last, and are left so.
        images = shared.empty((len(samples), height, width, 3), torch.uint8).permute(0, 3, 1, 2)
        for place, sample in enumerate(samples):
            images[place] = sample.image
        flips = shared.copied(torch.tensor([sample.flip for sample in samples]))
        return Batch(images, plan, failures, flips)

    def _plan(self, rng: np.random.Generator, count: int) -> Plan:
        """The plan of masks for so many images."""
        count = count if self.mask.per_image else None
        plan = self.planner(draw_visible(rng, self.planner.unit_grid, self.mask, count))
        return Plan(shared.copied(plan.memory), plan.layout)

    def batch_bytes(self, count: int) -> int:
        """What a batch of so many images takes."""
        pixels = count * 3 * math.prod(side * UNIT_PIXELS for side in self.planner.unit_grid)
        images = pixels * (1 if self.finish is None else 4)
        return images + self._plan(generator(self.seed, MASK), count).memory.nbytes


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
    # Batches come from an order's places in turn, and go to the workers in turn.
    places = PLACES * sampler.accumulate
    dataset.source.expect(places // math.gcd(max(workers, 1), places))
    return DataLoader(
        dataset,
        batch_sampler=sampler,
        collate_fn=collate,
        num_workers=workers,
        pin_memory=pin_memory,
        worker_init_fn=_start_worker,
        timeout=_POLL_SECONDS if workers else 0,  # no error: see `Feed.next`
        # Its own generator: a loader draws a seed when it starts, which must not move the run's
        # stream.
        generator=torch.Generator().manual_seed(0),
    )


def check_shared_memory(loader: DataLoader, processes: int) -> None:
    """Find out before a run whether its batches fit into shared memory.

    Args:
        loader: Of one process of the run, made by `make_loader`.
        processes: How many processes of the run share this machine.

    Raises:
        UserError: they do not.
    """
    if loader.num_workers:
        # Each worker makes batches ahead, and the main process still holds the one before.
        batches = loader.num_workers * loader.prefetch_factor + 1
        one = loader.collate_fn.batch_bytes(loader.batch_sampler.batch_size)
        shared.check_room(processes * batches * one)


def _start_worker(worker: int) -> None:
    # A scheduler signals the whole process group; only the main process may decide what happens,
    # and it still needs batches until the update under way is done.
    for number in StopSignal.HANDLED:
        signal.signal(number, signal.SIG_IGN)
    # The main process of a run on a CPU keeps what it frees; a picture is large once.
    give_back_freed_memory()
    # So it would outlive that process, if that is killed while this one hangs.
    with contextlib.suppress(OSError, AttributeError):  # Linux only
        ctypes.CDLL(None).prctl(_PR_SET_PDEATHSIG, signal.SIGKILL)

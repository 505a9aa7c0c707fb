"""Batches of augmented images with their masks planned ahead, the same for any number of workers.

What is random is a function of the run's seed and a place in the run, see `seeds`.
"""

from __future__ import annotations

import contextlib
import ctypes
import multiprocessing
import signal
import threading
import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass, replace

import numpy as np
import torch
from torch.utils.data import DataLoader

from greenmim.config import UNIT_PIXELS
from greenmim.data.augment import Encoded, Finish
from greenmim.data.dataset import AugmentedImages, Sample
from greenmim.data.device_decode import EncodedBatch, decode_into
from greenmim.data.sampler import EpochSampler
from greenmim.guards import StopSignal
from greenmim.masking import block_visible, random_visible
from greenmim.planning import Plan, Planner
from greenmim.recipe import MaskConfig, UserError
from greenmim.seeds import MASK, generator

# A wait for a batch looks so often whether the run was asked to stop.
_POLL_SECONDS = 2
_CLOSE_SECONDS = 3.0
_PR_SET_PDEATHSIG = 1  # of linux/prctl.h


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
        timeout=_POLL_SECONDS if workers else 0,  # no error: see `Feed.next`
        # Its own generator: a loader draws a seed when it starts, which must not move the run's
        # stream.
        generator=torch.Generator().manual_seed(0),
    )


class Feed:
    """The batches of a loader, with the time spent waiting for them and the files that failed.

    Args:
        loader: The loader.
        device: Where batches go.
        give_up: Asked again and again while a batch does not come: whether to wait no longer.

    Attributes:
        waited: Seconds spent waiting so far.
        failures: (path, reason) of files that could not be read, each once.
    """

    def __init__(
        self,
        loader: DataLoader,
        device: torch.device,
        give_up: Callable[[], bool] = lambda: False,
    ) -> None:
        self.device, self.give_up = device, give_up
        # Copies have a stream of their own: they run beside the update before.
        self._copies = torch.cuda.Stream(device) if device.type == "cuda" else None
        self.waited = 0.0
        self.failures: list[tuple[str, str]] = []
        self._dataset: AugmentedImages = loader.dataset
        self._finish = Finish(loader.dataset.config, device)
        others = set(multiprocessing.active_children())
        self._batches = iter(loader)
        self._workers = set(multiprocessing.active_children()) - others
        self._named: set[str] = set()

    def close(self) -> None:
        """End the loader's processes, in a few seconds those that hang, too."""
        late = threading.Timer(_CLOSE_SECONDS, self._kill)
        late.start()
        with _children_may_end():
            self._batches = None  # asks each to end, and waits for it
            late.cancel()
            self._kill()
            for worker in self._workers:
                worker.join(_CLOSE_SECONDS)

    def _kill(self) -> None:
        for worker in self._workers:
            if worker.is_alive():
                worker.kill()

    def next(self) -> Batch | None:
        """The next batch, on the device, as the model takes it; None where waiting was given up.

        Raises:
            UserError: no image can be read any more, or a loader process died.
        """
        asked = time.perf_counter()
        batch = self._wait()
        self.waited += time.perf_counter() - asked
        if batch is None:
            return None
        self._name(batch.failures)
        if batch.images is None:
            raise UserError(self._dataset.all_bad(batch.failures))
        batch = self._to_device(batch)
        if batch.flips is None:
            return batch
        return replace(batch, images=self._finish(batch.images, batch.flips), flips=None)

    def _wait(self) -> Batch | None:
        while True:
            try:
                return next(self._batches)
            except RuntimeError as error:
                if "DataLoader timed out" in str(error):
                    if self.give_up():
                        return None
                    continue
                if "DataLoader worker" not in str(error):
                    raise
                raise UserError(
                    f"A loader process died ({' '.join(str(error).split())}); most often memory"
                    " ran out: lower --data.workers, or raise the limit of /dev/shm in a"
                    " container."
                ) from error

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


@contextlib.contextmanager
def _children_may_end() -> Iterator[None]:
    """Inside, the end of a loader process is not the error that PyTorch takes it for."""
    if threading.current_thread() is not threading.main_thread():
        yield
        return
    before = signal.signal(signal.SIGCHLD, signal.SIG_DFL)
    try:
        yield
    finally:
        if before is not None:  # else it was no handler of Python's
            signal.signal(signal.SIGCHLD, before)


def _start_worker(worker: int) -> None:
    # A scheduler signals the whole process group; only the main process may decide what happens,
    # and it still needs batches until the update under way is done.
    for number in StopSignal.HANDLED:
        signal.signal(number, signal.SIG_IGN)
    # So it would outlive that process, if that is killed while this one hangs.
    with contextlib.suppress(OSError, AttributeError):  # Linux only
        ctypes.CDLL(None).prctl(_PR_SET_PDEATHSIG, signal.SIGKILL)

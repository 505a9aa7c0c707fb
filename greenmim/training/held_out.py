"""The reconstruction loss on held-out images: whether a run learns or remembers."""

from __future__ import annotations

import contextlib
from collections.abc import Callable
from typing import NamedTuple

import torch

from greenmim.data.dataset import Finish
from greenmim.data.held_out import HeldOutImages, HeldOutSampler
from greenmim.data.loader import Collate, Feed, make_loader
from greenmim.mim import GreenMIM
from greenmim.training.processes import Processes


class HeldOutLoss(NamedTuple):
    """What was found.

    Attributes:
        loss: mean over the hidden units of all images, as in training.
        images: how many of all processes.
        failures: (path, reason) of this process's files that could not be read; the next ones stood
            in.
    """

    loss: float
    images: int
    failures: list[tuple[str, str]]


class HeldOut:
    """Measures the loss of a model on the same images with the same masks again and again.

    Args:
        images: Which ones.
        collate: Stacks them and draws the masks, by the number of the batch.
        workers: Loader processes, for as long as it takes.
        finish: As of `Feed`.
    """

    def __init__(
        self,
        images: HeldOutImages,
        collate: Collate,
        workers: int,
        finish: Finish | None,
        processes: Processes,
    ) -> None:
        self.images, self.collate, self.workers = images, collate, workers
        self.finish, self.processes = finish, processes

    def measure(
        self, model: GreenMIM, autocast: Callable[[], torch.autocast], batch_size: int
    ) -> HeldOutLoss:
        """A collective; the model is left in the mode that it was in."""
        device, world = self.processes.device, self.processes.world
        sampler = HeldOutSampler(len(self.images), batch_size, world.rank, world.size)
        loader = make_loader(
            self.images, sampler, self.collate, self.workers, device.type == "cuda"
        )
        learning = model.training
        model.eval()
        total, count = torch.zeros((), device=device, dtype=torch.float64), 0
        try:
            with contextlib.closing(Feed(loader, device, self.finish)) as feed, torch.no_grad():
                for _ in range(len(sampler)):
                    batch = feed.next()
                    with autocast():
                        loss = model(batch.images, plan=batch.plan, loss_only=True).loss
                    total += loss * len(batch.images)
                    count += len(batch.images)
                failures = feed.take_failures()
        finally:
            model.train(learning)
        sums = self.processes.gather((total.item(), count))
        images = sum(images for _, images in sums)
        return HeldOutLoss(sum(part for part, _ in sums) / images, images, failures)

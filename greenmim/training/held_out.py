"""The reconstruction loss on held-out images: whether a run learns or remembers."""

from __future__ import annotations

import contextlib
from collections.abc import Callable
from typing import NamedTuple

import torch
from torch import Tensor

from greenmim.data.dataset import Finish
from greenmim.data.held_out import HeldOutCollate, HeldOutImages, HeldOutSampler
from greenmim.data.loader import Feed, make_loader
from greenmim.mim import GreenMIM, MIMOutput
from greenmim.training.processes import Processes

# Several processes ask one another so often, in batches, whether one was told to stop.
ASK = 16


class HeldOutLoss(NamedTuple):
    """What was found.

    Attributes:
        loss: mean over the images of each one's mean over its hidden units, as in training.
        images: how many, of all processes.
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
        collate: Stacks them and draws their masks.
        workers: Loader processes, for as long as it takes.
        finish: As of `Feed`.
    """

    def __init__(
        self,
        images: HeldOutImages,
        collate: HeldOutCollate,
        workers: int,
        finish: Finish | None,
        processes: Processes,
    ) -> None:
        self.images, self.collate, self.workers = images, collate, workers
        self.finish, self.processes = finish, processes

    def measure(
        self,
        model: GreenMIM,
        autocast: Callable[[], torch.autocast],
        batch_size: int,
        stop: Callable[[], bool] = lambda: False,
    ) -> HeldOutLoss | None:
        """None where a process was to `stop` meanwhile. A collective; the model is left in the mode
        that it was in."""
        processes, device = self.processes, self.processes.device
        world = processes.world
        sampler = HeldOutSampler(len(self.images), batch_size, world.rank, world.size)
        loader = make_loader(
            self.images, sampler, self.collate, self.workers, device.type == "cuda"
        )
        feed = Feed(loader, device, self.finish)
        # One process alone need not wait for a loader that hangs; others would wait for it.
        feed.give_up = lambda: processes.alone and stop()
        learning = model.training
        model.eval()
        total = torch.zeros((), device=device, dtype=torch.float64)
        try:
            with contextlib.closing(feed), torch.no_grad():
                for number, counted in enumerate(sampler.counted):
                    if number % (1 if processes.alone else ASK) == 0:
                        if any(processes.gather(stop())):
                            return None
                    if (batch := feed.next()) is None:
                        return None
                    with autocast():
                        output = model(batch.images, plan=batch.plan)
                    total += image_losses(model, batch.images, output)[:counted].sum()
                failures = feed.take_failures()
        finally:
            model.train(learning)
        sums = processes.gather((total.item(), sum(sampler.counted)))
        images = sum(images for _, images in sums)
        return HeldOutLoss(sum(part for part, _ in sums) / images, images, failures)


def image_losses(model: GreenMIM, images: Tensor, output: MIMOutput) -> Tensor:
    """The loss of each image [B]: the mean squared error over its hidden units."""
    hidden = output.visible.logical_not()
    return (model.errors(images, output.prediction) * hidden).sum(1) / hidden.sum(1)

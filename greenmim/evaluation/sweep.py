"""Going through images once without learning from them, in all processes alike."""

from __future__ import annotations

import contextlib
from collections.abc import Callable

import torch
from torch import nn

from greenmim.data.dataset import Finish
from greenmim.data.held_out import HeldOutImages, HeldOutSampler
from greenmim.data.loader import Batch, Collate, Feed, make_loader
from greenmim.processes import Processes

# Several processes ask one another so often, in batches, whether one was told to stop.
ASK = 16


class Sweep:
    """The same images in the same batches, again and again.

    Args:
        images: Which ones.
        collate: Stacks them.
        batch_size: Images of a batch.
        workers: Loader processes, for as long as it takes.
        finish: As of `Feed`.

    Attributes:
        loader_bytes: Most that the loader's processes took so far, as of `Feed.memory`.
    """

    def __init__(
        self,
        images: HeldOutImages,
        collate: Collate,
        batch_size: int,
        workers: int,
        finish: Finish | None,
        processes: Processes,
    ) -> None:
        self.images, self.collate, self.batch_size = images, collate, batch_size
        self.workers, self.finish, self.processes = workers, finish, processes
        self.loader_bytes = 0

    def run(
        self,
        model: nn.Module,
        each: Callable[[Batch, int], None],
        stop: Callable[[], bool] = lambda: False,
    ) -> list[tuple[str, str]] | None:
        """Call `each` with every batch of this process and how many images of it count. A
        collective; the model is left in the mode that it was in.

        Returns:
            (path, reason) of this process's files that could not be read; None where a process was
            to `stop` meanwhile.
        """
        processes, device = self.processes, self.processes.device
        world = processes.world
        sampler = HeldOutSampler(len(self.images), self.batch_size, world.rank, world.size)
        on_gpu = device.type == "cuda"
        loader = make_loader(self.images, sampler, self.collate, self.workers, on_gpu)
        feed = Feed(loader, device, self.finish)
        # A single process may give up on a loader that hangs; several have to stop together.
        feed.give_up = lambda: processes.alone and stop()
        learning = model.training
        model.eval()
        try:
            with contextlib.closing(feed), torch.no_grad():
                for number, counted in enumerate(sampler.counted):
                    if number % (1 if processes.alone else ASK) == 0:
                        if any(processes.gather(stop())):
                            return None
                    if (batch := feed.next()) is None:
                        return None
                    each(batch, counted)
                self.loader_bytes = max(self.loader_bytes, feed.memory())
                return feed.take_failures()
        finally:
            model.train(learning)

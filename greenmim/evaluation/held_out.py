"""The reconstruction loss on held-out images: whether a run learns or remembers."""

from __future__ import annotations

from collections.abc import Callable
from typing import NamedTuple

import torch
from torch import Tensor

from greenmim.data.loader import Batch
from greenmim.evaluation.sweep import Sweep
from greenmim.mim import GreenMIM, MIMOutput


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


def held_out_loss(
    sweep: Sweep,
    model: GreenMIM,
    autocast: Callable[[], torch.autocast],
    stop: Callable[[], bool] = lambda: False,
) -> HeldOutLoss | None:
    """The loss of a model on the images of a sweep, whose plans hold their masks. A collective.

    None where a process was to `stop` meanwhile.
    """
    processes = sweep.processes
    total, images = torch.zeros((), device=processes.device, dtype=torch.float64), 0

    def add(batch: Batch, counted: int) -> None:
        nonlocal images
        with autocast():
            output = model(batch.images, plan=batch.plan)
        total.add_(image_losses(model, batch.images, output)[:counted].sum())
        images += counted

    failures = sweep.run(model, add, stop)
    if failures is None:
        return None
    sums = processes.gather((total.item(), images))
    images = sum(count for _, count in sums)
    return HeldOutLoss(sum(part for part, _ in sums) / images, images, failures)


def image_losses(model: GreenMIM, images: Tensor, output: MIMOutput) -> Tensor:
    """The loss of each image [B]: the mean squared error over its hidden units."""
    assert output.prediction is not None  # as without `loss_only`
    hidden = output.visible.logical_not()
    return (model.errors(images, output.prediction) * hidden).sum(1) / hidden.sum(1)

"""How well a classifier tells labelled images."""

from __future__ import annotations

import contextlib
import math
from collections import Counter
from collections.abc import Callable, Mapping
from typing import NamedTuple

import torch
from torch.nn import functional as F

from greenmim.classifier import Classifier
from greenmim.data.labelled import UNREADABLE
from greenmim.data.loader import Batch
from greenmim.evaluation.accuracy import Accuracy, Tally, numbers_of
from greenmim.evaluation.sweep import Sweep


class Classified(NamedTuple):
    """What was found, of all processes.

    Attributes:
        accuracy: of the images that have a class and could be read.
        loss: mean cross-entropy of those whose class the classifier has; NaN without one.
        images: how many have a class and could be read.
        strangers: images by a class that the classifier does not have.
        without_label: how many have no class.
        failures: (path, reason) of files that could not be read.
    """

    accuracy: Accuracy
    loss: float
    images: int
    strangers: Counter[str]
    without_label: int
    failures: tuple[tuple[str, str], ...]


def classify(
    sweep: Sweep,
    model: Classifier,
    autocast: Callable[[], contextlib.AbstractContextManager],
    classes: Mapping[str, int],
    stop: Callable[[], bool] = lambda: False,
    progress: Callable[[int], object] = lambda images: None,
) -> Classified | None:
    """Classify the images of a sweep, whose plans have everything visible. A collective.

    Args:
        classes: numbers of the classifier's classes by name.
        stop: whether to end early; where a process was to, the result is None.
        progress: told of every batch.
    """
    processes = sweep.processes
    tally, strangers, without = Tally(), Counter(), 0
    loss = torch.zeros((), device=processes.device, dtype=torch.float64)

    def add(batch: Batch, counted: int) -> None:
        nonlocal without
        with autocast():
            scores = model(batch.images, batch.plan)[:counted].float()
        own = batch.labels[:counted]
        known = [number for number, label in enumerate(own) if label not in (None, UNREADABLE)]
        labels = [own[number] for number in known]
        without += own.count(None)
        strangers.update(label for label in labels if label not in classes)
        answers = numbers_of(labels, classes).to(scores.device)
        scores = scores[torch.tensor(known, dtype=torch.int64, device=scores.device)]
        loss.add_(F.cross_entropy(scores, answers, ignore_index=-1, reduction="sum"))
        tally.add(scores, answers)
        progress(counted * processes.world.size)

    failures = sweep.run(model, add, stop)
    if failures is None:
        return None
    parts = processes.gather((tally, loss.item(), strangers, without, failures))
    whole, unknown = Tally(), Counter()
    for part, _, names, *_ in parts:
        whole.merge(part)
        unknown.update(names)
    learned = whole.images - unknown.total()
    return Classified(
        whole.accuracy(),
        sum(part for _, part, *_ in parts) / learned if learned else math.nan,
        whole.images,
        unknown,
        sum(part for *_, part, _ in parts),
        tuple(dict.fromkeys(failure for *_, part in parts for failure in part)),
    )

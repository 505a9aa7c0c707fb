"""How well a classifier tells labelled images."""

from __future__ import annotations

import contextlib
import math
from collections import Counter
from collections.abc import Callable, Mapping, Sequence
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
    models: Sequence[Classifier],
    autocast: Callable[[], contextlib.AbstractContextManager],
    classes: Mapping[str, int],
    stop: Callable[[], bool] = lambda: False,
    progress: Callable[[int], object] = lambda images: None,
) -> list[Classified] | None:
    """Classify the images of a sweep, whose plans have everything visible. A collective.

    Args:
        models: Each of them classifies all images; all but the first are in evaluation mode.
        classes: Numbers of the classifiers' classes by name.
        stop: Whether to end early; where a process was to, the result is None.
        progress: Told of every batch.

    Returns:
        What was found, for each model.
    """
    processes = sweep.processes
    tallies, without = [Tally() for _ in models], 0
    strangers: Counter[str] = Counter()
    losses = torch.zeros(len(models), device=processes.device, dtype=torch.float64)

    def add(batch: Batch, counted: int) -> None:
        nonlocal without
        own = batch.labels[:counted]
        known = [number for number, label in enumerate(own) if label not in (None, UNREADABLE)]
        labels = [str(own[number]) for number in known]
        without += own.count(None)
        strangers.update(label for label in labels if label not in classes)
        answers = numbers_of(labels, classes).to(processes.device)
        rows = torch.tensor(known, dtype=torch.int64, device=processes.device)
        for model, tally, loss in zip(models, tallies, losses, strict=True):
            with autocast():
                scores = model(batch.images, batch.plan)
            scores = scores[rows].float()
            loss.add_(F.cross_entropy(scores, answers, ignore_index=-1, reduction="sum"))
            tally.add(scores, answers)
        progress(counted * processes.world.size)

    failures = sweep.run(models[0], add, stop)
    if failures is None:
        return None
    parts = processes.gather((tallies, losses.tolist(), strangers, without, failures))
    unknown = sum((part for *_, part, _, _ in parts), Counter())
    without = sum(part for *_, part, _ in parts)
    named = tuple(dict.fromkeys(failure for *_, part in parts for failure in part))
    found = []
    for number in range(len(models)):
        whole, loss = Tally(), 0.0
        for own, sums, *_ in parts:
            whole.merge(own[number])
            loss += sums[number]
        learned = whole.images - unknown.total()
        loss = loss / learned if learned else math.nan
        found.append(Classified(whole.accuracy(), loss, whole.images, unknown, without, named))
    return found

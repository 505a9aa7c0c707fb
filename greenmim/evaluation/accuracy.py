"""How good scores are: accuracies, a table by class, a picture of what is taken for what."""

from __future__ import annotations

import json
import os
from collections.abc import Iterable
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import torch
from torch import Tensor

from greenmim.checkpoint import save_text
from greenmim.evaluation.classifiers import knn_scores
from greenmim.evaluation.features import Features
from greenmim.messages import columns

# So many classes have their names on the picture.
_NAMED = 60


class Accuracy(NamedTuple):
    """Of scores [m, K] and the true classes.

    Attributes:
        top1, top5: shares of images, 0 to 1. A score of minus infinity is never among the first.
        confusion: int64 [K, K], images of the class of a row taken for that of a column; those of a
            class that nobody learned are missing.
    """

    top1: float
    top5: float
    confusion: np.ndarray


def measure(scores: Tensor, answers: Tensor) -> Accuracy:
    """Accuracy of scores float [m, K]; answers int64 [m], -1 for a class that nobody learned.

    Raises:
        ValueError: there is nothing to measure.
    """
    if not len(scores):
        raise ValueError("there is no image to classify")
    classes = scores.shape[1]
    known = answers >= 0
    best = scores.topk(min(5, classes), 1)
    hits = (best.indices == answers[:, None]) & (best.values > -torch.inf)
    pairs = answers[known] * classes + best.indices[known, 0]
    confusion = torch.bincount(pairs.cpu(), minlength=classes**2).view(classes, classes)
    top1, top5 = (hits[:, :n].any(1).double().mean().item() for n in (1, 5))
    return Accuracy(top1, top5, confusion.numpy())


def classes_of(labels: Iterable[str]) -> dict[str, int]:
    """Numbers of the classes by name, in alphabetical order."""
    return {name: number for number, name in enumerate(sorted(set(labels)))}


def neighbours_accuracy(features: Features, k: int, device: torch.device) -> Accuracy:
    """How well labelled images are told by their k nearest among the others.

    Raises:
        ValueError: there are not so many.
    """
    classes = classes_of(features.labels)
    labels = torch.tensor([classes[name] for name in features.labels], device=device)
    scores = knn_scores(features.values.to(device), labels, None, len(classes), k)
    return measure(scores, labels)


def by_class(confusion: np.ndarray, classes: list[str]) -> list[dict[str, Any]]:
    """One row for each class: images, share that was right, what others are taken for."""
    rows = []
    for number, name in enumerate(classes):
        taken = confusion[number].copy()
        images, right = int(taken.sum()), int(taken[number])
        taken[number] = 0
        other = int(taken.argmax())
        rows.append(
            {
                "class": name,
                "images": images,
                "top1": right / images if images else None,
                "taken_for": classes[other] if taken[other] else None,
                "taken": int(taken[other]),
            }
        )
    return rows


def table(rows: list[dict[str, Any]], most: int = 40) -> str:
    """The rows for people, the worst first, so many at most."""
    there = sorted((row for row in rows if row["images"]), key=lambda row: row["top1"])
    lines = [("class", "images", "right", "mostly taken for")]
    for row in there[:most]:
        taken = f"{row['taken_for']} ({row['taken']})" if row["taken_for"] else ""
        lines.append((row["class"], str(row["images"]), f"{100 * row['top1']:.1f} %", taken))
    text = "\n".join(columns(lines))
    if len(there) > most:
        text += f"\nand {len(there) - most} more, better ones; all are in the file"
    return text


def draw(confusion: np.ndarray, classes: list[str], title: str, path: Path) -> None:
    """Draw which share of each class (row) is taken for which (column), as a PNG.

    Raises:
        OSError: it cannot be written.
    """
    from matplotlib.figure import Figure

    shares = confusion / np.maximum(confusion.sum(1, keepdims=True), 1)
    side = min(max(4.0, 0.22 * len(classes) + 2.0), 15.0)
    figure = Figure(figsize=(side + 1, side), layout="constrained")
    axes = figure.add_subplot()
    image = axes.imshow(shares, vmin=0, vmax=1, cmap="viridis", interpolation="nearest")
    axes.set(xlabel="taken for", ylabel="class", title=title)
    if len(classes) <= _NAMED:
        names = [name if len(name) <= 24 else f"{name[:21]}..." for name in classes]
        axes.set_xticks(range(len(classes)), names, rotation=90, fontsize=8)
        axes.set_yticks(range(len(classes)), names, fontsize=8)
    figure.colorbar(image, ax=axes, label="share of the class", shrink=0.8)
    beside = path.with_name(f".{path.stem}.{os.getpid()}{path.suffix}")
    try:
        figure.savefig(beside, dpi=120)
        os.replace(beside, path)
    finally:
        beside.unlink(missing_ok=True)


def save(result: dict[str, Any], path: Path) -> None:
    """Write a result as JSON, whole or not at all; OSError where it cannot be."""
    save_text(json.dumps(result, indent=1) + "\n", path)

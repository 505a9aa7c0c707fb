"""How good scores are: accuracies, a table by class, a picture of what is taken for what."""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import torch
from torch import Tensor

from greenmim.checkpoint import write_atomic
from greenmim.evaluation.classifiers import knn_pieces
from greenmim.evaluation.features import Features
from greenmim.messages import columns, drawable

# So many classes have their names on the picture; of more than the other number none is drawn.
_NAMED, _DRAWN = 60, 2000


class Accuracy(NamedTuple):
    """Of scores and true classes.

    Attributes:
        top1, top5: shares of images, 0 to 1. A score of minus infinity is never among the first.
        confusion: images by (true class, class taken for), -1 where the best score is NaN or minus
            infinity; those of a class that nobody learned are missing.
    """

    top1: float
    top5: float
    confusion: Counter[tuple[int, int]]

    def words(self) -> str:
        """For people."""
        return f"top-1 {100 * self.top1:.2f} %, top-5 {100 * self.top5:.2f} %"


class Tally:
    """Images of which scores are known, and of how many what was right; tallies add up.

    Attributes:
        images: how many.
    """

    def __init__(self) -> None:
        self.images, self._right = 0, torch.zeros(2, dtype=torch.int64)
        self._confusion: Counter[tuple[int, int]] = Counter()

    def add(self, scores: Tensor, answers: Tensor) -> None:
        """Count some images.

        Args:
            scores: float [b, K].
            answers: int64 [b], -1 for a class that nobody learned.
        """
        best = scores.topk(min(5, scores.shape[1]), 1)
        hits = (best.indices == answers[:, None]) & (best.values > -torch.inf)
        self.images += len(scores)
        self._right += torch.stack([hits[:, :number].any(1).sum() for number in (1, 5)]).cpu()
        # NaN is above all others there, and above minus infinity it is not.
        taken = best.indices[:, 0].where(best.values[:, 0] > -torch.inf, -1)
        self._confusion.update(zip(answers.tolist(), taken.tolist(), strict=True))

    def merge(self, other: Tally) -> None:
        """Add what another one has counted."""
        self.images += other.images
        self._right += other._right
        self._confusion.update(other._confusion)

    def accuracy(self) -> Accuracy:
        """Of all images; NaN of none."""
        top1, top5 = (self._right.double() / self.images).tolist()
        known = {pair: count for pair, count in self._confusion.items() if pair[0] >= 0}
        return Accuracy(top1, top5, Counter(known))


def measure(pieces: Iterable[Tensor], answers: Tensor) -> Accuracy:
    """The accuracy of scores.

    Args:
        pieces: float [b, K], whose rows follow one another.
        answers: int64 [m], as of `Tally.add`; at least one.
    """
    tally = Tally()
    for scores in pieces:
        tally.add(scores, answers[tally.images : tally.images + len(scores)])
    return tally.accuracy()


def classes_of(labels: Iterable[str]) -> dict[str, int]:
    """Numbers of the classes by name, in alphabetical order."""
    return {name: number for number, name in enumerate(sorted(set(labels)))}


def numbers_of(labels: Iterable[str | None], classes: Mapping[Any, int]) -> Tensor:
    """int64 [m], the numbers of some classes; -1 for one that has none."""
    return torch.tensor([classes.get(name, -1) for name in labels], dtype=torch.int64)


def neighbours_accuracy(features: Features, k: int, device: torch.device) -> Accuracy:
    """How well labelled images are told by their k nearest among the others.

    Raises:
        ValueError: there are not so many.
    """
    classes = classes_of(features.labels)
    labels = numbers_of(features.labels, classes).to(device)
    return measure(knn_pieces(features.values.to(device), labels, None, len(classes), k), labels)


def by_class(accuracy: Accuracy, classes: Iterable[str]) -> list[dict[str, Any]]:
    """One row for each class: images, share that was right, what others are taken for."""
    names = list(classes)
    taken: list[Counter[int]] = [Counter() for _ in names]
    for (wanted, found), count in accuracy.confusion.items():
        taken[wanted][found] = count
    rows = []
    for number, name in enumerate(names):
        images, right = taken[number].total(), taken[number].pop(number, 0)
        del taken[number][-1]
        ((other, count),) = taken[number].most_common(1) or [(-1, 0)]
        rows.append(
            {
                "class": name,
                "images": images,
                "top1": right / images if images else None,
                "taken_for": None if other < 0 else names[other],
                "taken": count,
            }
        )
    return rows


def table(rows: list[dict[str, Any]], most: int = 40) -> str:
    """The rows for people, the worst first, so many at most."""
    there = sorted((row for row in rows if row["images"]), key=lambda row: row["top1"])
    lines = [("class", "images", "right", "mostly taken for")]
    for row in there[:most]:
        taken = f"{row['taken_for']} ({row['taken']})" if row["taken"] else ""
        lines.append((row["class"], str(row["images"]), f"{100 * row['top1']:.1f} %", taken))
    text = "\n".join(columns(lines))
    if len(there) > most:
        text += f"\nand {len(there) - most} more, better ones; all are in the file"
    return text


def draw(accuracy: Accuracy, classes: Iterable[str], title: str, path: Path) -> bool:
    """Draw which share of each class (row) is taken for which (column), as a PNG.

    Of too many classes for a picture nothing is drawn.

    Returns:
        Whether it was drawn.

    Raises:
        OSError: it cannot be written.
    """
    from matplotlib.figure import Figure

    names = list(classes)
    if len(names) > _DRAWN:
        return False
    shares = np.zeros((len(names), len(names) + 1))  # the last, -1, is of no class
    for pair, count in accuracy.confusion.items():
        shares[pair] = count
    shares /= np.maximum(shares.sum(1, keepdims=True), 1)
    side = min(max(4.0, 0.22 * len(names) + 2.0), 15.0)
    figure = Figure(figsize=(side + 1, side), layout="constrained")
    axes = figure.add_subplot()
    image = axes.imshow(shares[:, :-1], vmin=0, vmax=1, cmap="viridis", interpolation="nearest")
    axes.set(xlabel="taken for", ylabel="class", title=title)
    if len(names) <= _NAMED:
        texts = [drawable(name, 24) for name in names]
        options: dict[str, Any] = {"labels": texts, "fontsize": 8, "parse_math": False}
        axes.set_xticks(range(len(names)), rotation=90, **options)
        axes.set_yticks(range(len(names)), **options)
    figure.colorbar(image, ax=axes, label="share of the class", shrink=0.8)
    write_atomic(lambda beside: figure.savefig(beside, dpi=120, format="png"), path)
    return True

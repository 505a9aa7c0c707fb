"""Classifiers on features: k nearest neighbours, and a linear layer."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator, Sequence
from typing import NamedTuple

import torch
from torch import Tensor
from torch.nn import functional as F

# Similarities that are held at a time.
_AT_ONCE = 2**26
# One of so many images chooses a learning rate.
_CHOOSING = 10


def knn_pieces(
    train: Tensor,
    labels: Tensor,
    features: Tensor | None,
    num_classes: int,
    k: int = 20,
    temperature: float = 0.07,
) -> Iterator[Tensor]:
    """As `knn_scores`, a few images at a time: float32 [b, K], whose rows follow one another."""
    leave_out = features is None
    there = len(train) - leave_out
    if k < 1:
        raise ValueError(f"k is {k}; it has to be at least 1")
    if k > there:
        raise ValueError(f"k is {k} and there are {there} neighbours")
    train = F.normalize(train.float(), dim=1)
    features = train if features is None else F.normalize(features.float(), dim=1)
    rows = max(1, _AT_ONCE // len(train))
    for start in range(0, max(len(features), 1), rows):
        part = features[start : start + rows].to(train.device)
        similarity = part @ train.T
        if leave_out:
            number = torch.arange(len(part), device=train.device)
            similarity[number, start + number] = -math.inf
        nearest, index = similarity.topk(k, dim=1)
        votes = (nearest / temperature).softmax(1)
        found = votes.new_zeros(len(part), num_classes)
        yield found.scatter_add_(1, labels[index], votes).log_()


def knn_scores(
    train: Tensor,
    labels: Tensor,
    features: Tensor | None,
    num_classes: int,
    k: int = 20,
    temperature: float = 0.07,
) -> Tensor:
    """Votes of the k nearest neighbours by cosine, each exp(similarity / temperature).

    Source: Wu et al., CVPR 2018 (arXiv 1805.01978), section 3.4; as DINO measures it.

    Args:
        train: float [n, C].
        labels: int64 [n], 0 to num_classes - 1.
        features: float [m, C] of images to classify; None classifies those of `train`, each by the
            others.
        num_classes: K.
        k: neighbours.
        temperature: of the votes.

    Returns:
        Logarithms of the shares of votes, float32 [m, K], on the device of `train`; minus infinity
        for a class without one.

    Raises:
        ValueError: k is below 1, or there are fewer neighbours.
    """
    return torch.cat(list(knn_pieces(train, labels, features, num_classes, k, temperature)))


class Rate(NamedTuple):
    """What a learning rate gave.

    Attributes:
        lr: the rate.
        choosing: accuracy on the images that choose, of the layer that did not learn them.
        loss: its cross-entropy there.
        top1: accuracy on the other images, of the layer that learned all.
    """

    lr: float
    choosing: float
    loss: float
    top1: float


def linear_probe(
    train: Tensor,
    labels: Tensor,
    features: Tensor,
    answers: Tensor,
    num_classes: int,
    *,
    rates: Sequence[float] = (0.003, 0.01, 0.03, 0.1, 0.3, 1.0, 3.0, 10.0),
    epochs: int = 100,
    batch_size: int = 256,
    seed: int = 0,
    progress: Callable[[int], object] = lambda epochs: None,
) -> tuple[Tensor, list[Rate], Rate]:
    """A linear layer after batch norm on frozen features, for several learning rates in one pass.

    Every rate trains two layers on the same batches: one without a tenth of the images, spread over
    the classes, on which its accuracy is measured; one on all images. The first kind chooses the
    rate, so the images to classify choose nothing. The statistics of batch norm are those of all
    images: features stay as they are. SGD with momentum 0.9 and a cosine to zero, no weight decay.

    Source: He et al., CVPR 2022 (arXiv 2111.06377), appendix A.1, with SGD in place of LARS.

    Args:
        train: float [n, C].
        labels: int64 [n], 0 to num_classes - 1.
        features: float [m, C] of images to classify.
        answers: int64 [m], their classes; -1 is of none.
        num_classes: K.
        rates: learning rates.
        epochs: passes over the features.
        batch_size: images of an update.
        seed: of the order and of which images choose.
        progress: told of every epoch.

    Returns:
        Scores float32 [m, K] of the chosen rate, all rates, and the chosen one.

    Raises:
        ValueError: there are fewer than two images, or no rate.
    """
    if len(train) < 2:
        raise ValueError(f"there are {len(train)} images to learn from; at least 2 are needed")
    if not rates:
        raise ValueError("there is no learning rate; give at least one")
    train, features = train.float(), features.float()
    device, count = train.device, len(rates)
    draw = torch.Generator().manual_seed(seed)
    mixed = torch.randperm(len(train), generator=draw).to(device)
    by_class = mixed[labels[mixed].argsort(stable=True)]
    chooses = torch.zeros(len(train), dtype=torch.bool, device=device)
    chooses[by_class[_CHOOSING // 2 :: _CHOOSING] if len(train) > 5 else by_class[:1]] = True
    variance, mean = torch.var_mean(train, 0, correction=0)
    scale = (variance + 1e-6).rsqrt()

    # First those that leave images out. Zeros: nothing is drawn, and the problem is convex.
    weight = torch.zeros(2 * count, train.shape[1], num_classes, device=device, requires_grad=True)
    bias = torch.zeros(2 * count, 1, num_classes, device=device, requires_grad=True)
    optimizer = torch.optim.SGD([weight, bias], lr=1.0, momentum=0.9)
    batches = -(-len(train) // batch_size)
    schedule = torch.optim.lr_scheduler.CosineAnnealingLR(optimizer, epochs * batches)
    lr = torch.tensor([*rates, *rates], device=device)

    def scores_of(some: Tensor, layers: slice) -> Tensor:
        """[b, C] -> [layers, b, K]."""
        x = (some - mean) * scale
        part = weight[layers]
        return torch.baddbmm(bias[layers], x.expand(len(part), -1, -1), part)

    for _ in range(epochs):
        for index in torch.randperm(len(train), generator=draw).to(device).tensor_split(batches):
            losses = _losses(scores_of(train[index], slice(None)), labels[index])
            kept = (~chooses[index]).float().expand(count, -1)
            kept = torch.cat([kept, torch.ones_like(kept)])
            loss = (losses * kept).sum(1) / kept.sum(1).clamp(min=1)
            optimizer.zero_grad()
            # A rate times the loss is that rate: momentum is linear in gradients.
            (loss * lr).sum().backward()
            optimizer.step()
            schedule.step()
        progress(1)

    with torch.no_grad():
        right, loss, top1 = torch.zeros(3, count, device=device, dtype=torch.float64)
        for index in chooses.nonzero()[:, 0].split(batch_size):
            scores = scores_of(train[index], slice(count))
            right += (scores.argmax(2) == labels[index]).sum(1)
            loss += _losses(scores, labels[index]).sum(1)
        for part, wanted in zip(features.split(batch_size), answers.split(batch_size), strict=True):
            top1 += (scores_of(part, slice(count, None)).argmax(2) == wanted).sum(1)
        number = int(chooses.sum())
        columns = (
            (right / number).tolist(),
            (loss / number).tolist(),
            (top1 / len(answers)).tolist(),
        )
        found = [Rate(*row) for row in zip(rates, *columns, strict=True)]
        # A rate that diverged is never the best one, whatever the index of a NaN is right by.
        best = max(found, key=lambda r: (not math.isnan(r.loss), r.choosing, -r.loss))
        chosen = count + found.index(best)
        parts = [
            scores_of(part, slice(chosen, chosen + 1))[0] for part in features.split(batch_size)
        ]
    return torch.cat(parts), found, best


def _losses(scores: Tensor, labels: Tensor) -> Tensor:
    """Cross-entropies [layers, b] of scores [layers, b, K]."""
    wanted = labels.expand(len(scores), -1)
    return F.cross_entropy(scores.flatten(0, 1), wanted.flatten(), reduction="none").view_as(wanted)

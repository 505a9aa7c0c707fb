"""Classifiers on features: k nearest neighbours, and a linear layer."""

from __future__ import annotations

import math
from typing import NamedTuple

import torch
from torch import Tensor, nn
from torch.nn import functional as F

# Similarities that are held at a time.
_AT_ONCE = 2**26
# Of all images, so many have one for the choice of a learning rate.
_CHOOSING = 10


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
        ValueError: there are fewer neighbours than k.
    """
    leave_out = features is None
    there = len(train) - leave_out
    if k > there:
        raise ValueError(f"k is {k} and there are {there} neighbours; take a smaller k")
    train = F.normalize(train.float(), dim=1)
    features = train if leave_out else F.normalize(features.float(), dim=1)
    scores = []
    for start in range(0, len(features), rows := max(1, _AT_ONCE // max(len(train), 1))):
        part = features[start : start + rows].to(train.device)
        similarity = part @ train.T
        if leave_out:
            number = torch.arange(len(part), device=train.device)
            similarity[number, start + number] = -math.inf
        nearest, index = similarity.topk(k, dim=1)
        votes = ((nearest - 1) / temperature).exp()  # at most 1: nothing overflows
        votes = votes / votes.sum(1, keepdim=True)
        found = votes.new_zeros(len(part), num_classes)
        scores.append(found.scatter_add_(1, labels[index], votes))
    return torch.cat(scores).log() if scores else train.new_zeros(0, num_classes)


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
    rates: tuple[float, ...] = (0.003, 0.01, 0.03, 0.1, 0.3, 1.0, 3.0, 10.0),
    epochs: int = 100,
    batch_size: int = 256,
    seed: int = 0,
) -> tuple[Tensor, list[Rate], Rate]:
    """A linear layer after batch norm on frozen features, for several learning rates in one pass.

    Every rate trains two layers on the same batches: one without every tenth image of a class, on
    which its accuracy is measured; one on all images. The first kind chooses the rate, so the
    images to classify choose nothing. SGD with momentum 0.9 and a cosine to zero, no weight decay.

    Source: He et al., CVPR 2022 (arXiv 2111.06377), appendix A.1, with SGD in place of LARS.

    Args:
        train: float [n, C].
        labels: int64 [n], 0 to num_classes - 1.
        features: float [m, C] of images to classify.
        answers: int64 [m], their classes; -1 is of none.
        num_classes: K.
        rates: learning rates, for any batch size.
        epochs: passes over the features.
        batch_size: images of an update.
        seed: of the order and of which images choose.

    Returns:
        Scores float32 [m, K] of the chosen rate, all rates, and the chosen one.

    Raises:
        ValueError: there are fewer than two images.
    """
    if len(train) < 2:
        raise ValueError(f"there are {len(train)} images to learn from; at least 2 are needed")
    device, count = train.device, len(rates)
    draw = torch.Generator().manual_seed(seed)
    mixed = torch.randperm(len(train), generator=draw).to(device)
    by_class = mixed[labels[mixed].argsort(stable=True)]
    chooses = torch.zeros(len(train), dtype=torch.bool, device=device)
    chooses[by_class[_CHOOSING // 2 :: _CHOOSING] if len(train) > 5 else by_class[:1]] = True

    # Without momentum its statistics are the mean over all batches: features stay as they are.
    norm = nn.BatchNorm1d(train.shape[1], eps=1e-6, momentum=None, affine=False).to(device)
    # [2 R, C, K] and [2 R, 1, K]: first those that leave images out. Zero: nothing is drawn.
    weight = torch.zeros(2 * count, train.shape[1], num_classes, device=device)
    bias = torch.zeros(2 * count, 1, num_classes, device=device)
    layers = [nn.Parameter(layer) for part in (weight, bias) for layer in part]
    groups = [{"params": layers[i :: 2 * count], "lr": rates[i % count]} for i in range(2 * count)]
    optimizer = torch.optim.SGD(groups, momentum=0.9, foreach=True)
    batches = -(-len(train) // batch_size)
    schedule = torch.optim.lr_scheduler.CosineAnnealingLR(optimizer, epochs * batches)

    def scores_of(some: Tensor) -> Tensor:
        """[b, C] -> [2 R, b, K]."""
        weights, biases = torch.stack(layers[: 2 * count]), torch.stack(layers[2 * count :])
        return torch.baddbmm(biases, norm(some).expand(2 * count, -1, -1), weights)

    for _ in range(epochs):
        order = torch.randperm(len(train), generator=draw).to(device)
        for index in order.tensor_split(batches):
            norm.train(len(index) > 1)
            scores = scores_of(train[index])
            wanted = labels[index].expand(2 * count, -1)
            losses = F.cross_entropy(scores.flatten(0, 1), wanted.flatten(), reduction="none")
            losses = losses.view(2 * count, -1)
            kept = (~chooses[index]).float().expand(count, -1)
            kept = torch.cat([kept, torch.ones_like(kept)])
            loss = (losses * kept).sum(1) / kept.sum(1).clamp(min=1)
            optimizer.zero_grad()
            loss.sum().backward()
            optimizer.step()
            schedule.step()

    norm.eval()
    with torch.no_grad():
        of_choosing = scores_of(train[chooses])[:count]
        right = labels[chooses]
        found = torch.cat([scores_of(some)[count:] for some in features.split(batch_size)], 1)
    results = []
    for number, lr in enumerate(rates):
        results.append(
            Rate(
                lr,
                (of_choosing[number].argmax(1) == right).double().mean().item(),
                F.cross_entropy(of_choosing[number], right).item(),
                (found[number].argmax(1) == answers).double().mean().item(),
            )
        )
    best = max(range(count), key=lambda i: (results[i].choosing, -results[i].loss))
    return found[best], results, results[best]

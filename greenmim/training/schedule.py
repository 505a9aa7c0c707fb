"""The learning rate over a run."""

from __future__ import annotations

import math

from greenmim.recipe import Recipe


def learning_rate(
    epoch: float, *, peak: float, final: float, warmup_epochs: float, epochs: float
) -> float:
    """Learning rate at a fractional epoch: linear warm-up from 0, then half a cosine to `final`.

    The published schedule (Huang et al., NeurIPS 2022, arXiv 2205.13515), set before every update.
    """
    if epoch < warmup_epochs:
        return peak * epoch / warmup_epochs
    if epochs <= warmup_epochs:
        return peak
    progress = min((epoch - warmup_epochs) / (epochs - warmup_epochs), 1.0)
    return final + (peak - final) * 0.5 * (1.0 + math.cos(math.pi * progress))


def scaled_rates(recipe: Recipe, images_per_update: int) -> tuple[float, float, str]:
    """Peak and final learning rate for the real number of images per update, and their origin."""
    optim, minimum = recipe.optim, recipe.schedule.min_lr
    if optim.lr is not None:
        return optim.lr, minimum, f"learning rate {optim.lr:.3g} (as given), final {minimum:.3g}"
    scale = images_per_update / optim.base_batch
    peak, final = optim.base_lr * scale, minimum * scale
    how = (
        f"learning rate {optim.base_lr:.3g} for {optim.base_batch} images per update"
        f" x {images_per_update}/{optim.base_batch} = {peak:.3g}, final {final:.3g}"
    )
    return peak, final, how

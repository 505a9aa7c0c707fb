"""Which units of an image stay visible."""

from __future__ import annotations

import numpy as np


def num_visible_units(num_units: int, mask_ratio: float) -> int:
    """int(L * (1 - ratio)), in double precision, as the published code counts.

    Raises:
        ValueError: the ratio is not in [0, 1), or leaves no unit visible.
    """
    if not 0 <= mask_ratio < 1:
        raise ValueError(f"mask_ratio must be at least 0 and below 1, got {mask_ratio}")
    visible = int(num_units * (1 - mask_ratio))
    if visible == 0:
        raise ValueError(
            f"mask_ratio {mask_ratio} hides all {num_units} units of an image; lower it or take a"
            " larger image_size"
        )
    return visible


def random_visible(
    rng: np.random.Generator, num_units: int, mask_ratio: float, batch: int | None = None
) -> np.ndarray:
    """Draw uniformly which units are visible.

    Args:
        rng: where the randomness comes from.
        num_units: units L of an image.
        mask_ratio: share of hidden units.
        batch: number of images with a mask each; None for one mask.

    Returns:
        bool [L] or [batch, L], True = visible; each row has `num_visible_units` of them.

    Raises:
        ValueError: as `num_visible_units`.
    """
    visible = num_visible_units(num_units, mask_ratio)
    noise = rng.random((1 if batch is None else batch, num_units))
    chosen = np.zeros(noise.shape, dtype=bool)
    np.put_along_axis(chosen, noise.argsort(1, kind="stable")[:, :visible], True, axis=1)
    return chosen[0] if batch is None else chosen

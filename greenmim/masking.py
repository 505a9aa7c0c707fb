"""Which units of an image stay visible."""

from __future__ import annotations

import math

import numpy as np

# Least number of units of a block, and its least and greatest height / width (Bao et al., BEiT,
# ICLR 2022, use 16 patches of 16 px, which are 4 units, and these ratios).
_BLOCK_UNITS = 4
_LOG_RATIO = math.log(1 / 0.3)


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


def block_visible(
    rng: np.random.Generator, grid: tuple[int, int], mask_ratio: float, batch: int | None = None
) -> np.ndarray:
    """Hide rectangles of units one after another; the last is cut so that the count is exact.

    Args:
        rng: where the randomness comes from.
        grid: (height, width) of an image in units.
        mask_ratio: share of hidden units.
        batch: number of images with a mask each; None for one mask.

    Returns:
        bool [L] or [batch, L], row-major, True = visible; `num_visible_units` in each row.

    Raises:
        ValueError: as `num_visible_units`.
    """
    count = num_visible_units(grid[0] * grid[1], mask_ratio)
    if batch is None:
        return _hide_blocks(rng, grid, count).reshape(-1)
    chosen = np.empty((batch, grid[0] * grid[1]), dtype=bool)
    for row in chosen:
        row[:] = _hide_blocks(rng, grid, count).reshape(-1)
    return chosen


def draw_visible(
    rng: np.random.Generator,
    grid: tuple[int, int],
    mask_ratio: float,
    batch: int | None = None,
    kind: str = "random",
) -> np.ndarray:
    """Draw masks of a kind.

    Args:
        rng: where the randomness comes from.
        grid: (height, width) of an image in units.
        mask_ratio: share of hidden units.
        batch: number of images with a mask each; None for one mask.
        kind: "random" (`random_visible`) or "block" (`block_visible`).

    Returns:
        bool [L] or [batch, L], row-major, True = visible.

    Raises:
        ValueError: another kind, or as `num_visible_units`.
    """
    if kind == "block":
        return block_visible(rng, grid, mask_ratio, batch)
    if kind != "random":
        raise ValueError(f"kind must be random or block, got {kind!r}")
    return random_visible(rng, grid[0] * grid[1], mask_ratio, batch)


def _hide_blocks(rng: np.random.Generator, grid: tuple[int, int], count: int) -> np.ndarray:
    visible = np.ones(grid, dtype=bool)
    flat = visible.reshape(-1)
    while len(shown := flat.nonzero()[0]) > count:
        excess = len(shown) - count
        # One call for all numbers of a block: a call costs more than the rest.
        size, form, over, *where = rng.random(5).tolist()
        least = min(_BLOCK_UNITS, excess)
        area = least + size * (excess - least)
        ratio = math.exp((2 * form - 1) * _LOG_RATIO)
        sides = (math.sqrt(area * ratio), math.sqrt(area / ratio))
        # Over a unit that is still visible, so that every block hides something.
        unit = divmod(int(shown[int(over * len(shown))]), grid[1])
        span = []
        for side, limit, at, share in zip(sides, grid, unit, where, strict=True):
            side = min(max(round(side), 1), limit)
            first, last = max(at - side + 1, 0), min(at, limit - side)
            start = first + int(share * (last - first + 1))
            span.append(slice(start, start + side))
        block = visible[tuple(span)]
        hidden = np.flatnonzero(block)[:excess]
        block[np.unravel_index(hidden, block.shape)] = False
    return visible

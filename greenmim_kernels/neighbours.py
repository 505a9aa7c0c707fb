"""Which visible tokens of a grid lie beside each other, planned on the CPU."""

from __future__ import annotations

import numpy as np
import torch
from torch import Tensor


def grid_neighbours(visible: np.ndarray | Tensor) -> Tensor:
    """The visible tokens around each visible token, for `sparse_depthwise_conv`.

    Args:
        visible: the token grid, True = visible: bool [H, W], one for the whole batch, or
            [B, H, W], one per image, each with the same number of visible tokens; on the CPU.

    Returns:
        int32 [P, N, 9]: for each visible token, row-major, the numbers of those at the nine places
        of a 3 x 3 kernel, row by row, itself in the middle; -1 for a hidden place, or one outside
        the grid. P = 1 or B.

    Raises:
        TypeError: ``visible`` is not a bool array, or is on a GPU.
        ValueError: it is empty or has another number of axes, or counts differ between images.
    """
    grids = np.asarray(visible)  # for a tensor on a GPU, PyTorch's own error says what to do
    if grids.dtype != np.bool_:
        raise TypeError(
            f"visible has dtype {grids.dtype}; pass bool, True = visible (for 0/1: visible == 1)"
        )
    if grids.ndim not in (2, 3) or 0 in grids.shape:
        raise ValueError(
            f"visible must be [H, W] or [B, H, W] and not empty, got shape {list(grids.shape)}"
        )
    grids = grids.reshape(-1, *grids.shape[-2:])
    counts = grids.sum((1, 2))
    if counts.min() != counts.max():
        raise ValueError(
            f"image {counts.argmin()} has {counts.min()} visible tokens and image"
            f" {counts.argmax()} {counts.max()}; all images of a batch need the same number"
        )
    images, height, width = grids.shape
    numbers = np.full((images, height + 2, width + 2), -1, dtype=np.int32)
    numbers[:, 1:-1, 1:-1][grids] = np.tile(np.arange(counts[0], dtype=np.int32), len(grids))
    around = np.lib.stride_tricks.sliding_window_view(numbers, (3, 3), (1, 2))[grids]
    return torch.from_numpy(around.reshape(len(grids), counts[0], 9))

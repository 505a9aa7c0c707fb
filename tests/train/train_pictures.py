"""Generated pictures, so that no test needs a file or the network."""

from __future__ import annotations

import numpy as np


def picture(seed: int, height: int = 60, width: int = 80) -> np.ndarray:
    """A smooth coloured picture, uint8 [height, width, 3]."""
    rng = np.random.default_rng(seed)
    rows, columns = np.mgrid[0:height, 0:width]
    waves = [
        np.sin(rng.uniform(0.02, 0.2) * rows + rng.uniform(0.02, 0.2) * columns) for _ in range(3)
    ]
    return (127 + 120 * np.stack(waves, axis=-1)).astype(np.uint8)

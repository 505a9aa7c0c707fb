"""Generated pictures, so that no test needs a file or the network."""

from __future__ import annotations

from pathlib import Path

import numpy as np
from PIL import Image

COLOURS = {"red": (200, 40, 40), "green": (40, 200, 40), "blue": (40, 40, 200)}


def picture(seed: int, height: int = 60, width: int = 80) -> np.ndarray:
    """A smooth coloured picture, uint8 [height, width, 3]."""
    rng = np.random.default_rng(seed)
    rows, columns = np.mgrid[0:height, 0:width]
    waves = [
        np.sin(rng.uniform(0.02, 0.2) * rows + rng.uniform(0.02, 0.2) * columns) for _ in range(3)
    ]
    return (127 + 120 * np.stack(waves, axis=-1)).astype(np.uint8)


def coloured(folder: Path, each: int, first: int = 0) -> Path:
    """Noisy pictures of three colours in class folders."""
    rng = np.random.default_rng(first)
    for name, colour in COLOURS.items():
        (folder / name).mkdir(parents=True)
        for number in range(each):
            pixels = np.clip(rng.normal(colour, 30, (60, 50, 3)), 0, 255).astype(np.uint8)
            Image.fromarray(pixels).save(folder / name / f"{first + number}.png")
    return folder

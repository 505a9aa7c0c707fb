"""Where every random number of a run comes from: its seed and a place in the run, nothing else.

The order of an epoch follows from (seed, epoch), a crop from (seed, epoch, position), a mask and
what a forward pass draws itself from (seed, step, micro-batch in the global batch). So neither the
number of processes nor that of loader workers matters, and a run can be taken up anywhere.
"""

from __future__ import annotations

import numpy as np

# Streams that must not repeat one another.
ORDER, CROP, MASK, FORWARD = 1, 2, 3, 4


def generator(seed: int, stream: int, *place: int) -> np.random.Generator:
    """A NumPy generator for one place of one stream."""
    return np.random.default_rng((seed, stream, *place))


def torch_seed(seed: int, stream: int, *place: int) -> int:
    """A seed for PyTorch's generators, for one place of one stream."""
    key = np.random.SeedSequence((seed, stream, *place))
    return int(key.generate_state(1, np.uint64)[0] >> np.uint64(1))

"""Types of the compiled planner, csrc/partition."""

from collections.abc import Sequence

import numpy as np

_Array = np.ndarray

def pack_windows(counts: _Array, group_size: int) -> list[_Array]: ...
def group_partition(
    visible: _Array,
    window: Sequence[int],
    shift: Sequence[int],
    segment: _Array | None,
    num_segments: int,
    group_size: int,
    capacity: int,
) -> tuple[_Array, _Array, _Array, _Array, int]: ...
def fixed_group_size(window_area: int, num_tokens: int) -> int: ...
def group_cost(group_size: int) -> float: ...

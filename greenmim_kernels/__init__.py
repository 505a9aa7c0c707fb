"""Attention on ragged windows: the kernels of GreenMIM, usable in anybody's code."""

from .backends import available_backends, load_library, use_backend
from .functional import (
    block_diagonal_attention,
    group_gather,
    group_scatter,
    group_window_attention,
    sparse_depthwise_conv,
)
from .modules import GroupWindowAttention
from .neighbours import grid_neighbours
from .partition import GroupPartition, group_partition, pack_windows, partition_capacity
from .windows import partition_from_windows

# The kernels must be known to the dispatcher before anything is traced.
load_library("_C")
load_library("_C_cuda")

__all__ = [
    "GroupPartition",
    "GroupWindowAttention",
    "available_backends",
    "block_diagonal_attention",
    "grid_neighbours",
    "group_gather",
    "group_partition",
    "group_scatter",
    "group_window_attention",
    "pack_windows",
    "partition_capacity",
    "partition_from_windows",
    "sparse_depthwise_conv",
    "use_backend",
]

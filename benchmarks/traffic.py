"""What an operator must do at least, from shapes and the partition: bytes moved and operations.

Bytes: every input read once, every output written once, nothing in between. What an implementation
saves from the forward for the backward pass (output, log-sum-exp) does not count: another one could
do without. Operations: two products of n x n x D for a window of n tokens and a head forward, four
backward; no window with another, no padding, nothing computed twice. The convolution's are in
`convolution`.
"""

from __future__ import annotations

import dataclasses

import torch

from greenmim_kernels import GroupPartition
from greenmim_kernels.testing import Inputs

from .convolution import CONVOLUTION, moved_bytes, operations
from .measure import bytes_of
from .peers import COPIES

PASSES = ("forward", "backward", "both")


@dataclasses.dataclass(frozen=True)
class Work:
    """Bytes and operations of one pass over a batch."""

    bytes: int
    flops: int

    def __add__(self, other: Work) -> Work:
        return Work(self.bytes + other.bytes, self.flops + other.flops)


def pairs_of(part: GroupPartition, batch: int) -> int:
    """Pairs of tokens that attend to each other in a batch: the sum of n * n over windows."""
    total = 0
    for row in part.window_id.flatten(1).cpu():
        counts = torch.bincount(row[row >= 0].long())
        total += int((counts * counts).sum())
    return total * (batch // part.num_partitions)


def work_of(operator: str, inputs: Inputs, which: str) -> Work:
    """Least work of a pass: "forward", "backward" or "both".

    Args:
        inputs: those of the case, whatever the operator: qkv is [B, N, 3C].
    """
    if which == "both":
        return work_of(operator, inputs, "forward") + work_of(operator, inputs, "backward")
    forward = which == "forward"
    if operator == CONVOLUTION:
        return Work(moved_bytes(inputs, forward), operations(inputs, forward))
    part = inputs.part
    batch, tokens, width = inputs.qkv.shape
    element = inputs.qkv.element_size()
    padding = batch * (part.num_groups * part.group_size - tokens)
    index = bytes_of(part.token_index)
    if operator in COPIES:
        columns = width if operator == "group_gather" else inputs.grad_out.shape[-1]
        # Tokens are read and written; padding is never read, but written as zeros by the gather
        # and by the backward pass of the scatter.
        writes_padding = forward == (operator == "group_gather")
        moved = 2 * batch * tokens + padding * writes_padding
        return Work(moved * columns * element + index, 0)
    places = bytes_of(*part.tensors[1:])
    table = bytes_of(inputs.table)
    qkv, out = bytes_of(inputs.qkv), bytes_of(inputs.grad_out)
    moved = qkv + out + table if forward else 2 * qkv + out + 2 * table
    if operator == "group_window_attention":
        moved += index + places
    else:
        written = inputs.grad_out.shape[-1] if forward else width
        moved += places + padding * written * element
    products = 2 if forward else 4
    head_dim = inputs.grad_out.shape[-1] // inputs.num_heads
    flops = products * 2 * pairs_of(part, batch) * head_dim * inputs.num_heads
    return Work(moved, flops)

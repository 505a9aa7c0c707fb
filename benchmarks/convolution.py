"""The convolution of visible tokens and what it is compared with, as `operators` takes them.

Inputs say "qkv" of the tokens and "table" of the weights. No peer adds a bias.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Callable

import torch
import torch.nn.functional as F
from torch import Tensor

import greenmim_kernels as gk
from greenmim import ModelConfig
from greenmim.planning import Planner
from greenmim_kernels.testing import Case, Inputs, make_inputs, visible_tokens

CONVOLUTION = "sparse_depthwise_conv"
Function = Callable[[Tensor, Tensor], Tensor]


@dataclasses.dataclass
class ConvInputs(Inputs):
    """qkv [B, N, C], table [C, 9], grad_out [B, N, C]; tokens in the order of an encoder.

    Attributes:
        neighbours: int32 [P, N, 9].
        places: int64 [P, N], of the tokens in the flattened grid.
        grid: (H, W).
    """

    neighbours: Tensor = None
    places: Tensor = None
    grid: tuple[int, int] = (0, 0)

    def conv(self, x: Tensor, weight: Tensor, *_: object) -> Tensor:
        """Ours."""
        return gk.sparse_depthwise_conv(x, weight, None, self.neighbours)


def conv_inputs(case: Case, device: str) -> ConvInputs:
    """Random inputs for the tokens of a case; its windows mean nothing."""
    inputs = make_inputs(case, device=device)
    grids = visible_tokens(case).reshape(-1, *case.grid)
    units = grids[:, :: case.scale, :: case.scale].reshape(len(grids), -1)
    planner = Planner(ModelConfig(encoder="twins_svt", image_size=case.image_size))
    places = torch.from_numpy(planner.positions(units, case.scale))
    generator = torch.Generator().manual_seed(1)
    weight = torch.randn(case.channels, 9, generator=generator)
    return ConvInputs(
        qkv=inputs.qkv[..., : case.channels].contiguous(),
        table=weight.to(device, inputs.table.dtype),
        grad_out=inputs.grad_out,
        part=inputs.part,
        num_heads=inputs.num_heads,
        neighbours=planner(units).neighbours[case.stage - 1].to(device),
        places=places.to(device),
        grid=case.grid,
    )


def dense(
    operator: str, inputs: ConvInputs, channels_last: bool, compiled: bool = False
) -> Function:
    """The tokens on a map of zeros, PyTorch's convolution, the visible tokens again."""
    places, (height, width) = inputs.places, inputs.grid

    def convolution(x: Tensor, weight: Tensor) -> Tensor:
        batch, _, channels = x.shape
        index = places[..., None].expand(batch, -1, channels)
        zeros = x.new_zeros(batch, height * width, channels)
        on_map = zeros.scatter(1, index, x).view(batch, height, width, channels).permute(0, 3, 1, 2)
        if not channels_last:
            on_map = on_map.contiguous()
        kernel = weight.to(x.dtype).view(-1, 1, 3, 3)
        out = F.conv2d(on_map, kernel, padding=1, groups=channels)
        return out.permute(0, 2, 3, 1).flatten(1, 2).gather(1, index)

    if not compiled:
        return convolution
    torch.compiler.reset()
    return torch.compile(convolution, dynamic=False)


def gathered(operator: str, inputs: ConvInputs, compiled: bool = False) -> Function:
    """The nine neighbours of each token side by side, and a sum of products."""
    neighbours = inputs.neighbours.long()
    images = torch.arange(len(neighbours), device=neighbours.device)[:, None, None]
    # What is not there is a row of zeros behind the last token.
    rows = torch.where(neighbours < 0, neighbours.shape[1], neighbours)

    def convolution(x: Tensor, weight: Tensor) -> Tensor:
        padded = F.pad(x, (0, 0, 0, 1))
        around = padded[:, rows[0]] if len(rows) == 1 else padded[images, rows]
        return torch.einsum("bnkc,ck->bnc", around, weight.to(x.dtype))

    if not compiled:
        return convolution
    torch.compiler.reset()
    return torch.compile(convolution, dynamic=False)


def moved_bytes(inputs: ConvInputs, forward: bool) -> int:
    """At least, in a pass: tokens read, and written; backward, those and their gradients."""
    tokens = inputs.qkv.numel() * inputs.qkv.element_size()
    weights, index = inputs.table.numel() * 4, inputs.neighbours.numel() * 4
    return (2 * tokens + weights if forward else 3 * tokens + 2 * weights) + index


def operations(inputs: ConvInputs, forward: bool) -> int:
    """Two for each neighbour that is there; backward, for x and for the weights."""
    pairs = int((inputs.neighbours >= 0).sum()) * (len(inputs.qkv) // len(inputs.neighbours))
    return (2 if forward else 4) * pairs * inputs.qkv.shape[2]

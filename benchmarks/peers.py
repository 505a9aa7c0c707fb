"""What the operators are compared with: each peer does the same job with other people's parts.

``Peer.make(operator, inputs)`` returns a function ``(x, table) -> out`` with the arguments of the
operator, or raises `Unable` with the reason. What does not change within a step (indices, masks of
absent tokens, block masks) is prepared there and left out of the timing, for every peer alike.
"""

from __future__ import annotations

import copy
import dataclasses
import functools
import importlib
from collections.abc import Callable

import torch
import torch.nn.functional as F
from torch import Tensor

import greenmim_kernels as gk
from greenmim_kernels import GroupPartition
from greenmim_kernels.testing import Inputs

from .convolution import CONVOLUTION, dense, gathered
from .naive import NaiveGroupAttention, SpreadGroupAttention

Function = Callable[[Tensor, "Tensor | None"], Tensor]
ATTENTION = ("group_window_attention", "block_diagonal_attention")
COPIES = ("group_gather", "group_scatter")
OPERATORS = (*ATTENTION, *COPIES, CONVOLUTION)
NAIVE = ("naive", "naive-spread")
FLEX_BLOCKS = (16, 32, 64, 128)
FLEX = tuple(f"flex-{block}" for block in FLEX_BLOCKS)


class Unable(Exception):
    """A peer cannot do this job here; the message is the reason."""


@dataclasses.dataclass(frozen=True)
class Peer:
    """One way to do an operator's job.

    Attributes:
        operators: which operators it stands beside.
        make: see the module.
        backend: the backend of ours that it runs in; None for other people's.
        with_bias: whether it adds the relative position bias. One without does less than the job
            and is a lower bound.
        compiles: it waits for a compiler on every new shape, so that short selections have it only
            in the study of stages.
    """

    name: str
    about: str
    operators: tuple[str, ...]
    make: Callable[[str, Inputs], Function]
    backend: str | None = None
    with_bias: bool = True
    compiles: bool = False


@dataclasses.dataclass(frozen=True)
class WindowOrder:
    """The visible tokens in the order of their windows: slots of the groups without padding.

    order, inverse, query_row, key_row: int64 [P, N]; window: int32 [P, N].
    """

    order: Tensor
    inverse: Tensor
    window: Tensor
    query_row: Tensor
    key_row: Tensor

    @classmethod
    def of(cls, part: GroupPartition) -> WindowOrder:
        index = part.token_index.flatten(1)
        kept = index >= 0  # N in every row
        shape = (part.num_partitions, part.num_tokens)
        order = index[kept].view(shape).long()
        return cls(
            order,
            order.argsort(1),
            part.window_id.flatten(1)[kept].view(shape),
            *(row.flatten(1)[kept].view(shape).long() for row in (part.query_row, part.key_row)),
        )

    def lengths(self, batch: int) -> list[int]:
        """Tokens of every window, image by image."""
        rows = [torch.unique_consecutive(row, return_counts=True)[1].tolist()
                for row in self.window.cpu()]  # fmt: skip
        return [n for row in rows for n in row] * (batch // len(rows))


def take(x: Tensor, index: Tensor, dim: int) -> Tensor:
    """x along `dim` at index [P, K], one row for all images (P = 1) or one per image."""
    if index.shape[0] == 1:
        return x.index_select(dim, index[0])
    shape = [1] * x.dim()
    shape[0], shape[dim] = index.shape
    sizes = list(x.shape)
    sizes[dim] = index.shape[1]
    return x.gather(dim, index.view(shape).expand(sizes))


def heads_of(x: Tensor, num_heads: int) -> tuple[Tensor, Tensor, Tensor]:
    """x [B, N, 3C] -> q, k, v, views [B, heads, N, D]."""
    return x.unflatten(-1, (3, num_heads, -1)).permute(2, 0, 3, 1, 4).unbind(0)


def ours(operator: str, inputs: Inputs) -> Function:
    """Our operator, in the backend that the peer names."""
    if operator == CONVOLUTION:
        return inputs.conv
    function, part = getattr(gk, operator), inputs.part
    if operator in COPIES:
        return lambda x, table: function(x, part)
    return lambda x, table: function(x, table, part, inputs.num_heads)


def three_operators(operator: str, inputs: Inputs) -> Function:
    """Ours, but not fused: gather, attention, scatter."""
    part = inputs.part

    def attention(x: Tensor, table: Tensor) -> Tensor:
        groups = gk.group_gather(x, part)
        out = gk.block_diagonal_attention(groups, table, part, inputs.num_heads)
        return gk.group_scatter(out, part)

    return attention


def naive(
    operator: str, inputs: Inputs, kind: type[NaiveGroupAttention] = NaiveGroupAttention
) -> Function:
    """The eager path; 16-bit types run as they do in practice, under autocast."""
    try:
        attention = kind(inputs.part)
    except ValueError as error:
        raise Unable(str(error)) from None
    device, dtype = inputs.qkv.device.type, inputs.qkv.dtype
    if dtype == torch.float32:
        return lambda x, table: attention(x, table, inputs.part, inputs.num_heads)

    def under_autocast(x: Tensor, table: Tensor) -> Tensor:
        with torch.autocast(device, dtype):
            return attention(x, table, inputs.part, inputs.num_heads)

    return under_autocast


def naive_compiled(operator: str, inputs: Inputs) -> Function:
    function = naive(operator, inputs)
    torch.compiler.reset()  # every case is compiled for its own shapes, none falls back to eager
    return torch.compile(function, dynamic=False)


def padded_windows(operator: str, inputs: Inputs) -> Function:
    """Each window that holds a token padded to Mh * Mw, SDPA with a dense bias, -inf where absent.

    The gather writes [B, heads, windows, Mh * Mw, D] at once, so that one bias serves all images.
    """
    part, num_heads = inputs.part, inputs.num_heads
    height, width = part.window_size
    slots = height * width
    tokens = WindowOrder.of(part)
    # Where a token is in its window, counted in rows of the table: row * (2 width - 1) + column.
    place = -tokens.key_row
    local = place // (2 * width - 1) * width + place % (2 * width - 1)  # [P, N]
    new = torch.ones_like(tokens.window, dtype=torch.bool)
    new[:, 1:] = tokens.window[:, 1:] != tokens.window[:, :-1]
    number = new.cumsum(1) - 1  # of the window, [P, N]
    windows = int(number.max()) + 1
    position = number * slots + local
    index = torch.full((len(position), windows * slots), -1, device=position.device)
    index.scatter_(1, position, tokens.order)
    absent = (index < 0).view(-1, windows, slots)
    absent = absent & ~absent.all(-1, keepdim=True)  # an empty window must not make NaN
    gather_index = index.clamp(min=0)
    scatter_index = position.gather(1, tokens.inverse)
    offset = torch.cartesian_prod(torch.arange(height), torch.arange(width))
    offset = offset[:, None] - offset[None]
    bias_row = (offset[..., 0] + height - 1) * (2 * width - 1) + offset[..., 1] + width - 1
    bias_row = bias_row.to(position.device)
    minus = torch.zeros(absent.shape, dtype=inputs.qkv.dtype, device=position.device)
    minus = minus.masked_fill(absent, -torch.inf)[:, None, :, None]  # [P, 1, windows, 1, slots]

    def attention(x: Tensor, table: Tensor) -> Tensor:
        batch = x.shape[0]
        # [3, B, heads, N, D] -> [3, B, heads * windows, slots, D]
        q, k, v = (
            take(t, gather_index, 2).view(batch, num_heads * windows, slots, -1)
            for t in heads_of(x, num_heads)
        )
        bias = table.to(x.dtype)[bias_row].permute(2, 0, 1)[None, :, None]
        bias = (bias + minus).flatten(1, 2).expand(batch, -1, -1, -1)
        out = F.scaled_dot_product_attention(q, k, v, attn_mask=bias)
        out = out.reshape(batch, num_heads, windows * slots, -1)
        return take(out, scatter_index, 2).transpose(1, 2).flatten(2)

    return attention


def grouped_sdpa(operator: str, inputs: Inputs) -> Function:
    """SDPA over groups with the dense bias of the partition, -inf between windows."""
    part, num_heads = inputs.part, inputs.num_heads
    row = (part.query_row[..., :, None] + part.key_row[..., None, :]).long()
    same = part.window_id[..., :, None] == part.window_id[..., None, :]
    row = torch.where(same, row, 0)
    minus = torch.zeros(same.shape, dtype=inputs.qkv.dtype, device=same.device)
    minus = minus.masked_fill(~same, -torch.inf)[:, None]  # [P, 1, G, S, S]

    def attention(x: Tensor, table: Tensor) -> Tensor:
        batch, groups, slots, _ = x.shape
        q, k, v = (
            t.reshape(batch, num_heads * groups, slots, -1)
            for t in x.unflatten(-1, (3, num_heads, -1)).permute(3, 0, 4, 1, 2, 5).unbind(0)
        )
        bias = (table.to(x.dtype)[row].movedim(-1, 1) + minus).flatten(1, 2)
        bias = bias.expand(batch, -1, -1, -1)
        out = F.scaled_dot_product_attention(q, k, v, attn_mask=bias)
        return out.view(batch, num_heads, groups, slots, -1).permute(0, 2, 3, 1, 4).flatten(3)

    return attention


_flex_block = 128  # of the call that is being compiled, its backward pass too


def _tiles_that_fit(choices: type) -> None:
    """Make Inductor's tiles of a backward pass no larger than the mask's blocks.

    PyTorch 2.11 leaves out every configuration whose own tiles do not divide the blocks, even where
    kernel_options give others, and on an H100 none has tiles below 64.
    """
    real = choices.get_flex_attention_bwd_configs
    if hasattr(real, "fits"):
        return

    def fitted(*arguments, **named):
        found = real(*arguments, **named)
        for one in (found := [copy.copy(one) for one in found]):
            for name in ("block_m1", "block_n1", "block_m2", "block_n2"):
                setattr(one, name, min(getattr(one, name), _flex_block))
        return found

    fitted.fits = True
    choices.get_flex_attention_bwd_configs = fitted


def flex_options(block: int) -> dict | None:
    """Kernel options with which FlexAttention takes blocks smaller than its own tiles."""
    if block >= FLEX_BLOCKS[-1]:
        return None  # its defaults
    tiles = ("fwd_BLOCK_M", "fwd_BLOCK_N", "bwd_BLOCK_M1", "bwd_BLOCK_N1", "bwd_BLOCK_M2",
             "bwd_BLOCK_N2")  # fmt: skip
    # A warp for 16 rows, which is what a tensor core's product has.
    return {**dict.fromkeys(tiles, block), "num_warps": block // 16, "BACKEND": "TRITON"}


def flex(operator: str, inputs: Inputs, block: int) -> Function:
    """FlexAttention: the table in score_mod, windows in the block mask, tokens sorted by window."""
    from torch._inductor.choices import InductorChoices
    from torch.nn.attention.flex_attention import create_block_mask, flex_attention

    part, num_heads = inputs.part, inputs.num_heads
    if inputs.qkv.is_cuda and block > FLEX_BLOCKS[0] and block >= 2 * part.num_tokens:
        raise Unable(f"{part.num_tokens} tokens are one block of {block // 2} already")
    _tiles_that_fit(InductorChoices)
    tokens = WindowOrder.of(part)
    window, last = tokens.window, part.table_rows - 1
    query_row, key_row = tokens.query_row, tokens.key_row
    per_image = len(window) > 1

    def same_window(b: Tensor, h: Tensor, q: Tensor, k: Tensor) -> Tensor:
        image = b if per_image else 0
        return window[image, q] == window[image, k]

    count, size = (len(window) if per_image else None), part.num_tokens
    device = str(inputs.qkv.device)
    mask = create_block_mask(same_window, count, None, size, size, device=device, BLOCK_SIZE=block)
    options = flex_options(block)
    torch.compiler.reset()
    compiled = torch.compile(flex_attention, dynamic=False)

    def attention(x: Tensor, table: Tensor) -> Tensor:
        global _flex_block
        _flex_block = block

        def add_bias(score: Tensor, b: Tensor, h: Tensor, q: Tensor, k: Tensor) -> Tensor:
            image = b if per_image else 0
            row = query_row[image, q] + key_row[image, k]
            # Called for pairs of other windows too, before the mask.
            return score + table[row.clamp(0, last), h]

        q, k, v = heads_of(take(x, tokens.order, 1), num_heads)
        out = compiled(q, k, v, score_mod=add_bias, block_mask=mask, kernel_options=options)
        return take(out.transpose(1, 2).flatten(2), tokens.inverse, 1)

    return attention


def packed(inputs: Inputs, attend: Callable[[Tensor, Tensor, Tensor], Tensor]) -> Function:
    """All windows of all images in one row: attend takes and gives [B * N, heads, D]."""
    tokens = WindowOrder.of(inputs.part)

    def attention(x: Tensor, table: Tensor | None) -> Tensor:
        batch, length, _ = x.shape
        sorted_x = take(x, tokens.order, 1).view(batch * length, 3, inputs.num_heads, -1)
        out = attend(*sorted_x.unbind(1)).reshape(batch, length, -1)
        return take(out, tokens.inverse, 1)

    return attention


def varlen(operator: str, inputs: Inputs) -> Function:
    """torch.nn.attention.varlen (FlashAttention) over windows of unequal length, without bias."""
    try:
        from torch.nn.attention.varlen import varlen_attn
    except ImportError:
        raise Unable(f"torch {torch.__version__} has no torch.nn.attention.varlen") from None
    if inputs.qkv.device.type != "cuda":
        raise Unable("varlen_attn runs on CUDA only")
    if inputs.qkv.dtype not in (torch.bfloat16, torch.float16):
        raise Unable("varlen_attn takes bfloat16 and float16 only")
    lengths = WindowOrder.of(inputs.part).lengths(len(inputs.qkv))
    ends = torch.tensor([0, *lengths], device=inputs.qkv.device).cumsum(0).int()
    longest = max(lengths)
    return packed(inputs, lambda q, k, v: varlen_attn(q, k, v, ends, ends, longest, longest))


def xformers(operator: str, inputs: Inputs) -> Function:
    """xFormers, or MSLK which it became: a block-diagonal mask; it takes no bias beside it."""
    fmha = None
    for name in ("xformers.ops.fmha", "mslk.attention.fmha"):
        try:
            fmha = importlib.import_module(name)
            break
        except Exception:  # not installed, or built for another torch
            continue
    if fmha is None:
        raise Unable("neither xformers nor mslk can be imported")
    mask_class = importlib.import_module(f"{fmha.__name__}.attn_bias").BlockDiagonalMask
    mask = mask_class.from_seqlens(WindowOrder.of(inputs.part).lengths(len(inputs.qkv)))

    def attend(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
        return fmha.memory_efficient_attention(q[None], k[None], v[None], attn_bias=mask)[0]

    return packed(inputs, attend)


def indexing(operator: str, inputs: Inputs, compiled: bool = False) -> Function:
    """Gather and scatter with PyTorch's own indexing; zeros in padding."""
    part = inputs.part
    index = part.token_index.flatten(1)
    valid = (index >= 0)[..., None]  # [P, G * S, 1]
    rows = index.clamp(min=0).long()
    slots = torch.arange(index.shape[1], device=index.device).expand_as(index)
    kept = index >= 0
    slot_of = torch.empty(part.num_partitions, part.num_tokens, dtype=torch.long,
                          device=index.device)  # fmt: skip
    slot_of.scatter_(1, index[kept].view_as(slot_of).long(), slots[kept].view_as(slot_of))
    shape = (part.num_groups, part.group_size)

    def gather(x: Tensor, table: None) -> Tensor:
        return torch.where(valid, take(x, rows, 1), 0).unflatten(1, shape)

    def scatter(x: Tensor, table: None) -> Tensor:
        return take(x.flatten(1, 2), slot_of, 1)

    function = gather if operator == "group_gather" else scatter
    if not compiled:
        return function
    torch.compiler.reset()
    return torch.compile(function, dynamic=False)


WINDOW = ("group_window_attention",)
PEERS = (
    Peer("greenmim-cpp", "our C++ kernels on the CPU", OPERATORS, ours, "cpp"),
    Peer("greenmim-cuda", "our CUDA kernels", OPERATORS, ours, "cuda"),
    Peer("greenmim-triton", "our Triton kernels", OPERATORS, ours, "triton"),
    Peer("three-operators", "our gather, attention and scatter one after the other",
         WINDOW, three_operators, "auto"),
    Peer("naive", "grouped masked attention in eager PyTorch", WINDOW, naive),
    Peer("naive-spread", "the same, with masked pairs spread over the bias table, and index_select",
         WINDOW, functools.partial(naive, kind=SpreadGroupAttention)),
    Peer("naive-compiled", "naive through torch.compile", WINDOW, naive_compiled,
         compiles=True),
    Peer("padded-sdpa", "each window padded to M x M, SDPA with a dense bias",
         WINDOW, padded_windows),
    *(Peer(name, f"FlexAttention with the bias table and a mask of blocks of {block}, compiled",
           WINDOW, functools.partial(flex, block=block), compiles=True)
      for name, block in zip(FLEX, FLEX_BLOCKS, strict=True)),
    Peer("varlen", "torch's varlen_attn (FlashAttention) without bias: a lower bound",
         WINDOW, varlen, with_bias=False),
    Peer("xformers", "xFormers or MSLK, block-diagonal mask, without bias: a lower bound",
         WINDOW, xformers, with_bias=False),
    Peer("reference", "our reference in eager PyTorch, fp32 inside",
         ("block_diagonal_attention",), ours, "reference"),
    Peer("grouped-sdpa", "SDPA over groups with a dense bias",
         ("block_diagonal_attention",), grouped_sdpa),
    Peer("indexing", "PyTorch's index_select or gather", COPIES, indexing),
    Peer("indexing-compiled", "the same through torch.compile", COPIES,
         functools.partial(indexing, compiled=True), compiles=True),
    Peer("dense", "PyTorch's convolution on a map of zeros", (CONVOLUTION,),
         functools.partial(dense, channels_last=False)),
    Peer("dense-last", "the same, channels last", (CONVOLUTION,),
         functools.partial(dense, channels_last=True)),
    Peer("dense-compiled", "the same through torch.compile", (CONVOLUTION,),
         functools.partial(dense, channels_last=True, compiled=True), compiles=True),
    Peer("gather-einsum", "nine neighbours side by side, and a sum of products", (CONVOLUTION,),
         gathered),
    Peer("gather-einsum-compiled", "the same through torch.compile", (CONVOLUTION,),
         functools.partial(gathered, compiled=True), compiles=True),
)  # fmt: skip

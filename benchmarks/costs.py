"""What a training step must compute and move, part by part, and the least time that takes.

    python -m benchmarks.costs                 # rewrite benchmarks/step_costs.md
    python -m benchmarks.costs --batch 256     # print another table

Computed from shapes alone, for a step whose pointwise work is fused as torch.compile fuses it: what
stands between two matrix products or attentions is one pass that reads what it needs once and
writes what is needed later once. Residuals and norms are float32 under autocast, products and
attention in the 16-bit type, weights, gradients and moments float32. The tests compare the matrix
products and attentions with a counter of a real step's operations, to the byte.
"""

from __future__ import annotations

import argparse
import dataclasses
import pathlib
import sys
from collections.abc import Iterator

import numpy as np

from greenmim import ModelConfig
from greenmim.config import PATCH_PIXELS, model_config
from greenmim.masking import num_visible_units, random_visible
from greenmim.planning import Planner

TABLE = pathlib.Path(__file__).parent / "step_costs.md"
# Measured on an H100: a device copy, and a product of two 8192 x 8192 bfloat16 matrices.
COPY_BYTES_PER_SECOND = 3.0e12
PRODUCT_FLOPS_PER_SECOND = 798e12
UNIT_VALUES = 3 * 32 * 32
MASKS = 64  # over which the pairs of tokens that share a window are averaged


@dataclasses.dataclass(frozen=True)
class Work:
    """One kernel's work.

    Attributes:
        part: Of the step.
        kind: product, attention, pointwise or optimiser.
        flops: Two for each multiplication with addition.
        bytes: Inputs read once and outputs written once.
    """

    part: str
    kind: str
    flops: float
    bytes: float

    def seconds(self, copy: float, product: float) -> float:
        """The least time at these rates."""
        return max(self.flops / product, self.bytes / copy)


@dataclasses.dataclass(frozen=True)
class Widths:
    """Bytes of a value: activations in products, the residual stream and norms, weights there."""

    act: int = 2
    stream: int = 4
    master: int = 4


def product(
    part: str, rows: int, k: int, n: int, w: Widths, first: bool = False, bias: bool = True
) -> Iterator[Work]:
    """A linear layer [rows, k] -> [rows, n], forward and backward.

    The `first` layer of a network has no gradient of its input.
    """
    x, weight, y = rows * k * w.act, k * n * w.act, rows * n * w.act
    flops = 2 * rows * k * n
    yield Work(part, "product", flops, x + weight + bias * n * w.act + y)
    if not first:
        yield Work(part, "product", flops, y + weight + x)
    yield Work(part, "product", flops, y + x + weight)
    if bias:
        yield Work(part, "pointwise", 0, y + n * w.master)  # its gradient
    if w.act != w.master:  # the weight's cast, and its gradient's
        yield Work(part, "pointwise", 0, 2 * k * n * (w.act + w.master))


def passes(part: str, values: int, forward: tuple, backward: tuple) -> Iterator[Work]:
    """Pointwise passes over `values` values: bytes of each that is read or written."""
    for widths in (forward, backward):
        yield Work(part, "pointwise", 0, values * sum(widths))


def norm(part: str, rows: int, dim: int, w: Widths, residual: bool) -> Iterator[Work]:
    """LayerNorm, with the addition of a block's output to the residual stream before it."""
    values, stream, act = rows * dim, w.stream, w.act
    added = (act, stream) if residual else ()  # the block's output is read, the sum written
    # Backward: gradients of both outputs and the normalised value in, that of the stream out.
    gradients = (act, stream, stream, stream) + ((act,) if residual else ())
    yield from passes(part, values, (stream, act, *added), gradients)


def attention(part: str, pairs: float, qkv: int, out: int, lse: int, table: int) -> Iterator[Work]:
    """Fused attention: two products forward, five backward; `qkv`, `out`: bytes."""
    yield Work(part, "attention", 4 * pairs, qkv + out + lse + table)
    yield Work(part, "attention", 10 * pairs, 2 * qkv + 2 * out + lse + 2 * table)


def encoder_work(config: ModelConfig, batch: int, visible: int, w: Widths) -> Iterator[Work]:
    """The encoder with `visible` units of each image."""
    patches = visible * (32 // PATCH_PIXELS) ** 2
    values = 3 * PATCH_PIXELS**2
    rows = batch * patches
    yield Work("patch embedding", "pointwise", 0, rows * values * (4 + w.act))  # gather of pixels
    yield from product("patch embedding", rows, values, config.embed_dim, w, first=True)
    yield from passes("patch embedding", rows * config.embed_dim, (w.act, w.stream), (4, 4, w.act))
    pairs = mean_pairs(config, visible)
    for stage, (dim, depth) in enumerate(zip(config.stage_dims, config.depths, strict=True)):
        rows = batch * patches // 4**stage
        if stage > 0:
            part = f"merging to stage {stage + 1}"
            yield from norm(part, rows, 2 * dim, w, residual=False)
            yield from product(part, rows, 2 * dim, dim, w, bias=False)
        for block in range(depth):
            yield from block_work(config, stage, block, rows, batch * pairs[stage][block % 2], w)
    yield from norm("final norm", rows, dim, w, residual=True)


def block_work(
    config: ModelConfig, stage: int, block: int, rows: int, pairs: float, w: Widths
) -> Iterator[Work]:
    """A Swin block: `pairs` of tokens share a window, in all images and one head."""
    dim, heads = config.stage_dims[stage], config.num_heads[stage]
    _, (high, wide), _ = config.stage_windows()[stage]
    table = (2 * high - 1) * (2 * wide - 1) * heads * 4
    part = f"stage {stage + 1}, "
    yield from norm(part + "norms", rows, dim, w, residual=block > 0)
    yield from product(part + "linear layers", rows, dim, 3 * dim, w)
    act = rows * dim * w.act
    yield from attention(part + "attention", pairs * dim, 3 * act, act, rows * heads * 4, table)
    yield from product(part + "linear layers", rows, dim, dim, w)
    yield from norm(part + "norms", rows, dim, w, residual=True)
    yield from product(part + "linear layers", rows, dim, 4 * dim, w)
    gelu = passes(part + "GELU", 4 * rows * dim, (w.act, w.act), (w.act, w.act, w.act))
    yield from gelu
    yield from product(part + "linear layers", rows, 4 * dim, dim, w)


def decoder_work(config: ModelConfig, batch: int, visible: int, w: Widths) -> Iterator[Work]:
    """The decoder and the loss; the end of the last block has hidden units alone."""
    units, dim = config.num_units, config.decoder_dim
    hidden = units - visible
    part = "decoder"
    yield from product(part, batch * visible, config.stage_dims[-1], dim, w)
    yield from passes(part, batch * units * dim, (w.act, 4), (4, w.act))  # positions, mask tokens
    for number in range(config.decoder_depth):
        last = number == config.decoder_depth - 1
        rows, kept = batch * units, batch * (hidden if last else units)
        yield from norm(part, rows, dim, w, residual=number > 0)
        if last and hidden < units:
            yield from product(part, kept, dim, dim, w)
            yield from product(part, rows, dim, 2 * dim, w)
        else:
            yield from product(part, rows, dim, 3 * dim, w)
        qkv, out = (kept + 2 * rows) * dim * w.act, kept * dim * w.act
        heads = kept * config.decoder_heads * 4
        yield from attention(part, kept * units * dim, qkv, out, heads, 0)
        yield from product(part, kept, dim, dim, w)
        yield from norm(part, kept, dim, w, residual=True)
        yield from product(part, kept, dim, 4 * dim, w)
        yield from passes(part, 4 * kept * dim, (w.act, w.act), (w.act, w.act, w.act))
        yield from product(part, kept, 4 * dim, dim, w)
    kept = batch * hidden
    yield from norm(part, kept, dim, w, residual=True)
    yield from product(part, kept, dim, UNIT_VALUES, w)
    # Pixels (twice: mean and deviation, then the error) and prediction in, its gradient out.
    yield from passes("loss", kept * UNIT_VALUES, (4, 4, w.act), (4, w.act, w.act))


def optimiser_work(parameters: int) -> Iterator[Work]:
    """The norm of the gradient, AdamW and clearing: float32."""
    yield Work("optimiser", "optimiser", 0, parameters * 4 * (1 + 4 + 3 + 1))


def step_work(
    config: ModelConfig, batch: int, mask_ratio: float, parameters: int, widths: Widths
) -> list[Work]:
    """Everything of one training step."""
    visible = num_visible_units(config.num_units, mask_ratio)
    return [
        *encoder_work(config, batch, visible, widths),
        *decoder_work(config, batch, visible, widths),
        *optimiser_work(parameters),
    ]


def mean_pairs(config: ModelConfig, visible: int) -> list[list[float]]:
    """Pairs of tokens of an image that share a window, for even and odd blocks of each stage."""
    planner, rng = Planner(config), np.random.default_rng(0)
    sums = np.zeros((len(config.depths), 2))
    for _ in range(MASKS):
        units = random_visible(rng, config.num_units, 1 - (visible - 0.5) / config.num_units) \
            if visible < config.num_units else np.ones(config.num_units, dtype=bool)  # fmt: skip
        for stage, pair in enumerate(planner(units).partitions):
            for odd, part in enumerate(pair):
                ids = part.window_id.numpy()
                sums[stage, odd] += np.square(np.bincount(ids[ids >= 0])).sum()
    return (sums / MASKS).tolist()


def table(work: list[Work], title: str, copy: float, rate: float) -> str:
    """A Markdown table by part."""
    lines = [
        title,
        "| part | GFLOPs | GB | products ms | other ms | share |",
        "|---|---:|---:|---:|---:|---:|",
    ]
    total = sum(item.seconds(copy, rate) for item in work)
    for part in dict.fromkeys(item.part for item in work):
        lines.append(_row(part, [item for item in work if item.part == part], total, copy, rate))
    lines.append(_row("**all**", work, total, copy, rate))
    return "\n".join(lines) + "\n"


def _row(name: str, work: list[Work], total: float, copy: float, rate: float) -> str:
    def milliseconds(items):
        return 1e3 * sum(item.seconds(copy, rate) for item in items)

    products = milliseconds([item for item in work if item.kind == "product"])
    others = milliseconds([item for item in work if item.kind != "product"])
    share = (products + others) / (1e3 * total)
    flops, moved = sum(item.flops for item in work), sum(item.bytes for item in work)
    return (
        f"| {name} | {flops / 1e9:.1f} | {moved / 1e9:.2f} | {products:.2f} | {others:.2f} |"
        f" {share:.1%} |"
    )


def page(name: str, batch: int, mask_ratio: float) -> str:
    """The page's text for a model."""
    from greenmim import create_model

    config = model_config(name)
    model = create_model(name)
    parameters = sum(p.numel() for p in model.parameters() if p.requires_grad)
    work = step_work(config, batch, mask_ratio, parameters, Widths())
    floor = sum(item.seconds(COPY_BYTES_PER_SECOND, PRODUCT_FLOPS_PER_SECOND) for item in work)
    title = (
        "# The least a training step costs\n\n"
        "Written by `python -m benchmarks.costs` from shapes alone; see its first lines for what is"
        " counted.\n\n"
        f"{name}, batch {batch}, {mask_ratio:.0%} hidden, bfloat16 autocast, forward, backward and"
        f" optimiser. Each kernel takes the longer of its FLOPs at"
        f" {PRODUCT_FLOPS_PER_SECOND / 1e12:.0f} TFLOP/s and its bytes at"
        f" {COPY_BYTES_PER_SECOND / 1e12:.1f} TB/s, rates measured on an H100. Together"
        f" **{1e3 * floor:.1f} ms, {batch / floor:.0f} images per second**: no step of these"
        " kernels is faster there, and what a real one takes longer is launches, products below"
        " the rate of a large one, and the host.\n"
    )
    return table(work, title, COPY_BYTES_PER_SECOND, PRODUCT_FLOPS_PER_SECOND)


def main(argv: list[str] | None = None) -> int:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--model", default="greenmim_swin_base_patch4_window7_224")
    parser.add_argument("--batch", type=int, default=128)
    parser.add_argument("--mask-ratio", type=float, default=0.75)
    options = parser.parse_args(argv)
    text = page(options.model, options.batch, options.mask_ratio)
    if argv or len(sys.argv) > 1:
        print(text)
    else:
        TABLE.write_text(text)
        print(f"written to {TABLE}")
    return 0


if __name__ == "__main__":
    sys.exit(main())

"""What a training step must compute and move, part by part, and the least time that takes.

    python -m benchmarks.costs                 # rewrite benchmarks/step_costs.md
    python -m benchmarks.costs --batch 256     # print another table

Computed from shapes alone, for one way to cut the step into kernels: what stands between two matrix
products or attentions is one pass that reads what it needs once and writes what is needed later
once; gradients of biases ride along, 16-bit weights are written by the optimiser, and products
write the gradients of weights in float32. PyTorch does not do the last three yet: what that adds is
told below the table. Other cuts could take less (GELU within a product), and so does what stays in
a GPU's L2 cache from one kernel to the next.

Types are those of autocast: products and attention in 16 bits; weights, gradients and moments in
float32; the residual stream in what the layer before the stage gives, float32 in stage 1 (after a
norm) and in the decoder (after the positions), 16 bits in stages 2 to 4 (after a product).

The tests compare with a real step: every product to the byte, all attention, and the values and
types that go through norms and GELUs.
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
# Measured on an H100 while this was planned: a device copy, and a product of two 8192 x 8192
# bfloat16 matrices. `benchmarks.steps` takes the rates of its own run.
COPY_BYTES_PER_SECOND = 3.0e12
PRODUCT_FLOPS_PER_SECOND = 798e12
UNIT_VALUES = 3 * 32 * 32
ADDED = ("cast", "bias gradient")  # by PyTorch, to what a step must do
MASKS = 64  # over which the pairs of tokens that share a window are averaged


@dataclasses.dataclass(frozen=True)
class Work:
    """One kernel's work.

    Attributes:
        part: Of the step.
        kind: product, attention, pointwise or optimiser; "cast" and "bias gradient" are what
            PyTorch adds, and no part of the floor.
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
    """Bytes of a value: in products, in the residual stream, of weights, in images."""

    act: int = 2
    stream: int = 4
    master: int = 4
    image: int = 4

    def after_product(self) -> Widths:
        """Where the stream is what a product gave."""
        return dataclasses.replace(self, stream=self.act)


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
    yield Work(part, "product", flops, y + x + k * n * w.master)
    if bias:
        yield Work(part, "bias gradient", 0, y + n * w.master)
    if w.act != w.master:
        yield Work("optimiser", "optimiser", 0, k * n * w.act)
        # Instead: weights read and written, and so gradients, which were written in 16 bits.
        yield Work(part, "cast", 0, k * n * (w.master + w.act + w.act + w.act))


def passes(part: str, values: int, forward: tuple, backward: tuple) -> Iterator[Work]:
    """Pointwise passes over `values` values: bytes of each that is read or written."""
    for widths in (forward, backward):
        yield Work(part, "pointwise", 0, values * sum(widths))


def norm(
    part: str, rows: int, dim: int, w: Widths, added: bool, goes_on: bool = True
) -> Iterator[Work]:
    """LayerNorm of the residual stream.

    Args:
        added: A block's output is added to the stream before it.
        goes_on: The stream goes on beside it, and so does a gradient.
    """
    values, stream, act = rows * dim, w.stream, w.act
    # Forward: the block's output is read, the sum written, the normalised value written.
    forward = (stream, act) + (act, stream) * added
    # Backward: the gradient of the normalised value, that of the stream, the saved stream; out, the
    # gradient of the stream, which is that of the block's output as well where types are the same.
    backward = (act, stream, stream) + (stream,) * goes_on + (act,) * (added and act != stream)
    yield from passes(part, values, forward, backward)


def attention(part: str, pairs: float, qkv: int, out: int, table: int) -> Iterator[Work]:
    """Fused attention: two products forward, four backward; `qkv`, `out`: bytes.

    As in `traffic`: what is saved for the backward pass does not count.
    """
    yield Work(part, "attention", 4 * pairs, qkv + out + table)
    yield Work(part, "attention", 8 * pairs, 2 * qkv + out + 2 * table)


def encoder_work(config: ModelConfig, batch: int, visible: int, w: Widths) -> Iterator[Work]:
    """The encoder with `visible` units of each image."""
    patches = visible * (32 // PATCH_PIXELS) ** 2
    values = 3 * PATCH_PIXELS**2
    rows = batch * patches
    part = "patch embedding"
    yield Work(part, "pointwise", 0, rows * values * (w.image + w.act))  # gather of pixels
    yield from product(part, rows, values, config.embed_dim, w, first=True)
    forward, backward = (w.act, w.stream), (w.stream, w.act, w.act)
    yield from passes(part, rows * config.embed_dim, forward, backward)
    pairs = mean_pairs(config, visible)
    for stage, (dim, depth) in enumerate(zip(config.stage_dims, config.depths, strict=True)):
        rows = batch * patches // 4**stage
        if stage > 0:
            part = f"merging to stage {stage + 1}"
            yield from norm(part, rows, 2 * dim, w, added=True, goes_on=False)
            yield from product(part, rows, 2 * dim, dim, w, bias=False)
            w = w.after_product()
        for block in range(depth):
            yield from block_work(config, stage, block, rows, batch * pairs[stage][block % 2], w)
    yield from norm("final norm", rows, dim, w, added=True, goes_on=False)


def block_work(
    config: ModelConfig, stage: int, block: int, rows: int, pairs: float, w: Widths
) -> Iterator[Work]:
    """A Swin block: `pairs` of tokens share a window, in all images and one head."""
    dim, heads = config.stage_dims[stage], config.num_heads[stage]
    _, (high, wide), _ = config.stage_windows()[stage]
    table = (2 * high - 1) * (2 * wide - 1) * heads * 4
    part = f"stage {stage + 1}, "
    yield from norm(part + "norms", rows, dim, w, added=block > 0)
    yield from product(part + "linear layers", rows, dim, 3 * dim, w)
    act = rows * dim * w.act
    yield from attention(part + "attention", pairs * dim, 3 * act, act, table)
    yield from product(part + "linear layers", rows, dim, dim, w)
    yield from norm(part + "norms", rows, dim, w, added=True)
    yield from product(part + "linear layers", rows, dim, 4 * dim, w)
    yield from gelu(part + "GELU", 4 * rows * dim, w)
    yield from product(part + "linear layers", rows, 4 * dim, dim, w)


def gelu(part: str, values: int, w: Widths) -> Iterator[Work]:
    """GELU between two products."""
    yield from passes(part, values, (w.act, w.act), (w.act, w.act, w.act))


def decoder_work(config: ModelConfig, batch: int, visible: int, w: Widths) -> Iterator[Work]:
    """The decoder and the loss; the end of the last block has hidden units alone."""
    units, dim = config.num_units, config.decoder_dim
    hidden = units - visible
    part = "decoder"
    yield from product(part, batch * visible, config.stage_dims[-1], dim, w)
    # Positions and mask tokens.
    yield from passes(part, batch * units * dim, (w.act, w.stream), (w.stream, w.act))
    for number in range(config.decoder_depth):
        last = number == config.decoder_depth - 1
        rows, kept = batch * units, batch * (hidden if last else units)
        yield from norm(part, rows, dim, w, added=number > 0)
        if last and hidden < units:
            yield from product(part, kept, dim, dim, w)
            yield from product(part, rows, dim, 2 * dim, w)
        else:
            yield from product(part, rows, dim, 3 * dim, w)
        qkv, out = (kept + 2 * rows) * dim * w.act, kept * dim * w.act
        yield from attention(part, kept * units * dim, qkv, out, 0)
        yield from product(part, kept, dim, dim, w)
        yield from norm(part, kept, dim, w, added=True)
        yield from product(part, kept, dim, 4 * dim, w)
        yield from gelu(part, 4 * kept * dim, w)
        yield from product(part, kept, 4 * dim, dim, w)
    kept = batch * hidden
    yield from norm(part, kept, dim, w, added=config.decoder_depth > 0, goes_on=False)
    yield from product(part, kept, dim, UNIT_VALUES, w)
    # Pixels and prediction in, in each pass, and the prediction's gradient out.
    yield from passes("loss", kept * UNIT_VALUES, (w.image, w.act), (w.image, w.act, w.act))


def optimiser_work(parameters: int) -> Iterator[Work]:
    """The norm of the gradient; AdamW, which reads four values and writes three: float32."""
    yield Work("optimiser", "optimiser", 0, parameters * 4 * (1 + 4 + 3))


def step_work(
    config: ModelConfig, batch: int, mask_ratio: float, parameters: int, widths: Widths
) -> list[Work]:
    """Everything of one training step, and what PyTorch adds to it (see `Work.kind`)."""
    visible = num_visible_units(config.num_units, mask_ratio)
    return [
        *encoder_work(config, batch, visible, widths),
        *decoder_work(config, batch, visible, widths),
        *optimiser_work(parameters),
    ]


def covers(config: ModelConfig) -> bool:
    """Whether the costs are of such a model: a Swin, or a SwinV2 without its bias' network."""
    return config.encoder in ("swin", "swinv2")


def floor_seconds(work: list[Work], copy: float, rate: float) -> float:
    """The least time at these rates."""
    return sum(item.seconds(copy, rate) for item in work if item.kind not in ADDED)


def mean_pairs(config: ModelConfig, visible: int) -> list[list[float]]:
    """Pairs of tokens of an image that share a window, for even and odd blocks of each stage."""
    planner, rng = Planner(config), np.random.default_rng(0)
    sums = np.zeros((len(config.depths), 2))
    for _ in range(MASKS):
        # Half a unit more, so that rounding down gives as many as wanted.
        ratio = 1 - min(1, (visible + 0.5) / config.num_units)
        units = random_visible(rng, config.num_units, ratio)
        for stage, pair in enumerate(planner(units).partitions):
            for odd, part in enumerate(pair):
                ids = part.window_id.numpy()
                sums[stage, odd] += np.square(np.bincount(ids[ids >= 0])).sum()
    return (sums / MASKS).tolist()


def table(work: list[Work], title: str, copy: float, rate: float) -> str:
    """A Markdown table by part, without what PyTorch adds."""
    work = [item for item in work if item.kind not in ADDED]
    lines = [
        title,
        "| part | GFLOPs | GB | products ms | other ms | share |",
        "|---|---:|---:|---:|---:|---:|",
    ]
    total = floor_seconds(work, copy, rate)
    # The optimiser comes last, whatever layers have to say of it.
    for part in sorted(dict.fromkeys(item.part for item in work), key="optimiser".__eq__):
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
    rates = COPY_BYTES_PER_SECOND, PRODUCT_FLOPS_PER_SECOND
    floor = floor_seconds(work, *rates)
    casts, biases = (
        1e3 * sum(item.seconds(*rates) for item in work if item.kind == kind) for kind in ADDED
    )
    title = (
        "# The least a training step costs\n\n"
        "Written by `python -m benchmarks.costs` from shapes alone; its first lines say how the"
        " step is cut into kernels, and what is not counted.\n\n"
        f"{name}, batch {batch}, {mask_ratio:.0%} hidden, bfloat16 autocast, forward, backward and"
        f" optimiser. Each kernel takes the longer of its FLOPs at"
        f" {PRODUCT_FLOPS_PER_SECOND / 1e12:.0f} TFLOP/s and its bytes at"
        f" {COPY_BYTES_PER_SECOND / 1e12:.1f} TB/s, rates measured on an H100. Together"
        f" **{1e3 * floor:.1f} ms, {batch / floor:.0f} images per second**. PyTorch today adds"
        f" {casts:.1f} ms of casts (weights before the products, their gradients after) and"
        f" {biases:.1f} ms for gradients of biases in passes of their own; what a real step takes"
        " beyond that is launches, products below the rate of a large one, and the host.\n"
    )
    return table(work, title, *rates)


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

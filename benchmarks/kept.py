"""What a step keeps for its backward pass, counted without a GPU.

    python -m benchmarks.kept                  # rewrite benchmarks/kept_memory.md
    python -m benchmarks.kept --batch 256      # print another table

The forward pass runs on the CPU with the types of bfloat16 autocast on CUDA, and every tensor that
autograd saves is counted once, weights left out. The compiled passes are split by torch.compile's
own partitioner, with the decompositions of its compiler, and run as they are. Not counted: what a
kernel or a pass needs while it runs, the fragments of an allocator, gradients.
"""

from __future__ import annotations

import argparse
import contextlib
import dataclasses
import pathlib
import sys
from collections.abc import Callable, Iterator
from unittest import mock

import numpy as np
import torch
from torch import Tensor, nn
from torch.nn import functional as F

import greenmim_kernels as gk
from greenmim import GreenMIM, ModelConfig
from greenmim.config import model_config
from greenmim.masking import random_visible
from greenmim.training.passes import recompute_pointwise

from .step_variants import Dense, Naive

TABLE = pathlib.Path(__file__).parent / "kept_memory.md"
# Splits into forward and backward as Inductor does; what comes out runs operator by operator.
PARTITIONER = "aot_eager_decomp_partition"
STATE_BYTES = 12  # of each weight: itself and two moments in float32


@dataclasses.dataclass(frozen=True)
class Kept:
    """Of a kind of step.

    Attributes:
        per_image, fixed: Bytes that grow with the batch, and that do not.
        state: Bytes of weights and moments.
    """

    name: str
    per_image: int
    fixed: int
    state: int

    def total(self, batch: int) -> int:
        """Bytes when the forward pass is done."""
        return self.per_image * batch + self.fixed + self.state


@contextlib.contextmanager
def autocast_as_on(device: str, precision: torch.dtype) -> Iterator[None]:
    """Autocast on the CPU with the types that autocast has on a device.

    On CUDA norms give float32, and what is added to their input is float32 from then on.
    """
    original = F.layer_norm

    def layer_norm(x: Tensor, *arguments: object, **options: object) -> Tensor:
        with torch.autocast("cpu", enabled=False):
            return original(x.float(), *arguments, **options)

    enabled = precision != torch.float32
    as_it_is = contextlib.nullcontext()
    norms = mock.patch.object(F, "layer_norm", layer_norm) if device == "cuda" else as_it_is
    with norms, torch.autocast("cpu", torch.bfloat16, enabled=enabled):
        yield


@contextlib.contextmanager
def counting_kept(model: nn.Module) -> Iterator[dict[int, int]]:
    """Counts what is kept for the backward pass meanwhile, weights left out: bytes by address."""
    weights = {p.untyped_storage().data_ptr() for p in model.parameters()}
    kept: dict[int, int] = {}
    held = []  # the tensors, so that no address comes twice

    def pack(tensor: Tensor) -> Tensor:
        address = tensor.untyped_storage().data_ptr()
        if address not in weights and address not in kept:
            held.append(tensor)
            kept[address] = tensor.untyped_storage().nbytes()
        return tensor

    with torch.autograd.graph.saved_tensors_hooks(pack, lambda tensor: tensor):
        yield kept


def kept_by_all(config: ModelConfig, mask_ratio: float) -> Iterator[Kept]:
    """Of the naive step, SimMIM's, and ours: eager, compiled, compiled with recomputation."""
    torch.manual_seed(0)
    model = GreenMIM(config).train()
    visible = random_visible(np.random.default_rng(0), config.num_units, mask_ratio)
    mask, plan = torch.from_numpy(visible), model.plan(visible)
    naive, dense = Naive(model, plan_within=False), Dense(config)
    naive_plan, size = naive.prepare(mask), config.image_hw
    yield _kept("naive", naive, size, lambda images: naive(images, naive_plan, True).loss)
    yield _kept("simmim", dense, size, lambda images: dense(images, mask, True).loss)
    with gk.use_backend("cpp"):

        def eager(images: Tensor) -> Tensor:
            return model(images, plan=plan, loss_only=True).loss

        yield _kept("ours", model, size, eager)
        for name, again in (("compiled", False), ("compiled, pointwise recomputed", True)):
            recompute_pointwise(again)
            torch._dynamo.reset()
            whole = torch.compile(model, fullgraph=True, dynamic=False, backend=PARTITIONER)

            def loss(images: Tensor, whole: nn.Module = whole) -> Tensor:
                return whole(images, plan=plan, loss_only=True).loss

            yield _kept(f"ours, {name}", model, size, loss)
    recompute_pointwise(False)


def _kept(
    name: str, model: nn.Module, size: tuple[int, int], loss: Callable[[Tensor], Tensor]
) -> Kept:
    totals = []
    for count in (1, 2):
        images = torch.zeros(count, 3, *size)
        with autocast_as_on("cuda", torch.bfloat16), counting_kept(model) as kept:
            loss(images)
        totals.append(sum(kept.values()))
    one, two = totals
    weights = sum(p.numel() for p in model.parameters())
    return Kept(name, two - one, 2 * one - two, STATE_BYTES * weights)


def page(name: str, batch: int, mask_ratio: float) -> str:
    """The page's text for a model."""
    rows = list(kept_by_all(model_config(name), mask_ratio))
    naive, dense = (next(row for row in rows if row.name == of) for of in ("naive", "simmim"))
    lines = [
        "# What a step keeps for its backward pass\n",
        "Written by `python -m benchmarks.kept`, counted on a CPU; see its first lines for what is"
        " counted and what is not.\n",
        f"{name}, {mask_ratio:.0%} hidden, bfloat16 autocast, torch {torch.__version__}."
        f" *Together*: for a batch of {batch}, with weights and AdamW's moments.\n",
        "| step | MB per image | MB besides | together GiB | of naive | of SimMIM |",
        "|---|---:|---:|---:|---:|---:|",
    ]
    for row in rows:
        total = row.total(batch)
        lines.append(
            f"| {row.name} | {row.per_image / 1e6:.1f} | {row.fixed / 1e6:.0f} |"
            f" {total / 2**30:.2f} | {total / naive.total(batch):.0%} |"
            f" {total / dense.total(batch):.0%} |"
        )
    gradients = 4 * rows[-1].state // STATE_BYTES / 2**30
    lines.append(
        "\nWhen the backward pass begins there are no gradients yet, and they grow as what is kept"
        " is given back. Only a CUDA graph of several processes or micro-batches has memory of its"
        f" own for them: {gradients:.2f} GiB more. *Together* is no peak, which has what one kernel"
        " needs, images and an allocator's fragments, too; `benchmarks.steps` measures that on a"
        " GPU."
    )
    return "\n".join(lines) + "\n"


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

"""What a run would cost, found by running its model once on two images on the CPU."""

from __future__ import annotations

import contextlib
import dataclasses
from collections.abc import Iterator
from unittest import mock

import numpy as np
import torch
from torch import Tensor, nn
from torch.nn import functional as F
from torch.utils.flop_counter import FlopCounterMode

from greenmim.data.loader import draw_visible
from greenmim.mim import GreenMIM
from greenmim.planning import Plan
from greenmim.recipe import Recipe

# Float32 weights and gradients and AdamW's two moments.
_BYTES_PER_WEIGHT = 16


@dataclasses.dataclass(frozen=True)
class Cost:
    """The cost of a recipe's step.

    Attributes:
        parameters: Weights of the model.
        forward_flops: Of one image, two for each multiplication with addition.
        dense_flops: The same with everything visible.
        state_bytes: Weights, gradients and moments in one process.
        activation_bytes: What a micro-batch of one process keeps for its backward pass.
    """

    parameters: int
    forward_flops: int
    dense_flops: int
    state_bytes: int
    activation_bytes: int


def estimate(recipe: Recipe, precision: torch.dtype, device: str, processes: int) -> Cost:
    """The cost of a recipe's step, as if it were not compiled: that keeps less.

    Args:
        recipe: The run.
        precision: What it computes in.
        device: Where it runs: cpu or cuda.
        processes: How many share the model with FSDP.
    """
    model = GreenMIM(recipe.model).train()
    rng, grid = np.random.default_rng(0), model.config.unit_grid
    plan = model.plan(draw_visible(rng, grid, recipe.mask, None))
    everything = model.plan(np.ones(model.config.num_units, dtype=bool))
    parameters = sum(p.numel() for p in model.parameters())
    with autocast_as_on(device, precision):
        one, two = (kept_bytes(model, plan, images) for images in (1, 2))
    per_image, fixed = two.total - one.total, 2 * one.total - two.total
    if recipe.activation_checkpointing:
        # Every block keeps its input alone, and one block at a time has all it needs.
        per_image -= (two.blocks - one.blocks) - (two.inputs - one.inputs)
        per_image += two.largest - one.largest
    shards = processes if recipe.strategy == "fsdp" else 1
    return Cost(
        parameters=parameters,
        forward_flops=forward_flops(model, plan, loss_only=True),
        dense_flops=forward_flops(model, everything),
        state_bytes=_BYTES_PER_WEIGHT * parameters // shards,
        activation_bytes=fixed + per_image * recipe.data.batch_size,
    )


def forward_flops(model: GreenMIM, plan: Plan, loss_only: bool = False) -> int:
    """Of one image, two for each multiplication with addition; attention counts real pairs only.

    With `loss_only` those of training, without the prediction of visible units.
    """
    operators = {
        getattr(torch.ops.greenmim, f"group_window_attention{variant}"): _window_attention_flops
        for variant in ("", "_triton")
    }
    operators[torch.ops.aten._scaled_dot_product_flash_attention_for_cpu] = _attention_flops
    image = torch.zeros(1, 3, *model.config.image_hw)
    with torch.no_grad(), FlopCounterMode(display=False, custom_mapping=operators) as counter:
        model(image, plan=plan, loss_only=loss_only)
    return counter.get_total_flops()


def _attention_flops(query: Tensor, key: Tensor, *_: object, out_val: object = None, **__) -> int:
    batch, heads, length, dim = query.shape
    return 4 * batch * heads * length * key.shape[2] * dim


def _window_attention_flops(
    qkv: Tensor,
    k: None,
    v: None,
    table: Tensor | None,
    pad_value: None,
    token_index: Tensor,
    window_id: Tensor,
    *_: object,
    **__: object,
) -> int:
    pairs = 0
    for row in window_id:
        pairs += int(torch.bincount(row[row >= 0]).square().sum())
    return 4 * pairs * (qkv.shape[2] // 3) * (len(qkv) // len(window_id))


_attention_flops._get_raw = _window_attention_flops._get_raw = True


@dataclasses.dataclass
class Kept:
    """Bytes kept for the backward pass: all, in blocks, by the largest block, and their inputs."""

    total: int = 0
    blocks: int = 0
    largest: int = 0
    inputs: int = 0


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
def counting_kept(model: nn.Module) -> Iterator[Kept]:
    """Counts what is kept for the backward pass meanwhile, weights left out; each tensor once."""
    kept, weights = Kept(), {p.untyped_storage().data_ptr() for p in model.parameters()}
    seen: dict[int, Tensor] = {}  # holds the tensors, so that no address comes twice

    def pack(tensor: Tensor) -> Tensor:
        address = tensor.untyped_storage().data_ptr()
        if address not in weights and address not in seen:
            seen[address] = tensor
            kept.total += tensor.untyped_storage().nbytes()
        return tensor

    with torch.autograd.graph.saved_tensors_hooks(pack, lambda tensor: tensor):
        yield kept


def kept_bytes(model: GreenMIM, plan: Plan, images: int) -> Kept:
    """What the forward pass of so many images keeps for the backward pass, weights left out."""
    batch = torch.zeros(images, 3, *model.config.image_hw)
    with counting_kept(model) as kept, _by_block(model, kept):
        model(batch, plan=plan, loss_only=True)
    return kept


@contextlib.contextmanager
def _by_block(model: GreenMIM, kept: Kept) -> Iterator[None]:
    before = 0

    def enter(block: nn.Module, arguments: tuple) -> None:
        nonlocal before
        before = kept.total
        kept.inputs += arguments[0].nbytes

    def leave(block: nn.Module, arguments: tuple, output: Tensor) -> None:
        own = kept.total - before
        kept.blocks += own
        kept.largest = max(kept.largest, own)

    handles = []
    for block in [*model.encoder.blocks(), *model.decoder_blocks]:
        handles += [block.register_forward_pre_hook(enter), block.register_forward_hook(leave)]
    try:
        yield
    finally:
        for handle in handles:
            handle.remove()

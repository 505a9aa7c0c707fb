"""The table of a step's costs agrees with a count of a real step's operations."""

from __future__ import annotations

import collections

import numpy as np
import pytest
import torch
from torch import nn
from torch.utils._python_dispatch import TorchDispatchMode

from benchmarks import costs
from benchmarks.kept import autocast_as_on
from greenmim import GreenMIM, ModelConfig, create_model
from greenmim.masking import random_visible

SIZES = ModelConfig(
    image_size=(96, 128), window_size=3, embed_dim=16, depths=(1, 2, 2, 1), num_heads=(1, 2, 4, 8),
    decoder_dim=32, decoder_heads=2, decoder_depth=2,
)  # fmt: skip
BATCH, RATIO = 2, 0.75
WIDTHS = costs.Widths(act=4, stream=4, master=4)
PRODUCTS = {"addmm", "mm"}
ATTENTIONS = {
    "group_window_attention", "group_window_attention_backward",
    "_scaled_dot_product_flash_attention_for_cpu",
    "_scaled_dot_product_flash_attention_for_cpu_backward",
}  # fmt: skip


class Counter(TorchDispatchMode):
    """Counts products, attentions and the bytes of everything that computes."""

    def __init__(self) -> None:
        super().__init__()
        self.products: collections.Counter = collections.Counter()
        self.attention_bytes = self.bytes = 0

    def __torch_dispatch__(self, operator, types, arguments=(), options=None):
        out = operator(*arguments, **(options or {}))
        outs = out if isinstance(out, (tuple, list)) else (out,)
        tensors = [t for t in (*arguments, *outs) if isinstance(t, torch.Tensor)]
        moved = sum(t.numel() * t.element_size() for t in tensors)
        name = operator.name().split("::")[1].split(".")[0]
        if not operator.is_view:
            self.bytes += moved
        if name in PRODUCTS:
            left, right = arguments[-2:]
            flops = 2 * left.shape[0] * left.shape[1] * right.shape[1]
            self.products[flops, moved] += 1
        elif name in ATTENTIONS:
            # What is saved for the backward pass, output and logarithms, need not be: it is not
            # in the table. Indices are shared by all images.
            values = [t for t in arguments if getattr(t, "is_floating_point", bool)()]
            is_backward = name.endswith("backward")
            counted = [*values[:-2], *outs] if is_backward else [*values, outs[0]]
            self.attention_bytes += sum(t.numel() * t.element_size() for t in counted)
        return out


def step_inputs():
    torch.manual_seed(0)
    model = GreenMIM(SIZES)
    plan = model.plan(random_visible(np.random.default_rng(0), SIZES.num_units, RATIO))
    return model, plan, torch.randn(BATCH, 3, *SIZES.image_hw)


@pytest.fixture(scope="module")
def counted():
    model, plan, images = step_inputs()
    with Counter() as counter:
        model(images, plan=plan, loss_only=True).loss.backward()
    return counter


def work_of_a_step():
    return [w for w in costs.step_work(SIZES, BATCH, RATIO, 0, WIDTHS) if w.kind != "optimiser"]


def test_products_are_those_of_a_real_step(counted):
    """Each of them: FLOPs and bytes."""
    expected = collections.Counter(
        (int(w.flops), int(w.bytes)) for w in work_of_a_step() if w.kind == "product"
    )
    assert counted.products == expected


def test_attention_moves_what_a_real_step_moves(counted):
    work = [w for w in work_of_a_step() if w.kind == "attention"]
    assert counted.attention_bytes == sum(w.bytes for w in work)


def test_norms_and_gelus_are_those_of_a_real_step(monkeypatch):
    """Values, and the type that autocast gives the residual stream where it is normalised."""
    expected: collections.Counter = collections.Counter()

    def norm(part, rows, dim, w, **options):
        expected["LayerNorm", rows * dim, w.stream] += 1
        return real_norm(part, rows, dim, w, **options)

    def gelu(part, values, w):
        expected["GELU", values, w.act] += 1
        return real_gelu(part, values, w)

    real_norm, real_gelu = costs.norm, costs.gelu
    monkeypatch.setattr(costs, "norm", norm)
    monkeypatch.setattr(costs, "gelu", gelu)
    costs.step_work(SIZES, BATCH, RATIO, 0, costs.Widths())

    found: collections.Counter = collections.Counter()
    model, plan, images = step_inputs()

    def note(module, arguments):
        x = arguments[0]
        found[type(module).__name__, x.numel(), x.element_size()] += 1

    for name, module in model.named_modules():
        if isinstance(module, (nn.LayerNorm, nn.GELU)) and name != "encoder.patch_embed.norm":
            module.register_forward_pre_hook(note)
    with autocast_as_on("cuda", torch.bfloat16):
        model(images, plan=plan, loss_only=True)
    assert found == expected


def test_the_fused_step_moves_less_than_the_eager_one(counted):
    total = sum(w.bytes for w in work_of_a_step())
    assert 0.3 * counted.bytes < total < 0.9 * counted.bytes


def test_pairs_of_a_full_image():
    pairs = costs.mean_pairs(ModelConfig(), visible=49)
    assert pairs[0][0] == 3136 * 49 and pairs[3] == [49 * 49] * 2
    assert pairs[0][1] == sum(a * a for a in [4, *[7] * 7, 3]) ** 2
    # At the last stage a token is a unit and the grid one window; 3 of 4 hidden elsewhere.
    few = costs.mean_pairs(ModelConfig(), visible=12)
    assert few[3] == [144, 144] and 768 < few[0][0] < 768 * 49


def test_the_page_is_what_the_shapes_say():
    text = costs.page("greenmim_swin_base_patch4_window7_224", 128, 0.75)
    assert costs.TABLE.read_text() == text


def test_what_pytorch_adds_is_no_part_of_the_floor():
    work = costs.step_work(SIZES, BATCH, RATIO, 0, costs.Widths())
    added = [w for w in work if w.kind in costs.ADDED]
    assert {w.kind for w in added} == set(costs.ADDED)
    without = [w for w in work if w not in added]
    assert costs.floor_seconds(work, 1e12, 1e14) == costs.floor_seconds(without, 1e12, 1e14)


def test_parameters_that_are_trained_are_counted():
    model = create_model("greenmim_swin_base_patch4_window7_224")
    assert sum(p.numel() for p in model.parameters() if p.requires_grad) == 91_997_880

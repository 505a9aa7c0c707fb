"""The steps that are compared: problems, variants, and each variant's step ready to be called."""

from __future__ import annotations

import dataclasses
import functools
from collections.abc import Callable
from typing import NamedTuple

import numpy as np
import torch
from torch import Tensor, nn

import greenmim_kernels as gk
from greenmim import GreenMIM, ModelConfig
from greenmim.masking import random_visible
from greenmim.training.distributed import Processes
from greenmim.training.onednn import use_onednn
from greenmim.training.parallel import recompute_pointwise
from greenmim.training.passes import GraphedPasses, Passes
from greenmim.training.world import World

from .naive_model import NaiveGreenMIM
from .simmim_model import SimMIM

BATCHES = 4  # of images and masks, used in turn
DTYPES = {"fp32": torch.float32, "bf16": torch.bfloat16, "fp16": torch.float16}
CHUNK = 16  # images
LARGE = {"embed_dim": 192, "num_heads": (6, 12, 24, 48)}


@dataclasses.dataclass(frozen=True)
class Problem:
    """A model, a batch and a precision."""

    name: str
    config: ModelConfig
    batch: int
    precision: str
    mask_ratio: float = 0.75


CPU_PROBLEMS = [Problem("base-224", ModelConfig(), 4, "fp32")]
CUDA_PROBLEMS = [
    Problem("base-224", ModelConfig(), 128, "bf16"),
    Problem("base-512", ModelConfig(image_size=512), 32, "bf16"),
    Problem("base-window14", ModelConfig(window_size=14), 128, "bf16"),
    Problem("base-224-batch256", ModelConfig(), 256, "bf16"),
    Problem("large-window14", ModelConfig(window_size=14, **LARGE), 128, "bf16"),
    Problem("base-224-fp16", ModelConfig(), 128, "fp16"),
    Problem("base-224-fp32", ModelConfig(), 64, "fp32"),
]


class Output(NamedTuple):
    """What the passes look for in what a model gives."""

    loss: Tensor


class Naive(nn.Module):
    """The naive step under the interface of the passes; plans within it, or ahead of it."""

    def __init__(self, model: GreenMIM, plan_within: bool) -> None:
        super().__init__()
        self.naive, self.plan_within = NaiveGreenMIM(model), plan_within

    def prepare(self, visible: Tensor) -> object:
        return visible if self.plan_within else self.naive.plan(visible)

    def forward(self, images: Tensor, plan: object, loss_only: bool) -> Output:
        plan = self.naive.plan(plan) if self.plan_within else plan
        return Output(loss=self.naive(images, plan))


class Dense(nn.Module):
    """SimMIM under the interface of the passes."""

    def __init__(self, model: GreenMIM) -> None:
        super().__init__()
        self.dense = SimMIM(model.config)

    def forward(self, images: Tensor, plan: Tensor, loss_only: bool) -> Output:
        return Output(loss=self.dense(images, plan))


@dataclasses.dataclass(frozen=True)
class Variant:
    """A way to run a step.

    Attributes:
        backend: of the kernels; None where there are none.
        kind: ours, naive, naive-planning or dense.
        recompute: pointwise work in the backward pass (see `greenmim.training.parallel`).
        keeps_memory: on a CPU, as the trainer does (see `greenmim_kernels.host_memory`).
    """

    name: str
    kind: str = "ours"
    backend: str | None = None
    compiled: bool = False
    graphed: bool = False
    recompute: bool = False
    keeps_memory: bool = False


def variants(device: str) -> list[Variant]:
    """All that make sense on a device, most valuable first."""
    backends = ["cuda", "triton"]
    found = [Variant("naive", "naive"), Variant("naive, planning in the step", "naive-planning")]
    first = backends[0]
    if device == "cpu":
        found.append(Variant("naive, memory kept", "naive", keeps_memory=True))
        found.append(Variant("cpp", "ours", "cpp", keeps_memory=True))
        found.append(Variant("cpp-compiled", "ours", "cpp", compiled=True, keeps_memory=True))
        return [*found, Variant("simmim", "dense")]
    found.append(Variant(f"{first}-graphed", "ours", first, compiled=True, graphed=True))
    found.append(Variant("simmim", "dense"))
    less = f"{first}-graphed, pointwise recomputed"
    found.append(Variant(less, "ours", first, compiled=True, graphed=True, recompute=True))
    found.append(Variant(first, "ours", first))
    found.append(Variant(f"{first}-compiled", "ours", first, compiled=True))
    for other in backends[1:]:
        found.append(Variant(f"{other}-graphed", "ours", other, compiled=True, graphed=True))
        found.append(Variant(other, "ours", other))
    found += [
        Variant("simmim-compiled", "dense", compiled=True),
        Variant("reference", "ours", "reference"),
    ]
    return found


REFERENCE = Variant("reference", "ours", "reference")


class Step:
    """A variant's training step, ready to be called; each call is one."""

    def __init__(self, problem: Problem, variant: Variant, device: str) -> None:
        self.problem, self.variant, self.device = problem, variant, device
        torch.manual_seed(0)
        model = GreenMIM(problem.config).to(device)
        if variant.kind.startswith("naive"):
            forward = Naive(model, variant.kind == "naive-planning")
        else:
            forward = model if variant.kind == "ours" else Dense(model).to(device)
        if device == "cpu" and variant.backend == "cpp":  # as the trainer does
            use_onednn(model)
        self.model, self.inputs = model, self._inputs(forward)
        trained = [p for p in forward.parameters() if p.requires_grad]
        self.parameters = sum(p.numel() for p in trained)
        self.optimizer = torch.optim.AdamW(trained, lr=1e-4, weight_decay=0.05, fused=True)
        self.scaler = torch.amp.GradScaler(device, enabled=problem.precision == "fp16")
        dtype = DTYPES[problem.precision]
        autocast = functools.partial(torch.autocast, device, dtype, enabled=dtype != torch.float32)
        make: Callable = Passes
        if variant.graphed:
            make = functools.partial(GraphedPasses, Processes(World(), torch.device(device)))
        recompute_pointwise(variant.recompute)
        called = torch.compile(forward, fullgraph=True) if variant.compiled else forward
        self.passes = make(called, trained, autocast, self.scaler, 1)
        self.count = 0

    def _inputs(self, forward: nn.Module) -> list[tuple[Tensor, object]]:
        problem, rng = self.problem, np.random.default_rng(0)
        generator = torch.Generator().manual_seed(0)
        found = []
        for _ in range(BATCHES):
            shape = (problem.batch, 3, *problem.config.image_hw)
            images = torch.randn(shape, generator=generator).to(self.device)
            visible = random_visible(rng, problem.config.num_units, problem.mask_ratio)
            mask = torch.from_numpy(visible).to(self.device)
            if isinstance(forward, GreenMIM):
                plan = forward.plan(visible).to(self.device)
            else:
                plan = forward.prepare(mask) if isinstance(forward, Naive) else mask
            found.append((images, plan))
        return found

    def loss(self) -> Tensor:
        """Gradients of the next batch, and its loss."""
        images, plan = self.inputs[self.count % BATCHES]
        self.count += 1
        with gk.use_backend(self.variant.backend or "auto"):
            return self.passes.run(images, plan, 0)

    def __call__(self) -> None:
        self.loss()
        self.scaler.unscale_(self.optimizer)
        self.scaler.step(self.optimizer)
        self.scaler.update()
        self.passes.clear(self.optimizer)

    def errors(self, expected: tuple[float, Tensor]) -> tuple[float, float] | None:
        """Of the first batch's loss and of a gradient, relative; None for SimMIM.

        The gradient is that of the first block's qkv: all that comes after it went into it.

        Args:
            expected: what `reference` gives for the problem.
        """
        loss = self.loss().item()
        if self.variant.kind == "dense":
            gradient = None
        else:
            gradient = checked_weight(self.model).grad.clone() / self.scaler.get_scale()
        self.passes.clear(self.optimizer)
        if gradient is None:
            return None if np.isfinite(loss) else (float("inf"), 0.0)
        exact, exact_gradient = expected[0], expected[1].to(gradient.device)
        off = (gradient - exact_gradient).norm() / exact_gradient.norm()
        return abs(loss - exact) / abs(exact), off.item()


def checked_weight(model: GreenMIM) -> Tensor:
    return model.encoder.layers[0].blocks[0].attn.qkv.weight


def reference(problem: Problem, device: str) -> tuple[float, Tensor]:
    """Loss and gradient of the first batch by the reference in float32, a few images at a time.

    Returns:
        The loss, and the gradient of `checked_weight` on the CPU.
    """
    step = Step(dataclasses.replace(problem, precision="fp32"), REFERENCE, device)
    images, plan = step.inputs[0]
    total = 0.0
    for part in images.split(CHUNK):
        with gk.use_backend("reference"):
            loss = step.model(part, plan=plan, loss_only=True).loss * len(part) / len(images)
        loss.backward()
        total += loss.item()
    return total, checked_weight(step.model).grad.cpu()

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
from greenmim.config import model_config
from greenmim.launch import World
from greenmim.masking import random_visible
from greenmim.processes import Processes
from greenmim.training.passes import GraphedPasses, Passes, recompute_pointwise, reconstruction_loss
from greenmim_kernels.onednn import use_onednn

from .naive_model import NaiveGreenMIM, NaiveGreenMIMTwins, NaiveGreenMIMv2
from .simmim_model import SimMIM

BATCHES = 4  # of images and masks, used in turn
CHECKED = 1  # the batch that is compared: not the one that a graph was recorded with
DTYPES = {"fp32": torch.float32, "bf16": torch.bfloat16, "fp16": torch.float16}
CHUNK = 16  # images
LARGE = {"embed_dim": 192, "num_heads": (6, 12, 24, 48)}
NAIVE = {"swin": NaiveGreenMIM, "swinv2": NaiveGreenMIMv2, "twins_svt": NaiveGreenMIMTwins}


@dataclasses.dataclass(frozen=True)
class Problem:
    """A model, a batch and a precision."""

    name: str
    config: ModelConfig
    batch: int
    precision: str
    mask_ratio: float = 0.75


BASE_V2 = model_config("greenmim_swinv2_base_patch4_window8_256")
TWINS = model_config("greenmim_twins_svt_large_patch4_224")
CPU_PROBLEMS = [
    Problem("base-224", ModelConfig(), 4, "fp32"),
    Problem("swinv2-base-256", BASE_V2, 4, "fp32"),
    Problem("twins-large-224", TWINS, 4, "fp32"),
]
CUDA_PROBLEMS = [
    Problem("base-224", ModelConfig(), 128, "bf16"),
    Problem("base-512", ModelConfig(image_size=512), 32, "bf16"),
    Problem("base-window14", ModelConfig(window_size=14), 128, "bf16"),
    Problem("base-224-batch256", ModelConfig(), 256, "bf16"),
    Problem("large-window14", ModelConfig(window_size=14, **LARGE), 128, "bf16"),
    Problem("base-224-fp16", ModelConfig(), 128, "fp16"),
    Problem("base-224-fp32", ModelConfig(), 64, "fp32"),
    Problem("swinv2-base-256", BASE_V2, 128, "bf16"),
    Problem("twins-large-224", TWINS, 128, "bf16"),
]


class Expected(NamedTuple):
    """Loss and gradients of the checked batch, by the reference in float32, on the CPU."""

    loss: float
    gradients: dict[str, Tensor]


class Errors(NamedTuple):
    """How far a step is from what is expected, relative.

    Attributes:
        loss: Of the loss.
        gradient: Of all gradients, as one vector.
        positions: Of those that have to do with positions alone, as one vector: they are too small
            to show in the other.
    """

    loss: float
    gradient: float
    positions: float


class Output(NamedTuple):
    """What the passes look for in what a model gives."""

    loss: Tensor


class Naive(nn.Module):
    """The naive step under the interface of the passes; plans within it, or ahead of it."""

    def __init__(self, model: GreenMIM, plan_within: bool, spread: bool = False) -> None:
        super().__init__()
        self.naive = NAIVE[model.config.encoder](model, spread)
        self.plan_within = plan_within

    def prepare(self, visible: Tensor) -> object:
        return visible if self.plan_within else self.naive.plan(visible)

    def forward(self, images: Tensor, plan: object, loss_only: bool) -> Output:
        plan = self.naive.plan(plan) if self.plan_within else plan
        return Output(loss=self.naive(images, plan))


class Dense(nn.Module):
    """SimMIM under the interface of the passes."""

    def __init__(self, config: ModelConfig) -> None:
        super().__init__()
        self.dense = SimMIM(config)

    def forward(self, images: Tensor, plan: Tensor, loss_only: bool) -> Output:
        return Output(loss=self.dense(images, plan))


@dataclasses.dataclass(frozen=True)
class Variant:
    """A way to run a step.

    Attributes:
        backend: of the kernels; None where there are none.
        kind: ours, naive, naive-planning, naive-spread or dense.
        recompute: pointwise work in the backward pass (see `greenmim.training.passes`).
        keeps_memory: on a CPU, as the trainer does (see `greenmim_kernels.host_memory`).
        onednn: on a CPU, for linear layers, as the trainer does.
    """

    name: str
    kind: str = "ours"
    backend: str | None = None
    compiled: bool = False
    graphed: bool = False
    recompute: bool = False
    keeps_memory: bool = False
    onednn: bool = False


def variants(device: str) -> list[Variant]:
    """All that make sense on a device, most valuable first.

    The naive path is not compiled on a CPU: its shapes change with the mask, and each of them takes
    minutes to compile.
    """
    naive = Variant("naive", "naive")
    if device == "cpu":
        as_trainer = {"keeps_memory": True, "onednn": True}
        return [
            naive,
            Variant("naive, memory kept", "naive", keeps_memory=True),
            Variant("naive, memory kept, oneDNN", "naive", **as_trainer),
            Variant("cpp", "ours", "cpp", **as_trainer),
            Variant("cpp-compiled", "ours", "cpp", compiled=True, **as_trainer),
            Variant("simmim", "dense"),
        ]
    backends = ["cuda", "triton"]
    first = backends[0]
    less = f"{first}-graphed, pointwise recomputed"
    found = [
        naive,
        Variant("naive, planning in the step", "naive-planning"),
        Variant("naive, rows spread", "naive-spread"),
        Variant(f"{first}-graphed", "ours", first, compiled=True, graphed=True),
        Variant("simmim", "dense"),
        Variant(less, "ours", first, compiled=True, graphed=True, recompute=True),
        Variant(first, "ours", first),
        Variant(f"{first}-graphed, not compiled", "ours", first, graphed=True),
        Variant(f"{first}-compiled", "ours", first, compiled=True),
    ]
    for other in backends[1:]:
        found.append(Variant(f"{other}-graphed", "ours", other, compiled=True, graphed=True))
        found.append(Variant(other, "ours", other))
    found += [
        Variant("simmim-compiled", "dense", compiled=True),
        Variant("reference", "ours", "reference"),
        Variant("naive-compiled", "naive", compiled=True),
    ]
    return found


class Step:
    """A variant's training step, ready to be called; each call is one."""

    def __init__(self, problem: Problem, variant: Variant, device: str) -> None:
        self.problem, self.variant, self.device = problem, variant, device
        torch.manual_seed(0)
        if variant.kind == "dense":
            forward = self.model = Dense(problem.config).to(device)
        else:
            self.model = GreenMIM(problem.config).to(device)
            kinds = (variant.kind == kind for kind in ("naive-planning", "naive-spread"))
            forward = self.model if variant.kind == "ours" else Naive(self.model, *kinds)
        with torch.no_grad():
            for name, parameter in self.model.named_parameters():
                # SwinV2's norms begin as zeros, and no gradient comes through them.
                if name.endswith(("norm1.weight", "norm2.weight")):
                    parameter.fill_(1.0)
        if variant.onednn and problem.precision == "fp32":
            use_onednn(self.model, self.model.encoder.one_node_block)
        self.inputs = self._inputs(forward)
        self.trained = {n: p for n, p in self.model.named_parameters() if p.requires_grad}
        self.parameters = sum(p.numel() for p in self.trained.values())
        trained = list(self.trained.values())
        self.optimizer = torch.optim.AdamW(trained, lr=1e-4, weight_decay=0.05, fused=True)
        enabled = problem.precision == "fp16"
        # As far down as a run's scale is after its first updates.
        self.scaler = torch.amp.GradScaler(device, init_scale=2.0**10, enabled=enabled)
        dtype = DTYPES[problem.precision]
        autocast = functools.partial(torch.autocast, device, dtype, enabled=dtype != torch.float32)
        make: Callable = Passes
        if variant.graphed:
            make = functools.partial(GraphedPasses, Processes(World(), torch.device(device)))
        recompute_pointwise(variant.recompute)
        called = torch.compile(forward, fullgraph=True) if variant.compiled else forward
        self.passes = make(reconstruction_loss, called, trained, autocast, self.scaler, 1)
        self.count = 0
        self._make_moments()

    def _make_moments(self) -> None:
        """AdamW's, before anything is recorded: the peak of memory is to have them."""
        group, state = self.optimizer.param_groups[0], self.optimizer.state
        rate, group["lr"] = group["lr"], 0.0
        for parameter in self.trained.values():
            if parameter.grad is None:
                parameter.grad = torch.zeros_like(parameter)
        self.optimizer.step()
        for parameter in self.trained.values():
            state[parameter]["step"].zero_()
        group["lr"] = rate
        self.passes.zero_grad(self.optimizer)

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
            return self.passes.forward_backward((images, plan), 0)

    def __call__(self) -> None:
        self.loss()
        self.passes.clip(self.optimizer, float("inf"))  # the norm, which a run logs
        self.scaler.step(self.optimizer)
        self.scaler.update()
        self.passes.zero_grad(self.optimizer)

    def errors(self, expected: Expected) -> Errors:
        """Of the checked batch, after those before it. For a step that was not called yet."""
        for _ in range(CHECKED):
            self.loss()
            self.passes.zero_grad(self.optimizer)
        loss = self.loss().item()
        scale = self.scaler.get_scale()
        found = {name: p.grad.cpu() / scale for name, p in self.trained.items()}
        self.passes.zero_grad(self.optimizer)
        positions = [name for name in found if _of_positions(name)]
        return Errors(
            abs(loss - expected.loss) / abs(expected.loss),
            _distance(found, expected.gradients, list(found)),
            _distance(found, expected.gradients, positions),
        )


def _of_positions(name: str) -> bool:
    """Whether a parameter has to do with positions alone: Swin's tables, SwinV2's network, or the
    convolutions of Twins."""
    others = ".cpb_mlp." in name or ".pos_block." in name
    return name.endswith("relative_position_bias_table") or others


def _distance(found: dict[str, Tensor], expected: dict[str, Tensor], names: list[str]) -> float:
    off = sum((found[n] - expected[n]).double().square().sum() for n in names)
    size = sum(expected[n].double().square().sum() for n in names)
    return (off / size).sqrt().item()


def reference(problem: Problem, dense: bool, device: str) -> Expected:
    """What is expected of a problem's steps, a few images at a time.

    Args:
        dense: of SimMIM, which is its own reference, in float32 and eager.
    """
    kind = Variant("reference", "dense") if dense else Variant("reference", "ours", "reference")
    step = Step(dataclasses.replace(problem, precision="fp32"), kind, device)
    images, plan = step.inputs[CHECKED]
    total = 0.0
    for part in images.split(CHUNK):
        with gk.use_backend("reference"):
            loss = step.model(part, plan=plan, loss_only=True).loss * len(part) / len(images)
        loss.backward()
        total += loss.item()
    return Expected(total, {name: p.grad.cpu() for name, p in step.trained.items()})

"""Training steps side by side: images per second, memory, energy.

    python -m benchmarks.steps                       # what this machine can run
    python -m benchmarks.steps --problem base-224 --variant naive cuda-graphed --no-save

A step is the forward pass, the backward pass and fused AdamW, on images that are on the device,
with another mask in every step. All variants of a problem train the same weights; the loss and the
first block's gradient of each are compared with the reference's in float32 before it is timed, and
what is off is not timed.
"""

from __future__ import annotations

import argparse
import dataclasses
import functools
import gc
import json
import pathlib
import sys
import time
from collections.abc import Callable
from typing import NamedTuple

import numpy as np
import torch
from torch import Tensor, nn

import greenmim_kernels as gk
from greenmim import GreenMIM, ModelConfig
from greenmim.distributed import Processes
from greenmim.masking import random_visible
from greenmim.onednn import use_onednn
from greenmim.passes import GraphedPasses, Passes
from greenmim.world import World

from .costs import Widths, step_work
from .environment import describe, folder_of, write_json
from .measure import Energy, Rates, Sampler, Timing, measure_rates, no_garbage_collection
from .naive_model import NaiveGreenMIM
from .simmim_model import SimMIM

BATCHES = 4  # of images and masks, used in turn
DTYPES = {"fp32": torch.float32, "bf16": torch.bfloat16, "fp16": torch.float16}
# How far a loss, and the gradient of the first block, may be from the reference's in float32,
# relative. What is wrong in the network changes its gradient, even where the loss of fresh weights
# hardly depends on it.
TOLERANCE = {"fp32": (1e-5, 1e-3), "bf16": (1e-2, 0.1), "fp16": (2e-3, 0.02)}
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
    """

    name: str
    kind: str = "ours"
    backend: str | None = None
    compiled: bool = False
    graphed: bool = False


def variants(device: str) -> list[Variant]:
    """All that make sense on a device, most valuable first."""
    backends = ["cuda", "triton"]
    found = [Variant("naive", "naive"), Variant("naive, planning in the step", "naive-planning")]
    first = backends[0]
    if device == "cpu":
        found += [Variant("cpp", "ours", "cpp"), Variant("cpp-compiled", "ours", "cpp", True)]
        return [*found, Variant("simmim", "dense")]
    found.append(Variant(f"{first}-graphed", "ours", first, compiled=True, graphed=True))
    found += [Variant("simmim", "dense"), Variant(first, "ours", first)]
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

    def errors(self) -> tuple[float, float] | None:
        """Of the first batch's loss and of a gradient, relative to the reference; None for SimMIM.

        The gradient is that of the first block's qkv: all that comes after it went into it.
        """
        loss = self.loss().item()
        if self.variant.kind == "dense":
            gradient = None
        else:
            gradient = checked_weight(self.model).grad.clone() / self.scaler.get_scale()
        self.passes.clear(self.optimizer)
        if gradient is None:
            return None if np.isfinite(loss) else (float("inf"), 0.0)
        exact, exact_gradient = reference(self.problem, self.device)
        off = (gradient - exact_gradient).norm() / exact_gradient.norm()
        return abs(loss - exact) / abs(exact), off.item()


def checked_weight(model: GreenMIM) -> Tensor:
    return model.encoder.layers[0].blocks[0].attn.qkv.weight


@functools.lru_cache(1)
def reference(problem: Problem, device: str) -> tuple[float, Tensor]:
    """Loss and gradient of the first batch by the reference in float32, a few images at a time."""
    step = Step(dataclasses.replace(problem, precision="fp32"), REFERENCE, device)
    images, plan = step.inputs[0]
    total = 0.0
    for part in images.split(CHUNK):
        with gk.use_backend("reference"):
            loss = step.model(part, plan=plan, loss_only=True).loss * len(part) / len(images)
        loss.backward()
        total += loss.item()
    return total, checked_weight(step.model).grad.clone()


def measured_rows(
    problem: Problem, chosen: list[Variant], device: str, rounds: int, rates: Rates, save: Callable
) -> None:
    """Measure variants of a problem; `save` is called with each row as it is done."""
    on_gpu = device == "cuda"
    ready: list[tuple[dict, Step]] = []
    for variant in chosen:
        row = {"model": problem.name, "batch": problem.batch, "precision": problem.precision,
               "variant": variant.name, "checked": False}  # fmt: skip
        try:
            if on_gpu:
                torch.cuda.empty_cache()
                torch.cuda.reset_peak_memory_stats()
            start = time.perf_counter()
            step = Step(problem, variant, device)
            errors = step.errors()
            row["first_seconds"] = time.perf_counter() - start
            row["loss_error"], row["gradient_error"] = errors or (None, None)
            allowed = TOLERANCE[problem.precision]
            if errors and not all(e <= a for e, a in zip(errors, allowed, strict=True)):
                row["reason"] = (
                    f"wrong, not timed: its loss is off by {errors[0]:.1e} of the reference's, its"
                    f" gradient by {errors[1]:.1e}"
                )
                save(row)
                continue
            row["checked"] = True
            if not on_gpu:
                ready.append((row, step))
                continue
            row |= _on_gpu(step, problem, rounds, rates)
            del step
        except (RuntimeError, ValueError) as error:  # out of memory, or a backend that cannot
            row["reason"] = str(error).strip().splitlines()[0]
        save(row)
        gc.collect()
    if ready:
        for row in _in_turn(ready, problem, rounds, rates):
            save(row)


def _on_gpu(step: Step, problem: Problem, rounds: int, rates: Rates) -> dict:
    sample = Sampler(step, "cuda")
    with no_garbage_collection():
        for _ in range(3):
            sample()
        torch.cuda.reset_peak_memory_stats()
        timing = Timing.of([sample() for _ in range(rounds)])
        peak = torch.cuda.max_memory_allocated()
        count = max(rounds, int(2.0 / timing.median))  # two seconds, for the energy counter
        with Energy("cuda") as energy:
            for _ in range(count):
                step()
    joules = None if energy.joules is None else energy.joules / (count * problem.batch)
    return {
        **_figures(timing, step, problem, rates),
        "peak_memory_bytes": peak,
        "joules_per_image": joules,
        "joules_from": energy.source,
    }


def _in_turn(
    ready: list[tuple[dict, Step]], problem: Problem, rounds: int, rates: Rates
) -> list[dict]:
    """On a CPU other work comes and goes: the variants take turns, and share what it costs."""
    samples: list[list[float]] = [[] for _ in ready]
    samplers = [Sampler(step, "cpu") for _, step in ready]
    with no_garbage_collection():
        for number in range(rounds + 2):
            for sampler, taken in zip(samplers, samples, strict=True):
                seconds = sampler()
                if number >= 2:
                    taken.append(seconds)
    rows = []
    for (row, step), taken in zip(ready, samples, strict=True):
        figures = _figures(Timing.of(taken), step, problem, rates)
        rows.append({**row, **figures, "peak_memory_bytes": None, "joules_per_image": None})
    return rows


def _figures(timing: Timing, step: Step, problem: Problem, rates: Rates) -> dict:
    act = DTYPES[problem.precision].itemsize
    figures = {
        "seconds": timing.median,
        "images_per_second": problem.batch / timing.median,
        "p20": problem.batch / timing.p80,
        "p80": problem.batch / timing.p20,
        "rounds": timing.n,
        "floor_ms": None,
    }
    if step.variant.kind != "dense":
        work = step_work(
            problem.config, problem.batch, problem.mask_ratio, step.parameters, Widths(act=act)
        )
        product = rates.matrix_flops_per_second[str(DTYPES[problem.precision]).split(".")[1]]
        floor = sum(item.seconds(rates.copy_bytes_per_second, product) for item in work)
        figures |= {"floor_ms": 1e3 * floor, "of_floor": floor / timing.median}
    return figures


def rows_to_keep(file: pathlib.Path, environment: dict, measured: set[str]) -> list[dict]:
    """Rows of other problems that the same code gave in the same place."""
    if not file.exists():
        return []
    earlier = json.loads(file.read_text())
    if earlier["environment"] != environment:
        return []
    return [row for row in earlier["rows"] if row["model"] not in measured]


def main(argv: list[str] | None = None) -> int:
    device = "cuda" if torch.cuda.is_available() else "cpu"
    problems = CUDA_PROBLEMS if device == "cuda" else CPU_PROBLEMS
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--problem", nargs="+", choices=[p.name for p in problems])
    parser.add_argument("--variant", nargs="+", choices=[v.name for v in variants(device)])
    parser.add_argument("--others", action="store_true", help="all problems but the first")
    parser.add_argument("--rounds", type=int, default=20 if device == "cuda" else 7)
    parser.add_argument("--threads", type=int, default=torch.get_num_threads(), help="of a CPU")
    parser.add_argument("--minutes", type=float, default=1e9, help="start no problem after these")
    parser.add_argument("--no-save", action="store_true", help="print only")
    options = parser.parse_args(argv)
    torch.set_num_threads(options.threads)
    start = time.monotonic()
    chosen = [v for v in variants(device) if not options.variant or v.name in options.variant]
    problems = problems[1:] if options.others else problems
    problems = [p for p in problems if not options.problem or p.name in options.problem]
    rates = measure_rates(device, sorted({DTYPES[p.precision] for p in problems}, key=str))
    result = {
        "environment": describe(options.threads, device),
        "rates": dataclasses.asdict(rates),
        "rows": [],
    }
    file = folder_of(result["environment"]["device"]) / "steps.json"
    result["rows"] = rows_to_keep(file, result["environment"], {p.name for p in problems})

    def save(row: dict) -> None:
        result["rows"].append(row)
        speed = row.get("images_per_second")
        said = row.get("reason") if speed is None else (
            f"{speed:9.1f} images/s   {1e3 * row['seconds']:9.1f} ms"
            + (f"   floor {row['floor_ms']:.1f} ms" if row["floor_ms"] else "")
        )  # fmt: skip
        print(f"{row['model']:<20}{row['precision']:<6}{row['variant']:<30}{said}", flush=True)
        if not options.no_save:
            write_json(file, result)

    for problem in problems:
        if time.monotonic() - start < 60 * options.minutes:
            measured_rows(problem, chosen, device, options.rounds, rates, save)
    return 0


if __name__ == "__main__":
    sys.exit(main())

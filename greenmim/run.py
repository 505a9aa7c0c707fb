"""A run, checked and built: what can be wrong with the input is found before anything is written.

A run is one process in this version; `world` and the sampler already speak of ranks.
"""

from __future__ import annotations

import contextlib
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch.utils.data import DataLoader

import greenmim
from greenmim.data import Collate, EpochSampler, ImageFolder, make_loader
from greenmim.guards import FiniteGuard
from greenmim.images import find_images
from greenmim.masking import num_visible_units
from greenmim.mim import GreenMIM
from greenmim.planning import Planner
from greenmim.recipe import Recipe, UserError, scaled_rates
from greenmim.run_folder import RUN_FORMAT, RunFolder, first_line, read_run_checkpoint
from greenmim.world import World
from greenmim_kernels import use_backend

PRECISIONS = {"fp32": torch.float32, "bf16": torch.bfloat16, "fp16": torch.float16}


@dataclass
class Run:
    """Everything a run needs, checked and built; nothing is written yet."""

    recipe: Recipe
    folder: RunFolder
    device: torch.device
    precision: torch.dtype
    model: GreenMIM
    optimizer: torch.optim.Optimizer
    scaler: torch.amp.GradScaler
    guard: FiniteGuard
    dataset: ImageFolder
    sampler: EpochSampler
    loader: DataLoader
    first_step: int
    notes: list[str]

    @property
    def steps_per_epoch(self) -> int:
        return self.sampler.updates_per_epoch

    @property
    def total_steps(self) -> int:
        return self.recipe.epochs * self.steps_per_epoch


def prepare(recipe: Recipe, resume: str | None = None) -> Run:
    """Check the recipe against this machine and build the run; writes nothing.

    Raises:
        UserError: any bad input.
    """
    with user_errors():
        world = World.from_environment()
        names = find_images(recipe.data.root)
    if world.size > 1:
        raise UserError(
            f"WORLD_SIZE is {world.size}, but a run is one process in this version; start it"
            " without torchrun and raise --optim.accumulate for a larger batch."
        )
    device, precision = _choose_device(recipe)
    with user_errors(), chosen_backend(recipe):
        pass
    if recipe.threads:
        torch.set_num_threads(recipe.threads)

    folder = RunFolder(recipe.work_dir)
    folder.check_usable()
    checkpoint = _find_checkpoint(folder, resume)
    state = read_run_checkpoint(checkpoint) if checkpoint else None

    torch.manual_seed(recipe.seed)
    with user_errors():
        num_visible_units(recipe.model.num_units, recipe.mask.ratio)
        model = GreenMIM(recipe.model)
        planner = Planner(recipe.model)
        sampler = _sampler(recipe, len(names), world, first_update=0)
    notes = [
        f"{sampler.positions} images per epoch = {sampler.updates_per_epoch} updates of"
        f" {sampler.images_per_update}, {sampler.left_out} left out, others each epoch",
        scaled_rates(recipe, sampler.images_per_update)[2],
    ]
    precision_name = str(precision).removeprefix("torch.")
    notes.insert(
        0,
        f"{sum(p.numel() for p in model.parameters()) / 1e6:.2f} M parameters on {device}"
        f" in {precision_name}; the run is in {folder.path}",
    )
    if state is not None:
        _check_same_model(state, recipe, checkpoint)
        model.load_state_dict(state["model"])
    model.to(device)
    optimizer = make_optimizer(model, recipe)
    scaler = torch.amp.GradScaler(device.type, enabled=precision == torch.float16)
    guard = FiniteGuard(device, recipe.max_skipped)
    first_step = 0
    if state is not None:
        first_step = _restore(state, optimizer, scaler, guard, sampler, notes, recipe)
        notes.append(f"resumed after update {first_step} from {checkpoint}")
    elif resume is not None:
        notes.append(f"no checkpoint in {folder.path} yet: the run starts from the beginning")

    dataset = ImageFolder(names, recipe.data, recipe.model.image_hw, recipe.seed)
    dataset.check_readable()
    sampler = _sampler(recipe, len(names), world, first_update=first_step)
    collate = Collate(planner, recipe.mask, recipe.model.num_units, recipe.seed, world.rank)
    loader = make_loader(dataset, sampler, collate, recipe.data.workers, device.type == "cuda")
    return Run(
        recipe,
        folder,
        device,
        precision,
        model,
        optimizer,
        scaler,
        guard,
        dataset,
        sampler,
        loader,
        first_step,
        notes,
    )


def chosen_backend(recipe: Recipe) -> contextlib.AbstractContextManager[None]:
    """The recipe's kernels; "auto" leaves the choice to the variable GREENMIM_BACKEND."""
    return contextlib.nullcontext() if recipe.backend == "auto" else use_backend(recipe.backend)


def make_optimizer(model: GreenMIM, recipe: Recipe) -> torch.optim.AdamW:
    """AdamW, no decay of biases, norms, position tables and tokens; fused: it can skip updates."""
    without = model.no_weight_decay()
    trained = [(name, p) for name, p in model.named_parameters() if p.requires_grad]
    decayed = [p for name, p in trained if name not in without]
    kept = [p for name, p in trained if name in without]
    optim = recipe.optim
    groups = [
        {"params": decayed, "weight_decay": optim.weight_decay},
        {"params": kept, "weight_decay": 0.0},
    ]
    return torch.optim.AdamW(groups, lr=0.0, betas=optim.betas, eps=optim.eps, fused=True)


@contextlib.contextmanager
def user_errors() -> Iterator[None]:
    """Errors that our own checks of the input raise, as one line for the user."""
    try:
        yield
    except (ValueError, OSError, RuntimeError) as error:
        raise UserError(first_line(error)) from error


def _sampler(recipe: Recipe, num_images: int, world: World, first_update: int) -> EpochSampler:
    return EpochSampler(
        num_images,
        recipe.data.batch_size,
        repeats=recipe.data.repeats,
        epochs=recipe.epochs,
        accumulate=recipe.optim.accumulate,
        seed=recipe.seed,
        rank=world.rank,
        world_size=world.size,
        first_update=first_update,
    )


def _choose_device(recipe: Recipe) -> tuple[torch.device, torch.dtype]:
    name = recipe.device
    if name == "auto":
        name = "cuda" if torch.cuda.is_available() else "cpu"
    if name == "cuda" and not torch.cuda.is_available():
        raise UserError(
            "--device cuda: PyTorch sees no CUDA GPU here; `greenmim doctor` says more."
        )
    precision = recipe.precision
    if precision == "auto":
        precision = "bf16" if name == "cuda" else "fp32"
    if precision == "fp16" and name == "cpu":
        raise UserError("--precision fp16 needs CUDA; on the CPU take fp32 or bf16.")
    return torch.device(name), PRECISIONS[precision]


def _find_checkpoint(folder: RunFolder, resume: str | None) -> Path | None:
    if resume is None:
        if folder.holds_run():
            raise UserError(
                f"--work-dir {folder.path} already holds a run; add --resume to go on with it, or"
                " choose another folder."
            )
        return None
    if resume == "auto":
        return folder.newest_checkpoint()
    path = Path(resume)
    if folder.holds_run() and path.resolve().parent != folder.checkpoints.resolve():
        raise UserError(
            f"--work-dir {folder.path} holds a run that {path} is not part of; choose another"
            " folder."
        )
    return path


def _check_same_model(state: dict[str, Any], recipe: Recipe, path: Path) -> None:
    there, here = state["recipe"]["model"], recipe.to_dict()["model"]
    for name in here:
        if there.get(name) != here[name]:
            raise UserError(
                f"The checkpoint {path} is of another model: {name} is {there.get(name)} there and"
                f" {here[name]} in this recipe."
            )


def _restore(
    state: dict[str, Any],
    optimizer: torch.optim.Optimizer,
    scaler: torch.amp.GradScaler,
    guard: FiniteGuard,
    sampler: EpochSampler,
    notes: list[str],
    recipe: Recipe,
) -> int:
    """Bring back the state of a checkpoint; returns the number of updates done."""
    options = [
        {k: v for k, v in group.items() if k != "params"} for group in optimizer.param_groups
    ]
    optimizer.load_state_dict(state["optimizer"])
    for group, chosen in zip(optimizer.param_groups, options, strict=True):
        group.update(chosen)  # the recipe of today, not the one of the checkpoint
    if scaler.is_enabled() and state["scaler"]:
        scaler.load_state_dict(state["scaler"])
    guard.restore(state["skipped"])
    torch.set_rng_state(state["rng"]["cpu"])
    if torch.cuda.is_available() and state["rng"]["cuda"] is not None:
        torch.cuda.set_rng_state(state["rng"]["cuda"])

    before, now = state["recipe"], recipe.to_dict()
    ignored = ("work_dir", "log", "checkpoint")
    changed = [name for name in now if name not in ignored and before.get(name) != now[name]]
    if changed:
        notes.append(f"changed since the checkpoint: {', '.join(changed)}")
    step, per_epoch = state["step"], state["steps_per_epoch"]
    if per_epoch != sampler.updates_per_epoch:
        step = step * sampler.updates_per_epoch // per_epoch
        notes.append(
            f"an epoch has {sampler.updates_per_epoch} updates now, {per_epoch} in the checkpoint;"
            " the run goes on at the same place of the schedule, epoch"
            f" {step / sampler.updates_per_epoch:.2f}"
        )
    return step


def run_state(run: Run, step: int) -> dict[str, Any]:
    """What a checkpoint holds after `step` updates."""
    on_gpu = run.device.type == "cuda"
    return {
        "format": RUN_FORMAT,
        "version": 1,
        "step": step,
        "epoch": step / run.steps_per_epoch,
        "steps_per_epoch": run.steps_per_epoch,
        "model": run.model.state_dict(),
        "optimizer": run.optimizer.state_dict(),
        "scaler": run.scaler.state_dict(),
        "skipped": run.guard.total(),
        "rng": {
            "cpu": torch.get_rng_state(),
            "cuda": torch.cuda.get_rng_state(run.device) if on_gpu else None,
        },
        "recipe": run.recipe.to_dict(),
        "greenmim": greenmim.__version__,
    }

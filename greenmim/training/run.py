"""A run, checked and built: what is wrong with the input is found before anything is written."""

from __future__ import annotations

import contextlib
import socket
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import nn
from torch.utils.data import DataLoader

import greenmim
from greenmim.data.augment import Finish, finishes_in_loader
from greenmim.data.dataset import AugmentedImages
from greenmim.data.loader import Collate, check_shared_memory, make_loader
from greenmim.data.sampler import EpochSampler
from greenmim.data.sources import Source, find_source
from greenmim.encoders.swin import VisibleBlock
from greenmim.masking import num_visible_units
from greenmim.messages import first_line
from greenmim.mim import GreenMIM
from greenmim.planning import Planner
from greenmim.recipe import CheckpointConfig, Recipe, UserError
from greenmim.training.distributed import Processes
from greenmim.training.parallel import distribute, whole_weights
from greenmim.training.passes import GraphedPasses, Passes
from greenmim.training.resume import (
    changes,
    check_same_model,
    find_checkpoint,
    place_of,
    restore_moments,
)
from greenmim.training.run_folder import (
    RUN_FORMAT,
    RUN_VERSION,
    RunFolder,
    read_run_checkpoint,
)
from greenmim.training.schedule import scaled_rates
from greenmim.training.trackers import check_trackers
from greenmim.training.world import World
from greenmim_kernels import use_backend
from greenmim_kernels.host_memory import keep_freed_memory
from greenmim_kernels.onednn import use_onednn

PRECISIONS = {"fp32": torch.float32, "bf16": torch.bfloat16, "fp16": torch.float16}
# Weights and two moments in float32.
_CHECKPOINT_BYTES_PER_WEIGHT = 12


@dataclass
class Run:
    """Everything a run needs, checked and built; nothing is written yet.

    Attributes:
        forward: What to call in place of `model`: compiled, or spread over the processes.
        first_step: Updates done, in the schedule's count.
        shift: Updates ever done, less `first_step`: not 0 after a change of the updates per epoch.
        kept: Updates done at the folder's own checkpoint that the run goes on from; 0 without one.
        skipped: Updates skipped before `first_step`.
        notes: What the user should know, one line each.
    """

    recipe: Recipe
    processes: Processes
    folder: RunFolder
    device: torch.device
    precision: torch.dtype
    model: GreenMIM
    forward: nn.Module
    optimizer: torch.optim.Optimizer
    scaler: torch.amp.GradScaler
    dataset: AugmentedImages
    sampler: EpochSampler
    loader: DataLoader
    first_step: int
    shift: int
    kept: int
    skipped: int
    notes: list[str]

    @property
    def steps_per_epoch(self) -> int:
        return self.sampler.updates_per_epoch

    @property
    def total_steps(self) -> int:
        return self.recipe.epochs * self.steps_per_epoch

    def passes(self) -> Passes:
        """The forward and backward passes of an update."""
        trained = [p for p in self.model.parameters() if p.requires_grad]
        arguments = (self.forward, trained, self.autocast, self.scaler)
        if self.recipe.cuda_graph:
            return GraphedPasses(self.processes, *arguments, self.recipe.optim.accumulate)
        return Passes(*arguments, self.recipe.optim.accumulate)

    def autocast(self) -> torch.autocast:
        """The recipe's precision for a forward pass."""
        enabled = self.precision != torch.float32
        return torch.autocast(self.device.type, self.precision, enabled=enabled)


def prepare(recipe: Recipe, resume: str | None, processes: Processes) -> Run:
    """Check the recipe against this machine and build the run; writes nothing. A collective.

    Args:
        recipe: The run.
        resume: As for `train.pretrain`.
        processes: The processes of the run; it says the device, too.

    Raises:
        UserError: any bad input.
    """
    world, device = processes.world, processes.device
    with processes.agreed():
        precision = precision_of(recipe, device)
        check_trackers(recipe)
        with user_errors(), chosen_backend(recipe):
            num_visible_units(recipe.model.num_units, recipe.mask.ratio)
    if recipe.threads:
        torch.set_num_threads(recipe.threads)

    source = processes.from_main(lambda: source_of(recipe))
    folder = RunFolder(recipe.work_dir)
    state = None

    def find() -> tuple[Path | None, list[str]]:
        nonlocal state
        folder.check_free()
        folder.note_found()
        found = find_checkpoint(folder, resume)
        state = found.state  # stays here: the others read it themselves
        return found.checkpoint, found.notes

    checkpoint, notes = processes.from_main(find)
    with processes.agreed():
        if checkpoint and state is None:
            state = read_run_checkpoint(checkpoint)
        torch.manual_seed(recipe.seed)
        with user_errors():
            model = GreenMIM(recipe.model)
            planner = Planner(recipe.model)
            sampler = make_sampler(recipe, source, world, first_update=0)
        if state is not None:
            check_same_model(state, recipe, checkpoint)
            model.load_state_dict(state["model"])
        dataset = AugmentedImages(source, recipe.data, recipe.model.image_hw, recipe.seed)
        notes += dataset.check_readable()
    processes.from_main(lambda: _check_room(folder, model, recipe.checkpoint))

    notes = [*_facts(recipe, model, processes, precision, sampler), *notes]
    model.to(device)
    if device.type == "cpu":
        keep_freed_memory()
        if precision == torch.float32:
            use_onednn(model, VisibleBlock)
    forward = distribute(model, recipe, processes.alone)
    optimizer = make_optimizer(model, recipe)
    scaler = torch.amp.GradScaler(device.type, enabled=precision == torch.float16)
    first_step = shift = kept = skipped = 0
    if state is not None:
        restore_moments(model, optimizer, checkpoint, processes)
        if scaler.is_enabled() and state["scaler"]:
            scaler.load_state_dict(state["scaler"])
        first_step, skipped = place_of(state, sampler, notes), state["skipped"]
        updates = state.get("updates", state["step"])
        shift, kept = updates - first_step, updates if folder.owns(checkpoint) else 0
        notes += changes(state["recipe"], recipe)
        notes.append(f"resumed after update {updates} from {checkpoint}")
    elif resume is not None:
        notes.append(f"no checkpoint in {folder.path} yet: the run starts from the beginning")

    sampler = make_sampler(recipe, source, world, first_update=first_step)
    finish = Finish(recipe.data) if finishes_in_loader(recipe.data, device) else None
    collate = Collate(planner, recipe.mask, recipe.seed, finish)
    loader = make_loader(dataset, sampler, collate, recipe.data.workers, device.type == "cuda")
    here = processes.gather(socket.gethostname()).count(socket.gethostname())
    with processes.agreed():
        check_shared_memory(loader, here)
    return Run(
        recipe,
        processes,
        folder,
        device,
        precision,
        model,
        forward,
        optimizer,
        scaler,
        dataset,
        sampler,
        loader,
        first_step,
        shift,
        kept,
        skipped,
        notes,
    )


def choose_device(recipe: Recipe, world: World) -> torch.device:
    """The device of this process: on a machine with several GPUs, the one of its local rank.

    Raises:
        UserError: no GPU for this process.
    """
    name = recipe.device
    if name == "auto":
        name = "cuda" if torch.cuda.is_available() else "cpu"
    if name == "cpu":
        return torch.device("cpu")
    if not torch.cuda.is_available():
        raise UserError(
            "--device cuda: PyTorch sees no CUDA GPU here; `greenmim doctor` says more."
        )
    count = torch.cuda.device_count()
    # Slurm may show every process its own GPU alone; NCCL refuses one GPU for two processes.
    index = 0 if count == 1 else world.local_rank
    if index >= count:
        raise UserError(
            f"Process {world.rank} is number {index} of its machine, which has {count} GPUs; start"
            f" {count} processes per machine."
        )
    torch.cuda.set_device(index)
    return torch.device("cuda", index)


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


def run_state(run: Run, step: int, skipped: int) -> dict[str, Any]:
    """What a checkpoint's file holds after `step` updates of the schedule. A collective with FSDP.

    There is no state of random generators in it: what is random follows from the step.
    """
    return {
        "format": RUN_FORMAT,
        "version": RUN_VERSION,
        "step": step,
        "updates": step + run.shift,
        "epoch": step / run.steps_per_epoch,
        "steps_per_epoch": run.steps_per_epoch,
        "images_per_update": run.sampler.images_per_update,
        "model": whole_weights(run.model, keep=run.processes.world.is_main),
        "scaler": run.scaler.state_dict(),
        "skipped": skipped,
        "recipe": run.recipe.to_dict(),
        "greenmim": greenmim.__version__,
    }


def source_of(recipe: Recipe) -> Source:
    """Where a recipe's images come from (see `sources.find_source`).

    Raises:
        UserError: there are none.
    """
    with user_errors():
        return find_source(recipe.data)


def make_sampler(recipe: Recipe, source: Source, world: World, first_update: int) -> EpochSampler:
    """The order of a run's images.

    Raises:
        ValueError: an epoch does not fill one update.
    """
    return EpochSampler(
        len(source),
        recipe.data.batch_size,
        repeats=recipe.data.repeats,
        epochs=recipe.epochs,
        accumulate=recipe.optim.accumulate,
        seed=recipe.seed,
        rank=world.rank,
        world_size=world.size,
        first_update=first_update,
        shards=source.shards,
    )


def precision_of(recipe: Recipe, device: torch.device) -> torch.dtype:
    """What a recipe computes in on a device.

    Raises:
        UserError: it cannot.
    """
    name = recipe.precision
    if name == "auto":
        name = "bf16" if device.type == "cuda" else "fp32"
    if name == "fp16" and device.type == "cpu":
        raise UserError("--precision fp16 needs CUDA; on the CPU take fp32 or bf16.")
    if name == "fp16" and recipe.strategy == "fsdp":
        raise UserError("--precision fp16 does not go with --strategy fsdp; take bf16.")
    if recipe.cuda_graph and device.type == "cpu":
        raise UserError("--cuda-graph needs a CUDA GPU; leave it out on the CPU.")
    return PRECISIONS[name]


def _check_room(folder: RunFolder, model: GreenMIM, keep: CheckpointConfig) -> None:
    one = _CHECKPOINT_BYTES_PER_WEIGHT * sum(p.numel() for p in model.parameters())
    free = folder.free_bytes()
    # The new one is whole before the oldest is removed.
    most = keep.keep_last + 1
    if free is None or free >= most * one:
        return
    more = max(most - folder.num_removable(keep), 1)
    if free < more * one:
        raise UserError(
            f"--work-dir {folder.path}: a checkpoint takes {one / 1e6:.0f} MB, the run needs room"
            f" for {more} and the disk has {free / 1e6:.0f} MB left; make room, choose another"
            " folder or a lower --checkpoint.keep-last."
        )


def _facts(
    recipe: Recipe,
    model: GreenMIM,
    processes: Processes,
    precision: torch.dtype,
    sampler: EpochSampler,
) -> list[str]:
    size = processes.world.size
    spread = f", {size} processes ({recipe.strategy})" if size > 1 else ""
    return [
        f"{sum(p.numel() for p in model.parameters()) / 1e6:.2f} M parameters on"
        f" {processes.device.type} in {str(precision).removeprefix('torch.')}{spread}; the run is"
        f" in {recipe.work_dir}",
        f"{sampler.positions} images per epoch = {sampler.updates_per_epoch} updates of"
        f" {sampler.images_per_update} ({recipe.data.batch_size} x {recipe.optim.accumulate}"
        f" accumulated x {size} processes), {sampler.left_out} left out, others each epoch",
        scaled_rates(recipe, sampler.images_per_update)[2],
    ]

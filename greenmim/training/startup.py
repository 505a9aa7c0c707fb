"""Making a run ready: all input is checked before anything is written."""

from __future__ import annotations

import contextlib
import functools
import math
import platform
import shlex
import socket
import sys
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any, TypeVar

import torch
from torch import nn

import greenmim
from greenmim.data.dataset import Finish, finishes_in_loader
from greenmim.data.loader import Feed, check_shared_memory, make_loader
from greenmim.data.sampler import EpochSampler
from greenmim.finetune_recipe import FinetuneRecipe
from greenmim.guards import UserError, user_errors
from greenmim.launch import World
from greenmim.processes import Processes
from greenmim.recipe import Recipe, RunRecipe
from greenmim.training.finetuning import Finetuning
from greenmim.training.log import RunLog, check_trackers, make_trackers
from greenmim.training.passes import GraphedPasses, Passes, distribute, make_optimizer
from greenmim.training.pretraining import Pretraining
from greenmim.training.run_folder import (
    Found,
    Progress,
    RunFolder,
    check_same_model,
    find_checkpoint,
    progress_of,
    restore_moments,
)
from greenmim.training.task import Task
from greenmim_kernels import use_backend
from greenmim_kernels.host_memory import keep_freed_memory
from greenmim_kernels.onednn import use_onednn

TASKS: dict[type[RunRecipe], type[Task]] = {Recipe: Pretraining, FinetuneRecipe: Finetuning}
N = TypeVar("N", bound=nn.Module)
PRECISIONS = {"fp32": torch.float32, "bf16": torch.bfloat16, "fp16": torch.float16}


@dataclass
class Run:
    """Everything a run needs, checked and built; nothing is written yet."""

    recipe: RunRecipe
    task: Task
    processes: Processes
    folder: RunFolder
    precision: torch.dtype
    model: nn.Module
    optimizer: torch.optim.AdamW
    scaler: torch.amp.GradScaler
    autocast: Callable[[], torch.autocast]  # makes the context of a forward pass
    passes: Passes
    sampler: EpochSampler
    feed: Feed
    progress: Progress  # at the start
    notes: list[str]  # for the user, one line each
    flops: float  # per image, forward and backward; 0 outside the main process
    last_step: int  # where this call ends: that of the schedule, or of --max-steps

    @property
    def steps_per_epoch(self) -> int:
        return self.sampler.updates_per_epoch

    @property
    def total_steps(self) -> int:
        return self.sampler.total_updates

    @functools.cached_property
    def rates(self) -> tuple[float, float, str]:
        """Peak and final learning rate, and a line that says where they come from."""
        return scaled_rates(self.recipe, self.sampler.images_per_update)

    def epoch(self, step: int) -> float:
        """Epochs done after `step` updates."""
        return step / self.steps_per_epoch

    def learning_rate(self, step: int) -> float:
        """The learning rate of update `step`, from 1."""
        peak, final, _ = self.rates
        warmup, epochs = self.recipe.schedule.warmup_epochs, self.recipe.epochs
        epoch = (step - 1) / self.steps_per_epoch
        return learning_rate(epoch, peak=peak, final=final, warmup_epochs=warmup, epochs=epochs)


def prepare(
    recipe: RunRecipe, resume: str | None, processes: Processes, max_steps: int | None = None
) -> Run:
    """Check the recipe against this machine and build the run; writes nothing. A collective.

    Args:
        recipe, resume, max_steps: As for `train`.
        processes: The processes of the run, joined.

    Raises:
        UserError: any bad input.
    """
    device, world = processes.device, processes.world
    task = TASKS[type(recipe)](recipe)
    with processes.agreed(), user_errors():
        precision = precision_of(recipe, device)
        check_trackers(recipe)
        with chosen_backend(recipe):
            pass  # raises where it cannot be used
    folder, state = RunFolder(recipe.folder), None

    # Only the main process looks: files may come and go between two looks.
    def look() -> tuple[dict[str, Any], Found]:
        nonlocal state
        images = task.find()
        folder.lock.check_free()
        found = find_checkpoint(folder, resume, task.command)
        state = found.state  # too large to be sent: the others read it themselves
        return images, found._replace(state=None)

    images, found = processes.from_main(look)
    checkpoint = found.checkpoint
    if recipe.threads:
        torch.set_num_threads(recipe.threads)
    progress = Progress()
    with processes.agreed():
        state = found._replace(state=state).content(task.command)
        notes = [*found.notes, *task.build(images, state)]
        recipe, model = task.recipe, task.model
        with user_errors():
            sampler = EpochSampler.of(recipe, task.dataset.source, world.rank, world.size)
            model.set_grad_checkpointing(recipe.activation_checkpointing)
        if state is not None and checkpoint is not None:
            progress = restore(task, state, checkpoint, sampler, folder)
            sampler.first_update = progress.first_step
        elif recipe.init:
            notes += task.initialise(recipe.init)
        with user_errors():
            flops = 3.0 * task.flops() if world.is_main else 0.0
        weights = sum(p.numel() for p in model.parameters())
        folder.check_room(recipe.checkpoint, task.bytes_per_weight * weights)
    if resume is not None and state is None:
        notes.append(f"no checkpoint in {folder.path} yet: the run starts from the beginning")

    if device.type == "cpu":
        keep_freed_memory()
    place(model, device, precision)
    task.placed(processes)
    wrapped_model = distribute(model, recipe, processes.alone)
    optimizer = make_optimizer(task.parameter_groups(), recipe.optim)
    scaler = torch.amp.GradScaler(device.type, enabled=precision == torch.float16)
    if state is not None and checkpoint is not None:
        restore_moments(model, optimizer, checkpoint, processes)
        if scaler.is_enabled() and state["scaler"]:
            scaler.load_state_dict(state["scaler"])
    autocast = autocast_for(device, precision)
    make = functools.partial(GraphedPasses, processes) if recipe.cuda_graph else Passes
    trained = [p for p in model.parameters() if p.requires_grad]
    passes = make(task.loss, wrapped_model, trained, autocast, scaler, recipe.optim.accumulate)

    in_loader = finishes_in_loader(recipe.data, device)
    finish = Finish(recipe.data, "cpu" if in_loader else device)
    finishes = (finish, None) if in_loader else (None, finish)
    notes += task.make_sweeps(images, finishes, processes)
    collate = task.collate(finishes[0])
    on_gpu = device.type == "cuda"
    loader = make_loader(task.dataset, sampler, collate, recipe.data.workers, on_gpu)
    hosts = processes.gather(socket.gethostname())
    with processes.agreed():
        # Those of other images come while those of training wait.
        sets = 2 if task.sweeps else 1
        check_shared_memory(loader, processes=sets * hosts.count(socket.gethostname()))
    feed = Feed(loader, device, finishes[1])
    last_step = sampler.total_updates
    if max_steps is not None:  # of all updates ever done, as the log counts them
        last_step = min(last_step, max(max_steps - progress.shift, progress.first_step))
    return Run(
        recipe, task, processes, folder, precision, model, optimizer, scaler, autocast, passes,
        sampler, feed, progress, [*notes, *progress.notes], flops, last_step,
    )  # fmt: skip


def restore(
    task: Task, state: dict[str, Any], checkpoint: Path, sampler: EpochSampler, folder: RunFolder
) -> Progress:
    """Load a checkpoint's weights into a built task; returns how far its run has come.

    Raises:
        UserError: it holds another model, or another run's that is at the end of this one.
    """
    check_same_model(state, task.recipe, checkpoint)
    task.restore(state)
    return progress_of(state, task.recipe, sampler, checkpoint, folder.owns(checkpoint))


@contextlib.contextmanager
def started(run: Run) -> Iterator[RunLog]:
    """Lock the work dir, write config.yaml and open the log. A collective."""
    recipe, folder, processes, progress = run.recipe, run.folder, run.processes, run.progress
    main = processes.world.is_main
    with folder.lock.held(processes):
        with processes.agreed():  # before the folder looks like a run: they may refuse
            trackers = make_trackers(folder.path, recipe, progress.resumed_at) if main else []
        try:
            processes.from_main(lambda: folder.start(recipe, progress.resumed_at))
            with processes.agreed():
                counts = progress.resumed_at, progress.first_step, run.total_steps, progress.shift
                log = RunLog(folder.log if main else None, trackers, *counts)
        except BaseException:
            for tracker in trackers:  # otherwise the log closes them
                with contextlib.suppress(Exception):
                    tracker.close()
            raise
        with log, chosen_backend(recipe):
            notes = [*_facts(run), *run.notes]
            for note in notes:
                log.say(note)
            log.event(
                "start",
                step=progress.first_step,
                command=shlex.join(sys.argv),
                greenmim=greenmim.__version__,
                torch=torch.__version__,
                python=platform.python_version(),
                device=str(processes.device),
                processes=processes.world.size,
                images=len(run.task.dataset),
                steps_per_epoch=run.steps_per_epoch,
                left_out_per_epoch=run.sampler.left_out,
                notes=notes,
            )
            yield log


def learning_rate(
    epoch: float, *, peak: float, final: float, warmup_epochs: float, epochs: float
) -> float:
    """Learning rate at a fractional epoch: linear warm-up from 0, then half a cosine to `final`.

    Source: the published schedule (Huang et al., NeurIPS 2022, arXiv 2205.13515).

    Args:
        epoch: Epochs done, from 0.
        peak, final: Rates after the warm-up and at the end.
        warmup_epochs, epochs: Length of the warm-up and of the run.
    """
    if epoch < warmup_epochs:
        return peak * epoch / warmup_epochs
    if epochs <= warmup_epochs:
        return peak
    progress = min((epoch - warmup_epochs) / (epochs - warmup_epochs), 1.0)
    return final + (peak - final) * 0.5 * (1.0 + math.cos(math.pi * progress))


def scaled_rates(recipe: RunRecipe, images_per_update: int) -> tuple[float, float, str]:
    """Peak and final learning rate for this many images per update, and where they come from."""
    optim, minimum = recipe.optim, recipe.schedule.min_lr
    if optim.lr is not None:
        return optim.lr, minimum, f"learning rate {optim.lr:.3g} (as given), final {minimum:.3g}"
    scale = images_per_update / optim.base_batch
    peak, final = optim.base_lr * scale, minimum * scale
    how = (
        f"learning rate {optim.base_lr:.3g} for {optim.base_batch} images per update"
        f" x {images_per_update}/{optim.base_batch} = {peak:.3g}, final {final:.3g}"
    )
    return peak, final, how


def choose_device(name: str, world: World) -> torch.device:
    """The device of this process: "auto", "cpu" or "cuda"; of several GPUs, by its local rank.

    Raises:
        UserError: there is no such device.
    """
    if name == "auto":
        name = "cuda" if torch.cuda.is_available() else "cpu"
    if name == "cpu":
        return torch.device("cpu")
    if not torch.cuda.is_available():
        raise UserError(
            "--device cuda: PyTorch sees no CUDA GPU; see `greenmim doctor`, or use --device cpu."
        )
    count = torch.cuda.device_count()
    # Slurm may show every process its own GPU alone; NCCL refuses one GPU for two processes.
    index = 0 if count == 1 else world.local_rank
    if index >= count:
        raise UserError(
            f"Process {world.rank} is number {index} of its machine, which has {count} GPUs; start"
            f" at most {count} processes per machine."
        )
    torch.cuda.set_device(index)
    return torch.device("cuda", index)


def place(model: N, device: torch.device, precision: torch.dtype) -> N:
    """A model on its device, as fast as it goes there."""
    model = model.to(device)
    if device.type == "cpu" and precision == torch.float32:
        use_onednn(model, model.encoder.one_node_block)
    return model


def autocast_for(device: torch.device, precision: torch.dtype) -> Callable[[], torch.autocast]:
    """What makes the context of a forward pass in this precision."""
    enabled = precision != torch.float32
    return functools.partial(torch.autocast, device.type, precision, enabled=enabled)


def chosen_backend(recipe: RunRecipe) -> contextlib.AbstractContextManager[None]:
    """A context that uses the recipe's backend; "auto" leaves it to GREENMIM_BACKEND."""
    return contextlib.nullcontext() if recipe.backend == "auto" else use_backend(recipe.backend)


def precision_of(recipe: RunRecipe, device: torch.device) -> torch.dtype:
    """The autocast dtype of a recipe; UserError where the device cannot do it."""
    name = recipe.precision
    if name == "auto":
        name = "bf16" if device.type == "cuda" else "fp32"
    if name == "fp16" and device.type == "cpu":
        raise UserError("--precision fp16 needs CUDA; use fp32 or bf16 on the CPU.")
    if name == "fp16" and recipe.strategy == "fsdp":
        raise UserError("--precision fp16 does not go with --strategy fsdp; use bf16.")
    if recipe.cuda_graph and device.type == "cpu":
        raise UserError("--cuda-graph needs a CUDA GPU; leave it out on the CPU.")
    return PRECISIONS[name]


def _facts(run: Run) -> list[str]:
    recipe, sampler, size = run.recipe, run.sampler, run.processes.world.size
    precision = str(run.precision).removeprefix("torch.")
    left_out = f"{sampler.left_out}, different ones each epoch" if sampler.left_out else "none"
    spread = f", {size} processes ({recipe.strategy})" if size > 1 else ""
    return [
        f"{sum(p.numel() for p in run.model.parameters()) / 1e6:.2f} M parameters on"
        f" {run.processes.device.type} in {precision}{spread}; the run is in {recipe.work_dir}",
        f"{sampler.positions} images per epoch = {sampler.updates_per_epoch} updates of"
        f" {sampler.images_per_update} ({recipe.data.batch_size} x {recipe.optim.accumulate}"
        f" accumulated x {size} processes); left out: {left_out}",
        run.rates[2],
    ]

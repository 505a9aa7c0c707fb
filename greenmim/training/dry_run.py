"""What a run would do, before anything runs or is written."""

from __future__ import annotations

import torch
import yaml

from greenmim.data.sampler import EpochSampler
from greenmim.guards import user_errors
from greenmim.recipe import RunRecipe
from greenmim.training.log import check_trackers
from greenmim.training.run_folder import RunFolder, find_checkpoint
from greenmim.training.startup import TASKS, precision_of, restore, scaled_rates


def dry_run(
    recipe: RunRecipe, resume: str | None, device: torch.device, processes: int
) -> tuple[str, list[str]]:
    """The resolved recipe as YAML, and the run's figures on so many processes, a line each.

    Raises:
        UserError: any bad input, as for a run.
    """
    check_trackers(recipe)
    precision = str(precision_of(recipe, device)).removeprefix("torch.")
    task = TASKS[type(recipe)](recipe)
    images = task.find()
    folder = RunFolder(recipe.folder)
    found = find_checkpoint(folder, resume, task.command)
    state = found.content(task.command)
    notes = task.build(images, state)
    recipe, model, source = task.recipe, task.model.train(), task.dataset.source
    with user_errors():
        sampler = EpochSampler.of(recipe, source, 0, processes)
        flops = task.flops()
    if state is not None and found.checkpoint:
        *changed, _ = restore(task, state, found.checkpoint, sampler, folder).notes
        notes += changed
    elif recipe.init:
        notes += task.initialise(recipe.init)
    weights = sum(p.numel() for p in model.parameters())
    folder.check_room(recipe.checkpoint, task.bytes_per_weight * weights)
    steps = sampler.updates_per_epoch
    lines = [
        f"processes        {processes}, on {device.type} in {precision}"
        + (f", {recipe.strategy}" if processes > 1 else ""),
        f"parameters       {weights / 1e6:.2f} M",
        f"GFLOPs           {flops / 1e9:.2f} per image forward; about"
        f" {3 * flops * sampler.images_per_update / 1e12:.2f} TFLOPs per update",
        f"images           {len(source)} in {recipe.data.root}"
        + (f", {recipe.data.repeats} times per epoch" if recipe.data.repeats > 1 else ""),
        *task.facts(images),
        f"images/update    {sampler.images_per_update} = {recipe.data.batch_size} x"
        f" {recipe.optim.accumulate} accumulated x {processes} processes",
        f"steps per epoch  {steps}, {steps * recipe.epochs} in {recipe.epochs} epochs;"
        f" {sampler.left_out} images left out of each epoch",
        f"schedule         {scaled_rates(recipe, sampler.images_per_update)[2]}; warm-up"
        f" {recipe.schedule.warmup_epochs:g} epochs",
        f"checkpoint       {found.checkpoint or 'none: the run starts from the beginning'}",
        *found.notes,
        *notes,
    ]
    return yaml.safe_dump(recipe.to_dict(), sort_keys=False), lines

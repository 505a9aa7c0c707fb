"""What a run would do, before anything runs or is written."""

from __future__ import annotations

import numpy as np
import torch
import yaml

from greenmim.data.sampler import EpochSampler
from greenmim.data.sources import find_source
from greenmim.flops import forward_flops
from greenmim.masking import num_visible_units
from greenmim.mim import GreenMIM
from greenmim.recipe import Recipe
from greenmim.training.log import check_trackers
from greenmim.training.run_folder import RunFolder, find_checkpoint
from greenmim.training.startup import (
    other_sources,
    precision_of,
    scaled_rates,
    start_from,
    training_flops,
    user_errors,
)


def dry_run(
    recipe: Recipe, resume: str | None, device: torch.device, processes: int
) -> tuple[str, list[str]]:
    """The resolved recipe as YAML, and the run's figures on so many processes, a line each.

    Raises:
        UserError: any bad input, as for a run.
    """
    check_trackers(recipe)
    precision = str(precision_of(recipe, device)).removeprefix("torch.")
    source, (held_out, probe) = find_source(recipe.data), other_sources(recipe.data)
    found = find_checkpoint(RunFolder(recipe.work_dir), resume)
    with user_errors():
        sampler = EpochSampler.of(recipe, source, 0, processes)
        model = GreenMIM(recipe.model).train()
    units = model.config.num_units
    visible = num_visible_units(units, recipe.mask.ratio)
    notes = start_from(model, recipe.init) if recipe.init and not found.checkpoint else []
    flops = training_flops(model, recipe) / 3
    dense = forward_flops(model, model.plan(np.ones(units, dtype=bool)))
    steps = sampler.updates_per_epoch
    lines = [
        f"processes        {processes}, on {device.type} in {precision}"
        + (f", {recipe.strategy}" if processes > 1 else ""),
        f"parameters       {sum(p.numel() for p in model.parameters()) / 1e6:.2f} M",
        f"visible          {visible} of {units} units of an image",
        f"GFLOPs           {flops / 1e9:.2f} per image forward, {100 * flops / dense:.0f}% of the"
        f" {dense / 1e9:.2f} with everything visible; about"
        f" {3 * flops * sampler.images_per_update / 1e12:.2f} TFLOPs per update",
        f"images           {len(source)} in {recipe.data.root}"
        + (f", {recipe.data.repeats} times per epoch" if recipe.data.repeats > 1 else ""),
        *([f"held out         {len(held_out)} in {recipe.data.val_root}"] if held_out else []),
        *([f"labelled         {len(probe)} in {recipe.data.probe_root}"] if probe else []),
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

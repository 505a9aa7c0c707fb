"""What a run would do, before anything runs or is written."""

from __future__ import annotations

import torch
import yaml

from greenmim.masking import num_visible_units
from greenmim.recipe import Recipe
from greenmim.training.estimate import estimate
from greenmim.training.resume import find_checkpoint
from greenmim.training.run import make_sampler, precision_of, source_of, user_errors
from greenmim.training.run_folder import RunFolder
from greenmim.training.schedule import scaled_rates
from greenmim.training.trackers import check_trackers
from greenmim.training.world import World

GIB = 2**30


def dry_run(
    recipe: Recipe, resume: str | None, device: torch.device, processes: int
) -> tuple[str, list[str]]:
    """The resolved recipe and the run's figures; the input is checked as for a run.

    Args:
        recipe: The run.
        resume: As for `train.pretrain`.
        device: Where it would run.
        processes: How many would share it.

    Returns:
        The recipe as YAML, and the figures, a line each.

    Raises:
        UserError: any bad input.
    """
    check_trackers(recipe)
    precision = precision_of(recipe, device)
    source = source_of(recipe)
    found = find_checkpoint(RunFolder(recipe.work_dir), resume)
    with user_errors():
        visible = num_visible_units(recipe.model.num_units, recipe.mask.ratio)
        sampler = make_sampler(recipe, source, World(size=processes), first_update=0)
        cost = estimate(recipe, precision, device.type, processes)
    steps, units = sampler.updates_per_epoch, recipe.model.num_units
    total = cost.state_bytes + cost.activation_bytes
    again = " (activations computed again)" if recipe.activation_checkpointing else ""
    again += "; a compiled step keeps less" if recipe.compile else ""
    share = 100 * cost.forward_flops / cost.dense_flops
    lines = [
        f"processes        {processes}, on {device.type} in {str(precision).removeprefix('torch.')}"
        + (f", {recipe.strategy}" if processes > 1 else ""),
        f"parameters       {cost.parameters / 1e6:.2f} M",
        f"visible          {visible} of {units} units of an image",
        f"GFLOPs           {cost.forward_flops / 1e9:.2f} per image forward, {share:.0f}% of the"
        f" {cost.dense_flops / 1e9:.2f} with everything visible; about"
        f" {3 * cost.forward_flops * sampler.images_per_update / 1e12:.2f} TFLOPs per update",
        f"memory estimate  {total / GIB:.2f} GiB per process: {cost.state_bytes / GIB:.2f} weights,"
        f" gradients, moments; {cost.activation_bytes / GIB:.2f} activations{again}",
        f"images           {len(source)} in {recipe.data.root}"
        + (f", {recipe.data.repeats} times per epoch" if recipe.data.repeats > 1 else ""),
        f"images/update    {sampler.images_per_update} = {recipe.data.batch_size} x"
        f" {recipe.optim.accumulate} accumulated x {processes} processes",
        f"steps per epoch  {steps}, {steps * recipe.epochs} in {recipe.epochs} epochs;"
        f" {sampler.left_out} images left out of each epoch",
        f"schedule         {scaled_rates(recipe, sampler.images_per_update)[2]}; warm-up"
        f" {recipe.schedule.warmup_epochs:g} epochs",
        f"checkpoint       {found.checkpoint or 'none: the run starts from the beginning'}",
        *found.notes,
    ]
    return yaml.safe_dump(recipe.to_dict(), sort_keys=False), lines

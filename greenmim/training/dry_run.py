"""What a run would do, before anything runs or is written."""

from __future__ import annotations

import numpy as np
import torch
import yaml
from torch import Tensor
from torch.utils.flop_counter import FlopCounterMode

from greenmim.data.loader import draw_visible
from greenmim.mim import GreenMIM
from greenmim.planning import Plan
from greenmim.recipe import Recipe
from greenmim.training.resume import find_checkpoint
from greenmim.training.run import make_sampler, precision_of, source_of, user_errors
from greenmim.training.run_folder import RunFolder
from greenmim.training.schedule import scaled_rates
from greenmim.training.trackers import check_trackers
from greenmim.training.world import World


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
    precision = str(precision_of(recipe, device)).removeprefix("torch.")
    source = source_of(recipe)
    found = find_checkpoint(RunFolder(recipe.work_dir), resume)
    with user_errors():
        sampler = make_sampler(recipe, source, World(size=processes), first_update=0)
        model = GreenMIM(recipe.model).train()
        grid, units = model.config.unit_grid, model.config.num_units
        visible = draw_visible(np.random.default_rng(0), grid, recipe.mask, None)
    flops = forward_flops(model, model.plan(visible), loss_only=True)
    dense = forward_flops(model, model.plan(np.ones(units, dtype=bool)))
    steps = sampler.updates_per_epoch
    lines = [
        f"processes        {processes}, on {device.type} in {precision}"
        + (f", {recipe.strategy}" if processes > 1 else ""),
        f"parameters       {sum(p.numel() for p in model.parameters()) / 1e6:.2f} M",
        f"visible          {visible.sum()} of {units} units of an image",
        f"GFLOPs           {flops / 1e9:.2f} per image forward, {100 * flops / dense:.0f}% of the"
        f" {dense / 1e9:.2f} with everything visible; about"
        f" {3 * flops * sampler.images_per_update / 1e12:.2f} TFLOPs per update",
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


def forward_flops(model: GreenMIM, plan: Plan, loss_only: bool = False) -> int:
    """Of one image, two for each multiplication with addition; attention counts real pairs only.

    With `loss_only` those of training, without the prediction of visible units.
    """
    formulas = {
        getattr(torch.ops.greenmim, f"group_window_attention{variant}"): _window_attention_flops
        for variant in ("", "_triton")
    }
    formulas[torch.ops.aten._scaled_dot_product_flash_attention_for_cpu] = _attention_flops
    image = torch.zeros(1, 3, *model.config.image_hw)
    with torch.no_grad(), FlopCounterMode(display=False, custom_mapping=formulas) as counter:
        model(image, plan=plan, loss_only=loss_only)
    return counter.get_total_flops()


def _attention_flops(query: Tensor, key: Tensor, *_: object, **__: object) -> int:
    return 4 * query.numel() * key.shape[2]


def _window_attention_flops(qkv: Tensor, *others: object, **_: object) -> int:
    window_id = others[5]
    pairs = sum(int(torch.bincount(row[row >= 0]).square().sum()) for row in window_id)
    return 4 * pairs * (qkv.shape[2] // 3) * (len(qkv) // len(window_id))


_attention_flops._get_raw = _window_attention_flops._get_raw = True

"""Pre-training.

    greenmim pretrain --config greenmim_swin-demo-cpu --data.root photos --work-dir runs/demo
    greenmim pretrain --config runs/demo/config.yaml --resume         # go on after a stop

`run.prepare` finds everything that can be wrong with the input before anything is written; `train`
is the loop, all of it.
"""

from __future__ import annotations

import dataclasses
import platform
import shlex
import sys
import time
from dataclasses import dataclass
from pathlib import Path

import torch
from torch import nn

import greenmim
from greenmim.guards import EXIT_DIVERGED, StopSignal
from greenmim.recipe import Recipe, UserError, learning_rate, scaled_rates
from greenmim.run import Run, chosen_backend, prepare, run_state
from greenmim.run_log import RunLog, peak_memory_gib


@dataclass(frozen=True)
class Result:
    """How a call of `pretrain` ended: the exit code, updates done, and the newest checkpoint."""

    exit_code: int
    step: int
    checkpoint: Path | None


def pretrain(recipe: Recipe, resume: str | None = None) -> Result:
    """Run a recipe.

    Args:
        recipe: The run.
        resume: None starts a new run; "auto" goes on from the newest checkpoint of the work dir,
            or starts where there is none yet (a scheduler can repeat one command); else the path
            of a checkpoint.

    Returns:
        Result with exit code 0; 75 or 130 after a signal (saved, to be resumed); 3 (not finite).

    Raises:
        UserError: bad input; nothing was written.
    """
    run = prepare(recipe, resume)
    if run.first_step >= run.total_steps:
        newest = run.folder.newest_checkpoint()
        print(f"The run in {run.folder.path} is finished ({recipe.epochs} epochs): {newest}")
        return Result(0, run.first_step, newest)
    run.folder.start(recipe)
    with (
        RunLog(run.folder, run.first_step, run.total_steps, recipe.log.tensorboard) as log,
        StopSignal() as stop,
        chosen_backend(recipe),
    ):
        for note in run.notes:
            log.say(note)
        log.event(
            "start",
            step=run.first_step,
            command=shlex.join(sys.argv),
            greenmim=greenmim.__version__,
            torch=torch.__version__,
            python=platform.python_version(),
            device=str(run.device),
            images=len(run.dataset),
            steps_per_epoch=run.steps_per_epoch,
            notes=run.notes,
        )
        return train(run, log, stop)


def train(run: Run, log: RunLog, stop: StopSignal) -> Result:
    """The training loop."""
    recipe, model, optimizer, scaler = run.recipe, run.model, run.optimizer, run.scaler
    peak, final, _ = scaled_rates(recipe, run.sampler.images_per_update)
    parameters = [parameter for parameter in model.parameters() if parameter.requires_grad]
    forward = torch.compile(model, fullgraph=True) if recipe.compile else model
    on_gpu = run.device.type == "cuda"
    clip = recipe.optim.clip or float("inf")
    result = Result(0, run.first_step, None)
    model.train()

    batches = iter(run.loader)
    losses, norms = [], []
    window_start, waited = time.perf_counter(), 0.0
    for step in range(run.first_step + 1, run.total_steps + 1):
        lr = learning_rate(
            (step - 1) / run.steps_per_epoch,
            peak=peak,
            final=final,
            warmup_epochs=recipe.schedule.warmup_epochs,
            epochs=recipe.epochs,
        )
        for group in optimizer.param_groups:
            group["lr"] = lr

        loss = torch.zeros((), device=run.device)
        for _ in range(recipe.optim.accumulate):
            asked = time.perf_counter()
            batch = next(batches)
            waited += time.perf_counter() - asked
            log.unreadable(batch.failures)
            if batch.images is None:
                raise UserError(run.dataset.all_bad(batch.failures))
            batch = batch.to(run.device, non_blocking=True)
            with torch.autocast(
                run.device.type, run.precision, enabled=run.precision != torch.float32
            ):
                part = forward(batch.images, plan=batch.plan).loss / recipe.optim.accumulate
            scaler.scale(part).backward()
            loss += part.detach()

        scaler.unscale_(optimizer)
        norm = nn.utils.clip_grad_norm_(parameters, clip)
        if scaler.is_enabled():  # fp16 gradients overflow now and then; the scaler deals with them
            bad = ~torch.isfinite(loss)
        else:
            bad = ~(torch.isfinite(loss) & torch.isfinite(norm))
            optimizer.found_inf = bad.float()  # the fused AdamW leaves all as it is where this is 1
        scaler.step(optimizer)
        scaler.update()
        optimizer.zero_grad(set_to_none=True)
        run.guard.count(bad)
        losses.append(loss)
        norms.append(norm.detach())
        log.step_done()

        last = step == run.total_steps
        log_now = last or step % recipe.log.every_steps == 0 or step == run.first_step + 1
        if log_now:
            values = _means(losses, norms)
            seconds = time.perf_counter() - window_start
            values |= {
                "lr": lr,
                "epoch": step / run.steps_per_epoch,
                "images_per_second": len(losses) * run.sampler.images_per_update / seconds,
                "data_wait": waited / seconds,
                "peak_memory_gib": peak_memory_gib(run.device),
                "skipped": run.guard.total(),
            }
            log.train(step, values)
            losses, norms = [], []
            window_start, waited = time.perf_counter(), 0.0

        # Reading the guard waits for a GPU: there, only with the log. Skipped updates do no harm.
        if (log_now or not on_gpu) and run.guard.tripped():
            log.event("diverged", step=step, skipped=run.guard.total())
            log.say(_diverged_advice(run, step))
            return dataclasses.replace(result, exit_code=EXIT_DIVERGED, step=step)

        if last or stop.received or _save_due(run, step):
            saved_at = time.perf_counter()
            path = run.folder.save(run_state(run, step), recipe.checkpoint)
            log.event("checkpoint", step=step, path=str(path))
            result = Result(0, step, path)
            window_start += time.perf_counter() - saved_at  # saving is not training time
        if stop.received and not last:
            log.event("stopped", step=step, signal=stop.received.name)
            log.say(
                f"{stop.received.name} received: saved {path}; the same command with --resume"
                " goes on."
            )
            return dataclasses.replace(result, exit_code=stop.exit_code)

    log.event("end", step=run.total_steps, skipped=run.guard.total(), unreadable=log.num_unreadable)
    log.say(
        f"finished: {recipe.epochs} epochs, {run.total_steps} updates, {run.guard.total()} skipped,"
        f" {log.num_unreadable} unreadable images; checkpoint {result.checkpoint}"
    )
    return result


def _save_due(run: Run, step: int) -> bool:
    keep = run.recipe.checkpoint
    by_epoch = step % (keep.every_epochs * run.steps_per_epoch) == 0
    return by_epoch or (keep.every_steps is not None and step % keep.every_steps == 0)


def _means(losses: list[torch.Tensor], norms: list[torch.Tensor]) -> dict[str, float]:
    loss, norm = torch.stack([torch.stack(losses), torch.stack(norms)]).mean(1).tolist()
    return {"loss": loss, "grad_norm": norm}


def _diverged_advice(run: Run, step: int) -> str:
    newest = run.folder.newest_checkpoint()
    advice = (
        "lower the learning rate (--optim.base-lr or --optim.lr), clip (--optim.clip 1), or use"
        " --precision bf16 or fp32"
    )
    again = f"; {newest} is from before it, --resume goes on there" if newest else ""
    return (
        f"stopped after update {step}: {run.recipe.max_skipped} updates in a row had a loss or"
        f" gradient that is not finite. To go on, {advice}{again}."
    )

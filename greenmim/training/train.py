"""Pre-training.

    greenmim pretrain --config greenmim_swin-demo-cpu --data.root photos --work-dir runs/demo
    greenmim pretrain --config runs/demo/config.yaml --resume         # go on after a stop
    torchrun --nproc-per-node 8 -m greenmim pretrain ...              # one process for each GPU

`run.prepare` finds everything that can be wrong with the input before anything is written;
`Trainer.train` is the loop, all of it.
"""

from __future__ import annotations

import contextlib
import math
import platform
import shlex
import signal
import statistics
import sys
import time
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

import torch
from torch.distributed.tensor import DTensor

import greenmim
from greenmim.data.feed import Feed
from greenmim.guards import EXIT_DIVERGED, StopSignal, exit_code_of
from greenmim.messages import first_line
from greenmim.recipe import Recipe, UserError
from greenmim.seeds import FORWARD, torch_seed
from greenmim.training.distributed import Processes
from greenmim.training.pictures import Painter
from greenmim.training.reports import LAG, Report, Reports
from greenmim.training.run import (
    Run,
    choose_device,
    chosen_backend,
    prepare,
    run_state,
    user_errors,
)
from greenmim.training.run_log import RunLog, peak_memory_gib
from greenmim.training.schedule import learning_rate, scaled_rates
from greenmim.training.trackers import make_trackers
from greenmim.training.training_state import write_moments
from greenmim.training.world import World, launcher_note

# A run ends when so many checkpoints in a row could not be written.
FAILED_SAVES = 3
# So many images of a skipped update are named in log.jsonl.
NAMED_FILES = 64


@dataclass(frozen=True)
class Result:
    """How a call of `pretrain` ended.

    Attributes:
        exit_code: 0; 75 or 130 after a signal (saved, to be resumed); 3 (losses not finite).
        step: Updates done.
        checkpoint: The newest checkpoint, if there is one.
        signal: What stopped the run, if it was stopped.
    """

    exit_code: int
    step: int
    checkpoint: Path | None
    signal: signal.Signals | None = None


def pretrain(recipe: Recipe, resume: str | None = None) -> Result:
    """Run a recipe, in every process of the run (see `world` for how processes find each other).

    Args:
        recipe: The run.
        resume: None starts a new run; "auto" goes on from the newest checkpoint of the work dir,
            or starts where there is none yet (a scheduler can repeat one command); else the path
            of a checkpoint.

    Raises:
        UserError: bad input; nothing was written. Or the disk is full: old checkpoints are whole.
        PeerError: another process of the run died.
    """
    with user_errors():
        world = World.from_environment()
    with (
        contextlib.ExitStack() as outside,
        Processes(world, lambda: choose_device(recipe, world), recipe.hang_minutes) as processes,
    ):
        run = prepare(recipe, resume, processes)
        if run.first_step >= run.total_steps:
            newest = run.folder.newest_checkpoint()
            if world.is_main:
                print(
                    f"The run in {run.folder.path} is finished ({recipe.epochs} epochs): {newest}"
                )
            return Result(0, run.first_step, newest)
        with run.folder.held(processes):
            with processes.agreed():  # before the folder looks like a run: they may refuse
                trackers = make_trackers(run.folder, recipe, run.kept) if world.is_main else []
            processes.from_main(lambda: run.folder.start(recipe, run.kept))
            with processes.agreed():
                folder = run.folder if world.is_main else None
                counts = run.first_step, run.total_steps, run.shift
                log = RunLog(folder, trackers, run.kept, *counts)
            # Left after the processes are: when one of them dies, torchrun sends SIGTERM to the
            # others, which are then finding out which one it was.
            stop = outside.enter_context(StopSignal())
            with log, chosen_backend(recipe):
                _introduce(run, log)
                trainer = Trainer(run, log, stop)
                with contextlib.closing(trainer.feed), told_of_memory(run.device):
                    return trainer.train()


def _introduce(run: Run, log: RunLog) -> None:
    for note in filter(None, [*run.notes, launcher_note()]):
        log.say(note)
    log.event(
        "start",
        step=run.first_step,
        command=shlex.join(sys.argv),
        greenmim=greenmim.__version__,
        torch=torch.__version__,
        python=platform.python_version(),
        device=str(run.device),
        processes=run.processes.world.size,
        images=len(run.dataset),
        steps_per_epoch=run.steps_per_epoch,
        left_out_per_epoch=run.sampler.left_out,
        notes=run.notes,
    )


class Trainer:
    """The loop of a run, and what it does besides training: log, save, stop."""

    def __init__(self, run: Run, log: RunLog, stop: StopSignal) -> None:
        self.run, self.log, self.stop = run, log, stop
        # One process alone need not wait for a loader that hangs; others would wait for it.
        self.feed = Feed(
            run.loader, run.device, lambda: run.processes.alone and stop.received is not None
        )
        self.passes = run.passes()
        self.reports = Reports(run.processes, run.device, run.recipe.optim.accumulate)
        self.painter = Painter(run.model, run.recipe, run.dataset, run.processes, log.say)
        self.checkpoint: Path | None = None
        self.saved, self.failed_saves, self.save_owed = run.first_step, 0, False
        self.skipped, self.skipped_in_a_row = run.skipped, 0
        self.stop_asked = self.diverged = False
        self.unlogged: list[Report] = []
        self.window_start, self.window_waited = time.perf_counter(), 0.0

    def train(self) -> Result:
        """From the run's first update to its last."""
        run, recipe = self.run, self.run.recipe
        peak, final, _ = scaled_rates(recipe, run.sampler.images_per_update)
        run.model.train()
        for step in range(run.first_step + 1, run.total_steps + 1):
            lr = learning_rate(
                (step - 1) / run.steps_per_epoch,
                peak=peak,
                final=final,
                warmup_epochs=recipe.schedule.warmup_epochs,
                epochs=recipe.epochs,
            )
            if not self.update(step, lr):
                return self.stopped(step - 1)
            self.log.step_done()

            last = step == run.total_steps
            # With processes that share the work, all have to stop at the same update.
            now = run.processes.alone and self.stop.received is not None
            self.take_note(step if last or now else step - LAG)
            if self.diverged:
                return Result(EXIT_DIVERGED, step, run.folder.newest_checkpoint())
            if last or now or self.stop_asked or self.save_owed or self._save_due(step):
                self.save(step, final=last or now or self.stop_asked)
                if self.diverged:
                    return Result(EXIT_DIVERGED, step, run.folder.newest_checkpoint())
                # A signal that came meanwhile has got its save.
                self.stop_asked |= any(run.processes.gather(self.stop.received is not None))
            if self.stop_asked and not last:
                return self.stopped(step)
            if not self.stop_asked and (last or self._due(step, recipe.log.pictures_every_epochs)):
                with run.autocast():
                    self.draw(step)
        self.finish()
        return Result(0, run.total_steps, self.checkpoint)

    def update(self, step: int, lr: float) -> bool:
        """Forward and backward passes of the global batch, and one step of the optimiser.

        False where a signal ended the wait for a batch: the weights are those of the step before.
        """
        run, recipe, optimizer, scaler = (
            self.run,
            self.run.recipe,
            self.run.optimizer,
            self.run.scaler,
        )
        for group in optimizer.param_groups:
            group["lr"] = lr
        losses = []
        for part in range(recipe.optim.accumulate):
            batch = self.feed.next()
            if batch is None:
                return False
            # For stochastic depth, the one thing that a forward pass draws.
            torch.manual_seed(torch_seed(recipe.seed, FORWARD, step - 1, run.sampler.micro(part)))
            losses.append(self.passes.run(batch.images, batch.plan, part))
        norm = self.passes.finish(optimizer, recipe.optim.clip or float("inf"))
        bad = self.reports.send(
            step,
            losses,
            norm,
            scale=scaler.scale(torch.ones((), device=run.device)) if scaler.is_enabled() else None,
            stop=self.stop.received is not None,
            news=bool(self.feed.failures),
            facts={
                "lr": lr,
                "epoch": step / run.steps_per_epoch,
                "waited": self.feed.waited,
                "time": time.perf_counter(),
            },
        )
        if not scaler.is_enabled():  # else it finds out by itself
            optimizer.found_inf = bad.float()  # the fused AdamW leaves all as it is where this is 1
        scaler.step(optimizer)
        scaler.update()
        self.passes.clear(optimizer)
        return True

    def take_note(self, up_to: int) -> None:
        """Read the reports of the updates up to one, and log what they say."""
        run, every = self.run, self.run.recipe.log.every_steps
        for report in self.reports.read(up_to):
            self.unlogged.append(report)
            self.stop_asked |= report.stop
            if report.news:
                for failures in run.processes.gather(self.feed.take_failures()):
                    self.log.unreadable(failures)
            if report.skipped:
                self._count_skipped(report)
            else:
                self.skipped_in_a_row = 0
            first_or_last = report.step in (run.first_step + 1, run.total_steps)
            if first_or_last or report.step % every == 0:
                self._log_window(report)
            if self.diverged:
                return

    def save(self, step: int, final: bool = False) -> None:
        """Write a checkpoint; everything before it is read and logged first.

        From a skipped update on it waits until one is applied again: what made it skip may be in
        the weights already, and older checkpoints go as new ones come. The `final` one does not
        wait: it takes no older one's place, and is not written where a weight is not finite.

        Raises:
            UserError: it could not be written, and this was the `final` one or one of many: until
                then, the run goes on and tries again when the next one is due.
        """
        run = self.run
        self.take_note(step)
        trouble = self.skipped_in_a_row > 0
        self.save_owed = trouble and not final
        if final and trouble and not self.diverged and not self._sound():
            self._diverge(step)
        if self.save_owed or self.diverged:
            return
        started = time.perf_counter()
        alone = run.processes.alone
        path, problem = run.folder.save(
            run_state(run, step, self.skipped),
            None if trouble else run.recipe.checkpoint,
            lambda folder: write_moments(run.model, run.optimizer, folder, alone),
            run.processes,
        )
        seconds = time.perf_counter() - started
        for note in run.folder.take_notes():
            self.log.say(note)
        if problem is None:
            self.checkpoint, self.saved, self.failed_saves = path, step, 0
            self.log.event("checkpoint", step=step, path=str(path), seconds=round(seconds, 3))
        else:
            self.failed_saves += 1
            self.log.event("not_saved", step=step, path=str(path), reason=problem)
            told = f"The checkpoint {path} could not be written: {problem}; older ones are whole"
            if final or self.failed_saves == FAILED_SAVES:
                raise run.processes.common_error(
                    f"{told}: make room or mend the folder, then repeat the command with --resume."
                )
            self.log.say(f"{told}. The run goes on and tries again when the next one is due.")
        self.window_start += seconds  # saving is not training time

    def draw(self, step: int) -> None:
        """Show how well the model fills in hidden units."""
        started = time.perf_counter()
        picture = self.painter.draw()
        if picture is not None:
            self.log.picture(step, "original, masked, reconstruction", picture)
        self.window_start += time.perf_counter() - started

    def stopped(self, step: int) -> Result:
        """The end of a run that a signal stopped."""
        if self.saved < step:  # it stopped between updates, or could not save
            self.save(step, final=True)
            if self.diverged:
                return Result(EXIT_DIVERGED, step, self.run.folder.newest_checkpoint())
        names = self.run.processes.gather(self.stop.received)
        received = next(name for name in names if name is not None)
        self.log.event("stopped", step=step, signal=received.name)
        saved = f"saved {self.checkpoint}" if self.checkpoint else "there was nothing to save yet"
        self.log.say(f"{received.name} received: {saved}; the same command with --resume goes on.")
        return Result(exit_code_of(received), step, self.checkpoint, received)

    def finish(self) -> None:
        """The last words."""
        run, log = self.run, self.log
        for failures in run.processes.gather(self.feed.take_failures()):
            log.unreadable(failures)
        log.event("end", step=run.total_steps, skipped=self.skipped, unreadable=log.num_unreadable)
        log.say(
            f"finished: {run.recipe.epochs} epochs, {run.total_steps} updates, {self.skipped}"
            f" skipped, {log.num_unreadable} unreadable images; checkpoint {self.checkpoint}"
        )

    def _save_due(self, step: int) -> bool:
        every = self.run.recipe.checkpoint
        by_steps = bool(every.every_steps) and step % every.every_steps == 0
        return by_steps or self._due(step, every.every_epochs)

    def _due(self, step: int, epochs: int | None) -> bool:
        return bool(epochs) and step % (epochs * self.run.steps_per_epoch) == 0

    def _log_window(self, report: Report) -> None:
        """A line on the updates since the line before."""
        count, done = len(self.unlogged), [r for r in self.unlogged if not r.skipped]
        seconds = max(report.facts["time"] - self.window_start, 1e-9)
        values = {
            "loss": statistics.fmean(r.loss for r in done) if done else math.nan,
            "grad_norm": statistics.fmean(r.grad_norm for r in done) if done else math.nan,
            "lr": report.facts["lr"],
            "epoch": report.facts["epoch"],
            "images_per_second": count * self.run.sampler.images_per_update / seconds,
            "data_wait": min((report.facts["waited"] - self.window_waited) / seconds, 1.0),
            "peak_memory_gib": peak_memory_gib(self.run.device),
            "skipped": self.skipped,
        }
        self.log.train(report.step, values)
        self.unlogged = []
        self.window_start = report.facts["time"]
        self.window_waited = report.facts["waited"]

    def _count_skipped(self, report: Report) -> None:
        run = self.run
        self.skipped += 1
        self.skipped_in_a_row += 1
        if run.processes.world.is_main:
            micro = report.bad_micro_batches()
            files = [
                run.dataset.path(item)
                for index in micro
                for item in run.sampler.items(report.step - 1, index)
            ]
            self.log.event(
                "skipped",
                step=report.step,
                micro_batches=micro,
                images=len(files),
                files=files[:NAMED_FILES],
            )
            self.log.say(
                f"update {self.log.number(report.step)} was skipped: its loss or gradient is not"
                f" finite ({len(files)} images, the first {files[0]}; more in log.jsonl)"
            )
        if self.skipped_in_a_row >= run.recipe.max_skipped:
            self._diverge(report.step)

    def _diverge(self, step: int) -> None:
        self.diverged = True
        self.log.event("diverged", step=step, skipped=self.skipped)
        advice = _diverged_advice(self.run, self.log.number(step), self.skipped_in_a_row)
        self.log.say(advice)

    def _sound(self) -> bool:
        """Whether all weights are finite. A collective."""
        own = (p.to_local() if isinstance(p, DTensor) else p for p in self.run.model.parameters())
        return all(self.run.processes.gather(all(bool(p.isfinite().all()) for p in own)))


@contextlib.contextmanager
def told_of_memory(device: torch.device) -> Iterator[None]:
    """Memory that runs out inside is a UserError, which says what to do."""
    try:
        yield
    except (MemoryError, RuntimeError) as error:
        # The allocator of a GPU has an error of its own, that of the CPU and libraries have not.
        if not isinstance(error, (MemoryError, torch.OutOfMemoryError)) and not any(
            words in str(error) for words in ("out of memory", "can't allocate memory")
        ):
            raise
        raise UserError(
            f"The memory of {device} ran out ({first_line(error)}); lower --data.batch-size and"
            " raise --optim.accumulate by as much, which leaves the update as it is, or take"
            " --activation-checkpointing true."
        ) from error


def _diverged_advice(run: Run, step: int, in_a_row: int) -> str:
    newest = run.folder.newest_checkpoint()
    advice = (
        "lower the learning rate (--optim.base-lr or --optim.lr), clip (--optim.clip 1), or use"
        " --precision bf16 or fp32"
    )
    again = f"; {newest} is from before it, --resume goes on there" if newest else ""
    updates = f"{in_a_row} updates" if in_a_row > 1 else "update"
    return (
        f"stopped after update {step}: the loss or gradient of the last {updates} was not finite."
        f" To go on, {advice}{again}."
    )

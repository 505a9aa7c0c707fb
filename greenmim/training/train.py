"""A run: pre-training, or fine-tuning.

    greenmim pretrain --config greenmim_swin-demo-cpu --data.root photos --work-dir runs/demo
    greenmim pretrain --config runs/demo/config.yaml --resume         # go on after a stop
    torchrun --nproc-per-node 8 -m greenmim pretrain ...              # one process for each GPU

`startup` makes a run ready; `Trainer.train` is the loop, all of it, whatever the `Task` is.
"""

from __future__ import annotations

import contextlib
import math
import signal
import statistics
import time
from collections import deque
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch.distributed.tensor import DTensor

import greenmim
from greenmim.data.sampler import FORWARD, torch_seed
from greenmim.guards import EXIT_DIVERGED, StopSignal, UserError, exit_code_of, first_line
from greenmim.launch import World
from greenmim.processes import LAG, Processes, Report, Reports
from greenmim.recipe import RunRecipe
from greenmim.training import run_folder
from greenmim.training.log import RunLog, peak_memory_gib
from greenmim.training.passes import whole_weights
from greenmim.training.profile import Profile
from greenmim.training.startup import Run, choose_device, prepare, started
from greenmim.training.task import Watch

# A run ends when so many checkpoints in a row could not be written.
FAILED_SAVES = 3
# Advice where memory runs out.
SMALLER = (
    "lower --data.batch-size and raise --optim.accumulate by the same factor, which keeps the"
    " update the same, or set --activation-checkpointing true"
)
# The most files of a skipped update that log.jsonl names.
NAMED_FILES = 64


@dataclass(frozen=True)
class Result:
    """How a call of `train` ended."""

    exit_code: int  # 0; 75 or 130 after a signal (saved, to be resumed); 3 (losses not finite)
    step: int  # updates done
    checkpoint: Path | None  # the newest one, if any
    signal: signal.Signals | None = None  # what stopped the run, if it was stopped


def train(
    recipe: RunRecipe,
    resume: str | None = None,
    max_steps: int | None = None,
    profile: bool = False,
) -> Result:
    """Run a recipe, in every process of the run (see `launch` for how they are started).

    Args:
        recipe: The run.
        resume: None starts a new run; "auto" resumes from the newest checkpoint of the work dir,
            or starts where there is none yet (a scheduler can repeat one command); else the path
            of a checkpoint.
        max_steps: End after so many updates of the run, with a checkpoint; the schedule stays that
            of all epochs. None trains to their end.
        profile: Record a few updates in the work dir (see `Profile`).

    Raises:
        UserError: bad input, and nothing was written; or a full disk, and older checkpoints are
            intact.
        PeerError: another process of the run died.
    """
    world = World.from_environment()
    with (
        contextlib.ExitStack() as outside,
        Processes(
            world, lambda: choose_device(recipe.device, world), recipe.hang_minutes
        ) as processes,
    ):
        run = prepare(recipe, resume, processes, max_steps)
        if run.progress.first_step >= run.last_step:
            newest = run.folder.newest_checkpoint()
            if newest is None:
                raise processes.common_error(
                    f"--resume {resume} has {run.progress.first_step} updates already, and"
                    f" --max-steps is {max_steps}; raise it."
                )
            if world.is_main:
                whole = run.last_step == run.total_steps
                length = f"{recipe.epochs} epochs" if whole else f"--max-steps {max_steps}"
                print(f"The run in {recipe.work_dir} is finished ({length}): {newest}")
            return Result(0, run.progress.first_step, newest)
        with started(run) as log:
            # Left after the processes: when one dies, torchrun sends SIGTERM to the others, which
            # are still finding out which one.
            stop = outside.enter_context(StopSignal())
            with contextlib.closing(run.feed), told_of_memory(processes.device, SMALLER):
                with recorded(run, log) if profile else contextlib.nullcontext() as recorder:
                    return Trainer(run, log, stop, recorder).train()


class Trainer:
    """The loop of a run, and what it does besides training: log, save, stop."""

    def __init__(
        self, run: Run, log: RunLog, stop: StopSignal, profile: Profile | None = None
    ) -> None:
        self.run, self.log, self.stop, self.profile = run, log, stop, profile
        processes = run.processes
        # A single process may give up on a loader that hangs; several have to stop together.
        run.feed.give_up = lambda: processes.alone and stop.received is not None
        run.feed.start()
        self.reports = Reports(processes, run.recipe.optim.accumulate)
        self.checkpoint: Path | None = None
        self.saved, self.failed_saves, self.save_owed = run.progress.first_step, 0, False
        self.skipped, self.skipped_in_a_row = run.progress.skipped, 0
        self.stop_asked = self.diverged = False
        self.clock: deque[tuple[float, float]] = deque()  # time and wait after updates not yet read
        self.unlogged: list[Report] = []
        self.window_start, self.window_waited = time.perf_counter(), 0.0
        self.asides = run.task.asides(
            Watch(log, processes, run.autocast, self._told_to_stop, run.steps_per_epoch)
        )

    def train(self) -> Result:
        """From the run's first update to its last."""
        run = self.run
        run.model.train()
        for step in range(run.progress.first_step + 1, run.last_step + 1):
            if not self.update(step):
                return self.stopped(step - 1)
            self.log.step_done()
            if self.profile is not None and self.profile.step():
                self.read_reports(step)  # writing the profile is not their time
                with self.not_training():
                    self.profile.close()

            # One process alone ends at its own signal. Several have to end at the same update: each
            # learns of the others' signals from the reports.
            last = step == run.last_step
            end = last or (run.processes.alone and self.stop.received is not None)
            # A report is read LAG updates late, when it has long arrived: nothing waits for it.
            self.read_reports(step if end else step - LAG)
            due = end or self.stop_asked or self.save_owed or self._save_due(step)
            if due and not self.diverged:
                self.save(step, final=end or self.stop_asked)
            if self.diverged:
                return Result(EXIT_DIVERGED, step, run.folder.newest_checkpoint())
            if due:  # a signal that came during the save needs no second one
                self.stop_asked |= any(run.processes.gather(self.stop.received is not None))
            if self.stop_asked and not last:
                return self.stopped(step)
            for epochs, work in self.asides:
                if not self.stop_asked and (last or self._epochs_done(step, epochs)):
                    self.aside(step, work)
                    if self.stop_asked and not last:
                        return self.stopped(step)
            if self.diverged:
                return Result(EXIT_DIVERGED, step, run.folder.newest_checkpoint())
        if self.stop_asked and self.asides:
            self.log.say("a signal ended the last measurements and pictures")
        self.say_the_end()
        return Result(0, run.last_step, self.checkpoint)

    def update(self, step: int) -> bool:
        """Forward and backward passes of the global batch, and one step of the optimiser.

        Returns False where a signal ended the wait for a batch; the weights are unchanged.
        """
        run, recipe, scaler = self.run, self.run.recipe, self.run.scaler
        optimizer, rate = run.optimizer, run.learning_rate(step)
        for group in optimizer.param_groups:
            group["lr"] = rate * group.get("lr_scale", 1.0)
        losses = []
        for index in range(recipe.optim.accumulate):
            batch = run.feed.next()
            if batch is None:
                return False
            number = run.sampler.micro_batch(index)
            # For stochastic depth, the only draw of a forward pass, and for what `inputs` draws.
            torch.manual_seed(torch_seed(recipe.seed, FORWARD, step - 1, number))
            inputs = run.task.inputs(batch, step - 1, number)
            losses.append(run.passes.forward_backward(inputs, index))
        norm = run.passes.clip(optimizer, recipe.optim.clip or math.inf)
        bad = self.reports.send(
            step,
            losses,
            norm,
            scale=scaler.scale(torch.ones_like(norm)) if scaler.is_enabled() else None,
            unreadable=bool(run.feed.failures),
            stop=self.stop.received is not None,
        )
        self.clock.append((time.perf_counter(), run.feed.waited))
        if not scaler.is_enabled():
            # At 1 the fused AdamW leaves weights and moments unchanged: an update is skipped
            # without the host knowing. A scaler sets it from the overflows that it found.
            optimizer.found_inf = bad.float()  # type: ignore[attr-defined]  # it looks for it
        scaler.step(optimizer)
        scaler.update()
        run.passes.zero_grad(optimizer)
        run.task.updated(step)
        return True

    def read_reports(self, up_to: int) -> None:
        """Read the reports of the updates up to one, and log them."""
        run, every = self.run, self.run.recipe.log.every_steps
        for report in self.reports.read(up_to):
            seconds, waited = self.clock.popleft()
            self.unlogged.append(report)
            self.stop_asked |= report.stop
            if report.unreadable:
                self._name_unreadable()
            if report.skipped:
                self._count_skipped(report)
            else:
                self.skipped_in_a_row = 0
            first_or_last = report.step in (run.progress.first_step + 1, run.last_step)
            if first_or_last or report.step % every == 0:
                self._log_window(report.step, seconds, waited)
            if self.diverged:
                return

    def save(self, step: int, final: bool = False) -> None:
        """Write a checkpoint, once all reports before it are read and logged.

        After a skipped update it waits until one is applied: the weights may be bad already, and
        each save removes an older checkpoint. A `final` one does not wait: it removes none, and is
        not written where a weight is not finite.

        Raises:
            UserError: it could not be written, and is `final` or the third failure in a row. After
                other failures the run continues, and tries again at the next save.
        """
        run, log = self.run, self.log
        self.read_reports(step)
        trouble = self.skipped_in_a_row > 0
        self.save_owed = trouble and not final
        if final and trouble and not self.diverged and not self._weights_are_finite():
            self._diverge(step)
        if self.save_owed or self.diverged:
            return
        start = time.perf_counter()
        path, problem = run_folder.save(
            run.folder,
            self._state(step),
            run.model,
            run.optimizer,
            None if trouble else run.recipe.checkpoint,
            run.processes,
            log.say_once,
        )
        seconds = time.perf_counter() - start
        self.window_start += seconds  # saving is not training time
        if problem is None:
            self.checkpoint, self.saved, self.failed_saves = path, step, 0
            log.event("checkpoint", step=step, path=str(path), seconds=round(seconds, 3))
            return
        self.failed_saves += 1
        log.event("not_saved", step=step, path=str(path), reason=problem)
        told = f"The checkpoint {path} could not be written: {problem}; older ones are intact"
        if final or self.failed_saves == FAILED_SAVES:
            raise run.processes.common_error(
                f"{told}: free disk space or fix the folder, then repeat the command with --resume."
            )
        log.say(f"{told}. The run continues, and tries again at the next save.")

    def _state(self, step: int) -> dict[str, Any]:
        """What a checkpoint's file holds after `step` updates of the schedule. A collective.

        It needs no generator state: all random numbers follow from the seed and the step.
        """
        run = self.run
        return {
            "format": f"greenmim.{run.task.command}",
            "version": run_folder.RUN_VERSION,
            "step": step,
            "updates": step + run.progress.shift,
            "epoch": run.epoch(step),
            "steps_per_epoch": run.steps_per_epoch,
            "images_per_update": run.sampler.images_per_update,
            "model": whole_weights(run.model, keep=run.processes.world.is_main),
            "scaler": run.scaler.state_dict(),
            "skipped": self.skipped,
            "recipe": run.recipe.to_dict(),
            "greenmim": greenmim.__version__,
            **run.task.state(keep=run.processes.world.is_main),
        }

    def aside(self, step: int, work: Callable[[int], bool]) -> None:
        """Do periodic work after an update, unless the run has diverged."""
        self.read_reports(step)  # the work is not their time
        if not self.diverged:
            with self.not_training():
                self.stop_asked |= not work(step)

    def _told_to_stop(self) -> bool:
        return self.stop.received is not None

    @contextlib.contextmanager
    def not_training(self) -> Iterator[None]:
        """Time spent inside does not count in the speed that the next log line gives."""
        start = time.perf_counter()
        yield
        self.window_start += time.perf_counter() - start

    def stopped(self, step: int) -> Result:
        """The end of a run that a signal stopped."""
        if self.saved < step:  # something was learned since the last save
            self.save(step, final=True)
            if self.diverged:
                return Result(EXIT_DIVERGED, step, self.run.folder.newest_checkpoint())
        received = next(filter(None, self.run.processes.gather(self.stop.received)))
        self.log.event("stopped", step=step, signal=received.name)
        newest = self.checkpoint or self.run.folder.newest_checkpoint()
        saved = f"saved {newest}" if newest else "there was nothing to save yet"
        self.log.say(f"{received.name} received: {saved}; repeat the command with --resume.")
        return Result(exit_code_of(received), step, newest, received)

    def say_the_end(self) -> None:
        run, log = self.run, self.log
        self._name_unreadable()
        log.event("end", step=run.last_step, skipped=self.skipped, unreadable=log.num_unreadable)
        whole = run.last_step == run.total_steps
        last, total = log.number(run.last_step), log.number(run.total_steps)
        updates = f"{last}" if whole else f"{last} of {total}"
        how, epochs = "finished" if whole else "ended by --max-steps", run.epoch(run.last_step)
        log.say(
            f"{how}: {epochs:g} epochs,"
            f" {updates} updates, {self.skipped} skipped, {log.num_unreadable} unreadable images;"
            f" checkpoint {self.checkpoint}"
        )

    def _name_unreadable(self) -> None:
        for failures in self.run.processes.gather(self.run.feed.take_failures()):
            self.log.unreadable(failures)

    def _save_due(self, step: int) -> bool:
        every = self.run.recipe.checkpoint
        by_steps = every.every_steps and step % every.every_steps == 0
        return by_steps or self._epochs_done(step, every.every_epochs)

    def _epochs_done(self, step: int, every: int | None) -> bool:
        return bool(every and step % (every * self.run.steps_per_epoch) == 0)

    def _log_window(self, step: int, now: float, waited: float) -> None:
        """Log the updates since the last line; `now` and `waited` (s) are after the last one."""
        run, done = self.run, [report for report in self.unlogged if not report.skipped]
        seconds = max(now - self.window_start, 1e-9)
        images = len(self.unlogged) * run.sampler.images_per_update
        norms = [r.grad_norm for r in done if math.isfinite(r.grad_norm)]  # float16 overflows
        values = {
            "loss": statistics.fmean(r.loss for r in done) if done else math.nan,
            "grad_norm": statistics.fmean(norms) if norms else math.nan,
            "lr": run.learning_rate(step),
            "epoch": run.epoch(step),
            "images_per_second": images / seconds,
            # Per process, to be compared with its device's peak.
            "model_tflops": run.flops * images / seconds / run.processes.world.size / 1e12,
            "data_wait": min((waited - self.window_waited) / seconds, 1.0),
            "peak_memory_gib": peak_memory_gib(run.processes.device),
            "loader_memory_gib": self._loader_bytes() / 2**30,
            "skipped": self.skipped,
        }
        self.log.train(step, values)
        self.unlogged, self.window_start, self.window_waited = [], now, waited

    def _loader_bytes(self) -> int:
        """Peak bytes of all loader processes: those of training stay during an evaluation."""
        others = max((sweep.loader_bytes for sweep in self.run.task.sweeps), default=0)
        return self.run.feed.memory() + others

    def _count_skipped(self, report: Report) -> None:
        run, log = self.run, self.log
        self.skipped += 1
        self.skipped_in_a_row += 1
        if run.processes.world.is_main:
            numbers = report.bad_micro_batches()
            items = [i for number in numbers for i in run.sampler.items(report.step - 1, number)]
            files = [run.task.dataset.path(item) for item in items[:NAMED_FILES]]
            facts = {"micro_batches": numbers, "images": len(items), "files": files}
            log.event("skipped", step=report.step, **facts)
            log.say(
                f"update {log.number(report.step)} was skipped: its loss or gradient was not finite"
                f" ({len(items)} images, first {files[0]}; see log.jsonl)"
            )
        if self.skipped_in_a_row >= run.recipe.max_skipped:
            self._diverge(report.step)

    def _diverge(self, step: int) -> None:
        self.diverged = True
        self.log.event("diverged", step=step, skipped=self.skipped)
        count, newest = self.skipped_in_a_row, self.run.folder.newest_checkpoint()
        again = f"; {newest} is from before it, --resume continues there" if newest else ""
        self.log.say(
            f"stopped after update {self.log.number(step)}: the loss or gradient of the last"
            f" {f'{count} updates' if count > 1 else 'update'} was not finite. To continue, lower"
            " the learning rate (--optim.base-lr or --optim.lr), clip (--optim.clip 1), or use"
            f" --precision bf16 or fp32{again}."
        )

    def _weights_are_finite(self) -> bool:
        """Whether all weights are finite. A collective."""
        own = (p.to_local() if isinstance(p, DTensor) else p for p in self.run.model.parameters())
        return all(self.run.processes.gather(all(bool(p.isfinite().all()) for p in own)))


@contextlib.contextmanager
def recorded(run: Run, log: RunLog) -> Iterator[Profile | None]:
    """The main process's profile of a few updates."""
    if not run.processes.world.is_main:
        yield None
        return
    updates = run.last_step - run.progress.first_step
    profile = Profile(run.folder.path, run.processes.device, updates, log.say)
    with contextlib.closing(profile):
        yield profile


@contextlib.contextmanager
def told_of_memory(device: torch.device, advice: str) -> Iterator[None]:
    """Turn an out-of-memory error inside into a UserError with `advice`."""
    try:
        yield
    except (MemoryError, RuntimeError) as error:
        # CUDA's allocator has its own error class; other errors are known by their text.
        if not isinstance(error, (MemoryError, torch.OutOfMemoryError)) and not any(
            words in str(error) for words in ("out of memory", "can't allocate memory")
        ):
            raise
        raise UserError(
            f"The memory of {device} ran out ({first_line(error)}); {advice}."
        ) from error

"""What a run says: plain lines or a progress bar, log.jsonl, TensorBoard, Weights & Biases."""

from __future__ import annotations

import resource
import sys
from collections.abc import Callable, Iterable
from typing import Any, TextIO

import numpy as np
import torch

from greenmim.messages import one_line, silence
from greenmim.recipe import UserError
from greenmim.training.log_file import LogFile, cut_log
from greenmim.training.run_folder import RunFolder
from greenmim.training.trackers import Tracker

BAR = "{percentage:3.0f}%|{bar}| {n_fmt}/{total_fmt} [{elapsed}<{remaining}{postfix}]"


class RunLog:
    """Writes one run's log. `train` lines hold the figures of the updates since the line before.

    Args:
        folder: The run's folder; log.jsonl is appended to. None: nothing is written or printed, as
            in all processes but the main one.
        trackers: Told the same figures, and closed.
        kept: Updates done at the folder's checkpoint that the run goes on from; later lines of an
            earlier try are dropped from log.jsonl.
        first_step, total_steps: Updates already done, and of the whole run, in the schedule's count
            like every `step` here.
        shift: What is written counts all updates ever done: so many more than the schedule's count.

    Raises:
        UserError: log.jsonl cannot be written. Once it could, a failure is told and the lines wait.
    """

    def __init__(
        self,
        folder: RunFolder | None,
        trackers: list[Tracker],
        kept: int,
        first_step: int,
        total_steps: int,
        shift: int = 0,
    ) -> None:
        self.shift, self.total_steps = shift, total_steps
        self._named: set[str] = set()
        self._trackers = trackers
        self._file = self._bar = None
        self._trouble: str | None = None
        if folder is None:
            return
        try:
            records = cut_log(folder.log, kept)
            self._file = LogFile(folder.log)
        except OSError as error:
            raise UserError(
                f"{folder.log} could not be written: {error.strerror or error}; checkpoints are"
                " whole: make room or mend the folder, then repeat the command with --resume."
            ) from error
        self._named = {r["path"] for r in records if r["event"] == "unreadable_image"}
        if sys.stderr.isatty():
            from tqdm import tqdm

            total, done = self.number(total_steps), self.number(first_step)
            self._bar = tqdm(total=total, initial=done, dynamic_ncols=True, bar_format=BAR)

    def number(self, step: int) -> int:
        """Updates ever done after `step` of the schedule's updates."""
        return step + self.shift

    def __enter__(self) -> RunLog:
        return self

    def __exit__(self, *_: object) -> None:
        if self._bar is not None:
            self._show(self._bar.close, sys.stderr)
        self._tell_trackers(lambda tracker: tracker.close())
        if self._file is not None:
            lost = self._file.close()
            if lost:
                self.say(f"{lost} lines could not be written to {self._file.path}")

    def say(self, text: str) -> None:
        """A line for the reader."""
        if self._bar is not None:
            self._show(lambda: self._bar.write(text))
        elif self._file is not None:
            self._show(lambda: print(text, flush=True))

    def _show(self, write: Callable[[], object], stream: TextIO | None = None) -> None:
        """To a reader who may have gone: the run goes on, and log.jsonl has it all."""
        try:
            write()
        except OSError as error:
            silence(stream or sys.stdout)
            self.event("output_lost", reason=one_line(error))

    def event(self, name: str, **values: Any) -> None:
        """A line for machines, in log.jsonl."""
        if self._file is None:
            return
        if "step" in values:
            values["step"] = self.number(values["step"])
        trouble = self._file.write(name, values)
        if trouble and not self._trouble:
            self.say(f"{self._file.path} could not be written: {trouble}; its lines wait")
        self._trouble = trouble

    def step_done(self) -> None:
        """One update is done."""
        if self._bar is not None:
            self._show(lambda: self._bar.update(1), sys.stderr)

    def train(self, step: int, values: dict[str, float]) -> None:
        """The figures after `step` updates."""
        self.event("train", step=step, **values)
        self._tell_trackers(lambda tracker: tracker.scalars(self.number(step), values))
        speed = f"{values['images_per_second']:.1f} img/s"
        wait = f"wait {100 * values['data_wait']:.0f}%"
        if self._bar is not None:  # short, for terminals of 80 columns
            loss = f"loss {values['loss']:.3f}"
            memory = f"{values['peak_memory_gib']:.1f} GiB"
            self._bar.set_postfix_str(f"{loss}, {speed}, {wait}, {memory}", refresh=False)
        elif self._file is not None:
            self.say(
                f"step {self.number(step):>6}/{self.number(self.total_steps)}"
                f"  epoch {values['epoch']:.2f}  loss {values['loss']:.4f}  lr {values['lr']:.2e}"
                f"  grad {values['grad_norm']:.2f}"
                f"  {speed}  {wait}  mem {values['peak_memory_gib']:.2f} GiB"
            )

    def picture(self, step: int, name: str, pixels: np.ndarray) -> None:
        """A picture for the trackers, uint8 [H, W, 3]."""
        self._tell_trackers(lambda tracker: tracker.picture(self.number(step), name, pixels))

    def unreadable(self, failures: Iterable[tuple[str, str]]) -> None:
        """Name image files that could not be read, each once."""
        for path, reason in failures:
            if path not in self._named:
                self._named.add(path)
                self.event("unreadable_image", path=path, reason=reason, count=len(self._named))
                self.say(f"cannot read {path} ({reason}); another image takes its place")

    @property
    def num_unreadable(self) -> int:
        """Image files that could not be read so far."""
        return len(self._named)

    def _tell_trackers(self, what: Callable[[Tracker], None]) -> None:
        for tracker in list(self._trackers):
            try:
                what(tracker)
            except Exception as error:  # a full disk, a lost connection: no reason to end a run
                self._trackers.remove(tracker)
                self.say(f"{tracker.name} is left out from here on: {one_line(error)}")


def peak_memory_gib(device: torch.device) -> float:
    """Peak memory so far in GiB: what PyTorch took of a GPU, else resident in the main process.

    Taken, not in use by tensors: a CUDA graph keeps memory that no tensor of the process names.
    """
    if device.type == "cuda":
        return torch.cuda.max_memory_reserved(device) / 2**30
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 2**20  # KiB on Linux

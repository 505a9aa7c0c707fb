"""What a run says: plain lines or a progress bar, log.jsonl, TensorBoard, Weights & Biases."""

from __future__ import annotations

import json
import math
import os
import resource
import sys
import time
from collections.abc import Callable, Iterable
from pathlib import Path
from typing import Any

import numpy as np
import torch

from greenmim.recipe import Recipe, UserError
from greenmim.training.run_folder import RunFolder
from greenmim.training.trackers import Tracker, make_trackers

BAR = "{percentage:3.0f}%|{bar}| {n_fmt}/{total_fmt} [{elapsed}<{remaining}{postfix}]"


class RunLog:
    """Writes one run's log. `train` lines hold the figures of the updates since the line before.

    Args:
        folder: The run's folder; log.jsonl is appended to. None: nothing is written or printed, as
            in all processes but the main one.
        recipe: The run.
        first_step: Updates already done; later lines of an earlier try are dropped from log.jsonl.
        total_steps: Updates of the whole run.

    Raises:
        UserError: here and in every method, when log.jsonl cannot be written.
    """

    def __init__(
        self, folder: RunFolder | None, recipe: Recipe, first_step: int, total_steps: int
    ) -> None:
        self.total_steps = total_steps
        self._named: set[str] = set()
        self._path = self._file = self._bar = None
        self._trackers: list[Tracker] = []
        if folder is None:
            return
        self._path = folder.log
        try:
            records = _drop_lines_after(folder.log, first_step)
            self._file = folder.log.open("a", encoding="utf-8")
        except OSError as error:
            raise self._not_written(error) from error
        self._named = {r["path"] for r in records if r["event"] == "unreadable_image"}
        self._trackers = make_trackers(folder, recipe, first_step)
        if sys.stderr.isatty():
            from tqdm import tqdm

            self._bar = tqdm(
                total=total_steps, initial=first_step, dynamic_ncols=True, bar_format=BAR
            )

    def __enter__(self) -> RunLog:
        return self

    def __exit__(self, *_: object) -> None:
        if self._bar is not None:
            self._bar.close()
        self._tell_trackers(lambda tracker: tracker.close())
        if self._file is not None:
            self._file.close()

    def say(self, text: str) -> None:
        """A line for the reader."""
        if self._bar is not None:
            self._bar.write(text)
        elif self._file is not None:
            print(text, flush=True)

    def event(self, name: str, **values: Any) -> None:
        """A line for machines, in log.jsonl."""
        if self._file is None:
            return
        finite = {
            key: None if isinstance(value, float) and not math.isfinite(value) else value
            for key, value in values.items()  # JSON has no NaN
        }
        record = {"event": name, "time": round(time.time(), 3), **finite}
        try:
            self._file.write(json.dumps(record) + "\n")
            self._file.flush()
        except OSError as error:
            self._file = None  # closing it would try once more
            raise self._not_written(error) from error

    def step_done(self) -> None:
        """One update is done."""
        if self._bar is not None:
            self._bar.update(1)

    def train(self, step: int, values: dict[str, float]) -> None:
        """The figures after `step` updates."""
        self.event("train", step=step, **values)
        self._tell_trackers(lambda tracker: tracker.scalars(step, values))
        speed = f"{values['images_per_second']:.1f} img/s"
        wait = f"wait {100 * values['data_wait']:.0f}%"
        if self._bar is not None:  # short, for terminals of 80 columns
            loss = f"loss {values['loss']:.3f}"
            memory = f"{values['peak_memory_gib']:.1f} GiB"
            self._bar.set_postfix_str(f"{loss}, {speed}, {wait}, {memory}", refresh=False)
        elif self._file is not None:
            print(
                f"step {step:>6}/{self.total_steps}  epoch {values['epoch']:.2f}"
                f"  loss {values['loss']:.4f}  lr {values['lr']:.2e}"
                f"  grad {values['grad_norm']:.2f}"
                f"  {speed}  {wait}  mem {values['peak_memory_gib']:.2f} GiB",
                flush=True,
            )

    def picture(self, step: int, name: str, pixels: np.ndarray) -> None:
        """A picture for the trackers, uint8 [H, W, 3]."""
        self._tell_trackers(lambda tracker: tracker.picture(step, name, pixels))

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
                self.say(f"{tracker.name} is left out from here on: {' '.join(str(error).split())}")

    def _not_written(self, error: OSError) -> UserError:
        return UserError(
            f"{self._path} could not be written: {error.strerror or error}; checkpoints are whole:"
            " make room or mend the folder, then repeat the command with --resume."
        )


def peak_memory_gib(device: torch.device) -> float:
    """Peak memory so far in GiB: of tensors on a GPU, else resident in the main process."""
    if device.type == "cuda":
        return torch.cuda.max_memory_allocated(device) / 2**30
    return (
        resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 2**20
    )  # ru_maxrss is in KiB on Linux


def read_log(path: str | Path) -> list[dict[str, Any]]:
    """The records of a log.jsonl; a last line cut off by a crash is left out."""
    records = []
    for line in Path(path).read_text(encoding="utf-8").splitlines():
        try:
            records.append(json.loads(line))
        except json.JSONDecodeError:
            continue
    return records


def _drop_lines_after(path: Path, step: int) -> list[dict[str, Any]]:
    """Remove what a broken-off try logged after the checkpoint that the run goes on from."""
    if not path.exists():
        return []
    kept = [record for record in read_log(path) if record.get("step", 0) <= step]
    temporary = path.with_name(f".{path.name}.{os.getpid()}")
    temporary.write_text("".join(json.dumps(record) + "\n" for record in kept), encoding="utf-8")
    os.replace(temporary, path)
    return kept

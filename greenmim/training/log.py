"""What a run says: log.jsonl, plain lines or a progress bar, TensorBoard, Weights & Biases."""

from __future__ import annotations

import contextlib
import functools
import importlib.util
import json
import math
import resource
import secrets
import sys
import time
from collections.abc import Callable, Iterable
from io import FileIO
from pathlib import Path
from typing import Any, TextIO

import numpy as np
import torch

from greenmim.checkpoint import free_name, save_text, write_atomic
from greenmim.data.images import REST_IS_USED
from greenmim.guards import UserError, one_line, silence
from greenmim.recipe import RunRecipe, flat

BAR = "{percentage:3.0f}%|{bar}| {n_fmt}/{total_fmt} [{elapsed}<{remaining}{postfix}]"


class RunLog:
    """Writes one run's log. A `train` line averages the updates since the line before.

    Every `step` here is in the schedule's count; what is written counts all updates ever done.

    Args:
        path: log.jsonl, which is appended to; UserError where it cannot be. None: nothing is
            written or printed, as in all processes but the main one.
        trackers: Get the same values, and are closed at the end.
        resumed_at, shift: As in `Progress`; lines of an earlier attempt after it are set aside.
        first_step, total_steps: Updates already done, and of the whole run.
    """

    def __init__(
        self,
        path: Path | None,
        trackers: list[TensorBoard | WandB],
        resumed_at: int,
        first_step: int,
        total_steps: int,
        shift: int = 0,
    ) -> None:
        self.shift, self.total_steps = shift, total_steps
        self._named: set[str] = set()  # unreadable files
        self._said: set[str] = set()
        self._trackers = trackers
        self._file = self._bar = None
        self._trouble: str | None = None  # why lines of log.jsonl wait
        if path is None:
            return
        try:
            records = cut_log(path, resumed_at)
            self._file = LogFile(path)
        except OSError as error:
            raise UserError(
                f"{path} could not be written: {error.strerror or error}; checkpoints are intact:"
                " free disk space or fix the folder, then repeat the command with --resume."
            ) from error
        self._named = {str(r.get("path")) for r in records if r["event"] == "unreadable_image"}
        if sys.stderr.isatty():
            from tqdm import tqdm

            total, done = self.number(total_steps), self.number(first_step)
            self._bar = tqdm(total=total, initial=done, dynamic_ncols=True, bar_format=BAR)

    def number(self, step: int) -> int:
        """Updates ever done when `step` of the schedule's are."""
        return step + self.shift

    @property
    def num_unreadable(self) -> int:
        """Image files that could not be read so far."""
        return len(self._named)

    def __enter__(self) -> RunLog:
        return self

    def __exit__(self, *_: object) -> None:
        if self._bar is not None:
            self._show(self._bar.close, sys.stderr)
        self._each_tracker(lambda tracker: tracker.close())
        if self._file is not None and self._file.close():
            self.say(f"{len(self._file.waiting)} lines could not be written to {self._file.path}")

    def say(self, text: str) -> None:
        """Print a line."""
        if self._bar is not None:
            self._show(functools.partial(self._bar.write, text))
        elif self._file is not None:
            self._show(lambda: print(text, flush=True))

    def say_once(self, text: str) -> None:
        """Print a line, but only once."""
        if text not in self._said:
            self._said.add(text)
            self.say(text)

    def event(self, name: str, **values: Any) -> None:
        """Append a record to log.jsonl."""
        if self._file is None:
            return
        if "step" in values:
            values["step"] = self.number(values["step"])
        before, self._trouble = self._trouble, self._file.write(name, values)
        if self._trouble and not before:
            self.say(
                f"{self._file.path} could not be written: {self._trouble}; its lines wait in memory"
            )

    def step_done(self) -> None:
        """Advance the progress bar."""
        if self._bar is not None:
            self._show(functools.partial(self._bar.update, 1), sys.stderr)

    def train(self, step: int, values: dict[str, float]) -> None:
        """Log the values of a `train` line, after `step` updates."""
        self.event("train", step=step, **values)
        self._each_tracker(lambda tracker: tracker.scalars(self.number(step), "train", values))
        speed = f"{values['images_per_second']:.1f} img/s"
        wait = f"wait {100 * values['data_wait']:.0f}%"
        if self._bar is not None:  # short, for terminals of 80 columns
            loss = f"loss {values['loss']:.3f}"
            loaders = f"{values['loader_memory_gib']:.1f}"
            memory = f"{values['peak_memory_gib']:.1f}+{loaders} GiB"
            self._bar.set_postfix_str(f"{loss}, {speed}, {wait}, {memory}", refresh=False)
        elif self._file is not None:
            self.say(
                f"step {self.number(step):>6}/{self.number(self.total_steps)}"
                f"  epoch {values['epoch']:.2f}  loss {values['loss']:.4f}  lr {values['lr']:.2e}"
                f"  grad {values['grad_norm']:.2f}"
                f"  {speed}  {values['model_tflops']:.3g} TFLOP/s  {wait}"
                f"  mem {values['peak_memory_gib']:.2f} GiB"
                f" + loaders {values['loader_memory_gib']:.2f}"
            )

    def measured(
        self, name: str, step: int, epoch: float, found: dict[str, float], text: str, **facts: int
    ) -> None:
        """Log values measured after `step` updates; `text` is the line for people."""
        self.event(name, step=step, epoch=epoch, **found, **facts)
        self._each_tracker(lambda tracker: tracker.scalars(self.number(step), name, found))
        total = self.number(self.total_steps)
        self.say(f"step {self.number(step):>6}/{total}  epoch {epoch:.2f}  {text}")

    def picture(self, step: int, name: str, pixels: np.ndarray) -> None:
        """A picture for the trackers, uint8 [H, W, 3]."""
        self._each_tracker(lambda tracker: tracker.picture(self.number(step), name, pixels))

    def unreadable(
        self, failures: Iterable[tuple[str, str]], instead: str = "another image takes its place"
    ) -> None:
        """Log image files that could not be read, each once, and what happens instead."""
        for path, reason in failures:
            if path not in self._named:
                self._named.add(path)
                self.event("unreadable_image", path=path, reason=reason, count=len(self._named))
                then = "" if reason.endswith(REST_IS_USED) else f"; {instead}"
                self.say(f"cannot read {path} ({reason}){then}")

    def _show(self, write: Callable[[], object], stream: TextIO | None = None) -> None:
        """Print; if the terminal or pipe is gone, the run continues, and log.jsonl is complete."""
        try:
            write()
        except OSError as error:
            silence(stream or sys.stdout)
            self.event("output_lost", reason=one_line(error))

    def _each_tracker(self, what: Callable[[TensorBoard | WandB], None]) -> None:
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


# ---- log.jsonl ----------------------------------------------------------------------------------


def read_log(path: str | Path) -> list[dict[str, Any]]:
    """The records of a log.jsonl; lines that a crash or a power cut damaged are left out."""
    records = []
    for line in Path(path).read_text(encoding="utf-8", errors="replace").splitlines():
        with contextlib.suppress(json.JSONDecodeError, RecursionError):
            record = json.loads(line)
            if isinstance(record, dict) and isinstance(record.get("event"), str):
                if isinstance(record.get("step", 0), (int, float)):
                    records.append(record)
    return records


def cut_log(path: Path, step: int) -> list[dict[str, Any]]:
    """Remove what an interrupted attempt logged after update `step`, where the run resumes.

    The whole log is kept as log.1.jsonl and so on. An OSError leaves the log unchanged.

    Returns:
        The records that are left.
    """
    if not path.exists():
        return []
    whole = path.read_bytes()
    left = [record for record in read_log(path) if record.get("step", 0) <= step]
    text = "".join(json.dumps(record) + "\n" for record in left)
    if text.encode() != whole:
        aside = free_name(path.parent, f"{path.stem}.{{}}{path.suffix}")
        write_atomic(lambda beside: beside.write_bytes(whole), aside)
        save_text(text, path)
    return left


class LogFile:
    """Appends records to log.jsonl; only the constructor raises OSError.

    A full disk does not end a run: records wait here, and are written with the next one.
    """

    def __init__(self, path: Path) -> None:
        self.path = path
        self.waiting: list[str] = []
        self._file: FileIO | None = path.open("ab", buffering=0)
        self._end = self._file.tell()

    def write(self, event: str, values: dict[str, Any]) -> str | None:
        """Append a record; returns why it could not be written, or None."""
        finite = {
            key: None if isinstance(value, float) and not math.isfinite(value) else value
            for key, value in values.items()  # JSON has no NaN
        }
        record = {"event": event, "time": round(time.time(), 3), **finite}
        self.waiting.append(json.dumps(record) + "\n")
        return self.write_waiting()

    def close(self) -> str | None:
        """Try once more, and close; returns as `write_waiting`."""
        problem = self.write_waiting()
        if self._file is not None:
            self._file.close()
        return problem

    def write_waiting(self) -> str | None:
        """Write what waits; returns why that failed, or None."""
        data = "".join(self.waiting).encode()
        try:
            if self._file is None:
                # Opened anew: after an error on a network file system the old handle stays broken.
                self._file = self.path.open("a+b", buffering=0)
                self._file.seek(self._end)
                got_through = self._file.read()
                if got_through and data.startswith(got_through):  # else others wrote it
                    self._file.truncate(self._end)
            while data:
                data = data[self._file.write(data) :]
            self._end = self._file.tell()
        except OSError as error:
            if self._file is not None:
                with contextlib.suppress(OSError):
                    self._file.close()
            self._file = None
            return error.strerror or str(error)
        self.waiting.clear()
        return None


# ---- trackers: `step` counts all updates ever done, pictures are uint8 [H, W, 3] ----------------


class TensorBoard:
    """Event files in the run's folder; what was written beyond `resumed_at` is purged."""

    name = "TensorBoard"

    def __init__(self, folder: Path, recipe: RunRecipe, resumed_at: int) -> None:
        from torch.utils.tensorboard import SummaryWriter

        try:
            self._writer = SummaryWriter(folder / "tensorboard", purge_step=resumed_at + 1)
        except OSError as error:
            raise UserError(
                f"--log.tensorboard: {folder / 'tensorboard'} cannot be written: {error.strerror}."
            ) from error
        if resumed_at == 0:
            rows = [f"| {key} | {value} |" for key, value in flat(recipe.to_dict()).items()]
            self._writer.add_text("recipe", "\n".join(["| value | |", "|---|---|", *rows]), 0)

    def scalars(self, step: int, group: str, values: dict[str, float]) -> None:
        for name, value in values.items():
            if name != "epoch":  # a straight line
                self._writer.add_scalar(f"{group}/{name}", value, step)

    def picture(self, step: int, name: str, pixels: np.ndarray) -> None:
        self._writer.add_image(name, pixels, step, dataformats="HWC")
        self._writer.flush()

    def close(self) -> None:
        self._writer.close()


class WandB:
    """A run of Weights & Biases, the same one again after a resume.

    W&B's own step may only grow, and a resumed run goes back. So updates are logged as a metric,
    which is the x-axis.
    """

    name = "Weights & Biases"

    def __init__(self, folder: Path, recipe: RunRecipe, resumed_at: int) -> None:
        import wandb

        self._wandb = wandb
        try:
            number = folder / "wandb_id"
            if not number.exists():
                save_text(secrets.token_hex(6), number)
            self._run = wandb.init(
                project=recipe.log.wandb,
                name=folder.name,
                id=number.read_text().strip(),
                resume="allow",
                dir=str(folder),
                config=recipe.to_dict(),
            )
            self._run.define_metric("update")
            self._run.define_metric("*", step_metric="update")
        except Exception as error:  # no key, no network: its own kinds of errors
            raise UserError(
                f"--log.wandb {recipe.log.wandb}: {one_line(error)}; log in (wandb login), or set"
                " WANDB_MODE=offline."
            ) from error

    def scalars(self, step: int, group: str, values: dict[str, float]) -> None:
        figures = {f"{group}/{name}": value for name, value in values.items()}
        self._run.log({"update": step, **figures})

    def picture(self, step: int, name: str, pixels: np.ndarray) -> None:
        self._run.log({"update": step, name: self._wandb.Image(pixels)})

    def close(self) -> None:
        self._run.finish()


def check_trackers(recipe: RunRecipe) -> None:
    """Raises UserError where a tracker's package is not installed."""
    if recipe.log.wandb and importlib.util.find_spec("wandb") is None:
        raise UserError("--log.wandb needs the package wandb: pip install wandb.")


def make_trackers(folder: Path, recipe: RunRecipe, resumed_at: int) -> list[TensorBoard | WandB]:
    """The trackers of a recipe; the one most likely to refuse comes first.

    Raises:
        UserError: one of them cannot be used.
    """
    wanted: dict = {WandB: bool(recipe.log.wandb), TensorBoard: recipe.log.tensorboard}
    return [kind(folder, recipe, resumed_at) for kind, asked in wanted.items() if asked]

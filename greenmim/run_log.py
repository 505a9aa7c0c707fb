"""What a run says: plain lines or a progress bar, log.jsonl, TensorBoard."""

from __future__ import annotations

import json
import math
import os
import resource
import sys
import time
from pathlib import Path
from typing import Any

import torch

from greenmim.run_folder import RunFolder

BAR = "{percentage:3.0f}%|{bar}| {n_fmt}/{total_fmt} [{elapsed}<{remaining}{postfix}]"


class RunLog:
    """Writes one run's log. `train` lines hold the figures of the updates since the line before.

    Args:
        folder: The run's folder; log.jsonl is appended to.
        first_step: Updates already done; later lines of an earlier try are dropped from log.jsonl.
        total_steps: Updates of the whole run.
        tensorboard: Write event files too.
    """

    def __init__(
        self, folder: RunFolder, first_step: int, total_steps: int, tensorboard: bool
    ) -> None:
        self.total_steps = total_steps
        records = _drop_lines_after(folder.log, first_step)
        self._file = folder.log.open("a", encoding="utf-8")
        self._writer = None
        if tensorboard:
            from torch.utils.tensorboard import SummaryWriter

            self._writer = SummaryWriter(folder.tensorboard, purge_step=first_step + 1)
        self._bar = None
        if sys.stderr.isatty():
            from tqdm import tqdm

            self._bar = tqdm(
                total=total_steps,
                initial=first_step,
                dynamic_ncols=True,
                bar_format=BAR,
            )
        self._named = {r["path"] for r in records if r["event"] == "unreadable_image"}

    def __enter__(self) -> RunLog:
        return self

    def __exit__(self, *_: object) -> None:
        if self._bar is not None:
            self._bar.close()
        if self._writer is not None:
            self._writer.close()
        self._file.close()

    def say(self, text: str) -> None:
        """A line for the reader."""
        if self._bar is not None:
            self._bar.write(text)
        else:
            print(text, flush=True)

    def event(self, name: str, **values: Any) -> None:
        """A line for machines, in log.jsonl."""
        finite = {
            key: None if isinstance(value, float) and not math.isfinite(value) else value
            for key, value in values.items()  # JSON has no NaN
        }
        record = {"event": name, "time": round(time.time(), 3), **finite}
        self._file.write(json.dumps(record) + "\n")
        self._file.flush()

    def step_done(self) -> None:
        """One update is done."""
        if self._bar is not None:
            self._bar.update(1)

    def train(self, step: int, values: dict[str, float]) -> None:
        """The figures after `step` updates."""
        self.event("train", step=step, **values)
        if self._writer is not None:
            for name, value in values.items():
                if name != "epoch":
                    self._writer.add_scalar(f"train/{name}", value, step)
        speed = f"{values['images_per_second']:.1f} img/s"
        wait = f"wait {100 * values['data_wait']:.0f}%"
        if self._bar is not None:  # short, for terminals of 80 columns
            loss = f"loss {values['loss']:.3f}"
            memory = f"{values['peak_memory_gib']:.1f} GiB"
            self._bar.set_postfix_str(f"{loss}, {speed}, {wait}, {memory}", refresh=False)
        else:
            print(
                f"step {step:>6}/{self.total_steps}  epoch {values['epoch']:.2f}"
                f"  loss {values['loss']:.4f}  lr {values['lr']:.2e}"
                f"  grad {values['grad_norm']:.2f}"
                f"  {speed}  {wait}  mem {values['peak_memory_gib']:.2f} GiB",
                flush=True,
            )

    def unreadable(self, failures: tuple[tuple[str, str], ...]) -> None:
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

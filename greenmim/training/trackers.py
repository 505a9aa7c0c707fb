"""TensorBoard and Weights & Biases: curves and pictures beside the run's own log."""

from __future__ import annotations

import hashlib
import importlib.util
from typing import Protocol

import numpy as np

from greenmim.recipe import Recipe, UserError
from greenmim.training.run_folder import RunFolder


class Tracker(Protocol):
    """Where curves and pictures go."""

    name: str

    def scalars(self, step: int, values: dict[str, float]) -> None:
        """Figures after `step` updates."""

    def picture(self, step: int, name: str, pixels: np.ndarray) -> None:
        """A picture, uint8 [H, W, 3]."""

    def close(self) -> None:
        """Write what is left."""


class TensorBoard:
    """Event files in the run's folder; what was written beyond `first_step` is purged."""

    name = "TensorBoard"

    def __init__(self, folder: RunFolder, recipe: Recipe, first_step: int) -> None:
        from torch.utils.tensorboard import SummaryWriter

        self._writer = SummaryWriter(folder.tensorboard, purge_step=first_step + 1)
        rows = [f"| {key} | {value} |" for key, value in _flat(recipe.to_dict()).items()]
        if first_step == 0:
            table = "\n".join(["| value | |", "|---|---|", *rows])
            self._writer.add_text("recipe", table, first_step)

    def scalars(self, step: int, values: dict[str, float]) -> None:
        for name, value in values.items():
            if name != "epoch":  # a straight line
                self._writer.add_scalar(f"train/{name}", value, step)

    def picture(self, step: int, name: str, pixels: np.ndarray) -> None:
        self._writer.add_image(name, pixels, step, dataformats="HWC")
        self._writer.flush()

    def close(self) -> None:
        self._writer.close()


class WandB:
    """A run of Weights & Biases, the same one again after a resume."""

    name = "Weights & Biases"

    def __init__(self, folder: RunFolder, recipe: Recipe, first_step: int) -> None:
        import wandb

        self._wandb = wandb
        try:
            self._run = wandb.init(
                project=recipe.log.wandb,
                name=folder.path.name,
                id=hashlib.sha1(str(folder.path.resolve()).encode()).hexdigest()[:12],
                resume="allow",
                dir=str(folder.path),
                config=recipe.to_dict(),
            )
        except Exception as error:  # no key, no network: its own kinds of errors
            reason = " ".join(str(error).split())
            raise UserError(
                f"--log.wandb {recipe.log.wandb}: {reason}; log in (wandb login), or set"
                " WANDB_MODE=offline."
            ) from error

    def scalars(self, step: int, values: dict[str, float]) -> None:
        self._run.log({f"train/{name}": value for name, value in values.items()}, step=step)

    def picture(self, step: int, name: str, pixels: np.ndarray) -> None:
        self._run.log({name: self._wandb.Image(pixels)}, step=step)

    def close(self) -> None:
        self._run.finish()


def check_trackers(recipe: Recipe) -> None:
    """Refuse a tracker whose package is not here.

    Raises:
        UserError: it is not.
    """
    if recipe.log.wandb and importlib.util.find_spec("wandb") is None:
        raise UserError("--log.wandb needs the package wandb: pip install wandb.")


def make_trackers(folder: RunFolder, recipe: Recipe, first_step: int) -> list[Tracker]:
    """The trackers that a recipe asks for."""
    wanted = {TensorBoard: recipe.log.tensorboard, WandB: bool(recipe.log.wandb)}
    return [kind(folder, recipe, first_step) for kind, asked in wanted.items() if asked]


def _flat(values: dict, prefix: str = "") -> dict[str, object]:
    flat = {}
    for key, value in values.items():
        nested = isinstance(value, dict)
        flat |= _flat(value, f"{prefix}{key}.") if nested else {prefix + key: value}
    return flat

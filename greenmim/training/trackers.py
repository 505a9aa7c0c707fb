"""TensorBoard and Weights & Biases: curves and pictures beside the run's own log."""

from __future__ import annotations

import importlib.util
import secrets
from typing import Protocol

import numpy as np

from greenmim.checkpoint import save_text
from greenmim.messages import one_line
from greenmim.recipe import Recipe, UserError, flat
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
    """Event files in the run's folder; what was written beyond update `kept` is purged."""

    name = "TensorBoard"

    def __init__(self, folder: RunFolder, recipe: Recipe, kept: int) -> None:
        from torch.utils.tensorboard import SummaryWriter

        try:
            self._writer = SummaryWriter(folder.tensorboard, purge_step=kept + 1)
        except OSError as error:
            raise UserError(
                f"--log.tensorboard: {folder.tensorboard} cannot be written: {error.strerror}."
            ) from error
        rows = [f"| {key} | {value} |" for key, value in flat(recipe.to_dict()).items()]
        if kept == 0:
            table = "\n".join(["| value | |", "|---|---|", *rows])
            self._writer.add_text("recipe", table, 0)

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
    """A run of Weights & Biases, the same one again after a resume.

    Its own count of steps only rises, and a resumed run may go back behind it; so updates are a
    figure of their own, which the curves are drawn over.
    """

    name = "Weights & Biases"

    def __init__(self, folder: RunFolder, recipe: Recipe, kept: int) -> None:
        import wandb

        self._wandb = wandb
        try:
            number = folder.path / "wandb_id"
            if not number.exists():
                save_text(secrets.token_hex(6), number)
            self._run = wandb.init(
                project=recipe.log.wandb,
                name=folder.path.name,
                id=number.read_text().strip(),
                resume="allow",
                dir=str(folder.path),
                config=recipe.to_dict(),
            )
            self._run.define_metric("update")
            self._run.define_metric("*", step_metric="update")
        except Exception as error:  # no key, no network: its own kinds of errors
            raise UserError(
                f"--log.wandb {recipe.log.wandb}: {one_line(error)}; log in (wandb login), or set"
                " WANDB_MODE=offline."
            ) from error

    def scalars(self, step: int, values: dict[str, float]) -> None:
        figures = {f"train/{name}": value for name, value in values.items()}
        self._run.log({"update": step, **figures})

    def picture(self, step: int, name: str, pixels: np.ndarray) -> None:
        self._run.log({"update": step, name: self._wandb.Image(pixels)})

    def close(self) -> None:
        self._run.finish()


def check_trackers(recipe: Recipe) -> None:
    """Refuse a tracker whose package is not here.

    Raises:
        UserError: it is not.
    """
    if recipe.log.wandb and importlib.util.find_spec("wandb") is None:
        raise UserError("--log.wandb needs the package wandb: pip install wandb.")


def make_trackers(folder: RunFolder, recipe: Recipe, kept: int) -> list[Tracker]:
    """The trackers that a recipe asks for; the one that may refuse comes first.

    Args:
        folder: The run's folder; it is there.
        recipe: The run.
        kept: Updates done at the folder's checkpoint that the run goes on from.

    Raises:
        UserError: one of them cannot be used.
    """
    wanted = {WandB: bool(recipe.log.wandb), TensorBoard: recipe.log.tensorboard}
    return [kind(folder, recipe, kept) for kind, asked in wanted.items() if asked]

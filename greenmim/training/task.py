"""What a run trains. The loop (`train.Trainer`) asks its task for all that is not every run's."""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from greenmim.config import ModelConfig
from greenmim.data.dataset import AugmentedImages, Finish
from greenmim.data.loader import Batch, Collate
from greenmim.evaluation.sweep import Sweep
from greenmim.guards import UserError, first_line, one_line
from greenmim.initial import continued
from greenmim.processes import Processes
from greenmim.recipe import RunRecipe
from greenmim.training.log import RunLog

# What is done beside training, every so many epochs and at the end: it is called with the number of
# updates done, and gives False where a process was told to stop meanwhile.
Aside = tuple[int, Callable[[int], bool]]
# The end of the augmentation: in the loader, and on the device.
Finishes = tuple[Finish | None, Finish | None]


@dataclass(frozen=True)
class Watch:
    """What it takes to look at a run."""

    log: RunLog
    processes: Processes
    autocast: Callable[[], torch.autocast]
    stop: Callable[[], bool]  # whether this process was told to stop
    steps_per_epoch: int

    def measured(self, name: str, step: int, found: dict[str, float], text: str, **facts: int):
        """Log what was found after `step` updates; `text` says it to people."""
        self.log.measured(name, step, step / self.steps_per_epoch, found, text, **facts)


def started_from(
    config: ModelConfig, init: str | None, sizes: dict[str, Any], state: dict[str, Any] | None
) -> ModelConfig:
    """The configuration of a run's model, by that of the weights it starts from.

    Args:
        config: What was asked for.
        init, sizes: The checkpoint of --init, and what is known of its model.
        state: The checkpoint that the run goes on from, which counts then.

    Raises:
        UserError: --init has another encoder, or other heads. Of a run that goes on
            `check_same_model` tells.
    """
    try:
        return continued(config, state["recipe"]["model"] if state else sizes)
    except ValueError as error:
        if state:
            return config
        raise UserError(f"--init {init}: {first_line(error)}.") from error


class Task(ABC):
    """A network that learns from images; one in each process of a run.

    Before a run it is called in this order: `find`, in the main process alone, whose answer all
    get, `build`, `initialise` or `restore`, `placed`, `make_sweeps`.

    Attributes:
        command: That of the command line; checkpoints are of the format greenmim.COMMAND.
        recipe: The run's; what it left to a checkpoint is known after `build`.
        model: The network, after `build`.
        dataset: Images to learn from, after `build`.
        sweeps: Images to measure with, after `make_sweeps`.
        bytes_per_weight: Of a checkpoint.
    """

    command: str
    recipe: RunRecipe
    model: nn.Module
    dataset: AugmentedImages
    sweeps: list[Sweep]
    bytes_per_weight = 12  # weights and two moments in float32

    def __init__(self, recipe: RunRecipe) -> None:
        self.recipe, self.sweeps = recipe, []

    # ---- before a run

    @abstractmethod
    def find(self) -> dict[str, Any]:
        """Where the images are, by option, "data.root" first; UserError where there are none."""

    @abstractmethod
    def build(self, found: dict[str, Any], state: dict[str, Any] | None) -> list[str]:
        """Make network and data set; what people should know, a line each.

        Args:
            found: What `find` gave.
            state: Of the checkpoint that the run goes on from, if it does.

        Raises:
            UserError: any bad input.
        """

    @abstractmethod
    def facts(self, found: dict[str, Any]) -> list[str]:
        """Lines on what would be trained, after `build`."""

    @abstractmethod
    def flops(self) -> float:
        """Floating-point operations of an image's forward pass; nothing that is repeated counts."""

    @abstractmethod
    def initialise(self, checkpoint: str) -> list[str]:
        """Start from the weights of --init; lines for people. UserError where they do not fit."""

    def restore(self, state: dict[str, Any]) -> None:
        """Take the weights of a checkpoint of such a run."""
        try:
            self.model.load_state_dict(state["model"])
        except (RuntimeError, TypeError) as error:  # of other weights than its recipe says
            raise UserError(f"The run's checkpoint is damaged: {one_line(error)[:300]}") from error

    def placed(self, processes: Processes) -> None:  # noqa: B027
        """The model is on its device, and not spread over the processes yet."""

    @abstractmethod
    def parameter_groups(self) -> list[dict[str, Any]]:
        """Those of the optimiser; `lr_scale` is a factor of a group's learning rate."""

    @abstractmethod
    def collate(self, finish: Finish | None) -> Collate:
        """What makes batches; `finish` as of `Collate`."""

    @abstractmethod
    def make_sweeps(
        self, found: dict[str, Any], finishes: Finishes, processes: Processes
    ) -> list[str]:
        """Prepare what is measured with; lines for people. A collective."""

    # ---- in the loop

    @abstractmethod
    def inputs(self, batch: Batch, step: int, micro_batch: int) -> tuple[Any, ...]:
        """Arguments of `loss`: tensors on the device and plans, of the same shapes each time.

        Args:
            step: Number of the update, from 0.
            micro_batch: Number in the global batch.
        """

    @abstractmethod
    def loss(self, wrapped_model: nn.Module, *inputs: Any) -> Tensor:
        """The loss of a micro-batch; `wrapped_model` is what to call in place of the model."""

    def updated(self, step: int) -> None:  # noqa: B027
        """Update number `step`, from 1, is done."""

    def state(self, keep: bool) -> dict[str, Any]:
        """What a checkpoint has beside the weights; {} without `keep`. A collective."""
        return {}

    @abstractmethod
    def asides(self, watch: Watch) -> list[Aside]:
        """What is done beside training."""

"""What a run trains: all that differs between pre-training and fine-tuning."""

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

# Work beside training, every so many epochs and at the end: called with the number of updates done.
# It returns False where a process was told to stop meanwhile.
Aside = tuple[int, Callable[[int], bool]]
# The last steps of augmentation, in the loader and on the device; one of the two is None.
Finishes = tuple[Finish | None, Finish | None]


@dataclass(frozen=True)
class Watch:
    """What periodic work needs of a run."""

    log: RunLog
    processes: Processes
    autocast: Callable[[], torch.autocast]
    stop: Callable[[], bool]  # whether this process was told to stop
    steps_per_epoch: int

    def measured(self, name: str, step: int, found: dict[str, float], text: str, **facts: int):
        """Log what was measured after `step` updates; `text` is the line for people."""
        self.log.measured(name, step, step / self.steps_per_epoch, found, text, **facts)


def started_from(
    config: ModelConfig, init: str | None, sizes: dict[str, Any], state: dict[str, Any] | None
) -> ModelConfig:
    """The configuration of a run's model, completed from the weights that it starts from.

    Args:
        config: What was asked for.
        init, sizes: The checkpoint of --init, and what is known of its model.
        state: Content of the checkpoint that the run resumes from; it takes precedence.

    Raises:
        UserError: --init has another encoder or other heads. (`check_same_model` checks `state`.)
    """
    try:
        return continued(config, state["recipe"]["model"] if state else sizes)
    except ValueError as error:
        if state:
            return config
        raise UserError(f"--init {init}: {first_line(error)}.") from error


class Task(ABC):
    """A network and how it learns from images; one in each process of a run.

    Before the loop: `find` (in the main process only, and sent to all), `build`, `initialise` or
    `restore`, `placed`, `make_sweeps`.

    Attributes:
        command: The command's name; the format of its checkpoints is greenmim.COMMAND.
        recipe: The run's; `build` fills in what it left to a checkpoint.
        model: The network, after `build`.
        dataset: Images to learn from, after `build`.
        sweeps: Evaluations, after `make_sweeps`.
        bytes_per_weight: Bytes of a checkpoint per parameter.
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
        """Image sources by option, "data.root" first, and classes; UserError without images."""

    @abstractmethod
    def build(self, found: dict[str, Any], state: dict[str, Any] | None) -> list[str]:
        """Make the network and the dataset; returns notes for people, a line each.

        Args:
            found: What `find` returned.
            state: Content of the checkpoint that the run resumes from, or None.

        Raises:
            UserError: any bad input.
        """

    @abstractmethod
    def facts(self, found: dict[str, Any]) -> list[str]:
        """Lines of a dry run on what would be trained; after `build`."""

    @abstractmethod
    def flops(self) -> float:
        """Floating-point operations of one image's forward pass; recomputation does not count."""

    @abstractmethod
    def initialise(self, checkpoint: str) -> list[str]:
        """Load the weights of --init; returns notes. UserError where they do not fit."""

    def restore(self, state: dict[str, Any]) -> None:
        """Load the weights of a run's checkpoint; UserError where it is damaged."""
        try:
            self.model.load_state_dict(state["model"])
        except (RuntimeError, TypeError) as error:  # of other weights than its recipe says
            raise UserError(
                f"The run's checkpoint is damaged: {one_line(error)[:300]}; name an older one with"
                " --resume."
            ) from error

    def placed(self, processes: Processes) -> None:  # noqa: B027
        """Called with the model on its device, before DDP or FSDP wraps it."""

    @abstractmethod
    def parameter_groups(self) -> list[dict[str, Any]]:
        """Parameter groups for AdamW; a group's `lr_scale` multiplies its learning rate."""

    @abstractmethod
    def collate(self, finish: Finish | None) -> Collate:
        """The collate function of training; `finish` as for `Collate`."""

    @abstractmethod
    def make_sweeps(
        self, found: dict[str, Any], finishes: Finishes, processes: Processes
    ) -> list[str]:
        """Prepare the evaluations; returns notes for people. A collective."""

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
        """Called after update `step`, from 1."""

    def state(self, keep: bool) -> dict[str, Any]:
        """More entries of a checkpoint; {} unless `keep`. A collective."""
        return {}

    @abstractmethod
    def asides(self, watch: Watch) -> list[Aside]:
        """The periodic work of a run."""

"""What the processes tell each other after every update, read a few updates later.

One small vector, summed over the processes on the device: the loss of every micro-batch of the
global batch, the gradient norm, and two flags. Whether it is finite decides on the device, for all
processes alike, whether the update is skipped; the host reads it when it has long arrived, so that
nothing waits. As all read the same numbers at the same update, all decide the same from them.
"""

from __future__ import annotations

import math
from collections import deque
from collections.abc import Iterator
from dataclasses import dataclass

import torch

from greenmim.training.distributed import Processes

# Updates between sending a report and reading it.
LAG = 2


@dataclass(frozen=True)
class Report:
    """One update as all processes saw it.

    Attributes:
        step: Updates done with it.
        losses: Loss of every micro-batch of the global batch, in its order.
        grad_norm: Norm of the gradient before clipping.
        skipped: Whether the weights were left as they were.
        stop: Whether a process was asked to stop.
        news: Whether a process has files to name that it could not read.
        facts: What this process gave to `send`.
    """

    step: int
    losses: list[float]
    grad_norm: float
    skipped: bool
    stop: bool
    news: bool
    facts: dict[str, float]

    @property
    def loss(self) -> float:
        """Mean loss of the global batch."""
        return math.nan if self.skipped else math.fsum(self.losses) / len(self.losses)

    def bad_micro_batches(self) -> list[int]:
        """Those whose loss is not finite; all of them where only the gradient was not."""
        bad = [i for i, loss in enumerate(self.losses) if not math.isfinite(loss)]
        return bad or list(range(len(self.losses)))


class Reports:
    """Sends and reads the reports of a run.

    Args:
        processes: The processes of the run.
        device: Where the losses are.
        accumulate: Micro-batches of a process in an update.
    """

    def __init__(self, processes: Processes, device: torch.device, accumulate: int) -> None:
        self.processes, self.device = processes, device
        self.num_losses = accumulate * processes.world.size
        self._sent: deque[tuple[int, torch.Tensor, torch.cuda.Event | None, dict]] = deque()

    def send(
        self,
        step: int,
        losses: list[torch.Tensor],
        grad_norm: torch.Tensor,
        *,
        scale: torch.Tensor | None = None,
        stop: bool = False,
        news: bool = False,
        facts: dict[str, float] | None = None,
    ) -> torch.Tensor:
        """Tell the others about an update. A collective that does not wait for a GPU.

        Args:
            step: Updates done with this one.
            losses: Scalar losses of this process's micro-batches, in order.
            grad_norm: Scalar.
            scale: What a gradient scaler multiplied the loss with, a scalar on the device. It finds
                the scale by norms that are not finite, and such an update counts as skipped only
                where the scale is below 1 and can be the reason no more.
            stop: Whether this process was asked to stop.
            news: Whether this process has unreadable files to name.
            facts: For the reader in this process.

        Returns:
            Boolean scalar on the device, the same in all processes: skip the update.
        """
        world, count = self.processes.world, self.num_losses
        vector = torch.zeros(count + 3, device=self.device)
        vector[world.rank : count : world.size] = torch.stack(losses).float()
        vector[count] = grad_norm / world.size
        # Filled by kernels that carry the number: no copy from the host.
        vector[count + 1].fill_(float(news))
        vector[count + 2].fill_(float(stop))
        self.processes.sum_(vector)
        norm_counts = True if scale is None else scale < 1
        bad = (vector[count].isfinite().logical_not() & norm_counts) | (
            vector[:count].isfinite().all().logical_not()
        )
        message = torch.cat([vector, bad.float()[None]])
        event = None
        if self.device.type == "cuda":
            message = message.to("cpu", non_blocking=True)  # into page-locked memory
            event = torch.cuda.Event()
            event.record()
        self._sent.append((step, message, event, facts or {}))
        return bad

    def read(self, up_to: int) -> Iterator[Report]:
        """The reports, in order, of the updates up to `up_to` that were not read yet."""
        while self._sent and self._sent[0][0] <= up_to:
            step, message, event, facts = self._sent.popleft()
            if event is not None:
                event.synchronize()
            values, count = message.tolist(), self.num_losses
            yield Report(
                step=step,
                losses=values[:count],
                grad_norm=values[count],
                skipped=bool(values[count + 3]),
                stop=bool(values[count + 2]),
                news=bool(values[count + 1]),
                facts=facts,
            )

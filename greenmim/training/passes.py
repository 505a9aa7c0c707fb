"""Forward and backward passes of an update: launched one by one, or replayed as a CUDA graph.

A graph takes thousands of launches off the host. What it needs is here by design: fixed shapes, no
wait for the host, and inputs in two pieces of memory, the images and the plan. The optimiser's step
stays outside: it is a few launches, and the gradient scaler and skipped updates keep working as
they are.
"""

from __future__ import annotations

import contextlib
import gc
from collections.abc import Callable

import torch
from torch import Tensor, nn

from greenmim.planning import Plan
from greenmim.training.distributed import Processes
from greenmim.training.parallel import clip_gradients, gradients_kept_back

# Passes before the one that is recorded: compilation, choice of algorithms, first use of libraries.
WARM_UP = 3


class Passes:
    """The passes of one process.

    Args:
        forward: The model, or what to call in its place (see `parallel.distribute`).
        parameters: Those that are trained.
        autocast: Makes the context of a forward pass.
        scaler: Scales the loss; may be disabled.
        parts: Micro-batches of an update.
    """

    def __init__(
        self,
        forward: nn.Module,
        parameters: list[nn.Parameter],
        autocast: Callable[[], contextlib.AbstractContextManager],
        scaler: torch.amp.GradScaler,
        parts: int,
    ) -> None:
        self.forward, self.parameters, self.autocast = forward, parameters, autocast
        self.scaler, self.parts = scaler, parts

    def run(self, images: Tensor, plan: Plan, part: int) -> Tensor:
        """Add the gradient of a micro-batch; its loss, a scalar on the device.

        Args:
            images: float [B, 3, H, W] on the device.
            plan: Of its masks, on the device.
            part: The number of the micro-batch in the update.
        """
        with gradients_kept_back(self.forward, part + 1 < self.parts):
            return self._pass(images, plan, 1 / self.parts)

    def finish(self, optimizer: torch.optim.Optimizer, limit: float) -> Tensor:
        """Make the sum of an update ready for the optimiser: unscaled, clipped.

        Returns:
            The gradient's norm before clipping, a scalar on the device.
        """
        self.scaler.unscale_(optimizer)
        return clip_gradients(self.parameters, limit)

    def clear(self, optimizer: torch.optim.Optimizer) -> None:
        """Forget the gradient."""
        optimizer.zero_grad(set_to_none=True)

    def _pass(self, images: Tensor, plan: Plan, share: float) -> Tensor:
        """Add `share` of the gradient; the loss."""
        with self.autocast():
            loss = self.forward(images, plan=plan, loss_only=True).loss
        self.scaler.scale(loss * share).backward()
        return loss.detach()


class GraphedPasses(Passes):
    """Passes recorded once, at the first micro-batch, and replayed.

    One process with one micro-batch in an update has the gradients that a replay writes: nothing is
    added up and nothing cleared, and they share the graph's memory with activations. Else gradients
    lie in one piece of memory of their own, to which replays add, and which is summed over the
    processes between the passes and the optimiser's step, all at once.

    Args:
        processes: The processes of the run, each with the same weights.
        others: As for `Passes`; `forward` is the model or the compiled model, without DDP.
    """

    def __init__(self, processes: Processes, *others) -> None:
        super().__init__(*others)
        self.processes = processes
        adds_up = self.parts > 1 or not processes.alone
        self.gradient = flat_gradients(self.parameters) if adds_up else None
        self._replay: Callable[[], None] | None = None

    def run(self, images: Tensor, plan: Plan, part: int) -> Tensor:
        if self._replay is None:
            self._images, self._plan = images.clone(), Plan(plan.memory.clone(), plan.layout)
            devices = [images.device] if images.device.type == "cuda" else []
            # The warm-up draws, too (stochastic depth), but is no part of the run.
            with torch.random.fork_rng(devices):
                self._replay = record(self._recorded_pass, self._forget)
            self._forget_sum()  # of what the warm-up left
        recorded = self._images.shape, self._plan.layout.places()
        if recorded != (images.shape, plan.layout.places()):
            raise ValueError("the passes were recorded for images or a plan of other shapes")
        self._images.copy_(images)
        self._plan.memory.copy_(plan.memory)
        self._replay()
        return self._loss.clone()

    def finish(self, optimizer: torch.optim.Optimizer, limit: float) -> Tensor:
        if self.gradient is not None:
            self.processes.sum_(self.gradient)
        return super().finish(optimizer, limit)

    def clear(self, optimizer: torch.optim.Optimizer) -> None:
        self._forget_sum()

    def _forget_sum(self) -> None:
        if self.gradient is not None:
            self.gradient.zero_()

    def _forget(self) -> None:
        """Before a pass that is to leave gradients of its own."""
        if self.gradient is None:
            for parameter in self.parameters:
                parameter.grad = None

    def _recorded_pass(self) -> None:
        share = 1 / (self.parts * self.processes.world.size)
        self._loss = self._pass(self._images, self._plan, share)


def flat_gradients(parameters: list[nn.Parameter]) -> Tensor:
    """Give all parameters gradients that are views of one vector of zeros, which is returned.

    Each begins at a multiple of 64 bytes, as tensors of their own would: kernels take whole vectors
    of memory only there.
    """
    first = parameters[0]
    step = 64 // first.element_size()
    sizes = [-(-p.numel() // step) * step for p in parameters]
    vector = torch.zeros(sum(sizes), dtype=first.dtype, device=first.device)
    for parameter, piece in zip(parameters, vector.split(sizes), strict=True):
        parameter.grad = piece[: parameter.numel()].view_as(parameter)
    return vector


def record(work: Callable[[], None], prepare: Callable[[], None]) -> Callable[[], None]:
    """Record a function's kernels as a CUDA graph; calling the result launches them again.

    Args:
        work: What is recorded.
        prepare: Called before each of its calls, the recorded one too, and no part of it.
    """
    stream = torch.cuda.Stream()
    stream.wait_stream(torch.cuda.current_stream())
    with torch.cuda.stream(stream):
        for _ in range(WARM_UP):
            prepare()
            work()
    torch.cuda.current_stream().wait_stream(stream)
    prepare()
    gc.collect()  # tensors that nobody needs are not to be freed while recording
    graph = torch.cuda.CUDAGraph()
    # Other threads, such as the one that pins batches, may go on calling CUDA meanwhile.
    with torch.cuda.graph(graph, capture_error_mode="thread_local"):
        work()
    return graph.replay

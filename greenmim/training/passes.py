"""Forward and backward passes of an update, on one device or spread over the processes.

A model is spread as copies (DDP) or slices (FSDP2). Passes are launched one by one, or replayed as
a CUDA graph, which takes thousands of launches off the host. What a graph needs is here by design:
fixed shapes, no wait for the host, and inputs in a few pieces of memory: images, a plan, targets.
The optimiser's step stays outside: it is a few launches, and the gradient scaler and skipped
updates keep working as they are.
"""

from __future__ import annotations

import contextlib
import gc
import math
import warnings
from collections.abc import Callable, Sequence
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch._functorch import config as functorch_config
from torch.distributed.fsdp import fully_shard, register_fsdp_forward_method
from torch.distributed.tensor import DTensor
from torch.nn import functional as F
from torch.nn.parallel import DistributedDataParallel

from greenmim.planning import Plan
from greenmim.processes import Processes
from greenmim.recipe import OptimConfig, RunRecipe

# Of a forward pass: images first, then whatever a loss needs.
Inputs = Sequence[Tensor | Plan]
# Passes before the one that is recorded: compilation, choice of algorithms, first use of libraries.
WARM_UP = 3


def distribute(model: nn.Module, recipe: RunRecipe, alone: bool) -> nn.Module:
    """What to call in place of `model`, a GreenMIM or a Classifier, which is on its device.

    DDP keeps a whole copy everywhere and averages gradients; FSDP2 keeps a slice of weights,
    gradients and moments and collects a block's weights when it runs. `model` holds slices
    (DTensors) afterwards, so an optimiser has to be made after this.
    """
    if recipe.compile:
        recompute_pointwise(recipe.recompute_pointwise)
    if not alone and recipe.cuda_graph:
        # Gradients are summed after the recorded passes (see `GraphedPasses`); here as in DDP's
        # constructor, all start from the weights of the first process.
        for tensor in (*model.parameters(), *model.buffers()):
            dist.broadcast(tensor.detach(), src=0)
    if alone or recipe.cuda_graph:
        # The stubs say that it makes a function of a module.
        return torch.compile(model, fullgraph=True) if recipe.compile else model  # type: ignore[return-value]
    if recipe.strategy == "fsdp":
        # The prediction is a view, of which it warns in case somebody changes it in place.
        warnings.filterwarnings("ignore", message="FSDP2-wrapped module")
        blocks = list(model.blocks())
        if recipe.compile:
            # The blocks are one function to the compiler, which gives up a function after 8 graphs:
            # for as many blocks, with and without gradients, and with everything visible.
            import torch._dynamo.config as dynamo  # seconds, which only who compiles need spend

            for name in ("recompile_limit", "accumulated_recompile_limit"):
                setattr(dynamo, name, max(getattr(dynamo, name), 3 * len(blocks)))
        for block in blocks:
            if recipe.compile:  # by block: the hooks around it are Python
                # Sizes differ from stage to stage and never else: each has a graph of its own.
                block.compile(fullgraph=True, dynamic=False)
            fully_shard(block)
        fully_shard(model)
        if hasattr(model, "embed"):
            register_fsdp_forward_method(model, "embed")
        return model
    # Compiled inside: traced as one graph, which PyTorch cuts where DDP's buckets end, so that
    # their gradients travel while the rest of the backward pass runs.
    inner = torch.compile(model, fullgraph=True) if recipe.compile else model
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", FutureWarning)  # newer versions have two names for it
        # Nothing here has buffers that change, so there are none to send.
        return DistributedDataParallel(inner, broadcast_buffers=False, gradient_as_bucket_view=True)


def make_optimizer(groups: list[dict[str, Any]], optim: OptimConfig) -> torch.optim.AdamW:
    """AdamW for groups of parameters; fused: it can skip updates."""
    return torch.optim.AdamW(
        groups, 0.0, optim.betas, optim.eps, weight_decay=optim.weight_decay, fused=True
    )


def decay_groups(model: nn.Module) -> list[dict[str, Any]]:
    """Groups of parameters: with weight decay, and biases, norms, position tables, tokens."""
    without = model.no_weight_decay()
    trained = [(name, p) for name, p in model.named_parameters() if p.requires_grad]
    return [
        {"params": [p for name, p in trained if name not in without]},
        {"params": [p for name, p in trained if name in without], "weight_decay": 0.0},
    ]


def recompute_pointwise(wanted: bool) -> None:
    """Whether what is compiled from now on computes GELU, norms and 16-bit weights again.

    torch.compile keeps what products of the backward pass take of them unless told otherwise.
    """
    functorch_config.ban_recompute_materialized_backward = not wanted


def reconstruction_loss(wrapped_model: nn.Module, images: Tensor, plan: Plan) -> Tensor:
    """Of a micro-batch, a scalar; `wrapped_model` is called in place of a GreenMIM."""
    return wrapped_model(images, plan=plan, loss_only=True).loss


def classification_loss(
    wrapped_model: nn.Module, images: Tensor, plan: Plan, targets: Tensor
) -> Tensor:
    """Of a micro-batch, a scalar: the mean cross-entropy to targets [B, K]; `wrapped_model` is
    called in place of a Classifier."""
    return F.cross_entropy(wrapped_model(images, plan).float(), targets)


class Passes:
    """The passes of one process.

    Args:
        loss: Gives the loss of a micro-batch's inputs.
        wrapped_model: What it calls (see `distribute`).
        parameters: Those that are trained.
        autocast: Makes the context of a forward pass.
        scaler: Scales the loss; may be disabled.
        accumulate: Micro-batches of an update.
    """

    def __init__(
        self,
        loss: Callable[..., Tensor],
        wrapped_model: nn.Module,
        parameters: list[nn.Parameter],
        autocast: Callable[[], contextlib.AbstractContextManager],
        scaler: torch.amp.GradScaler,
        accumulate: int,
    ) -> None:
        self.loss, self.wrapped_model = loss, wrapped_model
        self.parameters, self.autocast = parameters, autocast
        self.scaler, self.accumulate = scaler, accumulate
        # A micro-batch adds its share of the mean over an update to the gradient.
        self.share = 1 / accumulate

    def forward_backward(self, inputs: Inputs, micro_batch: int) -> Tensor:
        """Add the gradient of a micro-batch, number so-and-so of the update from 0.

        Args:
            inputs: Of `loss`, on the device; the same shapes each time.

        Returns:
            Its loss, a scalar on the device.
        """
        # Before the last one DDP adds up without telling the others. FSDP tells them always: not
        # to would need the memory of whole gradients.
        more = micro_batch + 1 < self.accumulate
        quiet = more and isinstance(self.wrapped_model, DistributedDataParallel)
        with self.wrapped_model.no_sync() if quiet else contextlib.nullcontext():
            return self._pass(inputs)

    def clip(self, optimizer: torch.optim.Optimizer, limit: float) -> Tensor:
        """Unscale and clip the gradient of an update; its norm before, a scalar on the device."""
        self.scaler.unscale_(optimizer)
        return clip_gradients(self.parameters, limit)

    def zero_grad(self, optimizer: torch.optim.Optimizer) -> None:
        optimizer.zero_grad(set_to_none=True)

    def _pass(self, inputs: Inputs) -> Tensor:
        with self.autocast():
            loss = self.loss(self.wrapped_model, *inputs)
        self.scaler.scale(loss * self.share).backward()
        return loss.detach()


class GraphedPasses(Passes):
    """Passes recorded once, at the first micro-batch, and replayed.

    One process with one micro-batch in an update has the gradients that a replay writes: nothing is
    added up and nothing cleared, and they share the graph's memory with activations. Else gradients
    lie in one piece of memory of their own, to which replays add, and which is summed over the
    processes between the passes and the optimiser's step, all at once.

    Args:
        processes: The processes of the run, each with the same weights.
        others: As for `Passes`; the model is compiled or not, without DDP.
    """

    def __init__(self, processes: Processes, *others) -> None:
        super().__init__(*others)
        self.processes = processes
        # DDP takes the mean over the processes; the sum of `clip` does not.
        self.share = 1 / (self.accumulate * processes.world.size)
        adds_up = self.accumulate > 1 or not processes.alone
        self.gradient = flat_gradients(self.parameters) if adds_up else None
        self._replay: Callable[[], None] | None = None

    def forward_backward(self, inputs: Inputs, micro_batch: int) -> Tensor:
        if self._replay is None:
            self._inputs = [
                Plan(part.memory.clone(), part.layout) if isinstance(part, Plan) else part.clone()
                for part in inputs
            ]
            device = inputs[0].device  # type: ignore[union-attr]  # images come first
            devices = [device] if device.type == "cuda" else []
            # The warm-up draws, too (stochastic depth), but is no part of the run.
            with torch.random.fork_rng(devices):
                self._replay = record(self._recorded_pass, self._forget)
            self._forget_sum()  # of what the warm-up left
        if _shapes(self._inputs) != _shapes(inputs):
            raise ValueError("the passes were recorded for images or a plan of other shapes")
        for mine, new in zip(self._inputs, inputs, strict=True):
            memory_of(mine).copy_(memory_of(new))
        self._replay()
        return self._loss.clone()

    def clip(self, optimizer: torch.optim.Optimizer, limit: float) -> Tensor:
        if self.gradient is not None:
            self.processes.sum_(self.gradient)
        return super().clip(optimizer, limit)

    def zero_grad(self, optimizer: torch.optim.Optimizer) -> None:
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
        self._loss = self._pass(self._inputs)


def memory_of(part: Tensor | Plan) -> Tensor:
    """The one piece of memory of an input."""
    return part.memory if isinstance(part, Plan) else part


def _shapes(inputs: Inputs) -> list:
    return [part.layout.regions() if isinstance(part, Plan) else part.shape for part in inputs]


def flat_gradients(parameters: list[nn.Parameter]) -> Tensor:
    """Give all parameters gradients that are views of one vector of zeros, which is returned.

    Each begins at a multiple of 64 bytes: kernels take whole vectors of memory only there.
    """
    first = parameters[0]
    step = 64 // first.element_size()
    sizes = [-(-p.numel() // step) * step for p in parameters]
    vector = torch.zeros(sum(sizes), dtype=first.dtype, device=first.device)
    for parameter, piece in zip(parameters, vector.split(sizes), strict=True):
        parameter.grad = piece[: parameter.numel()].view_as(parameter)
    return vector


def record(work: Callable[[], None], prepare: Callable[[], None]) -> Callable[[], None]:
    """Record the kernels of `work` as a CUDA graph; calling the result launches them again.

    `prepare` is called before each call of it, the recorded one too, and is no part of it.
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


def clip_gradients(parameters: list[nn.Parameter], limit: float) -> torch.Tensor:
    """Scale gradients down to a norm of at most `limit`; their norm before, a scalar."""
    gradients = [p.grad for p in parameters if p.grad is not None]
    norm = nn.utils.get_total_norm(gradients)
    value = (norm.full_tensor() if isinstance(norm, DTensor) else norm).detach()
    # Gradients that stay as they are need no pass over them; to look at the norm, which says so,
    # is for nothing on a CPU and a wait for the device elsewhere.
    if math.isfinite(limit) and (value.device.type != "cpu" or value > limit):
        nn.utils.clip_grads_with_norm_(parameters, limit, norm)
    return value


def whole_weights(model: nn.Module, keep: bool) -> dict[str, torch.Tensor]:
    """The state dict with whole tensors, or {} without `keep`. A collective after fully_shard.

    What was in slices comes to the CPU: a GPU never holds more than one whole tensor of it.
    """
    weights = {}
    for name, tensor in model.state_dict().items():
        if isinstance(tensor, DTensor):
            tensor = tensor.full_tensor()
            tensor = tensor.cpu() if keep else None
        if keep:
            weights[name] = tensor
    return weights

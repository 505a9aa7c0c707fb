"""How a model is spread over the processes: copies (DDP) or slices (FSDP2)."""

from __future__ import annotations

import contextlib
import math
import warnings

import torch
import torch.distributed as dist
from torch import nn
from torch._functorch import config as functorch_config
from torch.distributed.fsdp import fully_shard
from torch.distributed.tensor import DTensor
from torch.nn.parallel import DistributedDataParallel

from greenmim.mim import GreenMIM
from greenmim.recipe import Recipe


def distribute(model: GreenMIM, recipe: Recipe, alone: bool) -> nn.Module:
    """What to call in place of `model`, whose parameters it trains; `model` is on its device.

    DDP keeps a whole copy everywhere and averages gradients; FSDP2 keeps a slice of weights,
    gradients and moments and collects a block's weights when it runs: their places in `model` hold
    slices (DTensors) afterwards, so an optimiser has to be made after this.
    """
    model.set_grad_checkpointing(recipe.activation_checkpointing)
    if recipe.compile:
        recompute_pointwise(recipe.recompute_pointwise)
    if not alone and recipe.cuda_graph:
        # Gradients are summed after the recorded passes (see `passes`); here as in DDP's
        # constructor, all start from the weights of the first process.
        for tensor in (*model.parameters(), *model.buffers()):
            dist.broadcast(tensor.detach(), src=0)
    if alone or recipe.cuda_graph:
        return torch.compile(model, fullgraph=True) if recipe.compile else model
    if recipe.strategy == "fsdp":
        # The prediction is a view, of which it warns in case somebody changes it in place.
        warnings.filterwarnings("ignore", message="FSDP2-wrapped module")
        blocks = [*model.encoder.blocks(), *model.decoder_blocks]
        if recipe.compile:
            _allow_graphs(len(blocks))
        for block in blocks:
            if recipe.compile:  # by block: the hooks around it are Python
                # Sizes differ from stage to stage and never else: each has a graph of its own.
                block.compile(fullgraph=True, dynamic=False)
            fully_shard(block)
        return fully_shard(model)
    # Compiled inside: traced as one graph, which PyTorch cuts where DDP's buckets end, so that
    # their gradients travel while the rest of the backward pass runs.
    inner = torch.compile(model, fullgraph=True) if recipe.compile else model
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", FutureWarning)  # newer versions have two names for it
        # Nothing here has buffers that change, so there are none to send.
        return DistributedDataParallel(inner, broadcast_buffers=False, gradient_as_bucket_view=True)


def _allow_graphs(count: int) -> None:
    # The blocks are one function to the compiler, which gives up a function after 8 graphs: for as
    # many blocks, with and without gradients.
    import torch._dynamo.config as dynamo_config  # seconds, which only who compiles need spend

    for name in ("recompile_limit", "accumulated_recompile_limit"):
        setattr(dynamo_config, name, max(getattr(dynamo_config, name), 2 * count))


def recompute_pointwise(wanted: bool) -> None:
    """Whether what is compiled from now on keeps less and computes cheap things again.

    Those that a product of the backward pass takes: GELU, norms, and weights in 16 bits. To compute
    them again costs a pass that writes them; torch.compile keeps them unless told otherwise.
    """
    functorch_config.ban_recompute_materialized_backward = not wanted


def gradients_kept_back(forward: nn.Module, wanted: bool) -> contextlib.AbstractContextManager:
    """Inside, if `wanted`, DDP adds up gradients without telling the others.

    FSDP tells them always: keeping back would need the memory of whole gradients.
    """
    if wanted and isinstance(forward, DistributedDataParallel):
        return forward.no_sync()
    return contextlib.nullcontext()


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


def whole_weights(model: GreenMIM, keep: bool) -> dict[str, torch.Tensor]:
    """The state dict with whole tensors, or {} without `keep`. A collective after fully_shard.

    What was in slices comes to the CPU, so that a GPU never holds more than one whole tensor of it.
    """
    weights = {}
    for name, tensor in model.state_dict().items():
        if isinstance(tensor, DTensor):
            tensor = tensor.full_tensor()
            tensor = tensor.cpu() if keep else None
        if keep:
            weights[name] = tensor
    return weights

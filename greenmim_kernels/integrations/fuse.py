"""Which modules of a model the kernels can run, and the exchange of their classes."""

from __future__ import annotations

import copy
import hashlib
import re
from dataclasses import dataclass, field

import torch
from torch import Tensor, nn

from ..backends import use_backend
from ..windows import partition_from_windows
from .attention import Fused, fused_class, has_plain_index, index_matrix
from .kinds import ATTENTION, BLOCKS, LAYERS, Kind


@dataclass
class FusionReport:
    """What :func:`fuse_window_attention` did.

    Attributes:
        fused: what was replaced, by the module's name.
        left: why a module that looks like attention in windows was not, by its name.
    """

    fused: dict[str, str] = field(default_factory=dict)
    left: dict[str, str] = field(default_factory=dict)

    def __str__(self) -> str:
        if not self.fused and not self.left:
            return "no attention in windows found; nothing was changed"
        lines = []
        for title, entries in (("fused", self.fused), ("left as it is", self.left)):
            by_text: dict[str, list[str]] = {}
            for name, text in entries.items():
                by_text.setdefault(text, []).append(name or "the model itself")
            for text, names in by_text.items():
                where = names[0] if len(names) == 1 else f"{names[0]} to {names[-1]}"
                lines.append(f"{title}: {len(names)} x {text} ({where})")
        return "\n".join(lines)


def fuse_window_attention(model: nn.Module) -> FusionReport:
    """Makes the attention in windows of a model run on the fused kernels, in place.

    Parameters, buffers, their names and values stay; :func:`unfuse_window_attention` undoes it.
    Modules are known by their structure: the Swins of timm, torchvision, transformers, MONAI and
    Microsoft, SwinIR and MaxViT with rolling, padding and cutting into windows; else each class
    with the names and the ``forward(x, mask)`` of Swin's ``WindowAttention``, and HAT's. A copy of
    each with other weights is asked for its numbers before and after, in float64 on the CPU; where
    they differ the module is left alone.

    Calls go to the module's own code, with one warning, where the kernels lack something: attention
    dropout above 0 in training, attention maps asked for, a dtype or head dim. Pairs that a mask
    excludes are excluded exactly, where libraries add -100.

    Args:
        model: any module, on any device but "meta", before FSDP shards it; may be one of these
            modules itself.

    Returns:
        A :class:`FusionReport`; print it.
    """
    left: dict[str, str] = {}
    tried: dict[tuple, tuple | str] = {}
    for kinds in (ATTENTION, BLOCKS, LAYERS):
        for name, module in model.named_modules():
            found = [kind for kind in kinds if kind.fits(module)]
            if not found or isinstance(module, Fused):
                continue
            code = _code_of(module)
            for kind in found:
                key = (kind.ours, code)
                if key not in tried:
                    tried[key] = _try(module, kind)
                if isinstance(tried[key], tuple):
                    module.__class__ = fused_class(*tried[key])
                    break
            else:
                left[name] = f"{type(module).__name__}: {tried[found[0].ours, code]}"
    return _report(model, left)


def unfuse_window_attention(model: nn.Module) -> None:
    """Gives every module that :func:`fuse_window_attention` changed its own class back.

    Args:
        model: changed in place.

    Raises:
        RuntimeError: something else, such as FSDP, has changed the class of a fused module since;
            nothing is undone.
    """
    fused = {name: module for name, module in model.named_modules() if isinstance(module, Fused)}
    for name, module in fused.items():
        if type(module) is not fused_class(*module.unfused):  # type: ignore[arg-type]  # hashable
            raise RuntimeError(
                f"{name or 'the model'} has become a {type(module).__name__} since it was fused;"
                " undo that first"
            )
    for module in fused.values():
        module.__class__ = module.unfused[0]  # type: ignore[assignment]  # one of its two bases


def _report(model: nn.Module, left: dict[str, str]) -> FusionReport:
    report = FusionReport(left=dict(left))
    inside: list[str] = []
    for name, module in model.named_modules():
        if any(name.startswith(outer) for outer in inside):
            continue
        label = type(module).__name__
        if isinstance(module, Fused):
            extent = next(
                kind.extent
                for kind in (*ATTENTION, *BLOCKS, *LAYERS)
                if kind.ours is module.unfused[1]
            )
            report.fused[name] = f"{module.unfused[0].__name__}, {extent}"
            inside.append(f"{name}." if name else "")
        elif _looks_like_it(module) and not any(f"{name}.".startswith(f"{x}.") for x in left):
            report.left[name] = f"{label}: not known"
            inside.append(f"{name}.")
    return report


def _looks_like_it(module: nn.Module) -> bool:
    name = type(module).__name__
    is_called_so = re.search("window.*(attention|msa)$", name, re.IGNORECASE) is not None
    return is_called_so or hasattr(module, "relative_position_index")


# --- is it what it looks like? ------------------------------------------------------------------


# Attributes that differ between modules of a model where their code does not.
SIZES = frozenset(
    "training p drop_prob input_resolution dim embed_dims num_heads num_attention_heads head_dim"
    " attention_head_size all_head_size scale scaling in_features out_features in_channels"
    " out_channels normalized_shape".split()
)


def _code_of(module: nn.Module) -> tuple:
    """What a module computes with besides its weights: those with the same run the same code."""
    plain = (bool, int, float, str, tuple, list, type(None))
    found: list[object] = []
    for name, child in module.named_modules():
        settings = [
            (key, str(value))
            for key, value in sorted(vars(child).items())
            if isinstance(value, plain) and key not in SIZES
        ]
        tensors = [*child._parameters.items(), *child._buffers.items()]
        given = [(key, x is None) for key, x in tensors]
        # Such as a method that somebody has replaced.
        called = [(key, id(value)) for key, value in vars(child).items() if callable(value)]
        found.append((name, type(child), str(called), str(settings), str(given)))
    found += [(name, _digest(buffer)) for name, buffer in module.named_buffers()]
    return tuple(found)


def _digest(x: Tensor) -> bytes:
    """Of a buffer's values; empty without any."""
    if x.is_meta:
        return b""
    return hashlib.blake2b(x.detach().cpu().flatten().view(torch.uint8).numpy().tobytes()).digest()


def _try(module: nn.Module, kind: Kind) -> tuple | str:
    """What to fuse a module by, if a copy gives its numbers so; else the reason why not."""
    if any(x.is_meta for x in (*module.parameters(), *module.buffers())):
        return 'on the device "meta"; fuse it with values'
    if "forward" in vars(module):
        return "its forward was replaced"
    try:
        # Whatever surrounds the call: the copies are on the CPU, in float64.
        with (
            torch.device("cpu"),
            torch.inference_mode(False),
            torch.no_grad(),
            torch.autocast("cpu", enabled=False),
            use_backend("reference"),  # which takes everything
        ):
            return _compared(module, kind)
    except Exception as error:  # of anybody's code
        return f"its code could not be tried: {type(error).__name__}: {error}"


def _compared(module: nn.Module, kind: Kind) -> tuple | str:
    plain_index = has_plain_index(module, kind.ours)
    if not plain_index:
        index = index_matrix(module).cpu()
        partition_from_windows(torch.arange(index.shape[0])[None], bias_index=index)
    original, draw = _copy(module), torch.Generator().manual_seed(0)
    for weight in original.parameters():
        fan_in = weight.shape[-1] if weight.dim() == 2 else 1
        weight.copy_(torch.randn(weight.shape, dtype=weight.dtype, generator=draw) / fan_in**0.5)
    fused = copy.deepcopy(original)
    unfuse_window_attention(original)
    unfused = (type(module), kind.ours, plain_index, True)
    fused.__class__ = fused_class(*unfused)  # type: ignore[arg-type]  # hashable
    for number, arguments in enumerate(kind.sample(original, draw)):
        try:
            one, other = (getattr(m, kind.method)(*arguments) for m in (original, fused))
            one, other = (x if isinstance(x, Tensor) else x[0] for x in (one, other))
            # Libraries may take the softmax in float32 even so.
            is_same = one.shape == other.shape
            is_same = is_same and (one - other).abs().max() <= 1e-5 * one.abs().max()
        except Exception:
            if number < kind.whole:
                raise
            is_same = False
        if not is_same and number < kind.whole:
            return "its code computes something else"
        if not is_same:  # windows with fewer slots
            return (*unfused[:3], False)
    return unfused


def _copy(module: nn.Module) -> nn.Module:
    """In float64 on the CPU, for evaluation, without hooks."""
    without: dict = {}
    for child in module.modules():
        hooks = [value for key, value in vars(child).items() if "_hooks" in key]
        without |= {id(value): type(value)() for value in hooks if isinstance(value, dict)}
    return copy.deepcopy(module, without).cpu().double().eval()

"""Finds the modules of a model that the kernels can run, and exchanges their classes."""

from __future__ import annotations

import copy
import hashlib
import re
from dataclasses import dataclass, field

import torch
from torch import Tensor, nn

from ..backends import use_backend
from ..windows import partition_from_windows
from .attention import Fused, Origin, fused_class, index_is_swins, index_matrix
from .kinds import ATTENTION, BLOCKS, LAYERS, Kind


@dataclass
class FusionReport:
    """What :func:`fuse_window_attention` did.

    Attributes:
        fused: name of each outermost module on the kernels -> its class, and how much of it.
        left: name of each module left as it is, though it looks like window attention -> why.
    """

    fused: dict[str, str] = field(default_factory=dict)
    left: dict[str, str] = field(default_factory=dict)

    def __str__(self) -> str:
        if not self.fused and not self.left:
            return "no window attention found; nothing was changed"
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
    """Makes the window attention of a model run on the fused kernels, in place.

    Parameters, buffers, their names and values stay; :func:`unfuse_window_attention` undoes it.
    Modules are recognized by their structure. For the Swins of timm, torchvision, transformers,
    MONAI and Microsoft, SwinIR and MaxViT, rolling, padding and cutting into windows are replaced
    too; for other classes with the attributes and the ``forward(x, mask)`` of Swin's
    ``WindowAttention``, and for HAT's, the attention alone. A copy of each module, with other
    weights, must give the same numbers fused and unfused, in float64 on the CPU; else the module
    stays as it is.

    The library's own code runs, after one warning, what the kernels cannot: attention dropout above
    0 in training, attention maps, some dtypes and head dims. Pairs that a mask excludes are
    excluded exactly, where libraries add -100 to their scores.

    Args:
        model: any module, on any device but "meta", before FSDP shards it; may be an attention
            module itself.

    Returns:
        A :class:`FusionReport`; print it.
    """
    left: dict[str, str] = {}
    tried: dict[tuple, Origin | str] = {}
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
                if isinstance(origin := tried[key], Origin):
                    module.__class__ = fused_class(origin)
                    break
            else:
                left[name] = f"{type(module).__name__}: {tried[found[0].ours, code]}"
    return _report(model, left)


def unfuse_window_attention(model: nn.Module) -> None:
    """Gives every module that :func:`fuse_window_attention` changed its class back.

    Args:
        model: changed in place.

    Raises:
        RuntimeError: something else, such as FSDP, has exchanged the class of a fused module since
            then; nothing is undone.
    """
    fused = {name: module for name, module in model.named_modules() if isinstance(module, Fused)}
    for name, module in fused.items():
        if type(module) is not fused_class(module.fused_from):
            raise RuntimeError(
                f"{name or 'the model'} has become a {type(module).__name__} since it was fused;"
                " undo that first"
            )
    for module in fused.values():
        module.__class__ = module.fused_from.original  # type: ignore[assignment]  # one of its bases


def _report(model: nn.Module, left: dict[str, str]) -> FusionReport:
    report = FusionReport(left=dict(left))
    inside: list[str] = []
    for name, module in model.named_modules():
        if name.startswith(tuple(inside)):
            continue
        if isinstance(module, Fused):
            extent = next(
                kind.extent
                for kind in (*ATTENTION, *BLOCKS, *LAYERS)
                if kind.ours is module.fused_from.ours
            )
            report.fused[name] = f"{module.fused_from.original.__name__}, {extent}"
            inside.append(_prefix(name))
        elif (
            _looks_like_attention(module)
            and not any(isinstance(child, Fused) for child in module.modules())
            and not f"{name}.".startswith(tuple(map(_prefix, left)))
        ):
            report.left[name] = f"{type(module).__name__}: not known"
            inside.append(_prefix(name))
    return report


def _prefix(name: str) -> str:
    """The prefix of the names of a module's children."""
    return f"{name}." if name else ""


def _looks_like_attention(module: nn.Module) -> bool:
    name = type(module).__name__
    has_name = re.search("window.*(attention|msa)$", name, re.IGNORECASE) is not None
    return has_name or hasattr(module, "relative_position_index")


# --- does a module compute what its structure promises? ------------------------------------------


# Attributes that may differ between modules which run the same code.
SIZE_ATTRIBUTES = frozenset(
    "training p drop_prob input_resolution dim embed_dims num_heads num_attention_heads head_dim"
    " attention_head_size all_head_size scale scaling in_features out_features in_channels"
    " out_channels normalized_shape".split()
)


def _code_of(module: nn.Module) -> tuple:
    """Everything that decides what a module computes, except for its sizes and weights."""
    plain = (bool, int, float, str, tuple, list, type(None))
    found: list[object] = []
    for name, child in module.named_modules():
        settings = [
            (key, str(value))
            for key, value in sorted(vars(child).items())
            if isinstance(value, plain) and key not in SIZE_ATTRIBUTES
        ]
        tensors = [*child._parameters.items(), *child._buffers.items()]
        given = [(key, x is None) for key, x in tensors]
        # Methods that somebody has replaced on the module.
        called = [(key, id(value)) for key, value in vars(child).items() if callable(value)]
        found.append((name, type(child), str(called), str(settings), str(given)))
    found += [(name, _digest(buffer)) for name, buffer in module.named_buffers()]
    return tuple(found)


def _digest(x: Tensor) -> bytes:
    """A digest of a buffer's values; the object's id where they cannot be read."""
    try:
        values = x.detach().cpu().resolve_conj().resolve_neg().flatten()
        return hashlib.blake2b(values.view(torch.uint8).numpy().tobytes()).digest()
    except (RuntimeError, TypeError, NotImplementedError):  # on the meta device, sparse, nested
        return str(id(x)).encode()


def _try(module: nn.Module, kind: Kind) -> Origin | str:
    """How to fuse a module as this kind, if a fused copy gives its numbers; else why not."""
    if any(x.is_meta for x in (*module.parameters(), *module.buffers())):
        return 'it is on the device "meta"; load its weights, then fuse it'
    if "forward" in vars(module):
        return "its forward was replaced"
    try:
        # Modes around the call must not change the copies, which are on the CPU, in float64.
        with (
            torch.device("cpu"),
            torch.inference_mode(False),
            torch.no_grad(),
            torch.autocast("cpu", enabled=False),
            use_backend("reference"),  # it takes every size and dtype
        ):
            return _compare(module, kind)
    except Exception as error:  # the library's code may raise anything
        return f"its code could not be tried: {type(error).__name__}: {error}"


def _compare(module: nn.Module, kind: Kind) -> Origin | str:
    is_swin = index_is_swins(module, kind.ours)
    if not is_swin:
        index = index_matrix(module).cpu()
        # Raises where the index is no sum of a term of the query and a term of the key.
        partition_from_windows(torch.arange(index.shape[0])[None], bias_index=index)
    original, generator = _copy(module), torch.Generator().manual_seed(0)
    for weight in original.parameters():
        fan_in = weight.shape[-1] if weight.dim() == 2 else 1
        weight.copy_(
            torch.randn(weight.shape, dtype=weight.dtype, generator=generator) / fan_in**0.5
        )
    fused = copy.deepcopy(original)
    unfuse_window_attention(original)
    origin = Origin(type(module), kind.ours, is_swin, takes_fewer_slots=True)
    fused.__class__ = fused_class(origin)
    for number, arguments in enumerate(kind.samples(original, generator)):
        try:
            expected, actual = (getattr(m, kind.method)(*arguments) for m in (original, fused))
            expected, actual = (x if isinstance(x, Tensor) else x[0] for x in (expected, actual))
            # Some libraries take the softmax in float32 whatever the dtype.
            is_same = expected.shape == actual.shape
            is_same = is_same and (expected - actual).abs().max() <= 1e-5 * expected.abs().max()
        except Exception:
            if number < kind.required:
                raise
            is_same = False
        if not is_same and number < kind.required:
            return "its code computes something else"
        if not is_same:  # windows with fewer slots
            return origin._replace(takes_fewer_slots=False)
    return origin


def _copy(module: nn.Module) -> nn.Module:
    """A copy in float64 on the CPU, in evaluation mode, without hooks."""
    # deepcopy takes what its memo holds for an object: for its hooks an empty dict.
    memo: dict = {}
    for child in module.modules():
        hooks = [value for key, value in vars(child).items() if "_hooks" in key]
        memo |= {id(value): type(value)() for value in hooks if isinstance(value, dict)}
    return copy.deepcopy(module, memo).cpu().double().eval()

"""Weights to start from, whoever trained them: an encoder, and a decoder where there is one.

And the sizes of an encoder that only its weights tell.
"""

from __future__ import annotations

import dataclasses
import json
import math
import re
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from safetensors import SafetensorError, safe_open
from torch import Tensor
from torch.nn import functional as F

from greenmim.checkpoint import (
    convert_checkpoint,
    find_state_dict,
    kind_of,
    load_checkpoint,
    load_state_dict_file,
    run_command,
)
from greenmim.classifier import Classifier
from greenmim.config import UNIT_PIXELS, ModelConfig
from greenmim.mim import GreenMIM

_TABLE = re.compile(r"encoder\.layers\.(\d+)\..*\.relative_position_bias_table")
# Follows from the size of images alone.
_FIXED = "decoder_pos_embed"


def initialise(
    model: GreenMIM, path: str | Path, weights: Mapping[str, Tensor] | None = None
) -> list[str]:
    """Bring the weights of a checkpoint into a model.

    Args:
        model: On the CPU; its window and image size may be others than the checkpoint's.
        path: A checkpoint of this package (of a run, or exported), an official one, timm's Swin or
            Microsoft's, with Swin's order of patch merging.
        weights: The state dict in it, where it was read before.

    Returns:
        What people should know, a line each: what was taken, what was interpolated, what is new.

    Raises:
        FileNotFoundError: there is no such file.
        ValueError: it cannot be read, or its encoder is of another model; the first difference is
            named. The model is as it was.
    """
    weights = load_state_dict_file(path) if weights is None else weights
    own = model.state_dict()
    kind, found, resized = _fitted(weights, model)
    decoder = {name for name in own if not name.startswith("encoder.")} - {_FIXED}
    fits = all(name in found and found[name].shape == own[name].shape for name in decoder)
    taken = {name: t for name, t in found.items() if fits or name.startswith("encoder.")}
    model.load_state_dict(taken, strict=False)
    what = "encoder and decoder" if fits else "the encoder; the decoder starts anew"
    if not fits and decoder & set(found):
        what += ", as the checkpoint's is not whole or has other sizes"
    return [f"starts from {path} ({kind}): {what}", *resized]


def initialise_classifier(
    model: Classifier, path: str | Path, weights: Mapping[str, Tensor] | None = None
) -> list[str]:
    """As `initialise`, of a classifier: its encoder alone, whatever head there is."""
    weights = load_state_dict_file(path) if weights is None else weights
    kind, found, resized = _fitted(weights, model)
    encoder = {name: tensor for name, tensor in found.items() if name.startswith("encoder.")}
    model.load_state_dict(encoder, strict=False)
    return [f"starts from {path} ({kind}): the encoder; the head starts anew", *resized]


def _fitted(
    weights: Mapping[str, Tensor], model: GreenMIM | Classifier
) -> tuple[str, dict[str, Tensor], list[str]]:
    """The kind of a checkpoint, its weights with our names and an encoder of the model's sizes,
    and lines on what was interpolated for that."""
    kind = kind_of(weights)
    found = convert_checkpoint(weights, source=kind, target="greenmim")
    found.pop(_FIXED, None)
    own = model.state_dict()
    windows = [window for _, window, _ in model.config.stage_windows()]
    resized: dict[int, int] = {}  # tables by their rows before
    for name, tensor in found.items():
        table = _TABLE.fullmatch(name)
        shape = own[name].shape if name in own else tensor.shape
        if table and tensor.ndim == 2 and len(tensor) != shape[0] and tensor.shape[1] == shape[1]:
            found[name] = _resized(tensor, windows[int(table[1])])
            resized[len(tensor)] = resized.get(len(tensor), 0) + 1
    _check_encoder(found, own)
    notes = []
    for rows, count in resized.items():
        side = (math.isqrt(rows) + 1) // 2
        notes.append(f"{count} position tables of windows of {side} were interpolated")
    return kind, found, notes


def sizes_in(path: str | Path | None) -> dict[str, Any]:
    """The sizes of a checkpoint's model, as `ModelConfig` has them; {} without a path.

    Raises:
        FileNotFoundError, ValueError: as `initialise`.
    """
    if path is None:
        return {}
    content = load_checkpoint(path, lazily=True)
    if run_command(content):
        return content["recipe"]["model"]
    return dataclasses.asdict(config_of(find_state_dict(content, path), safetensors_facts(path)))


def config_of(weights: Mapping[str, Tensor], facts: Mapping[str, str]) -> ModelConfig:
    """The sizes of an encoder from the shapes of its weights; the decoder's are ours.

    Args:
        weights: A state dict of any kind that `initialise` takes.
        facts: What its file says, as `safetensors_facts`: `greenmim export` writes how large images
            were. Else they are as large as the last stage's window: a table knows no more.

    Raises:
        ValueError: it is no Swin's.
    """
    kind = kind_of(weights)
    encoder = convert_checkpoint(weights, source=kind, target="timm")
    depths: dict[int, int] = {}
    sides: dict[int, int] = {}
    heads: dict[int, int] = {}
    for name, tensor in encoder.items():
        if found := re.fullmatch(r"layers\.(\d)\.blocks\.(\d+)\.attn\.(\w+_table)", name):
            stage, block = int(found[1]), int(found[2])
            if tensor.ndim != 2:
                raise ValueError(f"its {name} has {tensor.ndim} axes, not 2")
            depths[stage] = max(depths.get(stage, 0), block + 1)
            sides[stage], heads[stage] = (math.isqrt(len(tensor)) + 1) // 2, tensor.shape[1]
            if (2 * sides[stage] - 1) ** 2 != len(tensor):
                raise ValueError("its windows are not square; give the checkpoint of a run")
    if sorted(depths) != [0, 1, 2, 3] or "patch_embed.proj.weight" not in encoder:
        raise ValueError("it has not the four stages of a Swin")
    return ModelConfig(
        image_size=tuple(
            json.loads(facts.get("image_size", "null")) or [UNIT_PIXELS * sides[3]] * 2
        ),
        window_size=max(sides.values()),
        embed_dim=encoder["patch_embed.proj.weight"].shape[0],
        depths=tuple(depths[stage] for stage in range(4)),
        num_heads=tuple(heads[stage] for stage in range(4)),
        # timm's default, and Swin's own.
        norm_eps=float(facts.get("norm_eps", 1e-5 if kind == "timm" else 1e-6)),
    )


def safetensors_facts(path: str | Path) -> dict[str, str]:
    """What an exported file says of itself; {} of another file."""
    try:
        with safe_open(path, "pt") as file:
            return file.metadata() or {}
    except (OSError, SafetensorError):
        return {}


def _resized(table: Tensor, window: tuple[int, int]) -> Tensor:
    """A table [(2 M - 1)^2, heads] for another window, as Swin's own code does it."""
    side = math.isqrt(len(table))
    if side**2 != len(table) or side % 2 == 0:
        raise ValueError("its windows are not square, and tables of those are not interpolated")
    size = tuple(2 * length - 1 for length in window)
    grid = table.float().T.unflatten(1, (side, side))[None]
    return F.interpolate(grid, size, mode="bicubic")[0].flatten(1).T.to(table.dtype)


def _check_encoder(found: dict[str, Tensor], own: dict[str, Tensor]) -> None:
    """Raises ValueError where the encoders differ."""
    for name, tensor in own.items():
        if not name.startswith("encoder."):
            continue
        short = name.removeprefix("encoder.")
        if name not in found:
            raise ValueError(f"it is of another model: it lacks {short}")
        if found[name].shape != tensor.shape:
            raise ValueError(
                f"it is of another model: {short} is {list(found[name].shape)} there and"
                f" {list(tensor.shape)} in this recipe"
            )
    if broken := [name for name, tensor in found.items() if not tensor.isfinite().all()]:
        raise ValueError(f"its {broken[0].removeprefix('encoder.')} is not finite")
    more = [name for name in found if name.startswith("encoder.") and name not in own]
    if more:
        raise ValueError(
            f"it is of another model: this recipe's has no {more[0].removeprefix('encoder.')}"
        )

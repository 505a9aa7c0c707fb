"""Weights to start from, whoever trained them: an encoder, and a decoder where there is one.

And the sizes of an encoder that only its weights tell.
"""

from __future__ import annotations

import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from safetensors import SafetensorError, safe_open
from torch import Tensor

from greenmim.checkpoint import (
    convert_checkpoint,
    find_state_dict,
    kind_of,
    load_checkpoint,
    load_state_dict_file,
    run_command,
)
from greenmim.classifier import Classifier
from greenmim.config import ENCODERS, ModelConfig
from greenmim.encoders import encoder_class, encoder_of
from greenmim.guards import first_line
from greenmim.mim import GreenMIM

_ENCODER = "encoder."
# Follows from the size of images alone.
_FIXED = "decoder_pos_embed"


def initialise(
    model: GreenMIM, path: str | Path, weights: Mapping[str, Tensor] | None = None
) -> list[str]:
    """Load the weights of a checkpoint into a model.

    Args:
        model: On the CPU; its windows and image size may differ from the checkpoint's.
        path: A checkpoint of this package (of a run, or exported), an official one, timm's or
            Microsoft's, with Swin's order of patch merging.
        weights: The file's state dict, if it was read already.

    Returns:
        Lines for the user: what was taken, what was interpolated, what is new.

    Raises:
        FileNotFoundError: there is no such file.
        ValueError: it cannot be read, or its encoder is of another model; the first difference is
            named. The model is then unchanged.
    """
    weights = load_state_dict_file(path) if weights is None else weights
    own = model.state_dict()
    kind, found, resized = _fitted(weights, model)
    decoder = {name for name in own if not name.startswith(_ENCODER)} - {_FIXED}
    theirs = {name for name in found if not name.startswith(_ENCODER)}
    # The first blocks of a deeper decoder would be no decoder.
    fits = theirs == decoder and all(found[name].shape == own[name].shape for name in decoder)
    if fits:
        _check_finite({name: found[name] for name in decoder})
    taken = {name: t for name, t in found.items() if fits or name.startswith(_ENCODER)}
    model.load_state_dict(taken, strict=False)
    what = "encoder and decoder" if fits else "the encoder; the decoder starts anew"
    if not fits and theirs:
        what += ", as the checkpoint's has other sizes or is not whole"
    return [f"starts from {path} ({kind}): {what}", *resized]


def initialise_classifier(
    model: Classifier, path: str | Path, weights: Mapping[str, Tensor] | None = None
) -> list[str]:
    """As `initialise`, for a classifier: only the encoder is taken."""
    weights = load_state_dict_file(path) if weights is None else weights
    kind, found, resized = _fitted(weights, model)
    encoder = {name: tensor for name, tensor in found.items() if name.startswith(_ENCODER)}
    model.load_state_dict(encoder, strict=False)
    return [f"starts from {path} ({kind}): the encoder; the head starts anew", *resized]


def _fitted(
    weights: Mapping[str, Tensor], model: GreenMIM | Classifier
) -> tuple[str, dict[str, Tensor], list[str]]:
    """The kind of a checkpoint, its weights under our names with the encoder fitted to the model,
    and lines on what was interpolated."""
    kind = kind_of(weights)
    found = convert_checkpoint(weights, source=kind, target="greenmim")
    found.pop(_FIXED, None)
    encoder, own = (_of_encoder(tensors) for tensors in (found, model.state_dict()))
    encoder, notes = model.encoder.fitted(encoder, model.config, own)
    _check_encoder(encoder, own)
    found |= {f"{_ENCODER}{name}": tensor for name, tensor in encoder.items()}
    return kind, found, notes


def _of_encoder(tensors: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """The encoder's tensors, without the prefix."""
    return {n.removeprefix(_ENCODER): t for n, t in tensors.items() if n.startswith(_ENCODER)}


def sizes_in(path: str | Path | None) -> dict[str, Any]:
    """Sizes of a checkpoint's model, as far as it tells them, as `ModelConfig` names them.

    Args:
        path: The file; None gives {}.

    Raises:
        FileNotFoundError, ValueError: as `initialise`.
    """
    if path is None:
        return {}
    content = load_checkpoint(path, lazily=True)
    if run_command(content):
        return {n: size for n, size in content["recipe"]["model"].items() if size is not None}
    return _sizes_of(find_state_dict(content, path), safetensors_facts(path))


def continued(config: ModelConfig, before: Mapping[str, Any]) -> ModelConfig:
    """A configuration adapted to the weights that a model starts from.

    A SwinV2's weights do not tell its windows; a file of them alone changes nothing.

    Args:
        config: What was asked for.
        before: What is known of the weights' model, as from `sizes_in`.

    Raises:
        ValueError: another encoder, or another number of heads where no weight tells it.
    """
    if not before:
        return config
    encoder = before.get("encoder", ModelConfig.encoder)
    if encoder != config.encoder:
        raise ValueError(
            f"it has the encoder {encoder}, and this recipe {config.encoder};"
            f" pass --model.encoder {encoder}"
        )
    if not {"window_size", "num_heads"} <= before.keys():
        return config
    return encoder_class(encoder).continued(config, ModelConfig.of_saved(before))


def with_usual(sizes: Mapping[str, Any]) -> dict[str, Any]:
    """Sizes as from `sizes_in`; what they leave open is as in the published models."""
    if "embed_dim" not in sizes:
        return dict(sizes)
    return {**encoder_class(sizes.get("encoder", ModelConfig.encoder)).usual(sizes), **sizes}


def config_of(weights: Mapping[str, Tensor], facts: Mapping[str, str]) -> ModelConfig:
    """The sizes of an encoder from the shapes of its weights; the decoder's are ours.

    Args:
        weights: A state dict of any kind that `initialise` takes.
        facts: What its file says, as from `safetensors_facts`.

    Raises:
        ValueError: no known encoder, or neither weights nor file tell its windows, image size or
            heads.
    """
    sizes = with_usual(_sizes_of(weights, facts))
    for name, what in (("window_size", "how large its windows are"), ("num_heads", "its heads")):
        if name not in sizes:
            raise ValueError(
                f"its weights do not tell {what}; give the checkpoint of a run, or what"
                " `greenmim export` wrote"
            )
    return ModelConfig(**sizes)


def _sizes_of(weights: Mapping[str, Tensor], facts: Mapping[str, str]) -> dict[str, Any]:
    """Sizes that weights and file tell; `greenmim export` writes those of images and windows."""
    kind = kind_of(weights)
    encoder = _of_encoder(convert_checkpoint(weights, source=kind, target="greenmim"))
    name = encoder_of(encoder)
    sizes = encoder_class(name).sizes(encoder) | {"encoder": name}
    for fact in ("image_size", "window_size", "norm_eps", "num_heads", *ENCODERS[name].fields):
        if fact in facts:
            sizes[fact] = value_of(facts, fact)
    published = ModelConfig.norm_eps
    sizes.setdefault("norm_eps", encoder_class(name).timm_norm_eps if kind == "timm" else published)
    return sizes


def safetensors_facts(path: str | Path) -> dict[str, str]:
    """Metadata of a safetensors file, strings by name; {} for any other file."""
    try:
        with safe_open(path, "pt") as file:
            return file.metadata() or {}
    except (OSError, SafetensorError):
        return {}


def value_of(facts: Mapping[str, str], name: str) -> Any:
    """A value of `safetensors_facts`, decoded from JSON; None where it is missing.

    Raises:
        ValueError: it is not JSON.
    """
    try:
        return json.loads(facts.get(name, "null"))
    except (ValueError, RecursionError) as error:
        raise ValueError(f"what it says of its {name} is damaged ({first_line(error)})") from error


def _check_encoder(encoder: Mapping[str, Tensor], own: Mapping[str, Tensor]) -> None:
    """Raises ValueError where an encoder does not fit the model's own; names have no prefix."""
    for name, tensor in own.items():
        if name not in encoder:
            raise ValueError(f"it is of another model: it lacks {name}")
        if encoder[name].shape != tensor.shape:
            raise ValueError(
                f"it is of another model: {name} is {list(encoder[name].shape)} there and"
                f" {list(tensor.shape)} in this recipe"
            )
    _check_finite(encoder)
    if more := [name for name in encoder if name not in own]:
        raise ValueError(f"it is of another model: this recipe's has no {more[0]}")


def _check_finite(tensors: Mapping[str, Tensor]) -> None:
    if broken := [name for name, tensor in tensors.items() if not tensor.isfinite().all()]:
        raise ValueError(f"its {broken[0]} is not finite")

"""The model in a checkpoint file, whoever wrote it."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

from greenmim.checkpoint import convert_checkpoint, find_state_dict, load_checkpoint
from greenmim.config import ModelConfig
from greenmim.guards import UserError, first_line, one_line
from greenmim.initial import config_of, initialise, safetensors_facts
from greenmim.mim import GreenMIM, create_model
from greenmim.training.run_folder import RUN_FORMAT


def read_weights(path: Path) -> tuple[Any, dict[str, Any]]:
    """A checkpoint's content, and the state dict in it.

    Raises:
        UserError: it cannot be read.
    """
    try:
        content = load_checkpoint(path)
        return content, find_state_dict(content, path)
    except Exception as error:  # pickle, zip and torch raise anything on a damaged file
        raise UserError(f"The checkpoint {path} cannot be read: {first_line(error)}") from error


def load_model(checkpoint: str | Path, name: str | None = None) -> tuple[GreenMIM, dict[str, Any]]:
    """The model of a checkpoint with its weights, and the recipe of its run ({} without a run).

    Raises:
        UserError: unreadable file, no decoder in it, or another model than `name`.
    """
    path = Path(checkpoint)
    if not path.is_file():
        raise UserError(f"There is no checkpoint {path}.")
    content, weights = read_weights(path)
    if path.suffix != ".safetensors" and content.get("format") == RUN_FORMAT:
        run = content["recipe"]
        network = GreenMIM(ModelConfig(**run["model"]))
    elif name is None:
        raise UserError(f"{path} does not say what model it is; pass --model with its name.")
    else:
        run = {}
        try:
            network = create_model(name)
        except (ValueError, KeyError) as error:
            raise UserError(first_line(error)) from error
    problems = []
    for source in ("greenmim", "official"):
        try:
            network.load_state_dict(convert_checkpoint(weights, source=source, target="greenmim"))
            return network, run
        except (RuntimeError, ValueError, KeyError) as error:
            problems.append(one_line(error))
    raise UserError(f"The checkpoint {path} is of another model: {problems[0][:300]}")


def load_encoder(checkpoint: str | Path) -> tuple[GreenMIM, dict[str, Any]]:
    """A model with the encoder of a checkpoint, whoever trained it, and the recipe of its run.

    The decoder is that of a run's checkpoint, else as it happens to be. Of an exported file the
    recipe has mean and standard deviation of the images alone; of others it is {}.

    Raises:
        UserError: unreadable file, or no Swin.
    """
    path = Path(checkpoint)
    if not path.is_file():
        raise UserError(f"There is no checkpoint {path}.")
    content, weights = read_weights(path)
    if path.suffix != ".safetensors" and content.get("format") == RUN_FORMAT:
        return load_model(path)
    facts = safetensors_facts(path)
    try:
        network = GreenMIM(config_of(weights, facts))
        initialise(network, path, weights)
    except ValueError as error:
        raise UserError(f"The checkpoint {path}: {first_line(error)}.") from error
    data = {name: json.loads(facts[name]) for name in ("mean", "std") if name in facts}
    return network, {"data": data} if data else {}

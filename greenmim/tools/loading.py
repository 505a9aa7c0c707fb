"""The model in a checkpoint file, whoever wrote it."""

from __future__ import annotations

import contextlib
import dataclasses
import math
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

from greenmim.checkpoint import (
    convert_checkpoint,
    find_state_dict,
    load_checkpoint,
    run_command,
)
from greenmim.classifier import Classifier, head_of
from greenmim.config import ModelConfig, model_config
from greenmim.guards import UserError, first_line, one_line
from greenmim.initial import (
    config_of,
    initialise,
    initialise_classifier,
    safetensors_facts,
    value_of,
)
from greenmim.mim import GreenMIM


def check_output(
    output: Path, suffixes: Sequence[str], overwrite: bool, *beside: Path, any_case: bool = False
) -> None:
    """Raises UserError where a result cannot be written, or would replace what is there.

    Args:
        output: The file of --output.
        suffixes: How its name may end.
        overwrite: Whether it may replace files.
        beside: Other files that are written with it.
        any_case: Whether suffixes may be in capitals.
    """
    if (output.suffix.lower() if any_case else output.suffix) not in suffixes:
        one = "one of " * (len(suffixes) > 1)
        raise UserError(f"--output {output} has to end in {one}{', '.join(suffixes)}.")
    if not output.absolute().parent.is_dir():
        raise UserError(f"--output {output} cannot be written: there is no folder {output.parent}.")
    for file in (output, *beside):
        if file.is_dir():
            raise UserError(f"--output: {file} is a folder; use another name.")
        if file.exists() and not overwrite:
            raise UserError(f"--output: {file} is there already; add --overwrite to replace it.")


def not_written(output: Path, error: OSError) -> UserError:
    """The error where a result cannot be written."""
    # `checkpoint.write_atomic` names the file, too.
    why = error.strerror or one_line(error).removeprefix(f"{output} could not be written: ")
    return UserError(f"--output {output} cannot be written: {why.rstrip('.')}.")


def check_there(path: Path) -> None:
    """Raises UserError unless there is such a file."""
    if not path.is_file():
        last = path / "checkpoints" / "last.pth"
        hint = f"; did you mean {last}?" if last.exists() else "."
        raise UserError(f"There is no checkpoint {path}{hint}")


def read_weights(path: Path) -> tuple[Any, dict[str, Any]]:
    """A checkpoint's content, and the state dict in it.

    Raises:
        UserError: it cannot be read.
    """
    with _told_of(path):
        content = load_checkpoint(path)
        return content, find_state_dict(content, path)


@contextlib.contextmanager
def _told_of(path: Path) -> Iterator[None]:
    """Whatever reading a checkpoint leads to as a UserError of the file.

    Pickle, zip and torch raise anything on a damaged one, and so does a network that is made from
    sizes which the file alone tells.
    """
    try:
        yield
    except UserError:
        raise
    except Exception as error:
        raise UserError(f"The checkpoint {path} cannot be read: {first_line(error)}") from error


def is_classifier(checkpoint: str | Path) -> bool:
    """Whether a file is a fine-tuning run's checkpoint; False of one that cannot be read."""
    path = Path(checkpoint)
    if not path.is_file() or path.suffix == ".safetensors":
        return False
    try:
        return run_command(load_checkpoint(path, lazily=True)) == "finetune"
    except Exception:  # pickle, zip and torch raise anything on a damaged file
        return False


def load_model(checkpoint: str | Path, name: str | None = None) -> tuple[GreenMIM, dict[str, Any]]:
    """The model of a checkpoint with its weights, and the recipe of its run ({} without a run).

    Raises:
        UserError: unreadable file, no decoder in it, or another model than `name`.
    """
    path = Path(checkpoint)
    check_there(path)
    with _told_of(path):
        return _with_decoder(path, *read_weights(path), name)


def _with_decoder(
    path: Path, content: Any, weights: dict[str, Any], name: str | None = None
) -> tuple[GreenMIM, dict[str, Any]]:
    try:
        named = None if name is None else model_config(name)
    except ValueError as error:
        raise UserError(first_line(error)) from error
    if run_command(content) == "pretrain":
        run = _run_of(content)
        network = GreenMIM(ModelConfig(**run["model"]))
        if named is not None and _sizes(named) != _sizes(network.config):
            raise UserError(
                f"--model {name}: {path} is of another model and says itself which; leave it out."
            )
    elif run_command(content):
        raise UserError(f"{path} has no decoder: it is a checkpoint of `greenmim finetune`.")
    elif named is None:
        raise UserError(f"{path} does not say what model it is; pass --model with its name.")
    else:
        run, network = {}, GreenMIM(named)
    problems = []
    for source in ("greenmim", "official"):
        try:
            network.load_state_dict(convert_checkpoint(weights, source=source, target="greenmim"))
            return network, run
        except (RuntimeError, ValueError, KeyError) as error:
            problems.append(one_line(error))
    raise UserError(f"The checkpoint {path} is of another model: {problems[0][:300]}")


def _sizes(config: ModelConfig) -> ModelConfig:
    """The same for configurations of one model, however its image size is written."""
    return dataclasses.replace(config, image_size=config.image_hw, drop_path=0.0)


def load_encoder(checkpoint: str | Path) -> tuple[GreenMIM, dict[str, Any]]:
    """A model with the encoder of a checkpoint, whoever trained it, and the recipe of its run.

    The decoder is that of a run's checkpoint, else as it happens to be. Of an exported file the
    recipe has mean and standard deviation of the images alone; of others it is {}.

    Raises:
        UserError: unreadable file, or no encoder that is known here.
    """
    path = Path(checkpoint)
    with _told_of(path):
        return _load_encoder(path)


def _load_encoder(path: Path) -> tuple[GreenMIM, dict[str, Any]]:
    content, weights, config, run, _ = _read_encoder(path)
    if run_command(content) == "pretrain":
        return _with_decoder(path, content, weights)
    network = GreenMIM(config)
    try:
        initialise(network, path, weights)
    except ValueError as error:
        raise UserError(f"The checkpoint {path}: {first_line(error)}.") from error
    return network, run


def load_classifier(
    checkpoint: str | Path, ema: bool = True
) -> tuple[Classifier, dict[str, Any], list[str] | None]:
    """A classifier, the recipe of its run as of `load_encoder`, and its classes where known.

    In the recipe, `trained` tells the update and the epoch, and whether the weights are averaged.

    Args:
        checkpoint: A fine-tuning run's, or timm's network or Microsoft's Swin with a head, also
            exported.
        ema: Take the averaged weights, where the checkpoint has some.

    Raises:
        UserError: unreadable file, no encoder that is known here, or no head.
    """
    path = Path(checkpoint)
    with _told_of(path):
        return _load_classifier(path, ema)


def _load_classifier(path: Path, ema: bool) -> tuple[Classifier, dict[str, Any], list[str] | None]:
    content, weights, config, run, classes = _read_encoder(path)
    if run_command(content):
        averaged = ema and "ema" in content
        weights = weights if averaged else content["model"]
        run["trained"]["weights"] = "averaged" if averaged else "last"
    if (head := head_of(weights)) is None:
        raise UserError(
            f"The checkpoint {path} has no head, so it classifies nothing: `greenmim finetune`"
            " makes one; `greenmim knn` and `greenmim probe` need none."
        )
    network = Classifier(config, len(head[0]))
    try:
        initialise_classifier(network, path, weights)
        network.head["fc"].load_state_dict(dict(zip(("weight", "bias"), head, strict=True)))
    except (ValueError, RuntimeError) as error:
        raise UserError(f"The checkpoint {path}: {first_line(error)}.") from error
    return network, run, classes


def _run_of(content: dict[str, Any]) -> dict[str, Any]:
    """The recipe of the run that wrote a checkpoint, and how far it was."""
    trained = {"step": content["step"], "epoch": round(content["epoch"], 3)}
    recipe, mask = content["recipe"], content["recipe"].get("mask", {})
    whole = "epochs" in recipe and {"mean", "std"} <= recipe["data"].keys()
    if not whole or mask and not {"ratio", "kind", "per_image"} <= mask.keys():
        raise ValueError("its recipe is not whole")
    return {**_with_numbers(recipe), "trained": trained}


def _with_numbers(run: dict[str, Any]) -> dict[str, Any]:
    """The same; ValueError where mean or deviation of its images are no numbers."""
    data = run.get("data", {})
    for name in data.keys() & {"mean", "std"}:
        values = data[name]
        three = isinstance(values, (list, tuple)) and len(values) == 3
        if not three or not all(isinstance(v, (int, float)) and math.isfinite(v) for v in values):
            raise ValueError(f"what it says of its {name} is no list of three numbers")
        if name == "std" and min(values) <= 0:
            raise ValueError("what it says of its std is not above 0")
    return run


def _read_encoder(
    path: Path,
) -> tuple[Any, dict[str, Any], ModelConfig, dict[str, Any], list[str] | None]:
    """Content, weights, sizes, recipe and classes of a checkpoint with an encoder."""
    check_there(path)
    content, weights = read_weights(path)
    if run_command(content):
        run = _run_of(content)
        return content, weights, ModelConfig(**run["model"]), run, content.get("classes")
    facts = safetensors_facts(path)
    try:
        config = config_of(weights, facts)
    except ValueError as error:
        raise UserError(f"The checkpoint {path}: {first_line(error)}.") from error
    data = {name: value_of(facts, name) for name in ("mean", "std") if name in facts}
    classes = value_of(facts, "classes")
    if classes is not None and not (
        isinstance(classes, list) and all(isinstance(name, str) for name in classes)
    ):
        raise UserError(f"The checkpoint {path}: what it says of its classes is no list of names.")
    trained = {
        name: facts[name] if name == "weights" else value_of(facts, name)
        for name in ("step", "epoch", "weights")
        if name in facts
    }
    run = ({"data": data} if data else {}) | ({"trained": trained} if trained else {})
    return content, weights, config, _with_numbers(run), classes

"""The encoder of a checkpoint, or its classifier, as a file that timm loads; it says what it is."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import greenmim
from greenmim.checkpoint import convert_checkpoint, save_safetensors
from greenmim.config import ModelConfig
from greenmim.data.labelled import CROP
from greenmim.encoders import encoder_class
from greenmim.guards import UserError
from greenmim.initial import safetensors_facts, value_of
from greenmim.messages import listed
from greenmim.tools.loading import (
    check_output,
    is_classifier,
    load_classifier,
    load_model,
    not_written,
)


def export(
    checkpoint: str | Path,
    output: str | Path,
    *,
    model: str | None = None,
    ema: bool = True,
    overwrite: bool = False,
) -> dict[str, str]:
    """Write the encoder, or the classifier, as a file that timm loads.

    Its metadata hold what a user needs to know.

    Args:
        checkpoint: A run's checkpoint, or any greenmim or official one with a decoder, if the model
            is named. From a fine-tuning run the head comes along.
        output: A .safetensors file; written whole or not at all.
        model: Name of the model, for a checkpoint that does not say.
        ema: Write the averaged weights, where the checkpoint has some.
        overwrite: Replace an output that is there already.

    Returns:
        The metadata: strings by name. `timm` holds the arguments of `timm.create_model` as JSON.

    Raises:
        UserError: a file is missing, unreadable or there already, or of another model.
    """
    output = Path(output)
    check_output(output, [".safetensors"], overwrite)
    if safetensors_facts(checkpoint).get("timm"):
        raise UserError(f"{checkpoint} is exported already; it says so in its metadata.")
    if is_classifier(checkpoint):
        if model is not None:
            raise UserError(f"--model {model}: {checkpoint} says itself what it is; leave it out.")
        classifier, run, classes = load_classifier(checkpoint, ema)
        weights, facts = classifier.to_timm(), metadata(classifier.config, run, classes)
    else:
        network, run = load_model(checkpoint, model)
        weights = convert_checkpoint(network.state_dict(), source="greenmim", target="timm")
        facts = metadata(network.config, run)
    try:
        save_safetensors(weights, output, facts)
    except OSError as error:
        raise not_written(output, error) from error
    return facts


def metadata(
    config: ModelConfig, run: dict[str, Any], classes: list[str] | None = None
) -> dict[str, str]:
    """What an exported file says of itself.

    Args:
        config: Sizes of the encoder.
        run: The recipe of its run, or {}.
        classes: Of a classifier, in the order of its scores.
    """
    facts = {
        "greenmim": greenmim.__version__,
        "image_size": json.dumps(config.image_hw),
        "window_size": str(config.window_size),
        "norm_eps": str(config.norm_eps),
        "encoder": config.encoder,
        "timm": json.dumps(
            encoder_class(config.encoder).timm_arguments(config)
            | ({"num_classes": len(classes)} if classes else {})
        ),
    }
    own = ("num_heads", *config.traits.fields)
    facts |= {name: json.dumps(getattr(config, name)) for name in own}
    if config.traits.is_swin:
        facts["merge_order"] = "swin"
    if classes:
        facts["classes"] = json.dumps(classes)
    if padded := padded_stages(config):
        facts["padding"] = (
            f"timm pads the windows of stage {listed([str(n) for n in padded])}, whose tokens do"
            " not fill them, so its results differ from this package's"
        )
    if mask := run.get("mask"):
        facts |= {
            "mask_ratio": str(mask["ratio"]),
            "mask_kind": mask["kind"],
            "mask_per_image": json.dumps(mask["per_image"]),
        }
    if run:
        facts |= {"epochs": str(run["epochs"])}
        facts |= {name: json.dumps(run["data"][name]) for name in ("mean", "std")}
        facts |= {name: str(value) for name, value in run["trained"].items()}
    return facts


def timm_line(facts: dict[str, str], file: str | Path) -> str:
    """The Python that makes timm's network of an exported file, with its preprocessing.

    Args:
        facts: As `metadata` gives them.
        file: The file.

    Raises:
        ValueError, LookupError, TypeError, AttributeError: what `metadata` did not give.
    """
    arguments = value_of(facts, "timm")
    name, classes = arguments.pop("model_name"), arguments.pop("num_classes", 0)
    # Not checkpoint_path, which takes tables of timm's own window and image size alone.
    overlay: dict = {"file": str(file), "input_size": (3, *value_of(facts, "image_size"))}
    overlay |= {"interpolation": "bicubic", "crop_pct": CROP}
    overlay |= {key: tuple(value_of(facts, key)) for key in ("mean", "std") if key in facts}
    if classes:
        overlay["num_classes"] = classes
    words = "".join(f", {key}={value!r}" for key, value in arguments.items())
    words += f", num_classes={classes}, pretrained=True, pretrained_cfg_overlay={overlay}"
    return f"timm.create_model({name!r}{words})"


def padded_stages(config: ModelConfig) -> list[int]:
    """Stages, from 1, whose tokens do not fill their windows."""
    return [
        number
        for number, (grid, window, _) in enumerate(config.stage_windows(), 1)
        if any(side % length for side, length in zip(grid, window, strict=True))
    ]

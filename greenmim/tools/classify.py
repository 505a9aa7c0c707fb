"""How well a fine-tuned classifier tells labelled images."""

from __future__ import annotations

from pathlib import Path
from typing import Any, Literal

import torch
from torch import Tensor

from greenmim.classifier import Classifier
from greenmim.data.dataset import Finish
from greenmim.data.images import Source
from greenmim.data.labelled import CROP, LabelledImages, find_classes, find_labelled
from greenmim.evaluation.classification import classify
from greenmim.guards import UserError, one_line
from greenmim.launch import World
from greenmim.processes import Processes
from greenmim.recipe import DataConfig
from greenmim.tools.loading import load_classifier
from greenmim.tools.measured import (
    ClassifiedData,
    all_unknown,
    check_options,
    precision_for,
    read_as_trained,
    sweep_over,
    tell,
    tell_of,
    unknown_classes,
    write_result,
)
from greenmim.training.startup import PRECISIONS, choose_device, place
from greenmim.training.train import told_of_memory


def classify_images(
    checkpoint: str | Path,
    data: ClassifiedData,
    output: str | Path,
    *,
    classes: str | Path | None = None,
    ema: bool = True,
    device: Literal["auto", "cpu", "cuda"] = "auto",
    precision: Literal["auto", "fp32", "bf16"] = "auto",
    overwrite: bool = False,
) -> dict[str, Any] | None:
    """Classify labelled images by a fine-tuned classifier, and count what is right.

    Args:
        checkpoint: A fine-tuning run's, or an exported one, or timm's or Microsoft's Swin with its
            head.
        data: The images.
        output: A .json file; a picture of what is taken for what is drawn beside it.
        classes: File with a class in each line, in the order of the scores; null takes those of the
            checkpoint, or, where it names none, of the images in alphabetical order.
        ema: Take the averaged weights, where the checkpoint has some.
        device: Where to run.
        precision: Autocast type; auto is bf16 on CUDA and fp32 on the CPU.
        overwrite: Replace an output that is there already.

    Returns:
        What is in the file; None in all processes but the main one.

    Raises:
        UserError: a file is missing or unreadable, or there are no labels, or no head.
    """
    output = Path(output)
    world = World.from_environment()
    with Processes(world, lambda: choose_device(device, world)) as processes:

        def prepare() -> Source:
            check_options(data, output, overwrite, {})
            config = DataConfig(data.root, max_pixels=data.max_pixels)
            return find_labelled(config, "data.root", least=1)

        source = processes.from_main(prepare)
        with processes.agreed():
            network, run, known = load_classifier(checkpoint, ema)
            names = _classes(source, classes, known, network.num_classes, world.is_main)
        chosen = precision_for(precision, processes)
        images = LabelledImages(
            source, read_as_trained(data, run), network.config.image_hw, data.crop
        )
        network = place(network, processes.device, PRECISIONS[chosen])
        numbers = {name: number for number, name in enumerate(names)}
        with (
            told_of_memory(processes.device, "lower --data.batch-size"),
            sweep_over(network, images, data, chosen, processes) as (sweep, autocast, progress),
        ):
            # Nobody stops it.
            (found,) = classify(sweep, [network], autocast, numbers, progress=progress)  # type: ignore[misc]

            def result() -> dict[str, Any]:
                tell_of(source, found.failures, found.without_label)
                if classes is None and known is None:
                    tell("the checkpoint names no classes: the images' are used, in their order")
                if not found.images:
                    raise UserError(f"--data.root {data.root}: no image with a class can be read.")
                if found.strangers.total() == found.images:
                    option = f"--data.root {data.root}"
                    raise all_unknown("the classifier", names, found.strangers, option)
                if found.strangers:
                    tell(unknown_classes("The classifier", found.strangers, "--data.root"))
                facts: dict = {"task": "eval", "checkpoint": str(checkpoint), "precision": chosen}
                facts |= {"root": data.root, "crop": data.crop, "loss": found.loss}
                facts |= run.get("trained", {})
                unreadable = [name for name, _ in found.failures]
                return write_result(
                    facts, found.accuracy, found.images, names, {}, unreadable, output
                )

            made = processes.from_main(result)
        return made if world.is_main else None


class _OneFile(Source):
    """A picture of somebody."""

    def __init__(self, file: str | Path) -> None:
        self.root = str(file)

    def __len__(self) -> int:
        return 1

    def path(self, index: int) -> str:
        return self.root

    def open(self, index: int) -> str:
        return self.root


def load_picture(
    file: str | Path, network: Classifier, recipe: dict[str, Any], crop: float = CROP
) -> Tensor:
    """A picture as `classify_images` reads it: upright, transparent parts white, its middle.

    Args:
        file: An image file.
        network: Who is to see it.
        recipe: As `load_classifier` gives it.
        crop: As of `ClassifiedData`.

    Returns:
        float32 [1, 3, H, W], normalised.

    Raises:
        UserError: it cannot be read.
    """
    config = read_as_trained(ClassifiedData(), recipe)
    images = LabelledImages(_OneFile(file), config, network.config.image_hw, crop)
    try:
        sample = images.read(0)
    except Exception as error:  # decoders raise anything on a broken file
        raise UserError(f"{file} cannot be read as an image: {one_line(error)}.") from error
    return Finish(config, "cpu")(sample.image[None], torch.tensor([sample.flip]))


def _classes(
    source: Source, file: str | Path | None, known: list[str] | None, number: int, is_main: bool
) -> list[str]:
    """The `number` classes in the order of a classifier's scores; the main process prints notes."""
    if file is not None or known is None:
        names = find_classes(source, str(file) if file else None, "classes")
    else:
        names = known
    if known is not None and names != known and len(names) == len(known):
        what = "in another order" if set(names) == set(known) else "others"
        if is_main:
            tell(f"--classes {file} replaces the checkpoint's own classes, which are {what}")
    if len(names) != number:
        raise UserError(
            f"The checkpoint tells {number} classes and"
            f" {f'--classes {file}' if file else f'the images in {source.root}'} {len(names)}; name"
            " them with --classes FILE, one in each line, in the order of the scores."
        )
    return names

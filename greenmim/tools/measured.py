"""What commands that classify images have in common: options, images, files that are written."""

from __future__ import annotations

import contextlib
import json
import math
import sys
from collections import Counter
from collections.abc import Callable, Collection, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from tqdm import tqdm

import greenmim
from greenmim.checkpoint import save_text
from greenmim.classifier import Classifier
from greenmim.data.dataset import Finish, finishes_in_loader
from greenmim.data.images import Source
from greenmim.data.labelled import CROP, LabelledCollate, LabelledImages, some_of
from greenmim.evaluation.accuracy import Accuracy, by_class, draw, table
from greenmim.evaluation.sweep import Sweep
from greenmim.guards import UserError
from greenmim.messages import dashes
from greenmim.mim import GreenMIM
from greenmim.processes import Processes
from greenmim.recipe import IMAGENET_MEAN, IMAGENET_STD, ImagesConfig
from greenmim.tools.loading import check_output, not_written
from greenmim.training.startup import PRECISIONS, autocast_for

# The most unreadable files that are named on stderr.
_NAMED = 10


@dataclass
class ClassifiedData:
    """Labelled images to classify.

    Args:
        root: Folder with a folder for each class; or, by a prefix: tar/FILE_OR_FOLDER with folders,
            wds/SHARDS with .cls, hfds/DATASET[:SPLIT] with a column of classes.
        batch_size: Images per process and per forward pass.
        workers: Loader processes; 0 loads in the main process.
        crop: Side of the centre crop, as a share of the largest one.
        max_pixels: Images with more pixels are not read.
    """

    root: str | None = None
    batch_size: int = 64
    workers: int = 4
    crop: float = CROP
    max_pixels: int = ImagesConfig.max_pixels


@dataclass
class LabelledData(ClassifiedData):
    """Labelled images, to learn from and to classify.

    Args:
        val_root: The images to classify, named in the same way.
    """

    val_root: str | None = None


def said(result: dict[str, Any], output: str | Path) -> str:
    """A result for people."""
    facts = [f"{result['images']} images", f"{result['classes']} classes"]
    if result["task"] == "knn":
        facts.append(f"{result['k']} neighbours")
    elif result["task"] == "probe":
        facts.append(f"learning rate {result['lr']:g}")
    shares = [f"top-1 {100 * result['top1']:.2f} %"]
    if result["classes"] > 5:  # of five or fewer one of the top five is always right
        shares.append(f"top-5 {100 * result['top5']:.2f} %")
    lines = [
        table(result["by_class"]),
        f"{', '.join(shares)} ({', '.join(facts)})",
        f"wrote {output}",
    ]
    return "\n".join(lines)


def picture_of(output: str | Path) -> Path:
    """The picture beside an output."""
    return Path(output).with_suffix(".png")


def check_options(
    data: ClassifiedData, output: Path, overwrite: bool, positive: dict[str, Any]
) -> None:
    """Raises UserError for bad options before anything is read.

    Args:
        positive: Numbers, or tuples of them, that must be above 0 and finite, by their options.
    """
    for name, given in positive.items():
        if given == ():
            raise UserError(f"--{name} is empty; give a number above 0.")
        for value in given if isinstance(given, tuple) else (given,):
            if not 0 < value < math.inf:
                finite = " and finite" * isinstance(value, float)
                raise UserError(f"--{name} is {value}; it has to be above 0{finite}.")
    for name in ("root", "val_root"):
        if not getattr(data, name, True):
            option = dashes(f"data.{name}")
            raise UserError(f"{option} is missing; pass a folder with a folder for each class.")
    if not 0 < data.crop <= 1:
        raise UserError(f"--data.crop is {data.crop}; it has to be above 0 and at most 1.")
    if data.batch_size < 1 or data.workers < 0:
        raise UserError("--data.batch-size has to be at least 1, and --data.workers 0 or more.")
    if data.max_pixels < 1:
        raise UserError(f"--data.max-pixels is {data.max_pixels}; it has to be at least 1.")
    check_output(output, [".json"], overwrite, picture_of(output))


def precision_for(name: str, processes: Processes) -> str:
    """fp32 or bf16, by the device where it is auto."""
    if name == "auto":
        return "bf16" if processes.device.type == "cuda" else "fp32"
    return name


def read_as_trained(data: ClassifiedData, run: dict[str, Any]) -> ImagesConfig:
    """How images are read: normalised as in the run that trained the network, if it is known."""
    trained = run.get("data", {})
    return ImagesConfig(
        max_pixels=data.max_pixels,
        mean=tuple(trained.get("mean", IMAGENET_MEAN)),
        std=tuple(trained.get("std", IMAGENET_STD)),
    )


@contextlib.contextmanager
def sweep_over(
    network: GreenMIM | Classifier,
    images: LabelledImages,
    data: ClassifiedData,
    precision: str,
    processes: Processes,
) -> Iterator[tuple[Sweep, Callable[[], torch.autocast], Callable[[int], object]]]:
    """What goes through images, in which precision, and what shows how far it is."""
    device = processes.device
    in_loader = finishes_in_loader(images.config, device)
    finish = Finish(images.config, "cpu" if in_loader else device)
    collate = LabelledCollate(network.planner, finish if in_loader else None)
    later = None if in_loader else finish
    sweep = Sweep(images, collate, data.batch_size, data.workers, later, processes)
    autocast = autocast_for(device, PRECISIONS[precision])
    quiet = None if processes.world.is_main else True
    with tqdm(total=len(images), desc=images.source.root, unit="img", disable=quiet) as bar:
        yield sweep, autocast, lambda count: bar.update(min(count, len(images) - bar.n))


def tell_of(source: Source, failures: Sequence[tuple[str, str]], without_label: int) -> None:
    """What people should know of a source, and which of its images are left out."""
    for note in source.notes():
        tell(note)
    for name, reason in failures[:_NAMED]:
        tell(f"cannot read {name} ({reason}); it is left out")
    if len(failures) > _NAMED:
        tell(f"and {len(failures) - _NAMED} more of {source.root} cannot be read")
    if without_label:
        tell(f"{without_label} images of {source.root} have no class and are left out")


def unknown_classes(who: str, strangers: Counter[str], option: str) -> str:
    """A line on images by classes that somebody does not have."""
    return (
        f"{who} has no class {some_of(strangers)}: {strangers.total()} images of {option} cannot be"
        " right"
    )


def all_unknown(who: str, classes: Collection[str], strangers: Counter[str], option: str):
    """The error where that is so of all images."""
    return UserError(
        f"{option} has images of {some_of(strangers)}, and {who} has {some_of(classes)}; name a"
        " folder with folders of these names."
    )


def write_result(
    facts: dict[str, Any],
    found: Accuracy,
    images: int,
    classes: list[str],
    how: dict[str, Any],
    unreadable: list[str],
    output: Path,
) -> dict[str, Any]:
    """Write the file and the picture; what is in the file."""
    result: dict[str, Any] = {
        **facts,
        "top1": found.top1,
        "top5": found.top5,
        "images": images,
        "classes": len(classes),
        **how,
        "by_class": by_class(found, classes),
        "unreadable": unreadable,
        "greenmim": greenmim.__version__,
    }
    result = _as_json(result)
    title = f"{facts['task']}, top-1 {100 * found.top1:.1f} %"
    try:
        save_text(json.dumps(result, indent=1, allow_nan=False) + "\n", output)
        if not draw(found, classes, title, picture_of(output)):
            picture_of(output).unlink(missing_ok=True)  # of an earlier result with fewer classes
    except OSError as error:
        raise not_written(output, error) from error
    return result


def _as_json(value: Any) -> Any:
    """The same with null for what JSON has no number for, as the loss of a rate that diverged."""
    if isinstance(value, dict):
        return {name: _as_json(part) for name, part in value.items()}
    if isinstance(value, (list, tuple)):
        return [_as_json(part) for part in value]
    return None if isinstance(value, float) and not math.isfinite(value) else value


def tell(text: str) -> None:
    """A line for people, beside what is printed as the result."""
    print(text, file=sys.stderr)

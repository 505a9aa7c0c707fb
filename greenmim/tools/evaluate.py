"""How well images are classified: by an encoder's features, with kNN and a linear probe, and by a
fine-tuned classifier."""

from __future__ import annotations

import contextlib
import functools
import json
import sys
from collections import Counter
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal, TypeVar

import torch
from torch import Tensor
from tqdm import tqdm

import greenmim
from greenmim.checkpoint import save_text
from greenmim.classifier import Classifier
from greenmim.data.dataset import Finish, finishes_in_loader
from greenmim.data.images import Source
from greenmim.data.labelled import (
    CROP,
    LabelledCollate,
    LabelledImages,
    find_classes,
    find_labelled,
)
from greenmim.encoders.swin import VisibleBlock
from greenmim.evaluation.accuracy import (
    Accuracy,
    by_class,
    classes_of,
    draw,
    measure,
    numbers_of,
    table,
)
from greenmim.evaluation.classification import classify
from greenmim.evaluation.classifiers import knn_pieces, linear_probe
from greenmim.evaluation.features import Features, extract, key_of, load_features, save_features
from greenmim.evaluation.sweep import Sweep
from greenmim.guards import UserError, one_line
from greenmim.launch import World
from greenmim.messages import dashes, listed
from greenmim.mim import GreenMIM
from greenmim.processes import Processes
from greenmim.recipe import IMAGENET_MEAN, IMAGENET_STD, DataConfig, ImagesConfig
from greenmim.tools.loading import load_classifier, load_encoder
from greenmim.training.startup import PRECISIONS, choose_device
from greenmim.training.train import told_of_memory
from greenmim_kernels.onednn import use_onednn

N = TypeVar("N", GreenMIM, Classifier)
# Named on stderr of those that cannot be read.
_NAMED = 10


@dataclass
class ClassifiedData:
    """Labelled images to classify.

    Args:
        root: Folder with a folder for each class; or, by a prefix: tar/FILE_OR_FOLDER with folders,
            wds/SHARDS with .cls, hfds/DATASET[:SPLIT] with a column of classes.
        batch_size: Images per process and per forward pass.
        workers: Loader processes; 0 loads in the main process.
        crop: Side of the middle of each image that is taken, as a share of the largest that fits.
        max_pixels: Pixels of an image, above which it is not read.
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
        val_root: The same of the images to classify.
    """

    val_root: str | None = None


def knn(
    checkpoint: str | Path,
    data: LabelledData,
    output: str | Path,
    *,
    k: int = 20,
    temperature: float = 0.07,
    features: str | Path | None = None,
    device: Literal["auto", "cpu", "cuda"] = "auto",
    precision: Literal["auto", "fp32", "bf16"] = "auto",
    overwrite: bool = False,
) -> dict[str, Any] | None:
    """Classify images by their nearest neighbours among labelled ones, by the encoder's features.

    Args:
        checkpoint: A run's checkpoint, or an encoder: exported, official, timm's or Microsoft's.
        data: The images.
        output: A .json file; a picture of what is taken for what is drawn beside it.
        k: Neighbours that vote.
        temperature: A neighbour's vote is exp(cosine / temperature).
        features: Folder where features are kept for the next command; null takes `features` beside
            the output.
        device: Where to run.
        precision: Autocast type; auto is bf16 on CUDA and fp32 on the CPU.
        overwrite: Replace an output that is there already.

    Returns:
        What is in the file; None in all processes but the main one.

    Raises:
        UserError: a file is missing or unreadable, or there are no labels or too few images.
    """

    def classify(train: Tensor, labels: Tensor, values: Tensor, answers: Tensor, classes: int):
        if k > len(train):
            raise UserError(f"--k is {k} and {len(train)} images can vote; take a smaller one.")
        pieces = knn_pieces(train, labels, values, classes, k, temperature)
        return measure(pieces, answers), {"k": k, "temperature": temperature}

    positive = {"k": k, "temperature": temperature}
    options = (features, device, precision, overwrite, positive)
    return _evaluate("knn", checkpoint, data, Path(output), classify, *options)


def probe(
    checkpoint: str | Path,
    data: LabelledData,
    output: str | Path,
    *,
    lr: float | tuple[float, ...] = (0.003, 0.01, 0.03, 0.1, 0.3, 1.0, 3.0, 10.0),
    epochs: int = 100,
    images_per_update: int = 256,
    seed: int = 0,
    features: str | Path | None = None,
    device: Literal["auto", "cpu", "cuda"] = "auto",
    precision: Literal["auto", "fp32", "bf16"] = "auto",
    overwrite: bool = False,
) -> dict[str, Any] | None:
    """Classify images by a linear layer on the encoder's features, which stay as they are.

    Args:
        checkpoint: A run's checkpoint, or an encoder: exported, official, timm's or Microsoft's.
        data: The images.
        output: A .json file; a picture of what is taken for what is drawn beside it.
        lr: Learning rates, all tried at once; a tenth of the labelled images chooses.
        epochs: Passes over the features.
        images_per_update: Of the probe, not of the encoder.
        seed: Of the order, and of which images choose.
        features: Folder where features are kept for the next command; null takes `features` beside
            the output.
        device: Where to run.
        precision: Autocast type; auto is bf16 on CUDA and fp32 on the CPU.
        overwrite: Replace an output that is there already.

    Returns:
        What is in the file; None in all processes but the main one.

    Raises:
        UserError: a file is missing or unreadable, or there are no labels or too few images.
    """
    rates = lr if isinstance(lr, tuple) else (lr,)

    def classify(train: Tensor, labels: Tensor, values: Tensor, answers: Tensor, classes: int):
        if len(train) < 2:
            raise UserError(f"--data.root has {len(train)} images that can be read; give more.")
        with tqdm(total=epochs, desc="probe", unit="epoch", disable=None) as bar:
            scores, found, best = linear_probe(
                train, labels, values, answers, classes, rates=rates, epochs=epochs,
                batch_size=images_per_update, seed=seed, progress=bar.update,
            )  # fmt: skip
        rows = [rate._asdict() for rate in found]
        how = {"lr": best.lr, "epochs": epochs, "seed": seed, "rates": rows}
        return measure([scores], answers), how

    positive = {
        "epochs": epochs,
        "images-per-update": images_per_update,
        "lr": min(rates, default=0),
    }
    options = (features, device, precision, overwrite, positive)
    return _evaluate("probe", checkpoint, data, Path(output), classify, *options)


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
            _check(data, output, overwrite, {})
            config = DataConfig(data.root, max_pixels=data.max_pixels)
            return find_labelled(config, "data.root")

        source = processes.from_main(prepare)
        with processes.agreed():
            network, run, names = load_classifier(checkpoint, ema)
            names = _classes(source, classes, names, network.num_classes)
        precision = _precision(precision, processes)
        images = LabelledImages(source, _normalised(data, run), network.config.image_hw, data.crop)
        network = _placed(network, precision, processes)
        numbers = {name: number for number, name in enumerate(names)}
        with (
            told_of_memory(processes.device, "lower --data.batch-size"),
            _sweep(network, images, data, precision, processes) as (sweep, autocast, progress),
        ):
            found = classify(sweep, network, autocast, numbers, progress=progress)

            def result() -> dict[str, Any]:
                _tell_of(source, found.failures, found.without_label)
                if not found.images:
                    raise UserError(f"--data.root {data.root}: no image with a class can be read.")
                if found.strangers:
                    _tell(_unknown("The classifier", found.strangers, "--data.root"))
                facts = {"task": "eval", "checkpoint": str(checkpoint), "precision": precision}
                facts |= {"root": data.root, "crop": data.crop, "loss": found.loss}
                unreadable = [name for name, _ in found.failures]
                return _write(facts, found.accuracy, found.images, names, {}, unreadable, output)

            made = processes.from_main(result)
        return made if world.is_main else None


def _classes(
    source: Source, file: str | Path | None, known: list[str] | None, number: int
) -> list[str]:
    """The classes in the order of a classifier's scores, of which there are so many."""
    names = known if file is None and known else find_classes(source, file and str(file), "classes")
    if len(names) != number:
        raise UserError(
            f"The checkpoint tells {number} classes and"
            f" {f'--classes {file}' if file else f'the images in {source.root}'} {len(names)}; name"
            " them with --classes FILE, one in each line, in the order of the scores."
        )
    return names


def said(result: dict[str, Any], output: str | Path) -> str:
    """A result for people."""
    facts = [f"{result['images']} images", f"{result['classes']} classes"]
    if result["task"] == "knn":
        facts.append(f"{result['k']} neighbours")
    elif result["task"] == "probe":
        facts.append(f"learning rate {result['lr']:g}")
    lines = [
        table(result["by_class"]),
        f"top-1 {100 * result['top1']:.2f} %, top-5 {100 * result['top5']:.2f} %"
        f" ({', '.join(facts)})",
        f"wrote {output}",
    ]
    return "\n".join(lines)


def picture_of(output: str | Path) -> Path:
    """The picture beside an output."""
    return Path(output).with_suffix(".png")


def _evaluate(
    task: str,
    checkpoint: str | Path,
    data: LabelledData,
    output: Path,
    classify: Callable[..., tuple[Accuracy, dict[str, Any]]],
    kept: str | Path | None,
    device: str,
    precision: str,
    overwrite: bool,
    positive: dict[str, float],
) -> dict[str, Any] | None:
    folder = Path(kept) if kept else output.absolute().parent / "features"
    world = World.from_environment()
    with Processes(world, lambda: choose_device(device, world)) as processes:

        def prepare() -> list[Source]:
            """What may be wrong is found before anything is computed."""
            _check(data, output, overwrite, positive)
            config = DataConfig(root=data.root, val_root=data.val_root, max_pixels=data.max_pixels)
            sources = [find_labelled(config, option) for option in ("data.root", "data.val_root")]
            try:
                folder.mkdir(parents=True, exist_ok=True)
            except OSError as error:
                raise UserError(
                    f"--features {folder} cannot be made: {one_line(error)}."
                ) from error
            return sources

        sources = processes.from_main(prepare)
        precision = _precision(precision, processes)
        with processes.agreed():
            network, run = load_encoder(checkpoint)
        config = _normalised(data, run)
        network = _placed(network, precision, processes)
        with told_of_memory(processes.device, "lower --data.batch-size"):
            train, held_out = (
                _features(
                    network,
                    LabelledImages(source, config, network.config.image_hw, data.crop),
                    data,
                    folder,
                    precision,
                    processes,
                )
                for source in sources
            )

            def result() -> dict[str, Any]:
                facts = {"task": task, "checkpoint": str(checkpoint), "precision": precision}
                facts |= {"root": data.root, "val_root": data.val_root, "crop": data.crop}
                return _result(facts, train, held_out, classify, output, processes.device)

            found = processes.from_main(result)
        return found if world.is_main else None


def _check(data: ClassifiedData, output: Path, overwrite: bool, positive: dict[str, float]) -> None:
    for name, value in positive.items():
        if not value > 0:
            raise UserError(f"--{name} is {value}; it has to be above 0.")
    for name in ("root", "val_root"):
        if not getattr(data, name, True):
            option = dashes(f"data.{name}")
            raise UserError(f"{option} is missing; pass a folder with a folder for each class.")
    if not 0 < data.crop <= 1:
        raise UserError(f"--data.crop is {data.crop}; it has to be above 0 and at most 1.")
    if data.batch_size < 1 or data.workers < 0:
        raise UserError("--data.batch-size has to be at least 1, and --data.workers 0 or more.")
    if output.suffix != ".json":
        raise UserError(f"--output {output} has to end in .json.")
    if not output.absolute().parent.is_dir():
        raise UserError(f"--output {output} cannot be written: there is no folder {output.parent}.")
    for file in (output, picture_of(output)):
        if file.exists() and not overwrite:
            raise UserError(f"--output: {file} is there already; add --overwrite to replace it.")


def _precision(name: str, processes: Processes) -> str:
    if name == "auto":
        return "bf16" if processes.device.type == "cuda" else "fp32"
    return name


def _normalised(data: ClassifiedData, run: dict[str, Any]) -> ImagesConfig:
    """How images are read: normalised as in the run that trained the network, if it is known."""
    trained = run.get("data", {})
    return ImagesConfig(
        max_pixels=data.max_pixels,
        mean=tuple(trained.get("mean", IMAGENET_MEAN)),
        std=tuple(trained.get("std", IMAGENET_STD)),
    )


def _placed(network: N, precision: str, processes: Processes) -> N:
    """The network on its device, as fast as it goes there."""
    network = network.to(processes.device)
    if processes.device.type == "cpu" and precision == "fp32":
        use_onednn(network, VisibleBlock)
    return network


@contextlib.contextmanager
def _sweep(
    network: GreenMIM | Classifier,
    images: LabelledImages,
    data: ClassifiedData,
    precision: str,
    processes: Processes,
) -> Iterator[tuple[Sweep, Callable[[], torch.autocast], Callable[[int], None]]]:
    """What goes through images, in which precision, and what shows how far it is."""
    device = processes.device
    in_loader = finishes_in_loader(images.config, device)
    finish = Finish(images.config, "cpu" if in_loader else device)
    collate = LabelledCollate(network.planner, finish if in_loader else None)
    later = None if in_loader else finish
    sweep = Sweep(images, collate, data.batch_size, data.workers, later, processes)
    autocast = functools.partial(
        torch.autocast, device.type, PRECISIONS[precision], enabled=precision != "fp32"
    )
    quiet = None if processes.world.is_main else True
    with tqdm(total=len(images), desc=images.source.root, unit="img", disable=quiet) as bar:
        yield sweep, autocast, lambda count: bar.update(min(count, len(images) - bar.n))


def _features(
    network: GreenMIM,
    images: LabelledImages,
    data: LabelledData,
    folder: Path,
    precision: str,
    processes: Processes,
) -> Features:
    """Those that were kept, or computed and kept. A collective."""
    is_main = processes.world.is_main
    path, found = None, None
    if is_main:
        path = folder / f"{key_of(network, images, PRECISIONS[precision])}.safetensors"
        found = load_features(path)
    if not processes.from_main(lambda: found is not None):
        with _sweep(network, images, data, precision, processes) as (sweep, autocast, progress):
            found = extract(sweep, network, autocast, progress=progress)
        if is_main:
            try:
                save_features(found, path)
            except OSError as error:
                _tell(f"the features are not kept: {path} cannot be written: {one_line(error)}")
    if is_main:
        _tell_of(images.source, found.failures, found.without_label)
    return found


def _tell_of(source: Source, failures: Sequence[tuple[str, str]], without_label: int) -> None:
    """What people should know of a source, and which of its images are left out."""
    for note in source.notes():
        _tell(note)
    for name, reason in failures[:_NAMED]:
        _tell(f"cannot read {name} ({reason}); it is left out")
    if len(failures) > _NAMED:
        _tell(f"and {len(failures) - _NAMED} more of {source.root} cannot be read")
    if without_label:
        _tell(f"{without_label} images of {source.root} have no class and are left out")


def _unknown(who: str, strangers: Counter[str], option: str) -> str:
    names = sorted(strangers)
    return (
        f"{who} has no class {listed(names[:5], 'or')}{' ...' * (len(names) > 5)}:"
        f" {strangers.total()} images of {option} cannot be right"
    )


def _result(
    facts: dict[str, Any],
    train: Features,
    held_out: Features,
    classify: Callable[..., tuple[Accuracy, dict[str, Any]]],
    output: Path,
    device: torch.device,
) -> dict[str, Any]:
    """Classify, write the file and the picture; what is in the file."""
    classes = classes_of(train.labels)
    if len(classes) < 2:
        raise UserError(f"--data.root {facts['root']}: its images are of {len(classes)} classes; at"
                        " least two are needed.")  # fmt: skip
    if not held_out.labels:
        raise UserError(f"--data.val-root {facts['val_root']}: no image with a class can be read.")
    if strangers := Counter(label for label in held_out.labels if label not in classes):
        _tell(_unknown("--data.root", strangers, "--data.val-root"))
    labels, answers = (numbers_of(some.labels, classes).to(device) for some in (train, held_out))
    found, how = classify(
        train.values.to(device), labels, held_out.values.to(device), answers, len(classes)
    )
    how = {"train_images": len(labels), **how}
    unreadable = [name for name, _ in train.failures + held_out.failures]
    return _write(facts, found, len(answers), list(classes), how, unreadable, output)


def _write(
    facts: dict[str, Any],
    found: Accuracy,
    images: int,
    classes: list[str],
    how: dict[str, Any],
    unreadable: list[str],
    output: Path,
) -> dict[str, Any]:
    """Write the file and the picture; what is in the file."""
    result = {
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
    title = f"{facts['task']}, top-1 {100 * found.top1:.1f} %"
    try:
        save_text(json.dumps(result, indent=1) + "\n", output)
        draw(found, classes, title, picture_of(output))
    except OSError as error:
        raise UserError(f"--output {output} cannot be written: {one_line(error)}.") from error
    return result


def _tell(text: str) -> None:
    print(text, file=sys.stderr)

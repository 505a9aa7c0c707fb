"""How good an encoder's features are for classes that it never saw: kNN, and a linear probe."""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable
from pathlib import Path
from typing import Any, Literal

import torch
from torch import Tensor
from tqdm import tqdm

from greenmim.data.images import Source
from greenmim.data.labelled import LabelledImages, find_labelled
from greenmim.evaluation.accuracy import Accuracy, classes_of, measure, numbers_of
from greenmim.evaluation.classifiers import knn_pieces, linear_probe
from greenmim.evaluation.features import Features, extract, key_of, load_features, save_features
from greenmim.guards import UserError, one_line
from greenmim.launch import World
from greenmim.mim import GreenMIM
from greenmim.processes import Processes
from greenmim.recipe import DataConfig
from greenmim.tools.loading import load_encoder
from greenmim.tools.measured import (
    LabelledData,
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
            raise UserError(f"--k is {k}, and only {len(train)} images can vote; lower it.")
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
        lr: Learning rates, tried together; a tenth of the labelled images chooses one.
        epochs: Passes over the features.
        images_per_update: Images per update of the probe.
        seed: Seed of the order, and of which images choose.
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
    rates = (lr,) if isinstance(lr, (int, float)) else tuple(lr)

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

    positive = {"epochs": epochs, "images-per-update": images_per_update, "lr": rates}
    options = (features, device, precision, overwrite, positive)
    return _evaluate("probe", checkpoint, data, Path(output), classify, *options)


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
    positive: dict[str, Any],
) -> dict[str, Any] | None:
    folder = Path(kept) if kept else output.absolute().parent / "features"
    world = World.from_environment()
    with Processes(world, lambda: choose_device(device, world)) as processes:

        def prepare() -> list[Source]:
            """What may be wrong is found before anything is computed."""
            check_options(data, output, overwrite, positive)
            config = DataConfig(root=data.root, val_root=data.val_root, max_pixels=data.max_pixels)
            sources = [
                find_labelled(config, "data.root"),
                find_labelled(config, "data.val_root", least=1),
            ]
            try:
                folder.mkdir(parents=True, exist_ok=True)
            except OSError as error:
                raise UserError(
                    f"--features {folder} cannot be made: {one_line(error)}."
                ) from error
            return sources

        sources = processes.from_main(prepare)
        precision = precision_for(precision, processes)
        with processes.agreed():
            network, run = load_encoder(checkpoint)
        config = read_as_trained(data, run)
        network = place(network, processes.device, PRECISIONS[precision])
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
                facts: dict = {"task": task, "checkpoint": str(checkpoint), "precision": precision}
                facts |= {"root": data.root, "val_root": data.val_root, "crop": data.crop}
                return _result(facts, train, held_out, classify, output, processes.device)

            found = processes.from_main(result)
        return found if world.is_main else None


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
    path: Any = None
    found: Any = None
    if is_main:
        path = folder / f"{key_of(network, images, PRECISIONS[precision])}.safetensors"
        found = load_features(path)
    if not processes.from_main(lambda: found is not None):
        with sweep_over(network, images, data, precision, processes) as (sweep, autocast, progress):
            found = extract(sweep, network, autocast, progress=progress)
        if is_main:
            try:
                save_features(found, path)
            except OSError as error:
                tell(f"the features are not kept: {path} cannot be written: {one_line(error)}")
    if is_main:
        tell_of(images.source, found.failures, found.without_label)
    return found


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
    strangers = Counter(label for label in held_out.labels if label not in classes)
    if strangers.total() == len(held_out.labels):
        option = f"--data.val-root {facts['val_root']}"
        raise all_unknown("--data.root", classes, strangers, option)
    if strangers:
        tell(unknown_classes("--data.root", strangers, "--data.val-root"))
    labels, answers = (numbers_of(some.labels, classes).to(device) for some in (train, held_out))
    found, how = classify(
        train.values.to(device), labels, held_out.values.to(device), answers, len(classes)
    )
    how = {"train_images": len(labels), **how}
    unreadable = [name for name, _ in train.failures + held_out.failures]
    return write_result(facts, found, len(answers), list(classes), how, unreadable, output)

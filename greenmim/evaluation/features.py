"""Features of labelled images: one vector for each, and where they are kept."""

from __future__ import annotations

import contextlib
import hashlib
import json
import os
from collections.abc import Callable
from pathlib import Path
from typing import NamedTuple

import torch
from safetensors import SafetensorError, safe_open
from torch import Tensor

from greenmim.checkpoint import save_safetensors
from greenmim.data.labelled import LabelledImages
from greenmim.data.loader import Batch
from greenmim.evaluation.sweep import Sweep
from greenmim.mim import GreenMIM

# Changed when the same images and weights give other features.
VERSION = 1


class Features(NamedTuple):
    """Features of images that have a label and could be read, in their order.

    Attributes:
        values: float32 [n, C], on the CPU; in the main process alone.
        labels: the class of each.
        without_label: how many images have none.
        failures: (path, reason) of files that could not be read.
    """

    values: Tensor
    labels: list[str]
    without_label: int
    failures: list[tuple[str, str]]


def extract(
    sweep: Sweep,
    model: GreenMIM,
    autocast: Callable[[], contextlib.AbstractContextManager],
    stop: Callable[[], bool] = lambda: False,
    progress: Callable[[int], object] = lambda images: None,
) -> Features | None:
    """Features of the images of a sweep, whose plans have everything visible. A collective.

    None where a process was to `stop` meanwhile; `progress` is told of every batch.
    """
    processes = sweep.processes
    values, labels, images = [], [], 0

    def add(batch: Batch, counted: int) -> None:
        nonlocal images
        with autocast():
            found = model.embed(batch.images, batch.plan)[:counted].float().cpu()
        known = [label is not None for label in batch.labels[:counted]]
        values.append(found[torch.tensor(known, dtype=torch.bool)])
        labels.extend(label for label in batch.labels[:counted] if label is not None)
        images += counted
        progress(counted * processes.world.size)

    failures = sweep.run(model, add, stop)
    if failures is None:
        return None
    parts = processes.collect(torch.cat(values))
    others = processes.gather((labels, failures, images))
    labels = [label for part, _, _ in others for label in part]
    failures = list(dict.fromkeys(failure for _, part, _ in others for failure in part))
    without = sum(count for _, _, count in others) - len(labels) - len(failures)
    whole = torch.cat(parts) if parts else values[0][:0]
    return Features(whole, labels, max(without, 0), failures)


def key_of(model: GreenMIM, images: LabelledImages, precision: torch.dtype) -> str:
    """Of what features follow from: weights, images, and how they are taken."""
    found = hashlib.sha256()
    for name, tensor in sorted(model.encoder.state_dict().items()):
        found.update(name.encode())
        found.update(tensor.detach().cpu().contiguous().numpy().tobytes())
    how = (VERSION, images.image_size, images.share, images.mean, images.std, str(precision))
    found.update(repr((*how, model.config.norm_eps, images.config.decode)).encode())
    found.update(images.source.fingerprint().encode())
    return found.hexdigest()[:16]


def load_features(path: Path) -> Features | None:
    """Those kept in a file; None where there are none, or the file is damaged."""
    try:
        with safe_open(path, "pt") as file:
            kept = json.loads(file.metadata()["features"])
            numbers = file.get_tensor("labels").tolist()
            labels = [kept["classes"][number] for number in numbers]
            failures = [tuple(failure) for failure in kept["failures"]]
            return Features(file.get_tensor("values"), labels, kept["without_label"], failures)
    except (OSError, SafetensorError, ValueError, KeyError, TypeError, IndexError):
        return None


def save_features(features: Features, path: Path) -> None:
    """Keep them in a file, which is whole or not there.

    Raises:
        OSError: it cannot be written.
    """
    classes = sorted(set(features.labels))
    number = {name: index for index, name in enumerate(classes)}
    labels = torch.tensor([number[label] for label in features.labels], dtype=torch.int32)
    kept = {
        "classes": classes,
        "without_label": features.without_label,
        "failures": features.failures,
    }
    os.makedirs(path.parent, exist_ok=True)
    save_safetensors(
        {"values": features.values, "labels": labels}, path, {"features": json.dumps(kept)}
    )

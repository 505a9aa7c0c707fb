"""Features of labelled images: one vector for each, and where they are kept."""

from __future__ import annotations

import contextlib
import dataclasses
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
from greenmim.data.labelled import UNREADABLE, LabelledImages
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
    without_label: int = 0
    failures: tuple[tuple[str, str], ...] = ()


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
    values: list[Tensor] = []
    labels: list[str] = []
    without = 0

    def add(batch: Batch, counted: int) -> None:
        nonlocal without
        with autocast():
            found = model.embed(batch.images, batch.plan)[:counted].float().cpu()
        own = batch.labels[:counted]
        known = [label not in (None, UNREADABLE) for label in own]
        values.append(found[torch.tensor(known, dtype=torch.bool)])
        labels.extend(str(label) for label, has_one in zip(own, known, strict=True) if has_one)
        without += own.count(None)
        progress(counted * processes.world.size)

    failures = sweep.run(model, add, stop)
    if failures is None:
        return None
    own = torch.cat(values)
    values.clear()
    parts = processes.collect(own)
    whole = parts[0] if len(parts) == 1 else torch.cat(parts) if parts else own[:0]
    others = processes.gather((labels, without, failures))
    named = dict.fromkeys(failure for _, _, part in others for failure in part)
    labels = [label for part, _, _ in others for label in part]
    return Features(whole, labels, sum(count for _, count, _ in others), tuple(named))


def key_of(model: GreenMIM, images: LabelledImages, precision: torch.dtype) -> str:
    """Of what features follow from: weights, images, and how they are taken."""
    found = hashlib.sha256()
    for name, tensor in sorted(model.encoder.state_dict().items()):
        found.update(name.encode())
        found.update(tensor.detach().cpu().contiguous().numpy().tobytes())
    config, sizes = images.config, model.config
    how = (images.image_size, images.share, config.max_pixels, config.decode, config.mean)
    # All sizes of the encoder but the images', which are there: weights do not tell an epsilon.
    others = ("decoder", "norm_pix", "drop_path", "image_size")
    fields = dataclasses.asdict(sizes).items()
    own = {name: value for name, value in fields if not name.startswith(others)}
    how_all = (VERSION, *how, config.std, str(precision), sorted(own.items()))
    found.update(f"{how_all} {images.source.fingerprint()}".encode())
    return found.hexdigest()[:16]


def load_features(path: Path) -> Features | None:
    """Those kept in a file; None where there are none, or the file is damaged."""
    try:
        with safe_open(path, "pt") as file:
            kept = json.loads(file.metadata()["features"])
            numbers = file.get_tensor("labels").tolist()
            names, without = kept["classes"], kept["without_label"]
            labels = [names[number] for number in numbers]
            values = file.get_tensor("values")
    except (OSError, SafetensorError, ValueError, LookupError, TypeError, RecursionError):
        return None
    fits = values.dtype == torch.float32 and values.dim() == 2 and len(values) == len(labels)
    whole = fits and isinstance(without, int) and all(isinstance(name, str) for name in names)
    return Features(values, labels, without) if whole else None


def save_features(features: Features, path: Path) -> None:
    """Keep them in a file, which is whole or not there.

    Those of files that could not be read are missing, and may be there the next time: nothing is
    kept then.

    Raises:
        OSError: it cannot be written.
    """
    if features.failures:
        return
    classes = sorted(set(features.labels))
    number = {name: index for index, name in enumerate(classes)}
    labels = torch.tensor([number[label] for label in features.labels], dtype=torch.int32)
    kept = {"classes": classes, "without_label": features.without_label}
    os.makedirs(path.parent, exist_ok=True)
    save_safetensors(
        {"values": features.values, "labels": labels}, path, {"features": json.dumps(kept)}
    )

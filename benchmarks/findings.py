"""What a small Swin learns on a CPU, and two questions: what docs/findings.md says, measured.

    apt-get download openclipart-png && dpkg-deb -x openclipart-png_*.deb clip
    python -m benchmarks.findings prepare --drawings clip/usr/share/openclipart/png --data data
    python -m benchmarks.findings run --data data --runs runs/findings    # an hour of two cores
    python -m benchmarks.findings tune --data data --runs runs/findings   # two hours more, after it

The data are Debian's 8,000 drawings in folders, public domain. One in five of each folder is held
out. Pre-training sees all others, without their labels; kNN and probe tell ten kinds of drawings
by the folders' names. A run that was stopped goes on, and rows that are in the result file are not
done again. Two commands with one thread each and other `--seeds` and `--out` are faster than one
with two; another then collects what their runs left.

Arms, each with three seeds:

- `correct`: one mask for each batch, as the paper has it;
- `published placement`: the decoder takes the latents of visible units in another order than
  theirs, as the published code does: drawn anew for each mask;
- `mask per image`: all images of a batch have masks of their own.

`untrained` is the same network before its first update. `tune` fine-tunes it, which is training
from labels alone, and the correct arm: as many updates for both, with a learning rate that falls
from layer to layer for the one that has something to keep.
"""

from __future__ import annotations

import argparse
import contextlib
import dataclasses
import hashlib
import json
import pathlib
import tempfile
from collections.abc import Iterator
from typing import NamedTuple

import torch
from PIL import Image
from torch import Tensor

from greenmim.config import ModelConfig
from greenmim.evaluation import accuracy
from greenmim.evaluation.classifiers import knn_scores, linear_probe
from greenmim.evaluation.features import load_features
from greenmim.finetune_recipe import (
    EncoderConfig,
    FinetuneOptimConfig,
    FinetuneRecipe,
    LabelledImagesConfig,
    MixConfig,
)
from greenmim.guards import UserError
from greenmim.mim import GreenMIM
from greenmim.planning import Plan
from greenmim.recipe import (
    CheckpointConfig,
    DataConfig,
    LogConfig,
    MaskConfig,
    OptimConfig,
    Recipe,
    RunLogConfig,
    ScheduleConfig,
)
from greenmim.tools.evaluate import knn
from greenmim.tools.measured import LabelledData
from greenmim.training import pretraining, train
from greenmim.training.log import read_log

from .environment import describe, folder_of, processor, write_json

# Kinds of drawings that their folder tells, with at most so many of each: three folders hold two
# thirds of all.
KINDS = (
    "animals", "computer", "food", "people", "recreation", "shapes", "signs_and_symbols", "tools",
    "transportation", "office",
)  # fmt: skip
MOST = 400
LABELS = (5, 20)  # of each kind, beside all
HELD_OUT = 5  # one in so many
SIDE = 160  # pixels of the shorter side: more than a crop needs
SEEDS = (0, 1, 2)
BATCH = 64
ARMS = ("correct", "published placement", "mask per image")


class Tuning(NamedTuple):
    """How an arm is fine-tuned."""

    arm: str  # where it starts from
    layer_decay: float
    epochs: dict[str, int]  # by labels of each kind
    lr: float = 1e-3
    warmup: float | None = None  # share of the epochs; None is one epoch


TUNED = {
    "untrained": Tuning("untrained", 1.0, {"20": 10, "all": 20}),
    "correct": Tuning("correct", 0.8, {"20": 10, "all": 20}),
    "untrained, twice as long": Tuning("untrained", 1.0, {"all": 40}),
    "untrained, rate 0.0003": Tuning("untrained", 1.0, {"20": 10, "all": 20}, 3e-4, 0.25),
    "correct, rate 0.0003": Tuning("correct", 0.8, {"20": 10, "all": 20}, 3e-4, 0.25),
    "untrained, layer decay 0.8": Tuning("untrained", 0.8, {"all": 20}),
    "correct, rate 0.0003, layer decay 1": Tuning("correct", 1.0, {"all": 20}, 3e-4, 0.25),
    "untrained, rate 0.0001": Tuning("untrained", 1.0, {"all": 20}, 1e-4, 0.25),
}
MODEL = ModelConfig(
    image_size=128, window_size=4, embed_dim=32, depths=(2, 2, 2, 2), num_heads=(1, 2, 4, 8),
    decoder_dim=128, decoder_depth=2, decoder_heads=4,
)  # fmt: skip


class PublishedPlacement(GreenMIM):
    """Latents of visible units at places of other visible units, by chance.

    The published code looks up latents in the order of the noise that a mask was drawn from, while
    they stand row by row.
    """

    def training_loss(self, images: Tensor, latent: Tensor, plan: Plan) -> Tensor:
        return super().training_loss(images, self._mixed(latent), plan)

    def decode(self, latent: Tensor, plan: Plan) -> Tensor:
        return super().decode(self._mixed(latent), plan)

    def _mixed(self, latent: Tensor) -> Tensor:
        return latent[:, torch.randperm(latent.shape[1])]


def prepare(drawings: pathlib.Path, data: pathlib.Path) -> None:
    """Small copies on white: data/all to pre-train on, data/val of the same folders, and
    data/labelled, data/labelled-val of ten kinds."""
    labelled: dict[tuple[str, bool], int] = {}
    names = [file.relative_to(drawings) for file in drawings.rglob("*.png")]
    # By chance, and the same again.
    names.sort(key=lambda name: hashlib.sha256(str(name).encode()).digest())
    seen: dict[str, int] = {}
    for name in names:
        kind = name.parts[0]
        with contextlib.suppress(OSError, ValueError, Image.DecompressionBombError):
            picture = Image.open(drawings / name).convert("RGBA")
            white = Image.new("RGBA", picture.size, "white")
            picture = Image.alpha_composite(white, picture).convert("RGB")
            factor = SIDE / min(picture.size)
            size = [max(1, round(side * factor)) for side in picture.size]
            if max(size) > 8 * SIDE:
                continue
            picture = picture.resize(size, Image.Resampling.BICUBIC)
            seen[kind] = seen.get(kind, 0) + 1
            held_out = seen[kind] % HELD_OUT == 0
            places = ["val" if held_out else "all"]
            count = labelled.get((kind, held_out), 0)
            if kind in KINDS and count < (MOST // HELD_OUT if held_out else MOST):
                labelled[kind, held_out] = count + 1
                places.append("labelled-val" if held_out else "labelled")
            for place in places:
                file = data / place / kind / f"{seen[kind]:05d}.jpg"
                file.parent.mkdir(parents=True, exist_ok=True)
                picture.save(file, quality=92)


def recipe_of(arm: str, seed: int, data: pathlib.Path, runs: pathlib.Path, epochs: int) -> Recipe:
    return Recipe(
        work_dir=str(runs / f"{arm.replace(' ', '-')}-{seed}"),
        epochs=epochs,
        seed=seed,
        device="cpu",
        model=MODEL,
        data=DataConfig(root=str(data / "all"), val_root=str(data / "val"), batch_size=BATCH,
                        workers=1, crop_scale=(0.4, 1.0)),
        mask=MaskConfig(per_image=arm == "mask per image"),
        optim=OptimConfig(lr=1e-3),
        schedule=ScheduleConfig(warmup_epochs=2),
        log=LogConfig(tensorboard=False, pictures_every_epochs=None, val_every_epochs=epochs),
    )  # fmt: skip


@contextlib.contextmanager
def model_of(arm: str) -> Iterator[None]:
    """Inside, runs train the arm's model."""
    pretraining.GreenMIM = PublishedPlacement if arm == "published placement" else GreenMIM
    try:
        yield
    finally:
        pretraining.GreenMIM = GreenMIM


def measured(checkpoint: pathlib.Path, data: pathlib.Path) -> dict[str, dict[str, float]]:
    """Top-1 on ten kinds of drawings of kNN and the probe, by the number of labels of each kind."""
    places = LabelledData(
        root=str(data / "labelled"), val_root=str(data / "labelled-val"), workers=1
    )
    with tempfile.TemporaryDirectory() as name:
        folder = pathlib.Path(name)
        knn(checkpoint, places, folder / "knn.json", features=folder / "kept", device="cpu")
        found = [load_features(file) for file in (folder / "kept").iterdir()]
    val, train = sorted(found, key=lambda features: len(features.labels))
    classes = accuracy.classes_of(train.labels)
    labels, answers = (torch.tensor([classes[x] for x in some.labels]) for some in (train, val))
    rows = {}
    for each in (*LABELS, MOST):
        # Names are by chance, and so is their order.
        chosen = torch.cat([(labels == kind).nonzero()[:each, 0] for kind in range(len(classes))])
        some = train.values[chosen], labels[chosen], val.values
        near = knn_scores(*some, len(classes), k=min(20, len(chosen)))
        line, *_ = linear_probe(*some, answers, len(classes))
        top1 = [accuracy.measure([scores], answers).top1 for scores in (near, line)]
        rows["all" if each == MOST else str(each)] = dict(zip(("knn", "probe"), top1, strict=True))
    return rows


def row_of(arm: str, seed: int, data: pathlib.Path, runs: pathlib.Path, epochs: int) -> dict:
    """Train an arm and measure it; `untrained` ends before its first update."""
    trained = arm != "untrained"
    recipe = recipe_of(arm, seed, data, runs, epochs)
    if not trained:
        torch.manual_seed(seed)
        checkpoint = pathlib.Path(recipe.work_dir) / "untrained.pth"
        checkpoint.parent.mkdir(parents=True, exist_ok=True)
        torch.save(GreenMIM(MODEL).state_dict(), checkpoint)
        return {"arm": arm, "seed": seed, "top1": measured(checkpoint, data)}
    with model_of(arm):
        result = train.train(recipe, resume="auto")
    if result.exit_code:
        raise UserError(f"the run in {recipe.work_dir} ended with code {result.exit_code}")
    log = read_log(pathlib.Path(recipe.work_dir) / "log.jsonl")
    losses = [record["loss"] for record in log if record["event"] == "val"]
    if not losses:
        raise UserError(f"{recipe.work_dir} has no held-out loss: it was stopped there; remove it")
    found = measured(result.checkpoint, data)
    return {"arm": arm, "seed": seed, "held_out_loss": losses[-1], "top1": found}


def some_labelled(each: int, data: pathlib.Path, runs: pathlib.Path) -> pathlib.Path:
    """A folder with so many drawings of each kind: those that `measured` takes."""
    if each >= MOST:
        return data / "labelled"
    folder = runs / f"labelled-{each}"
    for kind in (data / "labelled").iterdir():
        (folder / kind.name).mkdir(parents=True, exist_ok=True)
        for file in sorted(kind.iterdir())[:each]:
            with contextlib.suppress(FileExistsError):
                (folder / kind.name / file.name).symlink_to(file.resolve())
    return folder


def tuning_recipe(
    name: str, seed: int, labels: str, data: pathlib.Path, runs: pathlib.Path
) -> FinetuneRecipe:
    """Of an arm that was trained before. An epoch is as long whatever the number of labels."""
    arm, layer_decay, epochs, lr, warmup = TUNED[name]
    each = MOST if labels == "all" else int(labels)
    folder = runs / f"{arm.replace(' ', '-')}-{seed}"
    init = folder / ("untrained.pth" if arm == "untrained" else "checkpoints/last.pth")
    # All that differs is in the name: what is there goes on.
    how = f"{each}-{epochs[labels]}-lr{lr}-decay{layer_decay}-warmup{warmup or 'one'}"
    root = some_labelled(each, data, runs)
    whole, there = (len(list(place.rglob("*.jpg"))) for place in (data / "labelled", root))
    return FinetuneRecipe(
        work_dir=str(runs / f"{folder.name}-tuned-{how}"),
        init=str(init),
        epochs=epochs[labels],
        seed=seed,
        device="cpu",
        model=EncoderConfig(drop_path=0.0),
        data=LabelledImagesConfig(root=str(root), val_root=str(data / "labelled-val"), workers=1,
                                  batch_size=BATCH, repeats=max(1, round(whole / there)),
                                  crop_scale=(0.4, 1.0), erase=0.0),
        mix=MixConfig(mixup=0.0, cutmix=0.0),
        optim=FinetuneOptimConfig(lr=lr, layer_decay=layer_decay),
        schedule=ScheduleConfig(warmup_epochs=warmup * epochs[labels] if warmup else 1),
        log=RunLogConfig(tensorboard=False, val_every_epochs=1),
        checkpoint=CheckpointConfig(every_epochs=100, keep_every_epochs=None),
        ema_decay=None,
    )  # fmt: skip


def tune(data: pathlib.Path, runs: pathlib.Path, seeds: list[int], out: pathlib.Path) -> None:
    """The rows of fine-tuning, each written when it is there."""
    result = json.loads(out.read_text()) if out.exists() else {}
    rows = result.setdefault("finetuned", [])
    done = {(row["arm"], row["seed"], row["labels"]) for row in rows}
    result["finetuned_environment"] = where = describe(torch.get_num_threads())
    for seed in seeds:
        for arm, tuning in TUNED.items():
            for labels in tuning.epochs:
                if (arm, seed, labels) in done:
                    continue
                recipe = tuning_recipe(arm, seed, labels, data, runs)
                if (code := train.train(recipe, resume="auto").exit_code) != 0:
                    raise UserError(f"the run in {recipe.work_dir} ended with code {code}")
                log = read_log(pathlib.Path(recipe.work_dir) / "log.jsonl")
                last = [record for record in log if record["event"] == "val"][-1]
                found = {name: last[name] for name in ("top1", "loss", "epoch")}
                found |= {name: where[name] for name in ("device", "torch", "commit", "dirty")}
                rows.append({"arm": arm, "seed": seed, "labels": labels, **found})
                write_json(out, result)
                print(rows[-1], flush=True)


def run(
    data: pathlib.Path, runs: pathlib.Path, epochs: int, seeds: list[int], out: pathlib.Path
) -> None:
    """All rows, each written when it is there."""
    result = json.loads(out.read_text()) if out.exists() else {}
    result.setdefault("rows", [])
    environment = describe(torch.get_num_threads())
    if result.get("environment", environment)["device"] != environment["device"]:
        raise UserError(f"{out} is of another machine; take another file")
    done = {(row["arm"], row["seed"]) for row in result["rows"]}
    result["environment"] = environment
    result["recipe"] = dataclasses.asdict(MODEL) | {"epochs": epochs, "lr": 1e-3, "batch": BATCH}
    for place in ("all", "val", "labelled", "labelled-val"):
        result.setdefault("images", {})[place] = len(list((data / place).rglob("*.jpg")))
    for seed in seeds:
        for arm in ("untrained", *ARMS):
            if (arm, seed) not in done:
                result["rows"].append(row_of(arm, seed, data, runs, epochs))
                write_json(out, result)
                print(result["rows"][-1], flush=True)


def main(argv: list[str] | None = None) -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    commands = parser.add_subparsers(dest="command", required=True)
    first = commands.add_parser("prepare")
    first.add_argument("--drawings", type=pathlib.Path, required=True)
    second = commands.add_parser("run")
    second.add_argument("--epochs", type=int, default=24)
    third = commands.add_parser("tune")
    results = folder_of(processor()) / "findings.json"
    for command in (second, third):
        command.add_argument("--runs", type=pathlib.Path, required=True)
        command.add_argument("--seeds", type=int, nargs="+", default=SEEDS)
        command.add_argument("--out", type=pathlib.Path, default=results)
    for command in (first, second, third):
        command.add_argument("--data", type=pathlib.Path, required=True)
    options = parser.parse_args(argv)
    if options.command == "prepare":
        prepare(options.drawings, options.data)
    elif options.command == "tune":
        tune(options.data, options.runs, options.seeds, options.out)
    else:
        run(options.data, options.runs, options.epochs, options.seeds, options.out)


if __name__ == "__main__":
    main()

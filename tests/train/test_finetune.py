"""Fine-tuning: what it draws, learns, averages, measures, saves and goes on from."""

from __future__ import annotations

import functools
import json
import math
import random
import re
import shutil
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import pytest
import timm
import torch
from crew import losses, records, run_crew
from PIL import Image
from recording import Recording
from tar_files import encoded, write_tar
from tensorboard.backend.event_processing.event_accumulator import EventAccumulator
from test_evaluate import COLOURS, coloured
from timm.scheduler import CosineLRScheduler
from torch import nn
from torch.nn import functional as F
from torchvision.transforms.v2.functional import pil_to_tensor

from greenmim.checkpoint import load_checkpoint
from greenmim.cli import main
from greenmim.data.dataset import Finish
from greenmim.data.labelled import LabelledCollate, TrainingImages
from greenmim.data.sampler import Item
from greenmim.data.sources import find_source
from greenmim.finetune_recipe import (
    EncoderConfig,
    FinetuneRecipe,
    LabelledImagesConfig,
    MixConfig,
)
from greenmim.launch import World
from greenmim.processes import Processes
from greenmim.tools.loading import load_classifier
from greenmim.training import passes
from greenmim.training.finetuning import Finetuning
from greenmim.training.passes import GraphedPasses, Passes
from greenmim.training.startup import learning_rate

TINY = """
epochs: 2
device: cpu
threads: 1
model:
  image_size: [96, 64]
  window_size: 2
  embed_dim: 16
  depths: [1, 2, 1, 1]
  num_heads: [1, 2, 4, 8]
data:
  batch_size: 4
  workers: 0
optim:
  lr: 2.0e-3
schedule:
  warmup_epochs: 0.5
log:
  every_steps: 1
"""
SIZE = (96, 64)


@pytest.fixture(scope="module")
def recipe_file(tmp_path_factory) -> Path:
    path = tmp_path_factory.mktemp("config") / "finetune.yaml"
    path.write_text(TINY)
    return path


@pytest.fixture(scope="module")
def labelled(tmp_path_factory) -> tuple[Path, Path]:
    """18 images of three colours to learn from: 4 updates an epoch; and 9 others."""
    folder = tmp_path_factory.mktemp("labelled")
    return coloured(folder / "train", 6), coloured(folder / "val", 3, first=50)


def command(recipe_file: Path, root: Path, work_dir: Path, *more: str) -> list[str]:
    return [
        *("finetune", "--config", str(recipe_file), "--data.root", str(root)),
        *("--work-dir", str(work_dir), *more),
    ]


@pytest.fixture(scope="module")
def tuned(recipe_file, labelled, tmp_path_factory) -> Path:
    """A finished run of six epochs, measured after each third."""
    run = tmp_path_factory.mktemp("runs") / "tuned"
    more = ("--epochs", "6", "--data.val-root", str(labelled[1]), "--log.val-every-epochs", "3")
    assert main(command(recipe_file, labelled[0], run, *more)) == 0
    return run


def newest(run: Path) -> dict:
    return load_checkpoint(run / "checkpoints" / "last.pth")


def complaint(capsys, *arguments: str) -> str:
    assert main(list(arguments)) == 2
    text = capsys.readouterr().err
    assert text.startswith("greenmim: error: ") and text.count("\n") == 1, text
    return text


# ---- timm's parts -------------------------------------------------------------------------------


def test_the_schedule_is_that_of_timm():
    steps_per_epoch, epochs, warmup = 7, 12, 3
    group = torch.optim.SGD([torch.zeros(1)], lr=0.25)
    warm = warmup * steps_per_epoch
    theirs = CosineLRScheduler(
        group, steps_per_epoch * epochs - warm, lr_min=0.01, warmup_t=warm, warmup_prefix=True,
        t_in_epochs=False,
    )  # fmt: skip
    for step in range(steps_per_epoch * epochs):
        theirs.step_update(step)
        ours = learning_rate(
            step / steps_per_epoch, peak=0.25, final=0.01, warmup_epochs=warmup, epochs=epochs
        )
        assert ours == pytest.approx(group.param_groups[0]["lr"], rel=1e-12), step


def test_layers_learn_at_their_own_rates(recipe_file, labelled, tmp_path, monkeypatch):
    seen = []
    before = torch.optim.AdamW.step

    def step(optimizer, *rest):
        seen.append([(group["lr"], group["lr_scale"]) for group in optimizer.param_groups])
        return before(optimizer, *rest)

    monkeypatch.setattr(torch.optim.AdamW, "step", step)
    run = tmp_path / "run"
    more = ("--max-steps", "3", "--optim.layer-decay", "0.5")
    assert main(command(recipe_file, labelled[0], run, *more)) == 0
    # Two blocks in one stage, three stages of one, three mergings with their blocks, stem and head.
    assert {scale for _, scale in seen[0]} == {0.5**layer for layer in range(7)}
    rates = [row["lr"] for row in records(run, "train")]
    assert rates[1] > 0
    for rate, groups in zip(rates, seen, strict=True):
        assert all(lr == pytest.approx(rate * scale) for lr, scale in groups)


def test_the_average_is_that_of_timm(recipe_file, labelled, tmp_path):
    """timm's decay min(0.8, 1 - n ** (-2 / 3)) before update n + 1; the first one is a copy."""
    run = tmp_path / "run"
    more = ("--ema-decay", "0.8", "--checkpoint.every-steps", "1", "--checkpoint.keep-last", "99")
    assert main(command(recipe_file, labelled[0], run, *more)) == 0
    average = None
    for step in range(1, 9):
        state = load_checkpoint(run / "checkpoints" / f"step_{step:08d}.pth")
        weights = {name: tensor.double() for name, tensor in state["model"].items()}
        decay = min(0.8, 1 - step ** (-2 / 3))
        average = average or weights
        average = {n: decay * average[n] + (1 - decay) * weights[n] for n in weights}
        for name, tensor in state["ema"].items():
            torch.testing.assert_close(tensor.double(), average[name], rtol=1e-5, atol=1e-7)
    last = state["model"]["head.fc.weight"]
    assert not torch.allclose(state["ema"]["head.fc.weight"], last, rtol=1e-4)


def task_for(root: Path, mix: MixConfig | None = None, **data) -> Finetuning:
    sizes = EncoderConfig(SIZE, 2, 16, (1, 1, 1, 1), (1, 2, 4, 8), drop_path=0.0)
    data = LabelledImagesConfig(root=str(root), batch_size=4, workers=0, **data)
    recipe = FinetuneRecipe(work_dir="-", model=sizes, data=data, mix=mix or MixConfig())
    task = Finetuning(recipe)
    task.build(task.find(), None)
    return task


def batch_of(task: Finetuning, first: int = 0):
    items = [Item(0, 0, 0, position) for position in range(first, first + 4)]
    collate = task.collate(Finish(task.recipe.data))
    assert isinstance(collate, LabelledCollate)
    return collate([task.dataset[item] for item in items])


def test_what_is_mixed_follows_from_the_place_in_the_run(labelled):
    task = task_for(labelled[0], erase=0.5)
    found = {}
    for key in [(0, 0), (0, 1), (1, 0), (0, 0)]:
        random.seed(len(found))
        np.random.seed(len(found))
        torch.manual_seed(7)  # as the loop does, by update and micro-batch
        images, plan, targets = task.inputs(batch_of(task), *key)
        assert plan.visible.all() and images.shape == (4, 3, *SIZE)
        torch.testing.assert_close(targets.sum(1), torch.ones(4))
        if key in found:
            assert all(map(torch.equal, found[key], (images, targets)))
        found[key] = images, targets
    assert len({images.double().sum().item() for images, _ in found.values()}) == 3


def test_unmixed_targets_are_smoothed_as_pytorch_does(labelled):
    task = task_for(labelled[0], MixConfig(mixup=0, cutmix=0, smoothing=0.3), erase=0)
    batch = batch_of(task)
    images, plan, targets = task.inputs(batch, 0, 0)
    assert torch.equal(images, batch.images)
    labels = torch.tensor([task.classes[name] for name in batch.labels])
    with torch.no_grad():
        loss = task.loss(task.model.eval(), images, plan, targets)
        expected = F.cross_entropy(task.model(images), labels, label_smoothing=0.3)
    torch.testing.assert_close(loss, expected)


def mixed(labelled, step: int = 3, **mix):
    """A batch of two classes, before it is mixed and after, and the share of its first class."""
    task = task_for(labelled[0], MixConfig(**mix), erase=0)
    batch = batch_of(task, 4)
    before, labels = batch.images.clone(), [task.classes[name] for name in batch.labels]
    assert labels[0] != labels[3]  # its partner
    images, _, targets = task.inputs(batch, step, 1)
    return before, images, targets, targets[0, labels[0]]


def test_a_blended_batch_is_a_mean_of_two(labelled):
    for mix in ({"cutmix": 0.0}, {"switch_prob": 0.0}):
        before, images, _, share = mixed(labelled, smoothing=0.0, **mix)
        assert 0 < share < 1
        torch.testing.assert_close(images, share * before + (1 - share) * before.flip(0))


def test_a_pasted_batch_has_pixels_of_two(labelled):
    for mix in ({"mixup": 0.0}, {"switch_prob": 1.0}):
        before, images, _, share = mixed(labelled, smoothing=0.0, **mix)
        own, other = images == before, images == before.flip(0)
        assert (own | other).all() and not own.all()
        assert share == pytest.approx((~own[0]).logical_not().double().mean().item(), abs=0.01)


def test_mixed_targets_are_smoothed_and_mixing_has_a_probability(labelled):
    *_, targets, _ = mixed(labelled, smoothing=0.3)
    assert targets.min().item() == pytest.approx(0.1) and targets.max() < 0.8
    before, images, targets, share = mixed(labelled, smoothing=0.3, prob=0.0)
    assert torch.equal(images, before) and share == pytest.approx(0.8)
    changed = [not torch.equal(*mixed(labelled, step, prob=0.5)[:2]) for step in range(12)]
    assert 2 < sum(changed) < 10


def test_noise_takes_the_place_of_rectangles(labelled):
    task = task_for(labelled[0], MixConfig(mixup=0, cutmix=0), erase=1.0)
    batch = batch_of(task)
    before = batch.images.clone()
    images, _, _ = task.inputs(batch, 0, 0)
    for image, whole in zip(images, before, strict=True):
        rows, columns = (image != whole).any(0).nonzero().T
        height, width = (int(axis.max() - axis.min()) + 1 for axis in (rows, columns))
        assert len(rows) == height * width and 0.015 < len(rows) / (SIZE[0] * SIZE[1]) < 0.34


def test_recorded_passes_take_targets_too(labelled, monkeypatch):
    """A CUDA graph's inputs are refilled: images, plan and targets."""
    recording = Recording()
    monkeypatch.setattr(passes, "record", recording)
    task = task_for(labelled[0])
    batches = [task.inputs(batch_of(task, 4 * step), step, 0) for step in range(3)]
    scaler = torch.amp.GradScaler("cpu", enabled=False)
    autocast = functools.partial(torch.autocast, "cpu", enabled=False)
    alone = Processes(World(), torch.device("cpu"))
    found = []
    for make in (Passes, functools.partial(GraphedPasses, alone)):
        work = make(task.loss, task.model, list(task.model.parameters()), autocast, scaler, 1)
        found.append([work.forward_backward(inputs, 0).item() for inputs in batches])
    assert recording.count == 1
    assert found[1] == pytest.approx(found[0], rel=1e-6) and len(set(found[0])) == 3


def test_it_is_one_graph_to_the_compiler(labelled):
    task = task_for(labelled[0])
    images, plan, targets = task.inputs(batch_of(task), 0, 0)
    compiled = torch.compile(task.model, fullgraph=True, backend="aot_eager")
    loss = task.loss(compiled, images, plan, targets)
    torch.testing.assert_close(loss, task.loss(task.model, images, plan, targets))
    loss.backward()
    assert all(p.grad is not None for p in task.model.parameters())


# ---- images -------------------------------------------------------------------------------------


def training_images(root: Path, **options) -> TrainingImages:
    config = LabelledImagesConfig(root=str(root), **options)
    return TrainingImages(find_source(config), config, SIZE, 0, list(COLOURS))


def test_augmentation_follows_from_the_place_in_the_epoch(labelled):
    images = training_images(labelled[0])
    plain = training_images(labelled[0], rand_augment=None)
    items = [Item(0, 0, epoch, position) for epoch in (0, 1) for position in range(18)]
    first = [images[item] for item in items]
    again = {item: images[item] for item in reversed(items)}
    assert all(torch.equal(again[sample.item].image, sample.image) for sample in first)
    assert [sample.label for sample in first[:18:6]] == sorted(COLOURS)
    changed = [not torch.equal(plain[sample.item].image, sample.image) for sample in first]
    # Two operations, each with probability one half.
    assert 0.5 < np.mean(changed) < 0.95
    assert not torch.equal(first[0].image, first[18].image)


def test_augmentation_is_told_what_timm_s_loader_tells_it(labelled):
    mean = (0.2, 0.4, 0.99)
    ours = training_images(labelled[0], mean=mean).change
    theirs = next(
        step
        for step in timm.data.create_transform(
            (3, *SIZE), is_training=True, auto_augment="rand-m9-mstd0.5-inc1", mean=mean,
            interpolation="bicubic",
        ).transforms
        if hasattr(step, "ops")
    )  # fmt: skip
    assert len(ours.ops) == len(theirs.ops) and ours.num_layers == theirs.num_layers
    for mine, other in zip(ours.ops, theirs.ops, strict=True):
        assert (mine.name, mine.magnitude, mine.prob) == (other.name, other.magnitude, other.prob)
        assert mine.hparams == other.hparams and mine.kwargs == other.kwargs


def test_augmentation_at_its_greatest_magnitude(labelled):
    """Where timm's posterize keeps no bit, which newer versions of Pillow refuse."""
    images = training_images(labelled[0], rand_augment="rand-m10-n6-p1-inc1")
    samples = [images[Item(0, 0, 0, position)] for position in range(18)]
    assert not any(sample.failures for sample in samples)


def test_images_of_no_class_are_left_out(tmp_path, recipe_file, capsys):
    """However many: the others make up the epochs, each as often."""
    root = coloured(tmp_path / "images", 4)
    for number in range(120):
        Image.new("RGB", (40, 40)).save(root / f"{number}.png")
    (root / "red" / "broken.png").write_bytes(b"no picture")
    run, file = tmp_path / "run", tmp_path / "classes.txt"
    # As Windows writes it; the third has no image.
    file.write_bytes("\ufeffred\r\ngreen\r\nyellow\r\n".encode())
    arguments = command(recipe_file, root, run, "--epochs", "1", "--data.classes", str(file))
    assert main(arguments) == 0
    said = capsys.readouterr().out
    assert "left out of" in said and "120 images without a class and 4 of classes" in said
    assert f"{root} has no image of yellow" in said and "9 images per epoch" in said
    assert [Path(row["path"]).name for row in records(run, "unreadable_image")] == ["broken.png"]
    assert newest(run)["classes"] == ["red", "green", "yellow"]
    file.write_text("cat\ndog\n")
    arguments[arguments.index(str(run))] = str(tmp_path / "other")
    text = complaint(capsys, *arguments)
    assert "is of a class that is learned (cat and dog), they are of blue, green and red;" in text


def test_where_labels_come_after_images_others_take_their_place(tmp_path):
    files = {"0.png": encoded(0), "0.cls": b"red", "1.png": encoded(2)}
    files |= {"2.png": encoded(4), "2.cls": b"blue", "3.png": encoded(6)}
    write_tar(tmp_path / "0.tar", files)
    sample = training_images(f"wds/{tmp_path}/0.tar")[Item(0, 0, 0, 1)]
    assert sample.label == "blue" and sample.failures[0][1] == "it has no class"


def test_classes_of_shards_are_named_in_a_file(tmp_path, recipe_file, capsys):
    files = {}
    for number in range(8):
        files[f"{number}.png"] = encoded(2 * number)
        files[f"{number}.cls"] = sorted(COLOURS)[number % 3].encode()
    write_tar(tmp_path / "shards" / "0.tar", files)
    root = f"wds/{tmp_path}/shards/0.tar"
    arguments = command(recipe_file, root, tmp_path / "run", "--epochs", "1")
    assert "--data.classes is missing" in complaint(capsys, *arguments)
    file = tmp_path / "classes.txt"
    arguments += ["--data.classes", str(file)]
    assert "cannot be read" in complaint(capsys, *arguments)
    file.write_text("red\nred\n")
    assert "names red twice" in complaint(capsys, *arguments)
    file.write_text("red\n")
    assert "fewer than two classes" in complaint(capsys, *arguments)
    file.write_text("red\ngreen\nblue\n\n")
    assert main(arguments) == 0
    assert newest(tmp_path / "run")["classes"] == ["red", "green", "blue"]


# ---- runs ---------------------------------------------------------------------------------------


def test_it_learns_and_is_measured(tuned, labelled, tmp_path, capsys):
    rows = records(tuned, "val")
    assert [row["step"] for row in rows] == [12, 24] and rows[-1]["images"] == 9
    assert rows[-1]["top1"] == rows[-1]["top5"] == 1 and rows[-1]["loss"] < 0.7
    averaged = records(tuned, "val_ema")
    assert [row["step"] for row in averaged] == [12, 24]
    events = EventAccumulator(str(tuned / "tensorboard")).Reload()
    assert [point.value for point in events.Scalars("val_ema/top1")] == [
        pytest.approx(row["top1"]) for row in averaged
    ]
    output = tmp_path / "found.json"
    last = tuned / "checkpoints" / "last.pth"
    arguments = [
        *("eval", "--checkpoint", str(last), "--data.root", str(labelled[1])),
        *("--data.workers", "0", "--data.batch-size", "4", "--output", str(output)),
    ]
    assert main(arguments) == 0
    assert "top-1 100.00 %" in capsys.readouterr().out and output.with_suffix(".png").exists()
    found = json.loads(output.read_text())
    assert (found["top1"], found["images"], found["classes"]) == (averaged[-1]["top1"], 9, 3)
    assert found["loss"] == pytest.approx(averaged[-1]["loss"], rel=1e-5)
    assert main([*arguments, "--ema", "false", "--overwrite"]) == 0
    found = json.loads(output.read_text())
    assert found["loss"] == pytest.approx(rows[-1]["loss"], rel=1e-5)
    assert rows[-1]["loss"] != averaged[-1]["loss"]


def test_images_are_measured_as_the_run_s_are(recipe_file, labelled, tmp_path, capsys):
    """Mean, deviation and crop, in the run and in `eval`; and nobody counts what is not learned."""
    val = shutil.copytree(labelled[1], tmp_path / "val")
    (val / "red" / "broken.png").write_bytes(b"no picture")
    run, output = tmp_path / "run", tmp_path / "found.json"
    more = ["--data.val-root", str(val), "--max-steps", "2", "--data.mean", "[0.3,0.3,0.3]"]
    more += ["--data.std", "[0.1,0.1,0.1]", "--ema-decay", "null"]
    assert main(command(recipe_file, labelled[0], run, *more)) == 0
    assert f"cannot read {val / 'red' / 'broken.png'}" in capsys.readouterr().out
    model, recipe, classes = load_classifier(run / "checkpoints" / "last.pth")
    pictures = sorted(labelled[1].rglob("*.png"))
    # 60 x 50 pixels: the largest part of 3 x 2 is 60 x 40, seven eighths of it are 52 x 35.
    parts = [Image.open(file).crop((7, 4, 42, 56)).resize((64, 96), 3) for file in pictures]
    pixels = torch.stack([pil_to_tensor(part) for part in parts]).float() / 255
    answers = torch.tensor([classes.index(file.parent.name) for file in pictures])
    with torch.no_grad():
        loss = F.cross_entropy(model.eval()((pixels - 0.3) / 0.1), answers).item()
    (row,) = records(run, "val")
    assert row["images"] == 9 and row["loss"] == pytest.approx(loss, rel=0.02)
    assert recipe["data"]["std"] == [0.1, 0.1, 0.1] and not records(run, "val_ema")
    arguments = [
        *("eval", "--checkpoint", str(run / "checkpoints" / "last.pth"), "--data.workers", "0"),
        *("--output", str(output), "--overwrite", "--data.root"),
    ]
    assert main([*arguments, str(labelled[1])]) == 0
    assert json.loads(output.read_text())["loss"] == pytest.approx(row["loss"], rel=1e-5)
    assert main([*arguments, str(labelled[1]), "--data.crop", "0.4"]) == 0
    assert json.loads(output.read_text())["loss"] != pytest.approx(row["loss"], rel=1e-3)
    # The loss is that of images whose class is known: of the same ones, whatever is beside them.
    both, two = tmp_path / "both", tmp_path / "two"
    for folder in (both, two):
        shutil.copytree(labelled[1] / "red", folder / "red")
        shutil.copytree(labelled[1] / "green", folder / "green")
    shutil.copytree(labelled[1] / "blue", both / "navy")
    found = []
    for folder in (both, two):
        assert main([*arguments, str(folder)]) == 0
        found.append(json.loads(output.read_text()))
    assert found[0]["loss"] == pytest.approx(found[1]["loss"], rel=1e-6)
    assert [result["images"] for result in found] == [9, 6]
    shutil.rmtree(both / "red"), shutil.rmtree(both / "green")
    capsys.readouterr()
    text = complaint(capsys, *arguments, str(both))
    assert "both has images of navy, and the classifier has blue, green and red" in text
    shutil.rmtree(two / "green")  # one class can be measured
    assert main([*arguments, str(two)]) == 0


def test_a_stopped_run_ends_with_the_same_bits(recipe_file, labelled, tmp_path):
    whole, parts = tmp_path / "whole", tmp_path / "parts"
    options = ("--model.drop-path", "0.3", "--optim.accumulate", "2")
    assert main(command(recipe_file, labelled[0], whole, *options)) == 0
    # With loader processes, too, which have generators of their own.
    stopped = (*options, "--max-steps", "3", "--data.workers", "2")
    assert main(command(recipe_file, labelled[0], parts, *stopped)) == 0
    assert main(command(recipe_file, labelled[0], parts, *options, "--resume")) == 0
    assert losses(parts) == losses(whole) and len(losses(whole)) == 4
    first, second = newest(whole), newest(parts)
    for part in ("model", "ema"):
        assert first[part].keys() == second[part].keys()
        assert all(torch.equal(first[part][name], second[part][name]) for name in first[part])


@pytest.mark.parametrize("strategy", ["ddp", "fsdp"])
def test_two_processes_do_what_one_does(strategy, recipe_file, labelled, tmp_path):
    """The same micro-batches, mixed alike; measured over all, and averaged in slices."""
    val = ("--data.val-root", str(labelled[1]), "--data.batch-size", "2")
    one, two = tmp_path / "one", tmp_path / "two"
    more = (*val, "--optim.accumulate", "2", "--epochs", "1")
    assert main(command(recipe_file, labelled[0], one, *more)) == 0
    argv = command(recipe_file, labelled[0], two, *val, "--strategy", strategy, "--epochs", "1")
    run_crew(argv, 2, tmp_path / "crew")
    assert losses(two) == pytest.approx(losses(one), rel=1e-5)
    for event in ("val", "val_ema"):
        (mine,), (theirs,) = records(one, event), records(two, event)
        assert theirs["loss"] == pytest.approx(mine["loss"], rel=1e-4)
        assert (theirs["top1"], theirs["images"]) == (mine["top1"], 9)
    first, second = newest(one), newest(two)
    for part in ("model", "ema"):
        for name, tensor in first[part].items():
            torch.testing.assert_close(second[part][name], tensor, rtol=1e-3, atol=1e-4)


def test_timm_loads_what_is_exported(recipe_file, labelled, tmp_path, capsys):
    output, run = tmp_path / "tuned.safetensors", tmp_path / "run"
    # Windows that are full in all stages, which timm pads else.
    more = ("--model.image-size", "64", "--max-steps", "3")
    assert main(command(recipe_file, labelled[0], run, *more)) == 0
    last = run / "checkpoints" / "last.pth"
    arguments = ["export", "--checkpoint", str(last), "--output", str(output), "--overwrite"]
    images = torch.randn(2, 3, 64, 64)
    for ema in (True, False):
        assert main([*arguments, "--ema", str(ema).lower()]) == 0
        said = capsys.readouterr().out
        assert "num_classes=3" in said and "pads" not in said
        # What the command prints for people to paste.
        theirs = eval(said.splitlines()[-1], {"timm": timm}).eval()
        for module in theirs.modules():
            if isinstance(module, nn.LayerNorm):
                module.eps = 1e-6
        ours, _, classes = load_classifier(last, ema)
        assert classes == sorted(COLOURS)
        state = newest(run)
        head = state["ema" if ema else "model"]["head.fc.weight"]
        assert torch.equal(theirs.head.fc.weight, head)
        with torch.no_grad():
            torch.testing.assert_close(theirs(images), ours.eval()(images), rtol=1e-4, atol=1e-5)
        again, recipe, names = load_classifier(output)
        assert names == classes and recipe["data"]["mean"] == list(LabelledImagesConfig.mean)
        with torch.no_grad():
            assert torch.equal(again.eval()(images), ours(images))
    assert not torch.equal(state["ema"]["head.fc.weight"], state["model"]["head.fc.weight"])
    # It is told where timm pads, as in the last stage of 3 x 2 tokens; and no command forgets it.
    assert main(["export", "--checkpoint", str(last), "--output", str(output), "--overwrite"]) == 0
    text = complaint(capsys, "convert", "--input", str(last), "--output", str(tmp_path / "x.pth"))
    assert "`greenmim export` writes it for timm, with its head" in text


def test_where_timm_pads_it_is_told(tuned, tmp_path, capsys):
    output = tmp_path / "tuned.safetensors"
    last = str(tuned / "checkpoints" / "last.pth")
    assert main(["export", "--checkpoint", last, "--output", str(output)]) == 0
    assert "timm pads the windows of stage 4" in capsys.readouterr().out


def test_a_checkpoint_is_as_large_as_there_has_to_be_room(recipe_file, labelled, tuned):
    folder = tuned / "checkpoints"
    files = [folder / "step_00000024.pth", *(folder / "step_00000024.optimizer").iterdir()]
    weights = sum(tensor.numel() for tensor in newest(tuned)["model"].values())
    found = sum(file.stat().st_size for file in files) / weights
    assert 16 <= found < 18  # names and all
    for decay, each in ((0.9, 16), (None, 12)):
        data = LabelledImagesConfig(root=str(labelled[0]))
        recipe = FinetuneRecipe(work_dir="-", data=data, ema_decay=decay)
        assert Finetuning(recipe).bytes_per_weight == each


def test_who_was_told_to_stop_measures_no_further(labelled, monkeypatch):
    task = task_for(labelled[0])
    monkeypatch.setattr("greenmim.training.finetuning.classify", lambda *_: None)
    task.sweeps, task.watch = [None], SimpleNamespace(autocast=None, stop=None)
    assert task.measure(1) is False


def test_a_run_starts_from_a_pre_trained_one(finished_run, labelled, tmp_path, capsys):
    """Sizes and all that nobody asked to be another are the checkpoint's."""
    last = finished_run / "checkpoints" / "last.pth"
    run, photos = tmp_path / "run", str(labelled[0])
    arguments = [
        *("finetune", "--init", str(last), "--data.root", photos, "--work-dir", str(run)),
        *("--data.batch-size", "4", "--data.workers", "0", "--epochs", "1"),
        *("--schedule.warmup-epochs", "0", "--device", "cpu", "--optim.lr", "1e-9"),
    ]
    assert main([*arguments, "--dry-run"]) == 0
    said = capsys.readouterr().out
    assert "embed_dim: 16" in said and re.search(r"classes +3\n", said)
    assert main(arguments) == 0
    assert f"starts from {last} (greenmim): the encoder; the head" in capsys.readouterr().out
    before, state = load_checkpoint(last)["model"], newest(run)
    assert state["recipe"]["model"]["image_size"] == [96, 64]
    for name, tensor in state["model"].items():
        if name.startswith("encoder."):
            torch.testing.assert_close(tensor, before[name], rtol=1e-5, atol=1e-6)
    # Another window; and its own checkpoint needs the first one no more.
    other = tmp_path / "other"
    again = [other if part == str(run) else part for part in arguments]
    assert main([*map(str, again), "--model.window-size", "3", "--max-steps", "2"]) == 0
    assert "position tables of windows of 2 were interpolated" in capsys.readouterr().out
    config = (other / "config.yaml").read_text().replace(str(last), "gone.pth")
    (other / "config.yaml").write_text(config)
    assert main(["finetune", "--config", str(other / "config.yaml"), "--resume"]) == 0


def test_features_of_a_tuned_encoder_are_measured(tuned, labelled, tmp_path, capsys):
    arguments = [
        *("--checkpoint", str(tuned / "checkpoints" / "last.pth"), "--data.root", str(labelled[0])),
        *("--data.val-root", str(labelled[1]), "--data.workers", "0", "--k", "3"),
        *("--output", str(tmp_path / "knn.json")),
    ]
    assert main(["knn", *arguments]) == 0
    assert json.loads((tmp_path / "knn.json").read_text())["top1"] == 1
    (tmp_path / "knn.json").unlink(), (tmp_path / "knn.png").unlink()
    arguments[arguments.index(str(labelled[1]))] = str(labelled[1].parent)  # one level too high
    text = complaint(capsys, "knn", *arguments)
    assert "has images of train and val, and --data.root has blue, green and red" in text
    assert not (tmp_path / "knn.json").exists()
    arguments[1] = str(tuned)
    text = complaint(capsys, "knn", *arguments)
    assert f"did you mean {tuned / 'checkpoints' / 'last.pth'}?" in text


def test_eval_counts_what_is_not_known(tuned, labelled, tmp_path, capsys):
    root = coloured(tmp_path / "images", 2, first=90)
    (root / "red").rename(root / "crimson")
    (root / "blue" / "broken.png").write_bytes(b"no picture")
    Image.new("RGB", (40, 40)).save(root / "loose.png")
    output = tmp_path / "found.json"
    arguments = [
        *("eval", "--checkpoint", str(tuned / "checkpoints" / "last.pth")),
        *("--data.root", str(root), "--data.workers", "0", "--output", str(output)),
    ]
    assert main(arguments) == 0
    said = capsys.readouterr().err
    assert "The classifier has no class crimson: 2 images of --data.root cannot be right" in said
    assert "broken.png" in said and "1 images" in said and "have no class" in said
    found = json.loads(output.read_text())
    assert (found["top1"], found["images"]) == (pytest.approx(4 / 6), 6)
    assert math.isfinite(found["loss"])


def test_held_out_images_of_other_classes_are_told(recipe_file, labelled, tmp_path, capsys):
    val = coloured(tmp_path / "val", 2, first=90)
    (val / "red").rename(val / "crimson")
    Image.new("RGB", (40, 40)).save(val / "loose.png")
    run = tmp_path / "run"
    more = ("--data.val-root", str(val), "--max-steps", "2")
    arguments = command(recipe_file, labelled[0], run, *more)
    assert main(arguments) == 0
    said = "of the held-out images 1 have no class and are left out, and 2 have one that is not"
    assert capsys.readouterr().out.count(said) == 1
    (row,) = records(run, "val")
    assert row["images"] == 6 and row["top1"] <= 4 / 6 and math.isfinite(row["loss"])
    shutil.rmtree(val / "green"), shutil.rmtree(val / "blue")
    arguments[arguments.index(str(run))] = str(tmp_path / "other")
    for more in ((), ("--dry-run",)):
        text = complaint(capsys, *arguments, *more)
        assert "class that is learned (blue, green and red), they are of crimson" in text


def test_eval_of_timm_s_own_classifier(labelled, tmp_path, capsys):
    """Without names its classes are those of the images in alphabetical order, if as many."""
    torch.manual_seed(0)
    theirs = timm.create_model(
        "swin_tiny_patch4_window7_224", num_classes=3, embed_dim=24, depths=(1, 1, 1, 1)
    ).eval()
    file = tmp_path / "theirs.pth"
    torch.save(theirs.state_dict(), file)
    output = tmp_path / "found.json"
    arguments = [
        *("eval", "--checkpoint", str(file), "--data.root", str(labelled[1])),
        *("--data.workers", "0", "--output", str(output)),
    ]
    assert main(arguments) == 0
    assert json.loads(output.read_text())["images"] == 9
    assert "the checkpoint names no classes" in capsys.readouterr().err
    network, _, classes = load_classifier(file)
    images = torch.randn(2, 3, 224, 224)
    with torch.no_grad():
        torch.testing.assert_close(network.eval()(images), theirs(images), rtol=1e-4, atol=1e-4)
    assert classes is None
    (tmp_path / "classes.txt").write_text("a\nb\nc\nd\n")
    text = complaint(capsys, *arguments, "--classes", str(tmp_path / "classes.txt"), "--overwrite")
    assert "tells 3 classes" in text and "classes.txt 4;" in text


# ---- what is refused ----------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("options", "wanted"),
    [
        (["--data.batch-size", "5"], "it has to be even"),
        (["--optim.layer-decay", "0"], "--optim.layer-decay is 0"),
        (["--ema-decay", "1"], "--ema-decay is 1"),
        (["--mix.smoothing", "1"], "--mix.smoothing is 1"),
        (["--mix.prob", "2"], "--mix.prob is 2"),
        (["--mix.mixup=-1"], "--mix.mixup is -1"),
        (["--data.rand-augment", "nonsense"], "--data.rand-augment is 'nonsense'"),
        (["--model.embed-dim", "null"], "--model.embed-dim is missing"),
        (["--model.num-heads", "[1,2,4,5]"], "cannot be split into 5 heads"),
        (["--init", "nowhere.pth"], "there is no checkpoint nowhere.pth"),
        (["--mask.ratio", "0.5"], "--mask.ratio is no option"),
    ],
)
def test_bad_values_are_told(options, wanted, recipe_file, labelled, tmp_path, capsys):
    arguments = command(recipe_file, labelled[0], tmp_path / "run", *options)
    assert wanted in complaint(capsys, *arguments)
    assert not (tmp_path / "run").exists()


def test_checkpoints_of_another_command_or_other_classes_are_refused(
    finished_run, tuned, labelled, recipe_file, tiny, photos, tmp_path, capsys
):
    pretrained, finetuned = (str(run / "checkpoints" / "last.pth") for run in (finished_run, tuned))
    run = tmp_path / "run"
    text = complaint(capsys, *command(recipe_file, labelled[0], run, "--resume", pretrained))
    assert "was not written by `greenmim finetune`" in text and "--init" in text
    arguments = ["pretrain", "--config", str(tiny), "--data.root", str(photos)]
    text = complaint(capsys, *arguments, "--work-dir", str(run), "--resume", finetuned)
    assert "was not written by `greenmim pretrain`" in text
    text = complaint(capsys, *command(recipe_file, photos, run, "--resume", finetuned))
    assert "other classes than the images: 3 there and 2 here" in text
    other = [*command(recipe_file, labelled[0], run), "--resume", finetuned]
    text = complaint(capsys, *other, "--model.window-size", "3")
    assert "is of another model: window_size is 2 there and 3 in this recipe" in text
    assert "has no head" in complaint(
        capsys, "eval", "--checkpoint", pretrained, "--data.root", str(labelled[1]),
        "--output", str(tmp_path / "x.json"),
    )  # fmt: skip
    text = complaint(capsys, "reconstruct", "--checkpoint", finetuned, "--images", str(photos),
                     "--output", str(tmp_path / "x.png"))  # fmt: skip
    assert "has no decoder" in text


def test_presets_are_of_their_command(capsys):
    name = "finetune_swin-base_8xb128-amp-coslr-100e_in1k"
    arguments = ["--config", name, "--data.root", "x", "--work-dir", "y"]
    assert "is a preset of `greenmim finetune`" in complaint(capsys, "pretrain", *arguments)
    demo = ["--config", "greenmim_swin-demo-cpu", *arguments[2:]]
    assert "is a preset of `greenmim pretrain`" in complaint(capsys, "finetune", *demo)

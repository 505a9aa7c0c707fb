"""Fine-tuning, part by part: schedule, rates, average, what is mixed, images."""

from __future__ import annotations

import functools
import random
from collections import Counter
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import pytest
import timm
import torch
from crew import records
from PIL import Image
from recording import Recording
from tar_files import encoded
from timm.scheduler import CosineLRScheduler
from torch.nn import functional as F
from train_pictures import COLOURS, coloured
from tuning import SIZE, command, complaint, newest

import greenmim.encoders.visible
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
from greenmim.guards import UserError
from greenmim.launch import World
from greenmim.processes import Processes
from greenmim.training import passes
from greenmim.training.finetuning import Finetuning
from greenmim.training.passes import GraphedPasses, Passes
from greenmim.training.startup import learning_rate
from tests.archives import write_tar

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
    seen, decays, tasks = [], [], []
    before, groups_of = torch.optim.AdamW.step, Finetuning.parameter_groups

    def step(optimizer, *rest):
        seen.append([(group["lr"], group["lr_scale"]) for group in optimizer.param_groups])
        decays.append(
            {id(p): g["weight_decay"] for g in optimizer.param_groups for p in g["params"]}
        )
        return before(optimizer, *rest)

    monkeypatch.setattr(torch.optim.AdamW, "step", step)
    keep = lambda task: tasks.append(task) or groups_of(task)  # noqa: E731
    monkeypatch.setattr(Finetuning, "parameter_groups", keep)
    run = tmp_path / "run"
    more = ("--max-steps", "3", "--optim.layer-decay", "0.5")
    assert main(command(recipe_file, labelled[0], run, *more)) == 0
    # Two blocks in one stage, three stages of one, three mergings with their blocks, stem and head.
    assert {scale for _, scale in seen[0]} == {0.5**layer for layer in range(7)}
    rates = [row["lr"] for row in records(run, "train")]
    assert rates[1] > 0
    for rate, groups in zip(rates, seen, strict=True):
        assert all(lr == pytest.approx(rate * scale) for lr, scale in groups)
    for name, parameter in tasks[0].model.named_parameters():
        has_none = parameter.ndim == 1 or name.endswith("bias_table")
        assert decays[0][id(parameter)] == (0.0 if has_none else 0.05), name


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


def test_who_was_told_to_stop_measures_no_further(labelled, monkeypatch):
    task = task_for(labelled[0])

    def classify(sweep, models, autocast, classes, stop):
        assert stop() and classes == task.classes
        return None

    monkeypatch.setattr("greenmim.training.finetuning.classify", classify)
    task.sweeps, task.watch = [None], SimpleNamespace(autocast=None, stop=lambda: True)
    assert task.measure(1) is False


def test_memory_is_saved_where_that_is_asked_for(labelled, monkeypatch):
    task = task_for(labelled[0])
    model, batch = task.model, batch_of(task)
    blocks = sum(1 for _ in model.blocks())
    calls = []
    visible = "greenmim.encoders.visible.checkpoint"
    real = greenmim.encoders.visible.checkpoint
    monkeypatch.setattr(visible, lambda *a, **k: calls.append(1) or real(*a, **k))
    plain = model.train()(batch.images)
    model.set_grad_checkpointing()
    torch.testing.assert_close(model(batch.images), plain, rtol=0, atol=0)
    assert len(calls) == blocks


# ---- images -------------------------------------------------------------------------------------


def training_images(root: Path, **options) -> TrainingImages:
    config = LabelledImagesConfig(root=str(root), **options)
    return TrainingImages(find_source(config), config, SIZE, 0, list(COLOURS))


def test_a_label_that_can_be_read_only_later_is_looked_at_again(labelled, monkeypatch):
    """Of an image that is not learned, whose label could not be read when it was chosen."""
    images = training_images(labelled[0])
    monkeypatch.setattr(images.source, "knows_labels", False, raising=False)
    real, tried = images.source.label, []
    first = images._index(Item(0, 0, 0, 0))

    def label(index):
        if index != first:
            return real(index)
        tried.append(index)
        if len(tried) == 1:
            raise ValueError("a hiccup")
        return "lion"

    monkeypatch.setattr(images.source, "label", label)
    sample = images[Item(0, 0, 0, 0)]
    assert len(tried) == 2 and sample.label in COLOURS and not sample.stop
    assert not sample.failures  # it could be read


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
    images = training_images(f"wds/{tmp_path}/0.tar")
    assert any("are replaced by others" in note for note in images.check_readable())
    sample = images[Item(0, 0, 0, 1)]
    assert sample.label in ("red", "blue") and not sample.failures
    assert torch.equal(images[Item(0, 0, 0, 1)].image, sample.image)


def test_a_row_of_other_classes_neither_ends_a_run_nor_weighs(tmp_path):
    labels = ["red"] * 4 + ["zebra"] * 150 + ["blue"] * 4 + ["zebra"] * 2
    picture, files = encoded(0), {}
    for number, label in enumerate(labels):
        files |= {f"{number:03}.png": picture, f"{number:03}.cls": label.encode()}
    write_tar(tmp_path / "0.tar", files)
    root = f"wds/{tmp_path}/0.tar"
    images = training_images(root)
    stands_in = Counter(images[Item(0, 0, 0, position)].label for position in range(4, 154))
    assert stands_in.keys() == {"red", "blue"} and min(stands_in.values()) > 50
    assert [images[Item(0, 0, 0, position)].label for position in (0, 154)] == ["red", "blue"]
    config = LabelledImagesConfig(root=root)
    none = TrainingImages(find_source(config), config, SIZE, 0, ["lion"])
    with pytest.raises(UserError, match=r"No image in .* is of a class that is learned \(lion\)"):
        none.check_readable()


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

"""Runs of fine-tuning: what they learn, measure, save, go on from and refuse."""

from __future__ import annotations

import json
import math
import re
import shutil
from pathlib import Path

import pytest
import timm
import torch
from crew import losses, records, run_crew
from PIL import Image
from tensorboard.backend.event_processing.event_accumulator import EventAccumulator
from torch import nn
from torch.nn import functional as F
from torchvision.transforms.v2.functional import pil_to_tensor
from train_pictures import coloured
from tuning import command, complaint, newest

from greenmim.checkpoint import load_checkpoint
from greenmim.cli import main
from greenmim.data.images import Source
from greenmim.data.labelled import CROP, LabelledImages
from greenmim.data.sampler import Item
from greenmim.data.sources import find_source
from greenmim.finetune_recipe import (
    FinetuneRecipe,
    LabelledImagesConfig,
)
from greenmim.guards import UserError
from greenmim.recipe import DataConfig
from greenmim.tools.classify import _classes, load_picture
from greenmim.tools.loading import load_classifier
from greenmim.training.finetuning import Finetuning


@pytest.fixture(scope="module")
def tuned(recipe_file, labelled, tmp_path_factory) -> Path:
    """A finished run of six epochs, measured after each third."""
    run = tmp_path_factory.mktemp("runs") / "tuned"
    more = ("--epochs", "6", "--data.val-root", str(labelled[1]), "--log.val-every-epochs", "3")
    assert main(command(recipe_file, labelled[0], run, *more)) == 0
    return run


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
    said = capsys.readouterr().out
    assert "top-1 100.00 % (9 images" in said and output.with_suffix(".png").exists()
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
    first = json.loads(output.read_text())
    assert first["loss"] == pytest.approx(row["loss"], rel=1e-5)
    assert (first["step"], first["epoch"], first["weights"]) == (2, 0.5, "last")
    assert "cannot be right" not in capsys.readouterr().err
    # A picture alone is read as they are, whatever is odd about it.
    odd = tmp_path / "odd" / "red"
    odd.mkdir(parents=True)
    glass = Image.new("RGBA", (70, 90), (255, 0, 0, 0))
    glass.paste((0, 0, 255, 255), (0, 0, 30, 90))
    turned = Image.Exif()
    turned[0x0112] = 6
    glass.convert("RGB").save(odd / "turned.jpg", exif=turned)
    glass.save(odd / "glass.png")
    source = find_source(DataConfig(root=str(odd.parent)))
    reads = LabelledImages(source, LabelledImagesConfig(), (96, 64))
    for number, name in enumerate(("glass.png", "turned.jpg")):
        picture = load_picture(odd / name, model, recipe)
        sample = reads[Item(0, 0, 0, number)]
        assert picture.shape == (1, 3, 96, 64)
        torch.testing.assert_close(picture[0], (sample.image / 255 - 0.3) / 0.1)
    with pytest.raises(UserError, match="broken.png cannot be read as an image"):
        load_picture(val / "red" / "broken.png", model, recipe)
    # Another order of the classes is taken as it is said, and told.
    (tmp_path / "classes.txt").write_text("green\nblue\nred\n")
    order = ["--classes", str(tmp_path / "classes.txt")]
    assert main([*arguments, str(labelled[1]), *order]) == 0
    assert "replaces the checkpoint's own classes" in capsys.readouterr().err
    names = _classes(Source(), order[1], ["red", "blue", "green"], 3, is_main=False)
    assert names == ["green", "blue", "red"] and not capsys.readouterr().err
    assert json.loads(output.read_text())["loss"] != first["loss"]
    assert main([*arguments, str(labelled[1]), "--data.max-pixels", "10"]) == 2
    said = capsys.readouterr().err
    assert said.count("raise --data.max-pixels to read it") == 9
    assert "no image with a class can be read" in said
    more[1] = str(val / "red" / "broken")
    (val / "red" / "broken" / "a").mkdir(parents=True)
    (val / "red" / "broken" / "b").mkdir()
    for name in "ab":
        (val / "red" / "broken" / name / "1.png").write_bytes(b"no picture")
    again = command(recipe_file, labelled[0], tmp_path / "again", *more)
    (tmp_path / "classes.txt").write_text("a\nb\nred\n")
    again += ["--data.classes", str(tmp_path / "classes.txt")]
    assert "No image can be read: 2 under" in complaint(capsys, *again)
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
    # One that is not learned, and two in the second half that cannot be read or have no class.
    folder = shutil.copytree(labelled[1], tmp_path / "val")
    shutil.copytree(labelled[1] / "red", folder / "violet")
    (folder / "red" / "zz.png").write_bytes(b"no picture")
    Image.new("RGB", (40, 40)).save(folder / "zz.png")
    val = ("--data.val-root", str(folder), "--data.batch-size", "2")
    one, two = tmp_path / "one", tmp_path / "two"
    more = (*val, "--optim.accumulate", "2", "--epochs", "1")
    assert main(command(recipe_file, labelled[0], one, *more)) == 0
    argv = command(recipe_file, labelled[0], two, *val, "--strategy", strategy, "--epochs", "1")
    run_crew(argv, 2, tmp_path / "crew")
    assert losses(two) == pytest.approx(losses(one), rel=1e-5)
    for event in ("val", "val_ema"):
        (mine,), (theirs,) = records(one, event), records(two, event)
        assert theirs["loss"] == pytest.approx(mine["loss"], rel=1e-4)
        assert (theirs["top1"], theirs["images"]) == (mine["top1"], 12)
    named = [{r["path"] for r in records(run, "unreadable_image")} for run in (one, two)]
    assert named[0] == named[1] == {str(folder / "red" / "zz.png")}
    first, second = newest(one), newest(two)
    for part in ("model", "ema"):
        for name, tensor in first[part].items():
            torch.testing.assert_close(second[part][name], tensor, rtol=1e-3, atol=1e-4)


def test_timm_loads_what_is_exported(recipe_file, labelled, tmp_path, capsys):
    output, run = tmp_path / "tuned.safetensors", tmp_path / "run"
    # Windows that are full in all stages, which timm pads else.
    more = ("--model.image-size", "64", "--max-steps", "3", "--data.mean", "[0.3,0.4,0.5]")
    more += ("--data.std", "[0.1,0.1,0.2]", "--data.classes", str(tmp_path / "classes.txt"))
    (tmp_path / "classes.txt").write_text("red\nblue\ngreen\n")
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
        reads = timm.data.resolve_model_data_config(theirs)
        assert reads["input_size"] == (3, 64, 64) and reads["crop_pct"] == CROP
        assert (reads["mean"], reads["std"]) == ((0.3, 0.4, 0.5), (0.1, 0.1, 0.2))
        assert reads["interpolation"] == "bicubic"
        for module in theirs.modules():
            if isinstance(module, nn.LayerNorm):
                module.eps = 1e-6
        ours, _, classes = load_classifier(last, ema)
        assert classes == ["red", "blue", "green"]
        state = newest(run)
        head = state["ema" if ema else "model"]["head.fc.weight"]
        assert torch.equal(theirs.head.fc.weight, head)
        with torch.no_grad():
            torch.testing.assert_close(theirs(images), ours.eval()(images), rtol=1e-4, atol=1e-5)
        again, recipe, names = load_classifier(output)
        assert names == classes and recipe["data"]["mean"] == [0.3, 0.4, 0.5]
        weights = "averaged" if ema else "last"
        assert recipe["trained"] == {"step": 3, "epoch": 0.75, "weights": weights}
        with torch.no_grad():
            assert torch.equal(again.eval()(images), ours(images))
    assert not torch.equal(state["ema"]["head.fc.weight"], state["model"]["head.fc.weight"])
    # It is told where timm pads, as in the last stage of 3 x 2 tokens; and no command forgets it.
    assert main(["export", "--checkpoint", str(last), "--output", str(output), "--overwrite"]) == 0
    again = ["export", "--checkpoint", str(output), "--output", str(tmp_path / "x.safetensors")]
    assert "is exported already" in complaint(capsys, *again)
    again[2] = str(last)
    assert "leave it out" in complaint(capsys, *again, "--model", "greenmim_swin_tiny")
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
    said = "of the held-out images 1 have no class and are left out and 2 have one that is not"
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

"""Every encoder goes the whole way: pre-trained, measured, fine-tuned elsewhere, exported."""

from __future__ import annotations

import dataclasses
import json
from pathlib import Path

import pytest
import timm
import torch
import yaml
from crew import command, losses
from safetensors.torch import load_file, safe_open
from train_pictures import COLOURS
from tuning import command as tuning
from tuning import newest

from greenmim.checkpoint import load_checkpoint
from greenmim.cli import main
from greenmim.config import ENCODERS, ModelConfig
from greenmim.data.labelled import LabelledImages
from greenmim.data.sources import find_source
from greenmim.evaluation.features import key_of
from greenmim.mim import GreenMIM
from greenmim.recipe import DataConfig
from greenmim.tools.loading import load_classifier


@pytest.mark.parametrize("encoder", ENCODERS)
def test_the_whole_way(encoder, tiny, photos, labelled, recipe_file, tmp_path, capsys):
    # Swin's last stage has to have square windows for tables that are interpolated.
    square = ("--model.encoder", encoder, "--model.image-size", "64")
    first, tuned = tmp_path / "first", tmp_path / "tuned"
    assert main(command(tiny, photos, first, *square, "--epochs", "1")) == 0
    assert len(losses(first)) > 0
    last = str(first / "checkpoints" / "last.pth")
    picture, found = tmp_path / "picture.png", tmp_path / "knn.json"
    assert main(["reconstruct", "--checkpoint", last, "--images", str(photos),
                 "--output", str(picture)]) == 0  # fmt: skip
    data = ["--data.workers", "0", "--data.root", str(labelled[0])]
    assert main(["knn", "--checkpoint", last, *data, "--data.val-root", str(labelled[1]),
                 "--k", "3", "--output", str(found)]) == 0  # fmt: skip
    assert json.loads(found.read_text())["images"] == 9

    own = recipe_file.read_text().partition("model:")[0] + "data:\n  batch_size: 4\n  workers: 0\n"
    (tmp_path / "own.yaml").write_text(own + "schedule:\n  warmup_epochs: 0\n")
    more = ("--init", last, "--model.image-size", "128", "--model.window-size", "4")
    assert main(tuning(tmp_path / "own.yaml", labelled[0], tuned, *more, "--epochs", "1")) == 0
    model = newest(tuned)["recipe"]["model"]
    assert model["encoder"] == encoder and model["window_size"] == 4
    # The run goes on from its own sizes.
    again = ("--epochs", "1", "--resume")
    assert main(tuning(tuned / "config.yaml", labelled[0], tuned, *again)) == 0
    last, output = str(tuned / "checkpoints" / "last.pth"), tmp_path / "tuned.safetensors"
    assert main(["export", "--checkpoint", last, "--output", str(output)]) == 0
    said = capsys.readouterr().out

    network, _, classes = load_classifier(last)
    assert classes == sorted(COLOURS)
    with safe_open(output, "pt") as file:
        arguments = json.loads(file.metadata()["timm"])
    assert repr(arguments["model_name"]) in said
    theirs = timm.create_model(**arguments)
    for module in theirs.modules():
        if isinstance(module, torch.nn.LayerNorm):
            module.eps = network.config.norm_eps
    theirs.load_state_dict(load_file(output), strict=True)
    images = torch.randn(2, 3, 128, 128)
    with torch.no_grad():
        scores, expected = network.eval()(images), theirs.eval()(images)
    torch.testing.assert_close(scores, expected, rtol=0, atol=2e-5)
    exported, _, _ = load_classifier(output)
    assert exported.config.encoder == encoder
    # To the rounding of what stands in timm's files less by 1.
    torch.testing.assert_close(exported.eval()(images), scores, rtol=0, atol=1e-6)
    windows = network.config.pretrained_window_sizes
    assert exported.config.pretrained_window_sizes == windows
    assert windows == ((2, 2, 2, 2) if encoder == "swinv2" else (0, 0, 0, 0))
    # Once more, from either file, in windows of another size; and another's config.yaml.
    larger = ("--model.image-size", "256", "--model.window-size", "8", "--max-steps", "1")
    for number, init in enumerate((last, str(output))):
        run = tmp_path / f"again-{number}"
        more = ("--init", init, *larger)
        assert main(tuning(tuned / "config.yaml", labelled[0], run, *more)) == 0
        assert newest(run)["recipe"]["model"]["pretrained_window_sizes"] == list(windows)
    # Pre-training goes on likewise, and is resumed by the same command.
    more = (*square, "--init", str(first / "checkpoints" / "last.pth"), "--model.image-size", "128")
    more += ("--model.window-size", "4", "--max-steps", "2")
    for again in ((), ("--resume",)):
        assert main(command(tiny, photos, tmp_path / "second", *more, *again)) == 0
    assert newest(tmp_path / "second")["recipe"]["model"]["pretrained_window_sizes"] == list(
        windows
    )


def test_a_run_from_before_there_were_encoders_goes_on(
    tiny, photos, labelled, recipe_file, tmp_path
):
    new = ("encoder", "pretrained_window_sizes", "sr_ratios", "pos_conv_residual")
    for argv in (
        command(tiny, photos, tmp_path / "pretrain", "--max-steps", "2"),
        tuning(recipe_file, labelled[0], tmp_path / "finetune", "--max-steps", "2"),
    ):
        assert main(argv) == 0
        run = Path(argv[argv.index("--work-dir") + 1])
        for file in {path.resolve() for path in (run / "checkpoints").glob("*.pth")}:
            state = load_checkpoint(file)
            for name in new:
                state["recipe"]["model"].pop(name, None)
            torch.save(state, file)
        kept = yaml.safe_load((run / "config.yaml").read_text())
        for name in new:
            kept["model"].pop(name, None)
        (run / "config.yaml").write_text(yaml.safe_dump(kept))
        assert main([*argv[:-1], "3", "--resume"]) == 0
        assert main([argv[0], "--config", str(run / "config.yaml"), "--resume"]) == 0
        assert newest(run)["step"] > 3


def test_another_encoder_is_named(tiny, photos, tmp_path, capsys):
    assert main(command(tiny, photos, tmp_path / "first", "--max-steps", "1")) == 0
    last = str(tmp_path / "first" / "checkpoints" / "last.pth")
    argv = command(tiny, photos, tmp_path / "second", "--init", last, "--model.encoder", "swinv2")
    capsys.readouterr()
    assert main(argv) == 2
    assert "it has the encoder swin, and this recipe swinv2" in capsys.readouterr().err
    again = command(tiny, photos, tmp_path / "first", "--model.encoder", "swinv2", "--resume")
    assert main(again) == 2
    assert "of another model: encoder is swin there and swinv2" in capsys.readouterr().err


def test_windows_that_weights_do_not_tell(labelled, recipe_file, tmp_path, capsys):
    theirs = timm.create_model(
        "swinv2_tiny_window8_256", img_size=64, window_size=2, embed_dim=16, depths=(1, 1, 1, 1),
        num_heads=(1, 2, 4, 8),
    )  # fmt: skip
    file = tmp_path / "timm.pth"
    torch.save(theirs.state_dict(), file)
    data = ["--data.root", str(labelled[0]), "--data.val-root", str(labelled[1])]
    output = ["--output", str(tmp_path / "found.json")]
    assert main(["knn", "--checkpoint", str(file), *data, *output]) == 2
    assert "do not tell how large its windows are" in capsys.readouterr().err
    (tmp_path / "own.yaml").write_text("device: cpu\nepochs: 1\nschedule:\n  warmup_epochs: 0\n")
    more = ("--init", str(file), "--data.workers", "0", "--data.batch-size", "4")
    run = tuning(tmp_path / "own.yaml", labelled[0], tmp_path / "run", *more)
    assert main(run) == 2
    assert "--model.image-size is missing" in capsys.readouterr().err
    sizes = ("--model.image-size", "64", "--model.window-size", "2", "--max-steps", "1")
    assert main([*run, *sizes]) == 0
    assert "starts from" in capsys.readouterr().out


def test_kept_features_are_of_these_windows(labelled):
    """A SwinV2's weights are the same whatever its windows are."""
    sizes = {"embed_dim": 16, "depths": (1, 1, 1, 1), "num_heads": (1, 2, 4, 8)}
    config = ModelConfig(**sizes, image_size=64, window_size=4, encoder="swinv2")
    model, keys = GreenMIM(config), set()
    images = LabelledImages(find_source(DataConfig(root=str(labelled[0]))), DataConfig(), (64, 64))
    for change in ({}, {"window_size": 8}, {"pretrained_window_sizes": (2, 2, 2, 2)}):
        other = GreenMIM(dataclasses.replace(config, **change))
        other.encoder.load_state_dict(model.encoder.state_dict(), strict=True)
        keys.add(key_of(other, images, torch.float32))
    assert len(keys) == 3

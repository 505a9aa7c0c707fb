"""Watching a run and taking its result: TensorBoard, wandb, the bar, --dry-run, export, masks."""

from __future__ import annotations

import importlib.util
import io
import json
import re
import shutil
import sys
import types
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import pytest
import timm
import torch
from crew import command
from PIL import Image
from safetensors import safe_open
from tensorboard.backend.event_processing.event_accumulator import EventAccumulator
from torch import nn
from torch.utils.flop_counter import FlopCounterMode

from greenmim.cli import main
from greenmim.config import ModelConfig, model_config
from greenmim.data.dataset import AugmentedImages
from greenmim.data.images import Folder
from greenmim.flops import forward_flops
from greenmim.mim import GreenMIM
from greenmim.pictures import HIDDEN_GREY, Album
from greenmim.recipe import DataConfig, MaskConfig
from greenmim.tools.loading import load_model
from greenmim.training.log import read_log

# ---- TensorBoard, wandb, the bar ----------------------------------------------------------------


def test_tensorboard_has_every_curve_the_recipe_and_pictures(
    tiny: Path, photos: Path, tmp_path: Path
) -> None:
    run = tmp_path / "run"
    more = ("--epochs", "3", "--log.pictures-every-epochs", "2", "--log.pictures", "4")
    assert main(command(tiny, photos, run, *more)) == 0
    events = EventAccumulator(str(run / "tensorboard"))
    events.Reload()
    names = ("loss", "lr", "grad_norm", "images_per_second", "data_wait", "peak_memory_gib")
    for name in (*names, "skipped"):
        assert [e.step for e in events.Scalars(f"train/{name}")] == list(range(1, 13)), name
    (tag,) = events.Tags()["images"]
    pictures = events.Images(tag)
    assert [e.step for e in pictures] == [8, 12]  # after epoch 2, and at the end
    page = Image.open(io.BytesIO(pictures[0].encoded_image_string))
    assert page.size == (4 * (64 + 2) + 2, 3 * (96 + 2) + 2)  # three rows of four images
    (text,) = events.Tags()["tensors"]
    table = events.Tensors(text)[0].tensor_proto.string_val[0].decode()
    assert "| optim.weight_decay | 0.05 |" in table and "| model.window_size | 2 |" in table


def test_drawing_changes_nothing_in_the_run(tiny: Path, photos: Path, tmp_path: Path) -> None:
    for name, often in (("with", "1"), ("without", "null")):
        more = ("--log.pictures-every-epochs", often, "--model.drop-path", "0.3")
        assert main(command(tiny, photos, tmp_path / name, *more)) == 0
    a, b = (
        [r["loss"] for r in read_log(tmp_path / n / "log.jsonl") if r["event"] == "train"]
        for n in ("with", "without")
    )
    assert a == b


def test_an_album_shows_the_same_images_hidden_units_grey(photos: Path, last: str) -> None:
    network, _ = load_model(last)
    config = DataConfig(root=str(photos))
    dataset = AugmentedImages(Folder(str(photos)), config, (96, 64), 0)
    album = Album(dataset, 3, MaskConfig(0.5))
    first, again = album.draw(network.train()), album.draw(network)
    assert np.array_equal(first, again) and network.training
    grey = (np.abs(first[98:196].astype(int) - round(255 * HIDDEN_GREY)) <= 1).all(-1).mean()
    assert 0.4 < grey < 0.6
    assert not (np.abs(first[:98].astype(int) - round(255 * HIDDEN_GREY)) <= 1).all(-1).mean() > 0.2


@pytest.fixture
def last(finished_run: Path) -> str:
    return str(finished_run / "checkpoints" / "last.pth")


class FakeWandB(types.ModuleType):
    """Keeps runs by their number as the service does, and takes what it takes."""

    def __init__(self) -> None:
        super().__init__("wandb")
        self.__spec__ = types.SimpleNamespace()
        self.runs: dict[str, list[dict]] = {}
        self.starts: list[dict] = []
        self.finished = 0

    def init(self, *, project: str, name: str, id: str, resume: str, dir: str, config: dict):
        assert re.fullmatch(r"[\w-]{1,64}", id) and Path(dir).is_dir() and resume == "allow"
        self.starts.append({"project": project, "id": id, "config": config})
        history, fake, metrics = self.runs.setdefault(id, []), self, {}

        class Run:
            def define_metric(self, name: str, step_metric: str | None = None) -> None:
                assert "*" not in name[:-1] and (step_metric is None or step_metric in metrics)
                metrics[name] = step_metric

            def log(self, values: dict, step: int | None = None) -> None:
                if step is not None and history and step < history[-1]["_step"]:
                    return  # with a warning
                assert metrics.get("*") in values
                own = history[-1]["_step"] + 1 if history else 0
                history.append({**values, "_step": own if step is None else step})

            def finish(self) -> None:
                fake.finished += 1

        return Run()

    def Image(self, pixels: np.ndarray) -> tuple:
        return "image", pixels.shape


def test_wandb_gets_curves_and_pictures_and_goes_on_with_its_run(
    tiny: Path, photos: Path, tmp_path: Path, monkeypatch
) -> None:
    fake = FakeWandB()
    monkeypatch.setitem(sys.modules, "wandb", fake)
    more = ("--log.wandb", "mim", "--checkpoint.every-steps", "1", "--checkpoint.keep-last", "9")
    argv = command(tiny, photos, tmp_path / "run", *more, "--resume")
    assert main([*argv, "--epochs", "1"]) == 0
    older = tmp_path / "run" / "checkpoints" / "step_00000002.pth"
    assert main([*argv, str(older)]) == 0
    assert [s["project"] for s in fake.starts] == ["mim", "mim"] and fake.finished == 2
    assert fake.starts[0]["config"]["optim"]["lr"] == 1e-3
    (history,) = fake.runs.values()  # the same run again
    curve = [entry["update"] for entry in history if "train/loss" in entry]
    assert curve == [1, 2, 3, 4, 3, 4, 5, 6, 7, 8]  # what was resumed behind is there, too
    pictures = [e for e in history if "original, masked, reconstruction" in e]
    assert [entry["update"] for entry in pictures] == [4, 8]
    # Another folder is another run, also where it had the path of one before.
    shutil.rmtree(tmp_path / "run")
    assert main([*argv, "--epochs", "1"]) == 0
    assert len(fake.runs) == 2


def test_wandb_that_is_not_installed(
    tiny: Path, photos: Path, tmp_path: Path, capsys, monkeypatch
) -> None:
    real = importlib.util.find_spec
    monkeypatch.setattr(
        importlib.util, "find_spec", lambda name: None if name == "wandb" else real(name)
    )
    assert main(command(tiny, photos, tmp_path / "run", "--log.wandb", "mim")) == 2
    assert "pip install wandb" in capsys.readouterr().err
    assert not (tmp_path / "run").exists()


def test_the_bar_on_a_terminal(tiny: Path, photos: Path, tmp_path: Path, capsys) -> None:
    class Terminal(io.StringIO):
        def isatty(self) -> bool:
            return True

    terminal = Terminal()
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(sys, "stderr", terminal)
        assert main(command(tiny, photos, tmp_path / "run")) == 0
    last = terminal.getvalue().split("\r")[-1]
    for wanted in ("100%", "8/8", "loss ", "img/s", "wait ", "GiB"):
        assert wanted in last
    assert "step " not in capsys.readouterr().out  # no plain lines beside it


# ---- dry run ------------------------------------------------------------------------------------


def test_dry_run_says_it_all_and_writes_nothing(
    tiny: Path, photos: Path, tmp_path: Path, capsys
) -> None:
    argv = command(tiny, photos, tmp_path / "run", "--dry-run", "--optim.accumulate", "2")
    assert main(argv) == 0
    text = capsys.readouterr().out
    count = sum(p.numel() for p in GreenMIM(TINY).parameters())
    for wanted in (
        f"parameters       {count / 1e6:.2f} M",
        "visible          3 of 6 units",
        "steps per epoch  2, 4 in 2 epochs; 0 images left out",
        "images/update    6 = 3 x 2 accumulated x 1 processes",
        "learning rate 0.001 (as given)",
        "GFLOPs           0.0",
        "batch_size: 3",
    ):
        assert wanted in text, text
    assert not (tmp_path / "run").exists()
    assert main([*argv, "--data.batch-size", "50"]) == 2
    assert "fewer than the 100" in capsys.readouterr().err
    # Of a run that needs a GPU, wherever that is.
    assert main([*argv, "--device", "auto", "--compile", "true", "--cuda-graph", "true"]) == 0
    assert "on cuda in bfloat16" in capsys.readouterr().out


TINY = ModelConfig(
    image_size=(96, 64),
    window_size=2,
    embed_dim=16,
    depths=(1, 2, 1, 1),
    num_heads=(1, 2, 4, 8),
    decoder_dim=32,
    decoder_depth=1,
    decoder_heads=2,
)


def test_flops_are_those_of_the_formulas() -> None:
    model = GreenMIM(model_config("greenmim_swin_tiny_patch4_window7_224"))
    plan = model.plan(np.ones(49, dtype=bool))
    tokens, expected = 3136, 2 * 3136 * 48 * 96
    for dim, depth in zip((96, 192, 384, 768), (2, 2, 6, 2), strict=True):
        block = 24 * tokens * dim**2  # qkv, projection and MLP
        windows, rows = [7] * (round(tokens**0.5) // 7), round(tokens**0.5)
        shifted = [4, *windows[1:], 3] if rows > 7 else windows
        for number in range(depth):
            sides = shifted if number % 2 else windows
            pairs = sum(a * a * b * b for a in sides for b in sides)
            expected += block + 4 * pairs * dim
        if dim < 768:
            expected += 2 * (tokens // 4) * 4 * dim * 2 * dim
            tokens //= 4
    expected += 2 * 49 * 768 * 512 + 24 * 49 * 512**2 + 4 * 49 * 49 * 512 + 2 * 49 * 512 * 3072
    assert forward_flops(model, plan) == expected


def test_flops_of_linear_layers_agree_with_torch_alone() -> None:
    """Without our formulas the counter sees the matrix products, and attention is little."""
    model = GreenMIM(TINY)
    plan = model.plan(np.array([1, 0, 0, 1, 0, 1], dtype=bool))
    with torch.no_grad(), FlopCounterMode(display=False) as counter:
        model(torch.zeros(1, 3, 96, 64), plan=plan)
    assert counter.get_total_flops() < forward_flops(model, plan) < 1.2 * counter.get_total_flops()


# ---- export -------------------------------------------------------------------------------------


def test_export_gives_timm_the_encoder_and_says_how_it_was_made(
    last: str, tmp_path: Path, capsys
) -> None:
    output = tmp_path / "encoder.safetensors"
    argv = ["export", "--checkpoint", last, "--output", str(output)]
    assert main(argv) == 0
    text = capsys.readouterr().out
    with safe_open(output, "pt") as file:
        facts = file.metadata()
    assert facts["format"] == "pt" and facts["merge_order"] == "swin"
    assert facts["window_size"] == "2" and json.loads(facts["image_size"]) == [96, 64]
    assert facts["mask_ratio"] == "0.5" and facts["mask_kind"] == "random"
    assert json.loads(facts["mean"]) == [0.485, 0.456, 0.406] and facts["epochs"] == "2"
    # Both ways to load: from the metadata, and the printed line.
    arguments = json.loads(facts["timm"])
    one = timm.create_model(**arguments, num_classes=0, checkpoint_path=str(output))
    two = eval(text.splitlines()[1], {"timm": timm})
    own, _ = load_model(last)
    expected = own.state_dict()
    for model in (one, two):
        for name, weight in model.state_dict().items():
            assert torch.equal(weight, expected[f"encoder.{name}"]), name
    # The same features, but for timm's epsilon, which is another; and timm pads where we do not.
    assert main(argv) == 2 and "--overwrite" in capsys.readouterr().err
    assert main([*argv, "--overwrite"]) == 0


def test_exported_features_are_those_of_the_run(tmp_path: Path, capsys) -> None:
    name = "greenmim_swin_tiny_patch4_window7_224"
    model = GreenMIM(model_config(name)).eval()
    torch.save({"model": model.state_dict()}, tmp_path / "model.pth")
    output = tmp_path / "encoder.safetensors"
    argv = ["export", "--checkpoint", str(tmp_path / "model.pth"), "--output", str(output)]
    assert main([*argv, "--model", name]) == 0
    line = capsys.readouterr().out.splitlines()[1]
    assert line.startswith("timm.create_model('swin_tiny_patch4_window7_224', img_size=")
    theirs = eval(line, {"timm": timm}).eval()
    for module in theirs.modules():
        if isinstance(module, nn.LayerNorm):
            module.eps = 1e-6
    images = torch.randn(1, 3, 224, 224)
    with torch.no_grad():
        ours = model.encoder.norm(model.encode(images)[-1].permute(0, 2, 3, 1))
        torch.testing.assert_close(theirs.forward_features(images), ours, atol=2e-5, rtol=1e-4)
    with safe_open(output, "pt") as file:
        assert "mask_ratio" not in file.metadata()  # this checkpoint does not say


@pytest.mark.parametrize(
    "arguments",
    [{"img_size": 384, "window_size": 12}, {"img_size": (192, 320)}, {"num_classes": 5}],
)
def test_the_printed_line_works_at_another_window_and_size(
    arguments: dict, last: str, tmp_path: Path, capsys
) -> None:
    output = tmp_path / "encoder.safetensors"
    assert main(["export", "--checkpoint", last, "--output", str(output)]) == 0
    line = capsys.readouterr().out.splitlines()[1]

    def create_model(name: str, **values):
        return timm.create_model(name, **(values | arguments))

    model = eval(line, {"timm": SimpleNamespace(create_model=create_model)})
    own = load_model(last)[0].state_dict()
    for name, weight in model.state_dict().items():
        if "table" not in name and "head" not in name and "attn_mask" not in name:
            assert torch.equal(weight, own[f"encoder.{name}"]), name


@pytest.mark.parametrize("output", ["encoder.pth", "nowhere/encoder.safetensors"])
def test_export_refuses(output: str, last: str, tmp_path: Path, capsys) -> None:
    argv = ["export", "--checkpoint", last, "--output", str(tmp_path / output)]
    assert main(argv) == 2 and "--output" in capsys.readouterr().err
    assert not list(tmp_path.iterdir())

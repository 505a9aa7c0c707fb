"""The learning rate, the presets, and the trip of a recipe through YAML."""

from __future__ import annotations

import json
import re
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
import yaml

from greenmim.cli import COMMANDS, build_parser, main
from greenmim.guards import UserError
from greenmim.presets import CONFIGS, preset_names, resolve_config
from greenmim.recipe import DataConfig, OptimConfig, Recipe, ScheduleConfig
from greenmim.training.startup import learning_rate, scaled_rates

DATA = Path(__file__).parents[1] / "data"
GOLDEN = json.loads((DATA / "lr_schedule_and_keep_counts.json").read_text())


@pytest.mark.parametrize("case", ["base_200ep", "large_800ep"])
def test_learning_rate_matches_the_published_schedule(case: str) -> None:
    golden = GOLDEN[case]
    recipe = Recipe(
        work_dir="x",
        data=DataConfig(root="x"),
        epochs=golden["epochs"],
        optim=OptimConfig(base_lr=golden["blr"], base_batch=256),
        schedule=ScheduleConfig(golden["warmup_epochs"], golden["min_lr"]),
    )
    peak, final, how = scaled_rates(recipe, golden["effective_batch"])
    assert peak == pytest.approx(golden["lr"], rel=1e-12)
    assert f"x {golden['effective_batch']}/256" in how
    got = [
        learning_rate(
            e,
            peak=peak,
            final=final,
            warmup_epochs=golden["warmup_epochs"],
            epochs=golden["epochs"],
        )
        for e in golden["epoch"]
    ]
    np.testing.assert_allclose(got, golden["lr_at_epoch"], rtol=1e-9, atol=1e-18)


def test_learning_rate_ends_at_min_lr() -> None:
    golden = GOLDEN["min_lr_case"]
    got = [
        learning_rate(
            e,
            peak=golden["lr"],
            final=golden["min_lr"],
            warmup_epochs=golden["warmup_epochs"],
            epochs=golden["epochs"],
        )
        for e in golden["epoch"]
    ]
    np.testing.assert_allclose(got, golden["lr_at_epoch"], rtol=1e-9)


def test_learning_rate_per_update_matches_the_training_curve() -> None:
    curve = json.loads((DATA / "training_curve_shared_win7_224.json").read_text())
    variant = curve["variants"]["warmup_cosine_rowmajor"]
    plan = variant["schedule"]
    expected = np.load(DATA / "training_curve_shared_win7_224.npz")["warmup_cosine_rowmajor__lr"]
    got = [
        learning_rate(
            step / plan["steps_per_epoch"],
            peak=variant["lr"],
            final=plan["min_lr"],
            warmup_epochs=plan["warmup_epochs"],
            epochs=plan["epochs"],
        )
        for step in range(curve["steps"])
    ]
    np.testing.assert_allclose(got, expected, rtol=1e-9)


def test_no_warmup_starts_at_the_peak() -> None:
    assert learning_rate(0, peak=1.0, final=0.1, warmup_epochs=0, epochs=10) == 1.0
    assert learning_rate(10, peak=1.0, final=0.1, warmup_epochs=0, epochs=10) == pytest.approx(0.1)


def resolved(*arguments: str) -> dict:
    parser, *_ = build_parser()
    return parser.parse_args(["pretrain", *arguments]).pretrain.as_dict()


def test_every_preset_makes_a_model_config() -> None:
    assert preset_names() == sorted(path.stem for path in CONFIGS.glob("*.yaml"))
    assert "greenmim_swin-base_16xb128-amp-coslr-100e_in1k" in preset_names()
    for command, page in (("pretrain", "pretraining.md"), ("finetune", "finetuning.md")):
        text = (Path(__file__).parents[2] / "docs" / page).read_text()
        assert all(f"| `{name}` |" in text for name in preset_names(command))
        for name in preset_names(command):
            parser, subparser, _ = build_parser(command)
            options = parser.parse_args(
                [command, "--config", name, "--data.root", "x", "--work_dir", "y"]
            )
            recipe = subparser.instantiate(options[command])
            assert len(recipe.model.depths) == 4


def test_seed_preset_has_the_figures_of_its_name() -> None:
    recipe = resolved("--config", "greenmim_swin-base_16xb128-amp-coslr-100e_in1k")
    assert recipe["epochs"] == 100
    assert recipe["data"]["batch_size"] * 16 == recipe["optim"]["base_batch"] == 2048
    assert recipe["optim"]["base_lr"] == 8e-4 and recipe["schedule"]["min_lr"] == 4e-5
    assert recipe["schedule"]["warmup_epochs"] == 10 and recipe["optim"]["clip"] == 5.0
    assert recipe["optim"]["betas"] == (0.9, 0.999)
    assert recipe["model"]["decoder_depth"] == 8 and not recipe["model"]["norm_pix_loss"]


@pytest.mark.parametrize(
    ("name", "window", "embed_dim", "base_lr"),
    [
        ("greenmim_swin-tiny_8xb256-amp-coslr-800e_in1k", 7, 96, 1.5e-4),
        ("greenmim_swin-small_8xb256-amp-coslr-800e_in1k", 7, 96, 1.5e-4),
        ("greenmim_swin-base_8xb256-amp-coslr-800e_in1k", 7, 128, 1.5e-4),
        ("greenmim_swin-base-win14_8xb256-amp-coslr-800e_in1k", 14, 128, 1.5e-4),
        ("greenmim_swin-large-win14_8xb256-amp-coslr-800e_in1k", 14, 192, 1.0e-4),
    ],
)
def test_published_presets(name: str, window: int, embed_dim: int, base_lr: float) -> None:
    recipe = resolved("--config", name)
    assert recipe["model"]["window_size"] == window and recipe["model"]["embed_dim"] == embed_dim
    assert recipe["optim"]["base_lr"] == base_lr and recipe["optim"]["base_batch"] == 256
    assert recipe["epochs"] == 800 and recipe["schedule"]["warmup_epochs"] == 40
    assert recipe["optim"]["betas"] == (0.9, 0.95) and recipe["optim"]["clip"] is None
    assert recipe["model"]["norm_pix_loss"] and recipe["model"]["decoder_depth"] == 1


@pytest.mark.parametrize("window", [7, 14])
@pytest.mark.parametrize(
    ("size", "embed_dim", "base_lr", "min_lr", "layer_decay", "drop_path"),
    [("base", 128, 1.25e-3, 2.5e-7, 0.9, 0.1), ("large", 192, 1e-3, 3.5e-7, 0.8, 0.3)],
)
def test_published_fine_tuning(
    window: int,
    size: str,
    embed_dim: int,
    base_lr: float,
    min_lr: float,
    layer_decay: float,
    drop_path: float,
) -> None:
    name = f"finetune_swin-{size}{'-win14' * (window == 14)}_8xb128-amp-coslr-100e_in1k"
    parser, *_ = build_parser("finetune")
    recipe = parser.parse_args(["finetune", "--config", name]).finetune.as_dict()
    model, optim, mix = recipe["model"], recipe["optim"], recipe["mix"]
    assert (model["window_size"], model["embed_dim"]) == (window, embed_dim)
    assert (optim["base_lr"], optim["layer_decay"]) == (base_lr, layer_decay)
    assert recipe["schedule"]["min_lr"] == min_lr
    assert (model["drop_path"], optim["base_batch"], optim["clip"]) == (drop_path, 512, 5.0)
    assert (recipe["epochs"], recipe["schedule"]["warmup_epochs"]) == (100, 20)
    assert recipe["data"]["batch_size"] * 8 == 1024 and optim["betas"] == (0.9, 0.999)
    assert mix == {"mixup": 0.8, "cutmix": 1.0, "prob": 1.0, "switch_prob": 0.5, "smoothing": 0.1}
    assert recipe["data"]["rand_augment"] == "rand-m9-mstd0.5-inc1"
    assert (recipe["data"]["erase"], recipe["ema_decay"]) == (0.25, 0.9999)


def test_options_after_the_config_override_it_and_dashes_equal_underscores(tiny: Path) -> None:
    recipe = resolved("--config", str(tiny), "--data.batch_size", "5", "--model.embed_dim=32")
    assert recipe["data"]["batch_size"] == 5 and recipe["model"]["embed_dim"] == 32
    assert recipe["data"]["repeats"] == 2


def test_saved_recipe_comes_back_the_same(finished_run: Path, tmp_path: Path, capsys) -> None:
    saved = yaml.safe_load((finished_run / "config.yaml").read_text())
    code = main(
        [
            "pretrain",
            "--config",
            str(finished_run / "config.yaml"),
            "--work-dir",
            str(tmp_path / "b"),
        ]
        + ["--epochs", "1"]
    )
    assert code == 0, capsys.readouterr().err
    again = yaml.safe_load((tmp_path / "b" / "config.yaml").read_text())
    assert again.pop("work_dir") == str(tmp_path / "b") and again.pop("epochs") == 1
    assert saved.pop("work_dir") == str(finished_run) and saved.pop("epochs") == 2
    assert again == saved


def test_an_unknown_preset_leads_to_the_presets(capsys) -> None:
    with pytest.raises(
        UserError, match="Did you mean greenmim_swin-tiny_8xb256.*`greenmim presets`"
    ):
        resolve_config("greenmim_swin-tiny_8xb256")
    assert main(["presets"]) == 0
    lines = capsys.readouterr().out.splitlines()
    names = [line.split()[0] for line in lines[1:]]
    assert names == [*preset_names("pretrain"), *preset_names("finetune")]
    assert sorted(names) == preset_names()
    demo = lines[1 + names.index("greenmim_swin-demo-cpu")].split()
    assert demo[1:] == ["pretrain", "7", "100", "12"]


def test_help_shows_what_is_needed_first(capsys) -> None:
    assert main(["pretrain", "--help"]) == 0
    text = capsys.readouterr().out
    assert len(text.splitlines()) <= 80
    places = [text.index(f"\n  {option}") for option in ("--config", "--data.root", "--epochs")]
    assert places == sorted(places)
    for wanted in ("--data.batch-size", "exit codes", "75", "--help all"):
        assert wanted in text
    assert "Literal" not in text and "| null" not in text


def test_help_of_topics_and_of_all_has_every_option_once(capsys) -> None:
    _, parser, _ = build_parser()
    options = {
        option.replace("_", "-")
        for action in parser._actions
        if action.help != "==SUPPRESS==" and action.dest != "help"
        for option in action.option_strings
    }
    assert main(["pretrain", "--help", "all"]) == 0
    text = capsys.readouterr().out
    assert re.findall(r"^  --help (\w+)", text, re.M)[-1] == "all"
    listed = re.findall(r"^  (--[\w.-]+)(?: |$)", text.partition("\nmore:")[0], re.M)
    assert sorted(listed) == sorted(options)
    assert "_size" not in text.replace("base_lr", "")
    found = []
    for topic in re.findall(r"^  --help (\w+)", text, re.M)[:-1]:
        assert main(["pretrain", "--help", topic]) == 0
        part = capsys.readouterr().out.partition("\nmore:")[0]
        found += re.findall(r"^  (--[\w.-]+)(?: |$)", part, re.M)
    assert sorted(found) == sorted(options)


def test_help_is_shown_wherever_it_stands(capsys) -> None:
    for typed in (["--help=data"], ["--help", "data"], ["--epochs", "3", "--help", "data"]):
        assert main(["pretrain", *typed]) == 0
        assert "--data.workers" in (text := capsys.readouterr().out) and "--epochs" not in text
    assert main(["pretrain", "--help", "--epochs", "3"]) == 0
    assert "needed first" in capsys.readouterr().out
    assert main(["--version"]) == 0
    assert capsys.readouterr().out.startswith("greenmim ")


def test_the_package_is_there_before_pytorch_is() -> None:
    """So that Ctrl-C has its meaning from the first moment on."""
    code = (
        "import sys, greenmim, greenmim.__main__; assert 'torch' not in sys.modules;"
        " assert greenmim.__version__; assert greenmim.ModelConfig().depths;"
        " assert set(greenmim.__all__) <= set(dir(greenmim));"
        " assert greenmim.mim.GreenMIM is greenmim.GreenMIM;"
        " from greenmim import create_model; assert 'torch' in sys.modules"
    )
    subprocess.run([sys.executable, "-c", code], check=True)


@pytest.mark.parametrize("module", ["jsonargparse", "torch", "greenmim.training.train"])
def test_ctrl_c_during_imports_is_one_line(module, tmp_path) -> None:
    code = f"""
import os, signal, sys
signal.signal(signal.SIGINT, signal.default_int_handler)  # in the background: ignored
class At:
    def find_spec(self, name, *_):
        if name == {module!r}:
            os.kill(os.getpid(), signal.SIGINT)
sys.meta_path.insert(0, At())
from greenmim.__main__ import main
sys.argv = ["greenmim", "pretrain", "--config", "greenmim_swin-demo-cpu",
            "--data.root", {str(tmp_path)!r}, "--work-dir", {str(tmp_path / "run")!r}]
sys.exit(main())
"""
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True)
    assert (done.returncode, done.stderr) == (130, "greenmim: interrupted\n")


def test_when_a_run_begins_ctrl_c_is_an_exception_again(tmp_path) -> None:
    """So that the lock's file, trackers and the other processes hear of it."""
    code = f"""
import signal, sys, types
signal.signal(signal.SIGINT, signal.default_int_handler)
import greenmim.training.train as train
train.train = lambda *_: types.SimpleNamespace(
    exit_code=int(signal.getsignal(signal.SIGINT) is not signal.default_int_handler))
from greenmim.__main__ import main
sys.argv = ["greenmim", "pretrain", "--config", "greenmim_swin-demo-cpu",
            "--data.root", {str(tmp_path)!r}, "--work-dir", {str(tmp_path / "run")!r}]
sys.exit(main())
"""
    assert subprocess.run([sys.executable, "-c", code]).returncode == 0


def test_each_command_has_help(capsys) -> None:
    for command in COMMANDS:
        assert main([command, "--help"]) == 0
        text = capsys.readouterr().out
        assert f"greenmim {command}" in text
        assert not re.findall(r"--[a-z.]+_", text) and "False" not in text, text
    assert main(["reconstruct", "--help"]) == 0
    text = capsys.readouterr().out
    assert "--paste-visible {true,false}" in text and "(default: true)" in text
    assert text.index("--images") < text.index("options:") < text.index("--seed")

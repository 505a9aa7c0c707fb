"""`greenmim reconstruct`, `convert` and `doctor`."""

from __future__ import annotations

import os
from pathlib import Path

import numpy as np
import pytest
import timm
import torch
from matplotlib.axes import Axes
from PIL import Image
from safetensors.torch import load_file
from tar_files import name_of

from greenmim import pictures
from greenmim.checkpoint import convert_checkpoint
from greenmim.cli import main
from greenmim.data.decode import open_rgb
from greenmim.mim import GreenMIM
from greenmim.tools import reconstruct as module
from greenmim_kernels import available_backends


@pytest.fixture
def last(finished_run: Path) -> str:
    return str(finished_run / "checkpoints" / "last.pth")


# ---- reconstruct --------------------------------------------------------------------------------


def test_reconstruct_draws_a_grid(last: str, photos: Path, tmp_path: Path, capsys) -> None:
    output = tmp_path / "grid.png"
    files = [str(photos / "0.png"), str(photos / "cats")]
    assert (
        main(["reconstruct", "--checkpoint", last, "--images", *files, "--output", str(output)])
        == 0
    )
    assert capsys.readouterr().out == f"wrote {output}\n"
    image = open_rgb(output)
    width, height = image.size
    # Three rows of three columns of 96 x 64 px images, and a line of titles.
    assert 1.2 < height / width < 1.7
    assert len(np.unique(np.asarray(image).reshape(-1, 3), axis=0)) > 1000
    grey = round(255 * pictures.HIDDEN_GREY)
    assert (np.abs(np.asarray(image).astype(int) - grey).max(-1) <= 1).mean() > 0.08
    assert [p.name for p in tmp_path.iterdir()] == ["grid.png"]


def test_same_seed_same_picture(last: str, photos: Path, tmp_path: Path, capsys) -> None:
    for name, seed in (("a", "1"), ("b", "1"), ("c", "2")):
        output = str(tmp_path / f"{name}.png")
        arguments = [
            "reconstruct",
            "--checkpoint",
            last,
            "--images",
            str(photos),
            "--output",
            output,
        ]
        assert main([*arguments, "--seed", seed, "--limit", "2"]) == 0
        assert "only the first 2 are drawn; --limit draws more\n" in capsys.readouterr().err
    a, b, c = (np.asarray(Image.open(tmp_path / f"{name}.png")) for name in "abc")
    assert np.array_equal(a, b) and not np.array_equal(a, c)


def test_a_bad_file_of_a_folder_is_told_and_left_out(
    last: str, tmp_path: Path, capsys, monkeypatch
) -> None:
    drawn = []
    monkeypatch.setattr(module, "_draw", lambda columns, *rest: drawn.append(rest))
    for number in range(3):
        Image.new("RGB", (70, 90)).save(tmp_path / f"{number}.png")
    (tmp_path / "0.png").write_bytes(b"")
    output = ["--output", str(tmp_path / "grid.png"), "--limit", "2"]
    assert main(["reconstruct", "--checkpoint", last, "--images", str(tmp_path), *output]) == 0
    assert f"{tmp_path}/0.png cannot be read as an image: " in capsys.readouterr().err
    ((titles, names, _),) = drawn
    assert names == ["1.png", "2.png"]
    assert titles == ("original", "3 of 6 units hidden", "reconstruction")
    for path in tmp_path.glob("*.png"):
        path.write_bytes(b"")
    assert main(["reconstruct", "--checkpoint", last, "--images", str(tmp_path), *output]) == 2


def test_what_a_run_reads_can_be_drawn(last: str, root: str, tmp_path: Path, monkeypatch) -> None:
    if root.startswith("wds"):
        pytest.importorskip("webdataset")
    drawn = []
    monkeypatch.setattr(module, "_draw", lambda columns, *rest: drawn.append(rest))
    output = ["--output", str(tmp_path / "grid.png"), "--limit", "3"]
    assert main(["reconstruct", "--checkpoint", last, "--images", root, *output]) == 0
    assert drawn[0][1] == [name_of(number) for number in range(3)]
    missing = ["--images", f"{root.partition('/')[0]}/nothing"]
    assert main(["reconstruct", "--checkpoint", last, *missing, *output]) == 2


def test_names_of_any_kind_are_drawn(last: str, tmp_path: Path, monkeypatch) -> None:
    """Of a long one the beginning; mathematics and what is no text as they are."""
    texts = []
    real = Axes.text

    def text(self, x, y, s, **how):
        texts.append(s)
        return real(self, x, y, s, **how)

    monkeypatch.setattr(Axes, "text", text)
    names = ["$\\x$.png", os.fsdecode(b"\xff.png"), f"{'n' * 40}.png"]
    for name in names:
        Image.new("RGB", (64, 64)).save(tmp_path / name, "png")
    output = tmp_path / "grid.pdf"
    images = ["--images", *(str(tmp_path / name) for name in names)]
    assert main(["reconstruct", "--checkpoint", last, *images, "--output", str(output)]) == 0
    assert texts == ["$\\x$.png", "?.png", f"{'n' * 25}..."]


def test_masks_are_of_the_runs_kind(last: str, photos: Path, tmp_path: Path, monkeypatch) -> None:
    state = torch.load(last, weights_only=True)
    state["recipe"]["mask"]["kind"] = "block"
    torch.save(state, tmp_path / "block.pth")
    drawn = []
    real = module.draw_visible
    monkeypatch.setattr(
        module, "draw_visible", lambda *a: drawn.append((a[1:], real(*a))) or real(*a)
    )
    for checkpoint in (last, str(tmp_path / "block.pth")):
        module.reconstruct(checkpoint, [photos / "0.png"], tmp_path / "a.png", overwrite=True)
    assert [given for given, _ in drawn] == [((3, 2), 0.5, 1, "random"), ((3, 2), 0.5, 1, "block")]


class Oracle(torch.nn.Module):
    """Predicts the true patches, normalised if the config says so."""

    def __init__(self, model: GreenMIM) -> None:
        super().__init__()
        self.config, self.patchify, self.unpatchify = model.config, model.patchify, model.unpatchify

    def forward(self, images, visible):
        patches = self.patchify(images)
        if self.config.norm_pix_loss:
            patches = (patches - patches.mean(-1, keepdim=True)) / (
                patches.var(-1, keepdim=True) + 1e-6
            ).sqrt()
        return type("Output", (), {"prediction": patches})


@pytest.mark.parametrize("norm_pix", [True, False])
@pytest.mark.parametrize("paste", [True, False])
def test_a_perfect_prediction_gives_the_original_back(
    norm_pix: bool, paste: bool, last: str
) -> None:
    model, _ = module.load_model(last)
    object.__setattr__(model.config, "norm_pix_loss", norm_pix)
    images = torch.randn(2, 3, 96, 64)
    visible = np.array([[1, 0, 0, 1, 0, 1], [0, 1, 0, 0, 1, 1]], dtype=bool)
    rebuilt = pictures.reconstruction(Oracle(model), images, visible, paste)
    torch.testing.assert_close(rebuilt, images, atol=1e-5, rtol=0)


def test_pasting_shows_visible_patches_as_they_are(last: str) -> None:
    model, _ = module.load_model(last)
    images = torch.randn(1, 3, 96, 64)
    visible = np.array([[1, 0, 0, 1, 0, 1]], dtype=bool)
    pasted = pictures.reconstruction(model, images, visible, True)
    plain = pictures.reconstruction(model, images, visible, False)
    spread = pictures.spread(torch.from_numpy(visible), 96, 64).expand(1, 3, 96, 64)
    assert torch.equal(pasted[spread], images[spread])
    assert torch.equal(pasted[~spread], plain[~spread])
    assert not torch.allclose(plain[spread], images[spread])
    assert spread[0, 0, 0, 0] and not spread[0, 0, 0, 40] and spread[0, 0, 40, 40]


def test_model_of_a_run_has_its_weights(last: str) -> None:
    model, run = module.load_model(last)
    assert run["mask"]["ratio"] == 0.5 and model.config.image_size == (96, 64)
    state = torch.load(last, weights_only=True)["model"]
    assert all(torch.equal(w, state[name]) for name, w in model.state_dict().items())


# ---- convert ------------------------------------------------------------------------------------


@pytest.mark.parametrize("suffix", [".safetensors", ".pth"])
def test_a_run_becomes_a_timm_checkpoint(last: str, suffix: str, tmp_path: Path, capsys) -> None:
    output = tmp_path / f"encoder{suffix}"
    assert main(["convert", "--input", last, "--output", str(output), "--target", "timm"]) == 0
    text = capsys.readouterr().out
    weights = (
        load_file(output)
        if suffix == ".safetensors"
        else torch.load(output, weights_only=True)["model"]
    )
    assert f"{len(weights)} tensors" in text
    model = timm.models.swin_transformer.SwinTransformer(
        img_size=(96, 64),
        window_size=2,
        embed_dim=16,
        depths=(1, 2, 1, 1),
        num_heads=(1, 2, 4, 8),
        num_classes=0,
    )
    model.load_state_dict(weights, strict=True)
    own, _ = module.load_model(last)
    assert torch.equal(
        model.patch_embed.proj.weight, own.state_dict()["encoder.patch_embed.proj.weight"]
    )
    assert [p.name for p in tmp_path.iterdir()] == [output.name]


def test_official_and_back_is_the_same(last: str, tmp_path: Path) -> None:
    there, back = str(tmp_path / "official.pth"), str(tmp_path / "back.safetensors")
    order = ("--merge-order", "row-major")
    assert main(["convert", "--input", last, "--output", there, "--target", "official"]) == 0
    weights = torch.load(there, weights_only=True)["model"]
    older = convert_checkpoint(weights, "official", "official", "row-major")  # its own inverse
    torch.save({"model": older}, there)
    assert (
        main(
            [
                "convert",
                "--input",
                there,
                "--output",
                back,
                "--source",
                "official",
                "--target",
                "greenmim",
                *order,
            ]
        )
        == 0
    )
    own, again = module.load_model(last)[0].state_dict(), load_file(back)
    assert set(own) == set(again) and all(torch.equal(w, again[name]) for name, w in own.items())
    assert (
        main(
            [
                "convert",
                "--input",
                there,
                "--output",
                back,
                "--source",
                "official",
                "--target",
                "greenmim",
                "--overwrite",
            ]
        )
        == 0
    )
    name = next(name for name in own if name.endswith("downsample.reduction.weight"))
    assert not torch.equal(load_file(back)[name], own[name])  # the merge order matters


# ---- doctor -------------------------------------------------------------------------------------


def test_doctor_names_versions_backends_and_reasons(capsys) -> None:
    assert main(["doctor"]) == 0
    text = capsys.readouterr().out
    for wanted in (
        "python",
        torch.__version__,
        timm.__version__,
        "torchvision",
        "triton",
        "_partition",
        "gpu",
    ):
        assert wanted in text
    table = text.partition("\nbackends\n")[2].splitlines()
    for name, reason in available_backends().items():
        line = next(line for line in table if line.split()[0] == name)
        assert ("works" in line) if reason is None else line.endswith(reason)
    assert "cpu  group_window_attention" in text
    assert f"{len(os.sched_getaffinity(0))} cores" in text
    for package in ("pillow", "matplotlib", "webdataset", "datasets", "submitit", "filelock"):
        assert f"\n  {package}  " in text
    if not torch.cuda.is_available():
        assert "cuda  no GPU here; see the table below\n" in text


def test_doctor_says_when_the_environment_forces_a_backend(capsys, monkeypatch) -> None:
    monkeypatch.setenv("GREENMIM_BACKEND", "reference")
    assert main(["doctor"]) == 0
    assert "GREENMIM_BACKEND=reference is set" in capsys.readouterr().out

"""Conversion between the three kinds of state dict, and the files that hold them."""

from __future__ import annotations

import argparse
import fractions
import os

import pytest
import timm
import torch
from safetensors.torch import save_file

from greenmim import GreenMIM, ModelConfig, convert_checkpoint, create_model
from greenmim.checkpoint import load_checkpoint, load_state_dict_file, save_atomic

from .conftest import DATA, SMALL, load_json

FULL_SIZE = {
    "greenmim_swin_base_patch4_window7_224": "swin_base_patch4_dec512b1",
    "greenmim_swin_base_patch4_window14_224": "swin_base_patch4_win14_dec512b1",
    "greenmim_swin_large_patch4_window14_224": "swin_large_patch4_win14_dec512b1",
    "greenmim_twins_svt_large_patch4_224": "twins_large_patch4_dec512b1",
}


@pytest.fixture
def model() -> GreenMIM:
    torch.manual_seed(0)
    return GreenMIM(ModelConfig(**SMALL))


def assert_equal(left: dict, right: dict) -> None:
    assert sorted(left) == sorted(right)
    for name, tensor in left.items():
        assert torch.equal(tensor, right[name]), name


def test_round_trips(model):
    ours = model.state_dict()
    official = convert_checkpoint(ours, source="greenmim", target="official")
    assert "encoder.layers.0.downsample.reduction.weight" in official
    assert "encoder.layers.3.downsample.reduction.weight" not in official
    assert_equal(convert_checkpoint(official, source="official", target="greenmim"), ours)
    assert_equal(convert_checkpoint(official, source="official", target="official"), official)
    assert_equal(convert_checkpoint(ours, source="greenmim", target="greenmim"), ours)
    timm_weights = convert_checkpoint(ours, source="greenmim", target="timm")
    assert not any(name.startswith(("encoder.", "decoder", "mask_token")) for name in timm_weights)
    encoder = convert_checkpoint(timm_weights, source="timm", target="greenmim")
    assert_equal(encoder, {n: t for n, t in ours.items() if n.startswith("encoder.")})


@pytest.mark.parametrize("name", FULL_SIZE)
def test_official_keys_and_shapes(name):
    with torch.device("meta"):
        state = create_model(name).state_dict()
    official = convert_checkpoint(state, source="greenmim", target="official")
    expected = load_json(f"fullsize_state_dict_green_mim_{FULL_SIZE[name]}.json")
    found = {
        key: [list(tensor.shape), str(tensor.dtype).removeprefix("torch.")]
        for key, tensor in official.items()
    }
    assert found == expected


def test_relative_position_index_is_the_published_one():
    case = load_json("model_index.json")["cases"][0]
    original = load_state_dict_file(DATA / case["weights"])
    ours = convert_checkpoint(original, source="official", target="greenmim")
    again = convert_checkpoint(ours, source="greenmim", target="official")
    indices = [name for name in original if name.endswith("relative_position_index")]
    assert indices
    assert_equal(again, original)


def test_row_major_merging_is_reordered(model):
    ours = model.state_dict()
    official = convert_checkpoint(ours, source="greenmim", target="official")
    old = dict(official)
    name = "encoder.layers.1.downsample."
    for part in ("norm.weight", "norm.bias", "reduction.weight"):
        blocks = official[name + part].chunk(4, -1)
        old[name + part] = torch.cat([blocks[i] for i in (0, 2, 1, 3)], -1)
    changed = convert_checkpoint(old, source="official", target="greenmim", merge_order="row-major")
    expected = convert_checkpoint(official, source="official", target="greenmim")
    kept = "encoder.layers.2.downsample.reduction.weight"
    assert torch.equal(changed[kept], expected[kept])
    # The other two mergings were in Swin's order, so they are the ones that differ now.
    other = "encoder.layers.1.downsample.reduction.weight"
    first, second, third, fourth = expected[other].chunk(4, -1)
    assert torch.equal(changed[other], torch.cat([first, third, second, fourth], -1))


def test_timm_loads_the_encoder(tmp_path):
    """Fine-tuning: timm.create_model(..., checkpoint_path=...) takes the converted file."""
    torch.manual_seed(0)
    model = create_model("greenmim_swin_tiny_patch4_window7_224")
    weights = convert_checkpoint(model.state_dict(), source="greenmim", target="timm")
    for suffix in ("safetensors", "pth"):
        file = tmp_path / f"encoder.{suffix}"
        if suffix == "pth":
            save_atomic({"model": weights}, file)  # as `greenmim convert` writes it
        else:
            save_file({name: tensor.contiguous() for name, tensor in weights.items()}, file)
        swin = timm.create_model(
            "swin_tiny_patch4_window7_224", num_classes=0, checkpoint_path=str(file)
        )
        assert_equal(swin.state_dict(), weights)


def test_compiled_models(model):
    own = model.state_dict()
    for name in ("_orig_mod.{}", "module._orig_mod.{}", "_orig_mod.module.{}"):
        compiled = {name.format(key): tensor for key, tensor in own.items()}
        assert_equal(convert_checkpoint(compiled, source="greenmim", target="greenmim"), own)
    parts = {name.replace("layers.0.", "layers.0._orig_mod."): own[name] for name in own}
    assert_equal(convert_checkpoint(parts, source="greenmim", target="greenmim"), own)


def test_files_of_microsofts_swin_are_read_and_told_from_others(model):
    official = convert_checkpoint(model.state_dict(), source="greenmim", target="official")
    encoder = {n: t for n, t in official.items() if n.startswith("encoder.")}
    microsoft = {name.removeprefix("encoder."): tensor for name, tensor in encoder.items()}
    microsoft["head.weight"] = torch.zeros(10, 4)
    expected = convert_checkpoint(model.state_dict(), source="greenmim", target="timm")
    assert_equal(convert_checkpoint(microsoft, source="timm", target="timm"), expected)
    simmim = {**encoder, "encoder.mask_token": torch.zeros(1), "decoder.0.weight": torch.zeros(1)}
    for source, tensors, maker in (
        ("official", microsoft, "Microsoft's Swin"),
        ("greenmim", microsoft, "Microsoft's Swin"),
        ("greenmim", official, "GreenMIM's published ones"),
        ("official", model.state_dict(), "this package"),
        ("official", expected, "timm's Swin"),
        ("official", simmim, "SimMIM's"),
        ("timm", {f"swin.{name}": tensor for name, tensor in expected.items()}, "transformers'"),
        ("timm", {"features.0.0.weight": torch.zeros(1)}, "torchvision's"),
        ("timm", {"conv.weight": torch.zeros(1)}, "nobody.s that is known"),
    ):
        with pytest.raises(ValueError, match=f"not a state dict of kind {source!r}.*{maker}"):
            convert_checkpoint(tensors, source=source, target="timm")


def test_wrapped_models_and_heads(model):
    wrapped = {f"module.{name}": tensor for name, tensor in model.state_dict().items()}
    converted = convert_checkpoint(wrapped, source="greenmim", target="greenmim")
    assert_equal(converted, model.state_dict())
    swin = timm.create_model("swin_tiny_patch4_window7_224", num_classes=3)
    assert "head.fc.weight" in swin.state_dict()
    encoder = convert_checkpoint(swin.state_dict(), source="timm", target="greenmim")
    create_model("greenmim_swin_tiny_patch4_window7_224").encoder.load_state_dict(
        {name.removeprefix("encoder."): tensor for name, tensor in encoder.items()}, strict=True
    )


def test_errors(model):
    ours = model.state_dict()
    official = convert_checkpoint(ours, source="greenmim", target="official")
    with pytest.raises(ValueError, match="source must be one of official, timm, greenmim"):
        convert_checkpoint(ours, source="mmseg", target="timm")
    with pytest.raises(ValueError, match="target must be one of"):
        convert_checkpoint(ours, source="greenmim", target="mmseg")
    with pytest.raises(ValueError, match="merge_order must be one of"):
        convert_checkpoint(ours, source="greenmim", target="timm", merge_order="columns")
    for source, weights in (("official", ours), ("greenmim", official), ("timm", ours)):
        with pytest.raises(ValueError, match=f"not a state dict of kind '{source}'"):
            convert_checkpoint(weights, source=source, target="timm")
    with pytest.raises(ValueError, match="not a state dict"):
        convert_checkpoint({"fc.weight": torch.zeros(1)}, source="timm", target="greenmim")
    wide = GreenMIM(ModelConfig(**{**SMALL, "image_size": (32, 64)})).state_dict()
    with pytest.raises(ValueError, match="not square"):
        convert_checkpoint(wide, source="greenmim", target="official")


def test_official_pickles_load_without_running_code(tmp_path, model):
    official = convert_checkpoint(model.state_dict(), source="greenmim", target="official")
    file = tmp_path / "checkpoint-799.pth"
    arguments = argparse.Namespace(model="green_mim_swin_base", lr=1e-4, betas=(0.9, 0.95))
    torch.save({"model": official, "epoch": 799, "args": arguments, "scaler": {}}, file)
    assert_equal(load_state_dict_file(file), official)
    assert load_checkpoint(file)["args"].lr == 1e-4

    class Evil:
        def __reduce__(self):
            return os.system, (f"touch {tmp_path}/ran",)

    torch.save({"model": official, "args": Evil()}, file)
    with pytest.raises(ValueError, match=f"holds a {os.system.__module__}.system.*can run code"):
        load_checkpoint(file)
    assert not (tmp_path / "ran").exists()
    torch.save({"model": official, "args": fractions.Fraction(1)}, file)
    with pytest.raises(ValueError, match="holds a fractions.Fraction"):
        load_checkpoint(file)


def test_old_official_pickles(tmp_path, model):
    """Written by a PyTorch before 1.6, with a path among the arguments."""
    official = convert_checkpoint(model.state_dict(), source="greenmim", target="official")
    arguments = argparse.Namespace(output_dir=tmp_path)
    file = tmp_path / "old.pth"
    content = {"model": official, "args": arguments}
    torch.save(content, file, _use_new_zipfile_serialization=False)
    assert_equal(load_state_dict_file(file), official)
    assert load_checkpoint(file)["args"].output_dir == tmp_path


@pytest.mark.parametrize("name", ["x.pth", "x.safetensors"])
def test_damaged_files(tmp_path, name):
    file = tmp_path / name
    with pytest.raises(FileNotFoundError, match="there is no checkpoint"):
        load_checkpoint(file)
    for content in (b"", b"not a checkpoint at all"):
        file.write_bytes(content)
        with pytest.raises(ValueError, match="damaged or no checkpoint"):
            load_checkpoint(file)
    if file.suffix == ".pth":
        torch.save({"model": {"a": 1}}, file)
        with pytest.raises(ValueError, match="holds no state dict"):
            load_state_dict_file(file)
        itself: list = [torch.zeros(1)]
        itself.append(itself)
        many = itself
        for _ in range(40):  # 2**40 lists, each counted where it is named
            many = [many, many]
        torch.save({"model": {"a": torch.zeros(1)}, "more": many}, file)
        assert list(load_state_dict_file(file)) == ["a"]
        torch.save([1], file)
        with pytest.raises(ValueError, match="holds a list"):
            load_checkpoint(file)
        torch.save({"a": torch.zeros(100)}, file)
        file.write_bytes(file.read_bytes()[:-200])
        with pytest.raises(ValueError, match="damaged or no checkpoint"):
            load_checkpoint(file)


def test_save_atomic_keeps_the_old_file(tmp_path):
    file = tmp_path / "last.pth"
    save_atomic({"step": 1}, file)
    assert os.listdir(tmp_path) == ["last.pth"]
    with pytest.raises(Exception, match="pickle|local"):
        save_atomic({"step": lambda: 2}, file)
    assert os.listdir(tmp_path) == ["last.pth"]
    assert load_checkpoint(file) == {"step": 1}
    old = file.read_bytes()
    with open(file, "rb") as reader:  # whoever reads the old file meanwhile reads all of it
        save_atomic({"step": 2}, file)
        assert reader.read() == old
    assert load_checkpoint(file) == {"step": 2}
    with pytest.raises(OSError):
        save_atomic({"step": 3}, tmp_path / "missing" / "last.pth")
    if os.path.exists("/dev/full"):
        # A device that is always full: torch's writer must come out as an OSError.
        link = tmp_path / f".full.pth.{os.getpid()}"
        link.symlink_to("/dev/full")
        with pytest.raises(OSError):
            save_atomic({"step": torch.zeros(100_000)}, tmp_path / "full.pth")
        assert os.listdir(tmp_path) == ["last.pth"]

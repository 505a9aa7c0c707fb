"""Weights to start from: every kind of checkpoint, other windows, and models that do not fit."""

from __future__ import annotations

import pytest
import timm
import torch

from greenmim.checkpoint import convert_checkpoint, kind_of
from greenmim.classifier import Classifier
from greenmim.config import ModelConfig
from greenmim.initial import initialise, initialise_classifier
from greenmim.mim import GreenMIM

SIZES = dict(image_size=64, window_size=4, embed_dim=16, depths=(1, 2, 1, 1),
             num_heads=(1, 2, 4, 8), decoder_dim=32, decoder_depth=1, decoder_heads=2)  # fmt: skip


def model(seed: int = 0, **other) -> GreenMIM:
    torch.manual_seed(seed)
    return GreenMIM(ModelConfig(**(SIZES | other)))


def written(tmp_path, weights, name="weights.pth"):
    torch.save({"model": weights}, tmp_path / name)
    return tmp_path / name


def same(a: GreenMIM, b: GreenMIM, part: str) -> bool:
    theirs = dict(b.named_parameters())
    pairs = [(p, theirs[n]) for n, p in a.named_parameters() if n.startswith(part)]
    return all(torch.equal(x, y) for x, y in pairs)


@pytest.mark.parametrize("kind", ["greenmim", "official", "timm"])
def test_every_kind(kind, tmp_path):
    trained, fresh = model(1), model(2)
    weights = convert_checkpoint(trained.state_dict(), "greenmim", kind)
    assert kind_of(weights) == kind
    path = written(tmp_path, weights)
    notes = initialise(fresh, path)
    assert same(fresh, trained, "encoder.")
    for part in ("decoder_", "mask_token"):
        assert same(fresh, trained, part) == (kind != "timm")
    what = "the encoder; the decoder starts anew" if kind == "timm" else "encoder and decoder"
    assert notes == [f"starts from {path} ({kind}): {what}"]


def test_microsofts_swin_with_its_head(tmp_path):
    """Patch merging at the end of a stage, a head, buffers."""
    trained, fresh = model(1), model(2)
    official = convert_checkpoint(trained.state_dict(), "greenmim", "official")
    weights = {n.removeprefix("encoder."): t for n, t in official.items() if "encoder." in n}
    weights |= {"head.weight": torch.zeros(10, 128), "head.bias": torch.zeros(10)}
    assert kind_of(weights) == "timm"
    initialise(fresh, written(tmp_path, weights))
    assert same(fresh, trained, "encoder.")


def test_a_real_timm_model(tmp_path):
    theirs = timm.create_model("swin_tiny_patch4_window7_224", num_classes=3)
    ours = GreenMIM(ModelConfig(embed_dim=96, depths=(2, 2, 6, 2), num_heads=(3, 6, 12, 24),
                                norm_eps=1e-5))  # fmt: skip
    initialise(ours, written(tmp_path, theirs.state_dict()))
    images = torch.randn(1, 3, 224, 224)
    with torch.no_grad():
        expected = theirs.eval().forward_features(images)
        found = ours.eval()(images, visible=torch.ones(49, dtype=torch.bool)).latent
    assert torch.allclose(found.view_as(expected), expected, atol=1e-4)


def test_other_windows_and_images(tmp_path):
    trained, fresh = model(1), model(2, window_size=8, image_size=(128, 64))
    name = "encoder.layers.1.blocks.0.attn.relative_position_bias_table"
    weights = trained.state_dict()
    weights[name][:] = torch.arange(4.0, 6.0)  # of each head, the same for all offsets
    notes = initialise(fresh, written(tmp_path, weights))
    assert notes[1:] == [
        "4 position tables of windows of 4 were interpolated",
        "1 position tables of windows of 2 were interpolated",  # of two by two tokens
    ]
    table = fresh.state_dict()[name]
    assert len(table) > 49
    assert torch.allclose(table, torch.arange(4.0, 6.0).expand_as(table))
    # Fixed by the images' size, and not taken from elsewhere.
    assert torch.equal(fresh.decoder_pos_embed, model(3, image_size=(128, 64)).decoder_pos_embed)
    output = fresh(torch.randn(1, 3, 128, 64))
    assert output.loss.isfinite()


def test_a_table_keeps_its_centre_and_its_sides(tmp_path):
    """What grows to one side still does, and the offset of zero is the middle."""
    trained, fresh = model(1), model(2, window_size=8, image_size=128)
    name = "encoder.layers.0.blocks.0.attn.relative_position_bias_table"
    weights = trained.state_dict()
    down, right = torch.meshgrid(torch.arange(-3.0, 4), torch.arange(-3.0, 4), indexing="ij")
    weights[name] = (10 * down + right).reshape(-1, 1)
    initialise(fresh, written(tmp_path, weights))
    grid = fresh.state_dict()[name].view(15, 15)
    assert grid[7, 7].abs() < 1e-5
    assert (grid.diff(dim=0)[2:-2] > 0).all() and (grid.diff(dim=1)[:, 2:-2] > 0).all()
    assert torch.allclose(grid, -grid.flip(0, 1), atol=1e-4)


def test_a_decoder_of_other_sizes_starts_anew(tmp_path):
    trained, fresh = model(1), model(2, decoder_dim=64)
    before = {n: p.clone() for n, p in fresh.named_parameters() if n.startswith("decoder_")}
    notes = initialise(fresh, written(tmp_path, trained.state_dict()))
    assert (
        "the decoder starts anew, as the checkpoint's has other sizes or is not whole" in notes[0]
    )
    assert same(fresh, trained, "encoder.")
    assert all(torch.equal(p, before[n]) for n, p in fresh.named_parameters() if n in before)


@pytest.mark.parametrize(
    ("other", "said"),
    [
        (
            {"embed_dim": 32},
            r"patch_embed.proj.weight is \[16, 3, 4, 4\] there and \[32, 3, 4, 4\]",
        ),
        ({"depths": (1, 1, 1, 1)}, "has no layers.1.blocks.1"),
        ({"depths": (1, 2, 2, 1)}, "lacks layers.2.blocks.1"),
    ],
)
def test_another_model_is_refused_and_left_as_it_is(other, said, tmp_path):
    trained, fresh = model(1), model(2, **other)
    before = {name: tensor.clone() for name, tensor in fresh.state_dict().items()}
    with pytest.raises(ValueError, match=said):
        initialise(fresh, written(tmp_path, trained.state_dict()))
    assert all(torch.equal(tensor, before[name]) for name, tensor in fresh.state_dict().items())


@pytest.mark.parametrize(
    ("change", "said"),
    [
        (lambda tensor: tensor[:0], "not square"),
        (lambda tensor: tensor[:36], "not square"),  # of no window
        (lambda tensor: tensor * torch.nan, "is not finite"),
    ],
)
def test_broken_tables_are_refused(change, said, tmp_path):
    weights = model(1).state_dict()
    name = "encoder.layers.0.blocks.0.attn.relative_position_bias_table"
    weights[name] = change(weights[name])
    with pytest.raises(ValueError, match=said):
        initialise(model(2), written(tmp_path, weights))


def test_a_decoder_that_is_not_whole_starts_anew(tmp_path):
    weights = model(1).state_dict()
    del weights["decoder_embed.weight"]
    notes = initialise(model(2), written(tmp_path, weights))
    assert (
        "the decoder starts anew, as the checkpoint's has other sizes or is not whole" in notes[0]
    )


def test_of_a_deeper_decoder_nothing_is_taken(tmp_path):
    trained, fresh = model(1, decoder_depth=2), model(2)
    before = fresh.decoder_blocks[0].attn.qkv.weight.clone()
    notes = initialise(fresh, written(tmp_path, trained.state_dict()))
    assert "the decoder starts anew, as the checkpoint's has other sizes" in notes[0]
    assert torch.equal(fresh.decoder_blocks[0].attn.qkv.weight, before)
    assert same(fresh, trained, "encoder.")


def test_only_weights_that_are_taken_have_to_be_finite(tmp_path):
    weights = model(1).state_dict()
    weights["decoder_pred.bias"] = weights["decoder_pred.bias"] * torch.nan
    path = written(tmp_path, weights)
    with pytest.raises(ValueError, match="its decoder_pred.bias is not finite"):
        initialise(model(2), path)
    initialise(model(2, decoder_dim=64), path)
    initialise_classifier(Classifier(model(2).config, 3), path)


@pytest.mark.parametrize("content", [b"", b"abc", b"PK", b"epochs: 3\n"])
def test_a_file_that_is_none_is_told(content, tmp_path):
    (tmp_path / "x.pth").write_bytes(content)
    with pytest.raises(ValueError, match="is damaged or no checkpoint"):
        initialise(model(), tmp_path / "x.pth")


def test_what_is_no_swin_is_told_by_whose_it_looks_like(tmp_path):
    weights = {"swin.encoder.layers.0.blocks.0.layernorm_before.weight": torch.ones(2)}
    with pytest.raises(ValueError, match="transformers' Swin"):
        initialise(model(), written(tmp_path, weights))
    with pytest.raises(FileNotFoundError):
        initialise(model(), tmp_path / "none.pth")

"""What the model promises beyond the golden numbers."""

from __future__ import annotations

import dataclasses

import numpy as np
import pytest
import timm
import torch
from torch.utils.flop_counter import FlopCounterMode

from greenmim import GreenMIM, ModelConfig, create_model
from greenmim.checkpoint import load_state_dict_file
from greenmim.mim import sincos_position_embedding

from .conftest import DATA, SMALL, images_for, load_json, small, some_visible


def dense_swin(image_size: int | tuple[int, int], window: int) -> timm.models.SwinTransformer:
    """timm's own model, of the sizes of `small`."""
    return timm.models.SwinTransformer(
        img_size=image_size, window_size=window, embed_dim=16, depths=(1, 2, 1, 1),
        num_heads=(1, 2, 4, 8), num_classes=0, global_pool="",
        norm_layer=lambda dim, **kwargs: torch.nn.LayerNorm(dim, eps=1e-6, **kwargs),
    ).eval()  # fmt: skip


@pytest.mark.parametrize(
    ("dtype", "tolerance"), [(torch.float64, 1e-11), (torch.float32, 2e-5)], ids=str
)
@pytest.mark.parametrize(
    ("image_size", "window"), [((64, 64), 4), ((64, 128), 8), ((128, 64), 2), ((224, 224), 7)]
)
def test_equals_timm_with_everything_visible(image_size, window, dtype, tolerance, backend):
    model = small(image_size=image_size, window_size=window).to(dtype)
    swin = dense_swin(image_size, window).to(dtype)
    swin.load_state_dict(model.encoder.state_dict(), strict=True)
    images = images_for(model)
    expected = swin.forward_intermediates(images, intermediates_only=True, output_fmt="NCHW")
    maps = model.encode(images)
    for ours, theirs in zip(maps, expected, strict=True):
        assert ours.is_contiguous()
        torch.testing.assert_close(ours, theirs, rtol=0, atol=tolerance)
    out = model(images, visible=np.ones(model.config.num_units, dtype=bool))
    final = swin.forward_features(images).flatten(1, 2)
    torch.testing.assert_close(out.latent, final, rtol=0, atol=tolerance)


def test_hidden_pixels_do_not_reach_the_latent(backend):
    model = small(image_size=(96, 128))
    images = images_for(model)
    visible = some_visible(model)
    pixels = torch.from_numpy(visible.reshape(3, 4)).repeat_interleave(32, 0)
    pixels = pixels.repeat_interleave(32, 1)
    poisoned = images.masked_fill(~pixels, torch.nan)
    latent = model(images, visible=visible).latent
    assert torch.equal(model(poisoned, visible=visible).latent, latent)
    assert not torch.allclose(model(images * pixels * 2, visible=visible).latent, latent)


def test_a_mask_per_image_is_each_image_alone(backend):
    model = small(image_size=(96, 96))
    images = images_for(model, batch=3)
    visible = some_visible(model, batch=3)
    assert len(np.unique(visible, axis=0)) == 3
    together = model(images, visible=torch.from_numpy(visible))
    for i in range(3):
        alone = model(images[i : i + 1], visible=visible[i])
        torch.testing.assert_close(together.latent[i], alone.latent[0], rtol=0, atol=1e-12)
        torch.testing.assert_close(together.prediction[i], alone.prediction[0], rtol=0, atol=1e-12)
    losses = [model(images[i : i + 1], visible=visible[i]).loss for i in range(3)]
    torch.testing.assert_close(together.loss, torch.stack(losses).mean())
    same = np.repeat(visible[:1], 3, 0)
    one = model(images, visible=visible[0])
    torch.testing.assert_close(model(images, visible=same).loss, one.loss, rtol=0, atol=1e-12)
    assert one.visible.shape == (1, 9) and together.visible.shape == (3, 9)


def test_shapes_and_default_mask():
    model = small(image_size=(64, 96)).float()
    images = images_for(model)
    torch.manual_seed(3)
    first = model(images, mask_ratio=0.5)
    torch.manual_seed(3)
    again = model(images, mask_ratio=0.5)
    other = model(images, mask_ratio=0.5)
    assert torch.equal(first.visible, again.visible) and torch.equal(first.loss, again.loss)
    assert not all(
        torch.equal(model(images, mask_ratio=0.5).visible, other.visible) for _ in range(8)
    )
    assert first.loss.shape == ()
    assert first.prediction.shape == (2, 6, 3072)
    assert first.latent.shape == (2, 3, 128)
    assert first.visible.shape == (1, 6) and first.visible.dtype == torch.bool
    assert int(first.visible.sum()) == 3


@pytest.mark.parametrize("norm_pix", [False, True])
@pytest.mark.parametrize("depth", [0, 1, 2])
@pytest.mark.parametrize("per_image", [False, True])
def test_the_loss_alone_is_the_same_loss(depth, norm_pix, per_image):
    """Only the hidden units pass the decoder's end; loss and gradients do not change."""
    model = small(image_size=(96, 64), decoder_depth=depth, norm_pix_loss=norm_pix)
    images = images_for(model)
    visible = some_visible(model, 2 if per_image else None)
    whole, alone = (model(images, visible=visible, loss_only=only) for only in (False, True))
    assert alone.prediction is None and torch.equal(alone.latent, whole.latent)
    torch.testing.assert_close(alone.loss, whole.loss, rtol=1e-12, atol=0)
    trained = {name: p for name, p in model.named_parameters() if p.requires_grad}
    expected = torch.autograd.grad(whole.loss, trained.values())
    actual = torch.autograd.grad(alone.loss, trained.values())
    for name, ours, theirs in zip(trained, actual, expected, strict=True):
        torch.testing.assert_close(ours, theirs, rtol=1e-9, atol=1e-13, msg=name)


def test_the_loss_alone_where_nothing_is_hidden():
    model = small()
    out = model(images_for(model), visible=np.ones(4, dtype=bool), loss_only=True)
    assert out.loss.item() == 0
    out.loss.backward()
    assert model.encoder.patch_embed.proj.weight.grad.abs().max() == 0


def test_the_loss_alone_runs_the_decoder_for_hidden_units_only():
    model = small()
    images, plan = images_for(model), model.plan(np.array([True, False, False, False]))
    with FlopCounterMode(display=False) as counter:
        model(images, plan=plan, loss_only=True)
    flops = {name: sum(ops.values()) for name, ops in counter.get_flop_counts().items()}
    width, batch = 32, 2
    assert flops["GreenMIM.decoder_pred"] == 2 * batch * 3 * width * 3072
    assert flops["GreenMIM.decoder_blocks.0.mlp"] == 2 * 2 * batch * 3 * width * 4 * width


def test_loss_by_hand():
    for norm_pix in (False, True):
        model = small(norm_pix_loss=norm_pix)
        images = images_for(model)
        visible = np.array([True, False, True, False])
        out = model(images, visible=visible)
        total = 0.0
        for b in range(2):
            for unit in (1, 3):
                row, column = divmod(unit, 2)
                patch = images[b, :, row * 32 : row * 32 + 32, column * 32 : column * 32 + 32]
                target = patch.permute(1, 2, 0).flatten()
                if norm_pix:
                    target = (target - target.mean()) / (target.var() + 1e-6).sqrt()
                total += (out.prediction[b, unit] - target).square().mean().item()
        assert out.loss.item() == pytest.approx(total / 4, rel=1e-12)


# Of an empty batch, whose targets have no variance.
@pytest.mark.filterwarnings("ignore:var_mean")
def test_nothing_hidden_is_a_loss_of_zero_and_nothing_visible_an_error():
    model = small()
    images = images_for(model)
    out = model(images, visible=np.ones(4, dtype=bool))
    assert out.loss.item() == 0.0
    out.loss.backward()
    assert all(p.grad.isfinite().all() for p in model.parameters() if p.grad is not None)
    with pytest.raises(ValueError, match="keeps no unit"):
        model(images, visible=np.zeros(4, dtype=bool))
    empty = model(images[:0], visible=some_visible(model))
    assert empty.loss.item() == 0.0 and empty.prediction.shape == (0, 4, 3072)


def test_positions_are_the_published_ones():
    for case in load_json("model_index.json")["cases"]:
        config = case["config"]
        side = config["img_px"] // 32
        published = load_state_dict_file(DATA / case["weights"])["decoder_pos_embed"]
        ours = sincos_position_embedding(config["dec_dim"], (side, side))
        torch.testing.assert_close(ours, published, rtol=0, atol=1e-6)
    model = small(image_size=(64, 96)).float()
    assert not model.decoder_pos_embed.requires_grad
    # 8 frequencies 10000 ** (-k / 8); unit (1, 2) of 2 x 3 is the last.
    frequency = 10000 ** (-np.arange(8) / 8)
    expected = np.concatenate([f(p * frequency) for p in (2, 1) for f in (np.sin, np.cos)])
    fresh = GreenMIM(model.config).decoder_pos_embed
    assert fresh.shape == (1, 6, 32)
    np.testing.assert_allclose(fresh[0, 5].numpy(), expected, rtol=0, atol=1e-6)


def test_fresh_weights():
    """Encoder as Swin: truncated normal, 0.02. Decoder as MAE: Xavier-uniform. Biases zero."""
    torch.manual_seed(0)
    model = GreenMIM(ModelConfig(**{**SMALL, "embed_dim": 32, "decoder_dim": 64}))
    for name, module in model.named_modules():
        if not isinstance(module, torch.nn.Linear):
            continue
        weight = module.weight
        assert module.bias is None or not module.bias.any(), name
        if name.startswith("encoder."):
            assert weight.std().item() == pytest.approx(0.02, rel=0.1), name
        else:
            bound = (6 / sum(weight.shape)) ** 0.5
            assert bound * 0.98 < weight.abs().max() <= bound * (1 + 1e-6), name
    assert model.mask_token.std().item() == pytest.approx(0.02, rel=0.4)
    table = model.encoder.layers[0].blocks[0].attn.relative_position_bias_table
    assert table.std().item() == pytest.approx(0.02, rel=0.4)
    assert all(
        (m.weight == 1).all() and not m.bias.any()
        for m in model.modules()
        if isinstance(m, torch.nn.LayerNorm)
    )


def test_no_dense_attention_masks_are_kept():
    with torch.device("meta"):
        model = create_model("greenmim_swin_base_patch4_window14_224", image_size=448)
    names = {name.rpartition(".")[2] for name, _ in model.named_buffers()}
    assert names <= {"relative_position_index"}


def test_patchify_and_back():
    model = small(image_size=(64, 96))
    images = images_for(model)
    patches = model.patchify(images)
    assert torch.equal(model.unpatchify(patches), images)
    # Unit (1, 2), pixel row 3, column 5, channel 1.
    assert patches[0, 5, (3 * 32 + 5) * 3 + 1] == images[0, 1, 32 + 3, 64 + 5]


def test_autocast_and_half_precision_models(backend):
    model = small().float()
    images = images_for(model)
    visible = some_visible(model)
    exact = model(images, visible=visible).loss
    with torch.autocast("cpu", dtype=torch.bfloat16):
        out = model(images, visible=visible)
    assert out.loss.dtype == torch.float32
    assert out.loss.item() == pytest.approx(exact.item(), rel=0.02)
    out.loss.backward()
    half = model.to(torch.bfloat16)(images.bfloat16(), visible=visible)
    assert half.loss.dtype == torch.float32
    assert half.loss.item() == pytest.approx(exact.item(), rel=0.05)


def test_encode_takes_other_sizes_with_the_same_windows():
    model = small(image_size=(224, 224), window_size=7)
    maps = model.encode(torch.zeros(1, 3, 256, 288, dtype=torch.float64))
    assert [tuple(m.shape) for m in maps] == [
        (1, 16, 64, 72), (1, 32, 32, 36), (1, 64, 16, 18), (1, 128, 8, 9),
    ]  # fmt: skip
    # 448 px: grids that are multiples of 7, and a shift at stage 4, which 224 px do not have.
    images = torch.randn(1, 3, 448, 448, dtype=torch.float64)
    swin = dense_swin(448, 7).double()
    swin.load_state_dict(model.encoder.state_dict(), strict=True)
    expected = swin.forward_intermediates(images, intermediates_only=True, output_fmt="NCHW")
    for ours, theirs in zip(model.encode(images), expected, strict=True):
        torch.testing.assert_close(ours, theirs, rtol=0, atol=1e-11)
    with pytest.raises(ValueError, match="create it with image_size="):
        model.encode(torch.zeros(1, 3, 96, 224, dtype=torch.float64))
    with pytest.raises(ValueError, match="multiples of 32"):
        model.encode(torch.zeros(1, 3, 250, 224, dtype=torch.float64))


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"image_size": 100}, "multiples of 32, got 100"),
        ({"image_size": (64, 0)}, "multiples of 32"),
        ({"image_size": 224.0}, "multiples of 32, got 224.0"),
        ({"image_size": "224"}, "multiples of 32, got '224'"),
        ({"image_size": (64, 64, 64)}, "multiples of 32"),
        ({"depths": (2, 2, 2)}, "depths must be 4 positive integers"),
        ({"depths": (2, 2, 2.5, 2)}, "depths must be 4 positive integers"),
        ({"num_heads": 4}, "num_heads must be 4 positive integers, got 4"),
        ({"num_heads": (3, 2, 4, 8)}, "16 channels of stage 1 cannot be split into 3 heads"),
        ({"window_size": 0}, "window_size must be an integer of at least 1, got 0"),
        ({"window_size": (7, 7)}, r"window_size must be an integer of at least 1, got \(7, 7\)"),
        ({"norm_eps": float("nan")}, "norm_eps must be positive"),
        ({"drop_path": 1.0}, "drop_path"),
        ({"decoder_dim": 34}, "decoder_dim must be a multiple of 4"),
        ({"decoder_depth": -1}, "decoder_depth"),
    ],
)
def test_sizes_that_do_not_fit(change, message):
    with pytest.raises(ValueError, match=message):
        ModelConfig(**{**SMALL, **change})


def test_sizes_of_any_integer_kind():
    config = ModelConfig(**{**SMALL, "image_size": np.int64(64), "depths": [np.int32(1)] * 4})
    assert config == ModelConfig(**{**SMALL, "depths": (1, 1, 1, 1)})
    assert type(config.image_size) is int and type(config.depths[0]) is int
    assert ModelConfig(**{**SMALL, "image_size": [64, 96]}).image_size == (64, 96)


def test_wrong_inputs():
    model = small()
    images = images_for(model)
    visible = some_visible(model)
    with pytest.raises(ValueError, match=r"\[B, 3, 64, 64\]"):
        model(images[:, :, :32], visible=visible)
    with pytest.raises(ValueError, match="floating point"):
        model(images.int(), visible=visible)
    with pytest.raises(ValueError, match="give one of them"):
        model(images, visible=visible, plan=model.plan(visible))
    for size in ((32, 128), (96, 64)):  # as many units in another grid, and more units
        other = small(image_size=size)
        plan = other.plan(some_visible(other))
        with pytest.raises(ValueError, match="and this model has 16 x 16"):
            model(images, plan=plan)
    with pytest.raises(ValueError, match="must be bool"):
        model(images, visible=visible.astype(np.int64))
    with pytest.raises(ValueError, match=r"\[4\] or \[batch, 4\]"):
        model(images, visible=visible[:3])
    with pytest.raises(ValueError, match="image 0 has 1 visible units and image 1 2"):
        model(images, visible=np.array([[1, 0, 0, 0], [1, 1, 0, 0]], dtype=bool))
    with pytest.raises(ValueError, match="masks are for 3 images and the batch has 2"):
        model(images, visible=some_visible(model, batch=3))
    with pytest.raises(ValueError, match="hides all 4 units"):
        model(images, mask_ratio=0.9)


def test_model_names():
    with pytest.raises(ValueError, match="did you mean greenmim_swin_base_patch4_window7_224"):
        create_model("greenmim_swin_bass_patch4_window7_224")
    with torch.device("meta"):
        model = create_model("greenmim_swin_tiny_patch4_window7_224", image_size=(192, 256))
    assert model.config.image_hw == (192, 256)
    assert model.config.depths == (2, 2, 6, 2)
    assert dataclasses.replace(model.config, depths=[1, 1, 1, 1]).depths == (1, 1, 1, 1)


def test_drop_path_only_in_training():
    model = small(drop_path=0.5)
    images = images_for(model)
    visible = some_visible(model)
    model.eval()
    a = model(images, visible=visible).latent
    assert torch.equal(a, model(images, visible=visible).latent)
    model.train()
    torch.manual_seed(0)
    assert any(not torch.equal(a, model(images, visible=visible).latent) for _ in range(8))

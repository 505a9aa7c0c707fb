"""What the model promises beyond the golden numbers."""

from __future__ import annotations

import dataclasses
import pickle
import time

import numpy as np
import pytest
import timm
import torch
from torch._dynamo.testing import CompileCounter

from greenmim import GreenMIM, ModelConfig, create_model
from greenmim.masking import num_visible_units, random_visible
from greenmim.planning import Planner

from .conftest import SMALL, load_json


def small(**overrides) -> GreenMIM:
    torch.manual_seed(0)
    model = GreenMIM(ModelConfig(**{**SMALL, **overrides}))
    for parameter in model.parameters():  # biases and norms away from their plain initial values
        if parameter.requires_grad:
            torch.nn.init.normal_(parameter, std=0.1)
    return model.double()


def images_for(model: GreenMIM, batch: int = 2) -> torch.Tensor:
    generator = torch.Generator().manual_seed(1)
    return torch.randn(batch, 3, *model.config.image_hw, generator=generator).to(
        next(model.parameters()).dtype
    )


def some_visible(model: GreenMIM, batch: int | None = None, seed: int = 0) -> np.ndarray:
    return random_visible(np.random.default_rng(seed), model.config.num_units, 0.5, batch)


@pytest.mark.parametrize(
    ("image_size", "window"), [((64, 64), 4), ((64, 128), 8), ((128, 64), 2), ((224, 224), 7)]
)
def test_equals_timm_with_everything_visible(image_size, window, backend):
    model = small(image_size=image_size, window_size=window)
    swin = timm.models.SwinTransformer(
        img_size=image_size, window_size=window, embed_dim=16, depths=(1, 2, 1, 1),
        num_heads=(1, 2, 4, 8), num_classes=0, global_pool="",
        norm_layer=lambda dim, **kwargs: torch.nn.LayerNorm(dim, eps=1e-6, **kwargs),
    ).double().eval()  # fmt: skip
    swin.load_state_dict(model.encoder.state_dict(), strict=True)
    images = images_for(model)
    expected = swin.forward_intermediates(images, intermediates_only=True, output_fmt="NCHW")
    maps = model.encode(images)
    for ours, theirs in zip(maps, expected, strict=True):
        assert ours.is_contiguous()
        torch.testing.assert_close(ours, theirs, rtol=0, atol=1e-11)
    out = model(images, visible=np.ones(model.config.num_units, dtype=bool))
    final = swin.forward_features(images).flatten(1, 2)
    torch.testing.assert_close(out.latent, final, rtol=0, atol=1e-11)


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


@pytest.mark.parametrize("per_image", [False, True])
def test_compiles_once_for_all_masks(per_image, backend):
    model = small(image_size=(96, 96)).float()
    images = images_for(model)
    torch._dynamo.reset()
    counter = CompileCounter()
    counted = torch.compile(model, fullgraph=True, backend=counter)
    compiled = torch.compile(model, fullgraph=True, backend="aot_eager")
    for seed in range(3):
        plan = model.plan(some_visible(model, 2 if per_image else None, seed))
        expected = model(images, plan=plan)
        counted(images, plan=plan)
        loss = compiled(images, plan=plan).loss
        torch.testing.assert_close(loss, expected.loss)
        loss.backward()
    assert counter.frame_count == 1


def test_gradient_of_the_compiled_model():
    model = small().float()
    images = images_for(model)
    plan = model.plan(some_visible(model))
    model(images, plan=plan).loss.backward()
    expected = {n: p.grad.clone() for n, p in model.named_parameters() if p.grad is not None}
    model.zero_grad()
    torch._dynamo.reset()
    torch.compile(model, fullgraph=True)(images, plan=plan).loss.backward()
    for name, parameter in model.named_parameters():
        if name in expected:
            torch.testing.assert_close(parameter.grad, expected[name], rtol=1e-3, atol=1e-5)


def test_the_shapes_of_a_plan_never_depend_on_the_mask():
    planner = pickle.loads(pickle.dumps(Planner(ModelConfig())))

    def shapes(plan):
        tensors = [plan.visible, plan.unit_index, plan.patch_index]
        for part in (*plan.merges, *(part for pair in plan.partitions for part in pair)):
            tensors += [part.token_index, part.window_id, part.coords]
        return [tuple(tensor.shape) for tensor in tensors]

    rng = np.random.default_rng(0)
    corner = np.zeros((7, 7), dtype=bool)
    corner[:3, :4] = True
    first = shapes(planner(corner.flatten()))
    for _ in range(50):
        assert shapes(planner(random_visible(rng, 49, 0.75))) == first


def test_planning_a_step_is_quick():
    """About 0.5 ms for Swin-B where this was written; a Python loop over tokens takes 10 times it."""
    planner = Planner(ModelConfig())
    rng = np.random.default_rng(0)
    seconds = []
    for _ in range(30):
        visible = random_visible(rng, 49, 0.75)
        start = time.perf_counter()
        planner(visible)
        seconds.append(time.perf_counter() - start)
    assert min(seconds) < 5e-3


def test_plans_move_and_stay_whole():
    model = small(image_size=(224, 224), window_size=7)
    plan = model.plan(some_visible(model))
    even, odd = plan.partitions[0]
    assert even is not odd
    assert plan.partitions[3][0] is plan.partitions[3][1]
    moved = plan.to("meta")
    assert moved.partitions[3][0] is moved.partitions[3][1]
    assert moved.partitions[0][1].token_index.device.type == "meta"
    assert moved.merges[2].coords.device.type == "meta"


def test_visible_counts_are_the_published_ones():
    for key, expected in load_json("lr_schedule_and_keep_counts.json")[
        "visible_units_kept"
    ].items():
        units, ratio = (float(part.split("=")[1]) for part in key.split())
        assert num_visible_units(int(units), ratio) == expected, key


def test_encode_takes_other_sizes_with_the_same_windows():
    model = small(image_size=(224, 224), window_size=7)
    maps = model.encode(torch.zeros(1, 3, 256, 288, dtype=torch.float64))
    assert [tuple(m.shape) for m in maps] == [
        (1, 16, 64, 72), (1, 32, 32, 36), (1, 64, 16, 18), (1, 128, 8, 9),
    ]  # fmt: skip
    with pytest.raises(ValueError, match="create it with that image_size"):
        model.encode(torch.zeros(1, 3, 96, 224, dtype=torch.float64))
    with pytest.raises(ValueError, match="multiples of 32"):
        model.encode(torch.zeros(1, 3, 250, 224, dtype=torch.float64))


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"image_size": 100}, "multiples of 32, got 100"),
        ({"image_size": (64, 0)}, "multiples of 32"),
        ({"depths": (2, 2, 2)}, "depths must be 4 positive numbers"),
        ({"num_heads": (3, 2, 4, 8)}, "16 channels of stage 1 cannot be split into 3 heads"),
        ({"window_size": 0}, "window_size must be positive"),
        ({"drop_path": 1.0}, "drop_path"),
        ({"decoder_dim": 34}, "decoder_dim must be a multiple of 4"),
        ({"decoder_depth": -1}, "decoder_depth"),
    ],
)
def test_sizes_that_do_not_fit(change, message):
    with pytest.raises(ValueError, match=message):
        ModelConfig(**{**SMALL, **change})


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

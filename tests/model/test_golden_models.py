"""Whole small models and a training curve against the published code's numbers.

Tolerances are those written beside the golden files.
"""

from __future__ import annotations

import numpy as np
import pytest
import torch

from greenmim import convert_checkpoint, create_model

from .conftest import golden_model, load_arrays, load_json, official_names

TWINS = load_json("model_shared_twins_224.json")
MODELS = [*load_json("model_index.json")["cases"], TWINS | TWINS["losses"]]
CURVE = load_json("training_curve_shared_win7_224.json")


def cosine_sum(values: torch.Tensor) -> torch.Tensor:
    """sum_k values[..., k] cos(0.37 (k + 1)): a permutation changes it."""
    k = torch.arange(1, values.shape[-1] + 1, dtype=torch.float64)
    return (values.double() * torch.cos(0.37 * k)).sum(-1)


def gradients(model, loss):
    """Norm and cosine sum of every parameter's gradient, by official name and in official shape."""
    trainable = {n: p for n, p in model.named_parameters() if p.requires_grad}
    found = torch.autograd.grad(loss, list(trainable.values()))
    official = convert_checkpoint(dict(zip(trainable, found, strict=True)), "greenmim", "official")
    return {
        name: (grad.double().norm().item(), cosine_sum(grad.flatten()).item())
        for name, grad in official.items()
        if not name.endswith("relative_position_index")
    }


@pytest.mark.parametrize("loss_kind", ["normpix", "rawpix"])
@pytest.mark.parametrize("case", MODELS, ids=lambda case: case["name"])
def test_float64(case, loss_kind, backend):
    arrays = load_arrays(case["data"])
    model = golden_model(case["weights"], case["config"], norm_pix_loss=loss_kind == "normpix")
    images = torch.from_numpy(arrays["images"]).double()
    out = model(images, visible=arrays["mask"] == 0)

    def close(actual, expected, **tolerance):
        torch.testing.assert_close(actual, torch.from_numpy(np.asarray(expected)), **tolerance)

    close(out.latent, arrays["latent"], rtol=0, atol=1e-9)
    close(out.prediction[..., ::8].float(), arrays["pred_every8"], rtol=0, atol=1e-6)
    close(out.prediction.mean(-1), arrays["pred_patch_mean"], rtol=0, atol=1e-8)
    close(out.prediction.norm(dim=-1), arrays["pred_patch_l2"], rtol=0, atol=1e-8)
    close(cosine_sum(out.prediction), arrays["pred_patch_cosdot"], rtol=0, atol=1e-8)
    assert out.loss.item() == pytest.approx(case[f"loss_{loss_kind}"], rel=0, abs=1e-10)

    found = gradients(model, out.loss)
    assert sorted(found) == sorted(arrays["param_names"].tolist())
    norms, sums = arrays[f"grad_norm_{loss_kind}"], arrays[f"grad_cosdot_{loss_kind}"]
    for name, norm, total in zip(arrays["param_names"].tolist(), norms, sums, strict=True):
        assert found[name][0] == pytest.approx(norm, rel=1e-8, abs=1e-14), name
        # A sum that cancels is exact relative to the norm of what it sums.
        assert found[name][1] == pytest.approx(total, rel=1e-8, abs=1e-8 * norm + 1e-14), name


@pytest.mark.parametrize("case", MODELS, ids=lambda case: case["name"])
def test_float32(case, backend):
    arrays = load_arrays(case["data"])
    model = golden_model(case["weights"], case["config"]).float()
    out = model(torch.from_numpy(arrays["images"]).float(), visible=arrays["mask"] == 0)
    latent = torch.from_numpy(arrays["latent"])
    torch.testing.assert_close(out.latent.double(), latent, rtol=0, atol=2e-5)
    torch.testing.assert_close(
        out.prediction[..., ::8], torch.from_numpy(arrays["pred_every8"]), rtol=0, atol=2e-5
    )
    assert out.loss.item() == pytest.approx(case["loss_normpix"], rel=2e-6)
    found = gradients(model, out.loss)
    names = arrays["param_names"].tolist()
    for name, norm in zip(names, arrays["grad_norm_normpix"], strict=True):
        assert found[name][0] == pytest.approx(norm, rel=1e-3, abs=1e-9), name


@pytest.mark.parametrize("variant", ["constant_lr_rowmajor", "warmup_cosine_rowmajor"])
def test_training_curve(variant, backend):
    """30 steps of AdamW in float32, a new mask at each."""
    arrays = load_arrays("training_curve_shared_win7_224.npz")
    model = golden_model(CURVE["weights"], CURVE["config"]).float()
    images = torch.from_numpy(load_arrays(CURVE["images_in"])["images"]).float()
    names = official_names(model)
    plain = model.no_weight_decay()
    trainable = [(n, p) for n, p in model.named_parameters() if p.requires_grad]
    assert sorted(names[n] for n, _ in trainable if n in plain) == CURVE["no_weight_decay_params"]
    optimizer = torch.optim.AdamW(
        [
            {"params": [p for n, p in trainable if n not in plain], "weight_decay": 0.05},
            {"params": [p for n, p in trainable if n in plain], "weight_decay": 0.0},
        ],
        betas=CURVE["betas"],
        eps=CURVE["eps"],
    )
    for step, (mask, lr) in enumerate(zip(arrays["masks"], arrays[f"{variant}__lr"], strict=True)):
        for group in optimizer.param_groups:
            group["lr"] = float(lr)
        loss = model(images, visible=mask == 0).loss
        expected = arrays[f"{variant}__loss_f32"][step]
        assert loss.item() == pytest.approx(expected, rel=1e-5), step
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
    norms = {names[n]: p.detach().double().norm().item() for n, p in trainable}
    final = arrays[f"{variant}__final_param_norm"]
    for name, norm in zip(arrays["param_names"].tolist(), final, strict=True):
        assert norms[name] == pytest.approx(norm, rel=1e-3), name


@pytest.mark.parametrize(
    ("name", "trainable"),
    [
        ("greenmim_swin_base_patch4_window7_224", 91_997_880),
        ("greenmim_swin_base_patch4_window14_224", 92_172_600),
        ("greenmim_swin_large_patch4_window14_224", 200_774_356),
    ],
)
def test_published_sizes(name, trainable):
    with torch.device("meta"):
        model = create_model(name)
    assert sum(p.numel() for p in model.parameters() if p.requires_grad) == trainable

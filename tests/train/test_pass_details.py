"""What happens around the passes: precision, gradient scaling, sums between processes, draws."""

from __future__ import annotations

import contextlib
import dataclasses
import functools
import threading

import numpy as np
import pytest
import torch
import torch.distributed as dist
from recording import CONFIG, Recording

from greenmim import GreenMIM
from greenmim.cli import main
from greenmim.launch import World
from greenmim.masking import random_visible
from greenmim.processes import Processes
from greenmim.recipe import DataConfig, Recipe
from greenmim.training import passes
from greenmim.training.log import read_log
from greenmim.training.passes import GraphedPasses, Passes, distribute, reconstruction_loss
from greenmim.training.train import Trainer
from greenmim_kernels import use_backend

ALONE = Processes(World(), torch.device("cpu"))


def model_and_batch(**changes):
    torch.manual_seed(0)
    model = GreenMIM(dataclasses.replace(CONFIG, **changes))
    plan = model.plan(random_visible(np.random.default_rng(0), 4, 0.5))
    return model, torch.randn(2, 3, 64, 64), plan


def trained(model):
    return [p for p in model.parameters() if p.requires_grad]


def no_autocast():
    return contextlib.nullcontext()


def test_a_scaler_s_gradients_are_scaled_until_the_end():
    found = []
    for scale in (None, 1024.0):
        model, images, plan = model_and_batch()
        scaler = torch.amp.GradScaler("cpu", init_scale=scale or 1.0, enabled=scale is not None)
        optimizer = torch.optim.AdamW(trained(model), fused=True)
        work = Passes(reconstruction_loss, model, trained(model), no_autocast, scaler, 1)
        loss = work.forward_backward((images, plan), 0)
        before = model.decoder_pred.weight.grad.clone()
        norm = work.clip(optimizer, float("inf"))
        found.append((loss, before, norm, model.decoder_pred.weight.grad))
    plain, scaled = found
    torch.testing.assert_close(scaled[0], plain[0])
    torch.testing.assert_close(scaled[1], 1024 * plain[1])
    torch.testing.assert_close(scaled[2:], plain[2:])


@pytest.mark.parametrize("make", [Passes, functools.partial(GraphedPasses, ALONE)])
def test_the_forward_pass_alone_is_under_autocast(make, monkeypatch):
    monkeypatch.setattr(passes, "record", Recording())
    model, images, plan = model_and_batch()
    inside = []
    model.register_forward_hook(lambda *_: inside.append(torch.is_autocast_enabled("cpu")))
    model.decoder_pred.weight.register_hook(
        lambda *_: inside.append(torch.is_autocast_enabled("cpu"))
    )
    autocast = functools.partial(torch.autocast, "cpu", torch.bfloat16)
    scaler = torch.amp.GradScaler("cpu", enabled=False)
    make(reconstruction_loss, model, trained(model), autocast, scaler, 1).forward_backward(
        (images, plan), 0
    )
    assert inside[-2:] == [True, False]


def test_a_recorded_pass_draws_what_a_plain_one_draws(monkeypatch):
    """Stochastic depth is seeded before each pass; warm-ups and recording draw for nothing."""
    monkeypatch.setattr(passes, "record", Recording())
    losses = []
    for make in (Passes, functools.partial(GraphedPasses, ALONE)):
        model, images, plan = model_and_batch(drop_path=0.5)
        scaler = torch.amp.GradScaler("cpu", enabled=False)
        work = make(reconstruction_loss, model.train(), trained(model), no_autocast, scaler, 1)
        for seed in (1, 2):
            torch.manual_seed(seed)
            losses.append(work.forward_backward((images, plan), 0).item())
    assert losses[:2] == losses[2:] and losses[0] != losses[1]


def test_a_graph_takes_what_it_was_recorded_for(monkeypatch):
    monkeypatch.setattr(passes, "record", Recording())
    model, images, plan = model_and_batch()
    scaler = torch.amp.GradScaler("cpu", enabled=False)
    work = GraphedPasses(ALONE, reconstruction_loss, model, trained(model), no_autocast, scaler, 1)
    work.forward_backward((images, plan), 0)
    with pytest.raises(ValueError, match="recorded for"):
        work.forward_backward((images[:1], plan), 0)  # would be copied to all
    other = model.plan(random_visible(np.random.default_rng(0), 4, 0.75))
    with pytest.raises(ValueError, match="recorded for"):
        work.forward_backward((images, other), 0)


@pytest.fixture
def group():
    dist.init_process_group("gloo", store=dist.HashStore(), rank=0, world_size=1)
    yield
    dist.destroy_process_group()


def test_gradients_travel_once_an_update(group):
    model, images, plan = model_and_batch()
    recipe = Recipe(work_dir="-", data=DataConfig(root="-"))
    forward = distribute(model, recipe, alone=False)
    sums = []

    def hook(state, bucket):
        sums.append(bucket.index())
        future = torch.futures.Future()
        future.set_result(bucket.buffer())
        return future

    forward.register_comm_hook(None, hook)
    scaler = torch.amp.GradScaler("cpu", enabled=False)
    work = Passes(reconstruction_loss, forward, trained(model), no_autocast, scaler, 3)
    for part in range(2):
        work.forward_backward((images, plan), part)
    assert sums == []
    work.forward_backward((images, plan), 2)
    assert sums and len(set(sums)) == len(sums)


def test_processes_with_graphs_start_alike(monkeypatch):
    told = []
    monkeypatch.setattr(dist, "broadcast", lambda tensor, src: told.append(tensor.data_ptr()))
    model, _, _ = model_and_batch()
    recipe = Recipe(work_dir="-", data=DataConfig(root="-"), cuda_graph=True)
    assert distribute(model, recipe, alone=False) is model
    assert told == [t.data_ptr() for t in (*model.parameters(), *model.buffers())]


def test_activations_are_computed_again_by_the_backend_that_was_forced():
    """On a GPU the backward pass runs in another thread, where nothing is forced."""
    model, images, plan = model_and_batch()
    model.set_grad_checkpointing()
    used = []
    real = torch.ops.greenmim.group_window_attention.default
    with use_backend("reference"):
        loss = model.train()(images, plan=plan, loss_only=True).loss
        failures = []

        def backward():
            try:
                with _calls_of(real, used):
                    loss.backward()
            except Exception as error:
                failures.append(error)

        thread = threading.Thread(target=backward)
        thread.start()
        thread.join()
    assert not failures and not used
    assert model.encoder.layers[0].blocks[0].attn.qkv.weight.grad.any()


@contextlib.contextmanager
def _calls_of(operator, calls):
    class Mode(torch.utils._python_dispatch.TorchDispatchMode):
        def __torch_dispatch__(self, called, types, arguments=(), options=None):
            if called is operator:
                calls.append(called)
            return called(*arguments, **(options or {}))

    with Mode():
        yield


def losses_of(run, arguments) -> list[float]:
    assert main(["pretrain", *arguments, "--work-dir", str(run)]) == 0
    return [record["loss"] for record in read_log(run / "log.jsonl") if "loss" in record]


def test_a_run_computes_in_its_precision(tiny, photos, tmp_path):
    arguments = ["--config", str(tiny), "--data.root", str(photos), "--log.tensorboard", "false"]
    exact = losses_of(tmp_path / "fp32", [*arguments, "--precision", "fp32"])
    rounded = losses_of(tmp_path / "bf16", [*arguments, "--precision", "bf16"])
    assert exact[0] != rounded[0]
    assert rounded == pytest.approx(exact, rel=0.05)


def test_an_update_of_the_trainer_reads_nothing_back(tiny, photos, tmp_path, monkeypatch):
    """A value that is read on the host waits for the device."""
    read, real_update = [], Trainer.update

    def update(trainer, step):
        with monkeypatch.context() as patch:
            for name in ("item", "tolist", "numpy", "cpu"):
                patch.setattr(torch.Tensor, name, noting(name, getattr(torch.Tensor, name)))
            return real_update(trainer, step)

    def noting(name, original):
        def called(tensor, *arguments):
            read.append(name)
            return original(tensor, *arguments)

        return called

    monkeypatch.setattr(Trainer, "update", update)
    # Batches are made beforehand: in a loader process, as on a GPU.
    arguments = ["--config", str(tiny), "--data.root", str(photos), "--data.workers", "1"]
    assert main(["pretrain", *arguments, "--work-dir", str(tmp_path / "run")]) == 0
    assert not read

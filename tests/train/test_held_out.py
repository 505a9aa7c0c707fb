"""Runs that start from weights, measure held-out images, end early, and are profiled."""

from __future__ import annotations

import contextlib
import gzip
import json
import os
import shutil
import signal

import numpy as np
import pytest
import torch
from crew import command, records, run_crew, weights
from PIL import Image
from tensorboard.backend.event_processing.event_accumulator import EventAccumulator
from train_pictures import picture

from greenmim.cli import main
from greenmim.config import ModelConfig
from greenmim.data.dataset import Finish
from greenmim.data.held_out import HeldOutCollate, HeldOutImages, HeldOutSampler
from greenmim.data.images import Folder
from greenmim.data.loader import Feed
from greenmim.data.sampler import Item
from greenmim.evaluation.held_out import held_out_loss
from greenmim.evaluation.sweep import Sweep
from greenmim.launch import World
from greenmim.mim import GreenMIM
from greenmim.processes import Processes
from greenmim.recipe import DataConfig, MaskConfig, Recipe
from greenmim.tools.loading import load_model
from greenmim.training import profile
from greenmim.training.pretraining import Pretraining
from greenmim.training.train import Trainer
from greenmim_kernels import use_backend

SIZE = (96, 64)  # of the tiny run's images
SMALL = dict(image_size=SIZE, window_size=2, embed_dim=16, depths=(1, 1, 1, 1),
             num_heads=(1, 2, 4, 8), decoder_dim=32, decoder_heads=2)  # fmt: skip


@pytest.fixture(scope="module")
def held_out(tmp_path_factory):
    """Five pictures."""
    folder = tmp_path_factory.mktemp("held_out")
    for index in range(5):
        Image.fromarray(picture(20 + index)).save(folder / f"{index}.png")
    return folder


# ---- the images ---------------------------------------------------------------------------------


@pytest.mark.parametrize("world", [1, 2, 3, 7])
def test_all_images_count_once_and_all_processes_have_as_many_batches(world):
    samplers = [HeldOutSampler(5, 2, rank, world) for rank in range(world)]
    batches = [list(sampler) for sampler in samplers]
    assert {len(own) for own in batches} == {len(samplers[0])}
    assert all(len(batch) == 2 for own in batches for batch in own)
    counting = [
        item.position
        for sampler, own in zip(samplers, batches, strict=True)
        for counted, batch in zip(sampler.counted, own, strict=True)
        for item in batch[:counted]
    ]
    assert sorted(counting) == list(range(5))
    assert batches == [list(sampler) for sampler in samplers]


def test_a_mask_follows_from_the_image_alone():
    planner, mask = GreenMIM(ModelConfig(**SMALL)).planner, MaskConfig(ratio=0.5)
    collate = HeldOutCollate(planner, mask, 0, None)
    one, two = ([Item(n, n, 0, p) for n, p in enumerate(places)] for places in ([3, 4], [4, 9, 3]))
    first, again = collate.visible(one), collate.visible(two)
    assert (first == again[[2, 0]]).all() and (first[0] != first[1]).any()
    assert (first.sum(1) == 3).all()


@pytest.mark.parametrize(("height", "width"), [(60, 80), (200, 64), (96, 64), (3, 500)])
def test_the_middle_of_an_image(height, width, tmp_path):
    pixels = np.zeros((height, width, 3), np.uint8)
    Image.fromarray(pixels).save(tmp_path / "0.png")
    images = HeldOutImages(Folder(str(tmp_path)), DataConfig(root=str(tmp_path)), SIZE, seed=0)
    ((item,),) = HeldOutSampler(1, 1)
    crop = images.crop(height, width, item)
    assert crop.top == (height - crop.height) // 2 and crop.left == (width - crop.width) // 2
    assert crop.height == height or crop.width == width
    assert abs(crop.height / crop.width - SIZE[0] / SIZE[1]) <= 1.5 / min(crop.height, crop.width)
    assert not crop.flip and images[item].image.shape == (3, *SIZE)


# ---- the loss -----------------------------------------------------------------------------------


def test_the_loss_is_that_of_the_model_and_the_same_again(finished_run, held_out):
    model, run = load_model(finished_run / "checkpoints" / "last.pth")
    images = HeldOutImages(Folder(str(held_out)), DataConfig(root=str(held_out)), SIZE, seed=0)
    collate = HeldOutCollate(model.planner, MaskConfig(ratio=0.5), 0, Finish(DataConfig()))
    with Processes(World(), lambda: torch.device("cpu"), None) as processes:

        def measure(batch_size, stop=lambda: False):
            sweep = Sweep(images, collate, batch_size, 0, None, processes)
            return held_out_loss(sweep, model, contextlib.nullcontext, stop)

        model.train()
        first, again, whole = measure(2), measure(2), measure(9)
        asked = iter([False, False, True])
        assert measure(2, lambda: next(asked)) is None and model.training
    assert first == again and first.images == whole.images == 5
    losses = []
    with torch.no_grad():
        for position in range(5):
            made = collate([images[Item(0, 0, 0, position)]])
            losses.append(model.eval()(made.images, plan=made.plan).loss.item())
    assert first.loss == pytest.approx(sum(losses) / 5, rel=1e-5)
    assert whole.loss == pytest.approx(first.loss, rel=1e-5)


def test_a_run_logs_it_after_every_epoch(tiny, photos, held_out, tmp_path, capsys):
    work = tmp_path / "run"
    assert main(command(tiny, photos, work, "--data.val-root", str(held_out))) == 0
    found = records(work, "val")
    assert [(r["step"], r["epoch"], r["images"]) for r in found] == [(4, 1.0, 5), (8, 2.0, 5)]
    assert all(0 < r["loss"] < 10 for r in found) and found[0]["loss"] != found[1]["loss"]
    assert f"held-out loss {found[1]['loss']:.4f} (5 images)" in capsys.readouterr().out
    events = EventAccumulator(str(work / "tensorboard"))
    events.Reload()
    curve = events.Scalars("val/loss")
    assert [e.step for e in curve] == [4, 8]
    assert [e.value for e in curve] == pytest.approx([r["loss"] for r in found])
    # It changes nothing of the training, nor the figures of its time.
    plain = tmp_path / "plain"
    assert main(command(tiny, photos, plain)) == 0
    assert all(torch.equal(t, weights(plain)[n]) for n, t in weights(work).items())
    assert all(r["images_per_second"] < 1e5 for r in records(work, "train"))


def test_its_loaders_are_in_the_memory_that_is_logged(
    tiny, photos, held_out, tmp_path, monkeypatch
):
    monkeypatch.setattr(Feed, "memory", lambda feed: 2**30)
    work = tmp_path / "run"
    assert main(command(tiny, photos, work, "--data.val-root", str(held_out))) == 0
    memory = [row["loader_memory_gib"] for row in records(work, "train")]
    assert memory == [1.0] * 4 + [2.0] * 4  # once it was measured


def test_every_second_epoch_and_at_the_end(tiny, photos, held_out, tmp_path):
    more = ("--data.val-root", str(held_out), "--log.val-every-epochs", "2", "--epochs", "3")
    assert main(command(tiny, photos, tmp_path / "run", *more)) == 0
    assert [r["step"] for r in records(tmp_path / "run", "val")] == [8, 12]


@pytest.mark.parametrize("strategy", ["ddp", "fsdp"])
def test_two_processes_measure_what_one_does(strategy, resumable, held_out, tmp_path):
    more = ("--data.val-root", str(held_out), "--strategy", strategy)
    for size in (1, 2):
        run_crew(resumable(str(size), size, *more), size, tmp_path)
    one, two = ({r["step"]: r for r in records(tmp_path / str(size), "val")} for size in (1, 2))
    assert one.keys() == two.keys() and one
    for step, row in one.items():
        assert row["images"] == two[step]["images"] == 5
        assert two[step]["loss"] == pytest.approx(row["loss"], rel=1e-4)


def test_a_signal_in_the_last_measurement_is_told(
    tiny, photos, held_out, tmp_path, monkeypatch, capsys
):
    real = Sweep.run

    def run(self, *arguments):
        os.kill(os.getpid(), signal.SIGTERM)
        return real(self, *arguments)

    monkeypatch.setattr(Sweep, "run", run)
    more = ("--data.val-root", str(held_out), "--log.val-every-epochs", "9")
    assert main(command(tiny, photos, tmp_path / "run", *more)) == 0
    said = capsys.readouterr().out
    assert "a signal ended the last measurements" in said and "finished: 2 epochs" in said
    more = ("--log.pictures-every-epochs", "null", "--max-steps", "1")
    monkeypatch.setattr(
        Trainer, "save", lambda self, *_, **__: os.kill(os.getpid(), signal.SIGTERM)
    )
    assert main(command(tiny, photos, tmp_path / "other", *more)) == 0
    assert "a signal ended" not in capsys.readouterr().out


@pytest.mark.parametrize("option", ["--data.val-root", "--data.probe-root"])
def test_a_signal_ends_the_measurement_and_the_run_is_saved(
    option, tiny, photos, held_out, tmp_path, monkeypatch, capsys
):
    root = photos if option == "--data.probe-root" else held_out
    real = Sweep.run

    def run(self, *arguments):
        os.kill(os.getpid(), signal.SIGTERM)
        return real(self, *arguments)

    monkeypatch.setattr(Sweep, "run", run)
    more = (option, str(root), "--checkpoint.every-epochs", "9")
    more += ("--log.probe-every-epochs", "1")
    assert main(command(tiny, photos, tmp_path / "run", *more)) == 75
    assert not records(tmp_path / "run", "val") and not records(tmp_path / "run", "knn")
    assert (tmp_path / "run" / "checkpoints" / "step_00000004.pth").exists()
    assert "SIGTERM received: saved" in capsys.readouterr().out


def test_neighbours_need_two_images(tiny, photos, tmp_path, capsys):
    labelled = tmp_path / "labelled" / "cats"
    labelled.mkdir(parents=True)
    shutil.copy(photos / "0.png", labelled / "0.png")
    (tmp_path / "labelled" / "dogs").mkdir()
    (tmp_path / "labelled" / "dogs" / "1.png").write_bytes(b"no picture")
    more = ("--data.probe-root", str(tmp_path / "labelled"), "--epochs", "1")
    assert main(command(tiny, photos, tmp_path / "run", *more)) == 0
    assert "not measured: fewer than two images can be read" in capsys.readouterr().out
    assert not records(tmp_path / "run", "knn")


def test_a_forced_backend_does_not_count_operations():
    """The count is of one image on the CPU, whatever the run computes with."""
    recipe = Recipe(work_dir="x", data=DataConfig(root="x"), model=ModelConfig(**SMALL))
    task = Pretraining(recipe)
    task.model = GreenMIM(recipe.model)
    expected = task.flops()
    with use_backend("reference"):
        assert task.flops() == expected > 0


def test_what_cannot_be_read_is_named_and_what_is_not_there_refused(
    tiny, photos, held_out, tmp_path, capsys
):
    some = shutil.copytree(held_out, tmp_path / "some")
    (some / "2.png").write_bytes(b"no picture")
    assert main(command(tiny, photos, tmp_path / "run", "--data.val-root", str(some))) == 0
    assert f"cannot read {some / '2.png'}" in capsys.readouterr().out
    nowhere = command(tiny, photos, tmp_path / "none", "--data.val-root", str(tmp_path / "gone"))
    assert main(nowhere) == 2
    error = capsys.readouterr().err
    assert "--data.val-root" in error and "There is no folder" in error
    assert not (tmp_path / "none").exists()


# ---- start from weights -------------------------------------------------------------------------


def test_a_run_starts_from_weights_and_goes_on_without_them(
    tiny, photos, finished_run, tmp_path, capsys
):
    file = shutil.copy(finished_run / "checkpoints" / "last.pth", tmp_path / "weights.pth")
    before = weights(finished_run)
    more = ("--init", str(file), "--optim.lr", "1e-30")
    assert main(command(tiny, photos, tmp_path / "run", *more, "--max-steps", "2")) == 0
    assert f"starts from {file} (greenmim): encoder and decoder" in capsys.readouterr().out
    assert all(torch.allclose(t, before[n]) for n, t in weights(tmp_path / "run").items())
    # What it started from may be gone by then.
    (tmp_path / "weights.pth").unlink()
    assert main(command(tiny, photos, tmp_path / "run", *more, "--resume")) == 0
    said = capsys.readouterr().out
    assert "resumed after update 2" in said and "starts from" not in said


@pytest.mark.parametrize("more", [(), ("--dry-run",)])
def test_weights_that_do_not_fit_are_refused(more, tiny, photos, finished_run, tmp_path, capsys):
    weights = str(finished_run / "checkpoints" / "last.pth")
    sizes = ("--model.embed-dim", "32")
    argv = command(tiny, photos, tmp_path / "run", "--init", weights, *sizes, *more)
    assert main(argv) == 2
    error = capsys.readouterr().err
    assert f"--init {weights}" in error and "patch_embed.proj.weight is [16" in error
    assert not (tmp_path / "run").exists()


# ---- end early, and be profiled -----------------------------------------------------------------


def test_it_ends_after_so_many_updates_and_goes_on_as_if_it_had_not(tiny, photos, tmp_path, capsys):
    whole, parts = tmp_path / "whole", tmp_path / "parts"
    assert main(command(tiny, photos, whole)) == 0
    assert main(command(tiny, photos, parts, "--max-steps", "3")) == 0
    assert "ended by --max-steps: 0.75 epochs, 3 of 8 updates" in capsys.readouterr().out
    assert [r["step"] for r in records(parts, "end")] == [3]
    assert (parts / "checkpoints" / "step_00000003.pth").exists()
    assert "max_steps" not in (parts / "config.yaml").read_text()
    assert main(command(tiny, photos, parts, "--max-steps", "3", "--resume")) == 0
    assert "is finished (--max-steps 3)" in capsys.readouterr().out
    assert main(command(tiny, photos, parts, "--resume")) == 0
    assert all(torch.equal(t, weights(whole)[n]) for n, t in weights(parts).items())


@pytest.mark.parametrize("number", ["0", "-1"])
def test_a_number_of_updates_below_one_is_refused(number, tiny, photos, tmp_path, capsys):
    argv = command(tiny, photos, tmp_path / "run", f"--max-steps={number}")
    assert main(argv) == 2
    assert f"--max-steps is {number}; it has to be at least 1" in capsys.readouterr().err


@pytest.mark.parametrize("steps", [1, 2, 5, 8])
def test_a_few_updates_are_profiled(steps, tiny, photos, tmp_path, monkeypatch, capsys):
    monkeypatch.setattr(profile, "WARM_UP", 3)
    work = tmp_path / "run"
    assert main(command(tiny, photos, work, "--profile", "--max-steps", str(steps))) == 0
    count = min(steps, profile.RECORDED)
    trace = work / "profile" / "trace.json.gz"
    assert f"the trace of {count} update{'s' * (count > 1)} is {trace}" in capsys.readouterr().out
    events = json.loads(gzip.decompress(trace.read_bytes()))["traceEvents"]
    steps_of_adamw = [e for e in events if e.get("name", "").startswith("Optimizer.step")]
    assert len(steps_of_adamw) == count
    assert any("group_window_attention" in e.get("name", "") for e in events)


def test_a_run_that_ends_early_tells_how_much_was_profiled(monkeypatch, tmp_path):
    monkeypatch.setattr(profile, "WARM_UP", 3)
    for done, told in ((1, "nothing was profiled: the run ended after 1 updates"),
                       (3, "nothing was profiled: the run ended after 3 updates"),
                       (4, "the trace of 1 update is "),
                       (5, "the trace of 2 updates is ")):  # fmt: skip
        said = []
        recorder = profile.Profile(tmp_path, torch.device("cpu"), 20, said.append)
        for _ in range(done):
            recorder.step()
        recorder.close()
        recorder.close()
        assert len(said) == 1 and said[0].startswith(told)


def test_a_profile_that_fails_ends_no_run(tiny, photos, tmp_path, monkeypatch, capsys):
    monkeypatch.setattr(
        torch.profiler.profile, "start", lambda self: (_ for _ in ()).throw(RuntimeError("taken"))
    )
    assert main(command(tiny, photos, tmp_path / "run", "--profile")) == 0
    said = capsys.readouterr().out
    assert "profiling failed: " in said and "taken" in said
    assert "finished: 2 epochs, 8 updates" in said


# ---- operations ---------------------------------------------------------------------------------


def test_the_line_has_the_model_s_operations_per_second(tiny, photos, tmp_path, capsys):
    work = tmp_path / "run"
    assert main(command(tiny, photos, work)) == 0
    lines = records(work, "train")
    per_image = [r["model_tflops"] / r["images_per_second"] for r in lines]
    assert per_image == pytest.approx([per_image[0]] * len(lines))
    main([*command(tiny, photos, tmp_path / "other"), "--dry-run"])
    said = capsys.readouterr().out
    billions = float(said.partition("GFLOPs")[2].split()[0])
    assert per_image[0] * 1e3 == pytest.approx(3 * billions, abs=0.02)
    assert f"{lines[0]['model_tflops']:.3g} TFLOP/s  wait" in said

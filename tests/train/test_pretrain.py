"""Whole runs: what they write, that stopping and going on changes nothing, and what stops them."""

from __future__ import annotations

import json
import os
import shutil
import signal
import subprocess
import sys
import time
from pathlib import Path

import numpy as np
import pytest
import torch
import torch.distributed.checkpoint as dcp
from PIL import Image
from tensorboard.backend.event_processing.event_accumulator import EventAccumulator
from test_run_folder import save
from torch.distributed.checkpoint import FileSystemReader

from greenmim.cli import main
from greenmim.config import ModelConfig
from greenmim.mim import GreenMIM
from greenmim.recipe import CheckpointConfig, OptimConfig
from greenmim.training import train
from greenmim.training.log import RunLog, read_log
from greenmim.training.passes import decay_groups, make_optimizer
from greenmim.training.run_folder import RunFolder
from greenmim_kernels.backends import backend_in_force

REPOSITORY = Path(__file__).parents[2]


def command(tiny: Path, photos: Path, work_dir: Path, *more: str) -> list[str]:
    return [
        "pretrain",
        "--config",
        str(tiny),
        "--data.root",
        str(photos),
        "--work-dir",
        str(work_dir),
        *more,
    ]


def losses(folder: Path) -> dict[int, float]:
    return {r["step"]: r["loss"] for r in read_log(folder / "log.jsonl") if r["event"] == "train"}


def weights(folder: Path) -> dict[str, torch.Tensor]:
    return torch.load(folder / "checkpoints" / "last.pth", weights_only=True)["model"]


def moments(folder: Path, step: int) -> dict[str, torch.Tensor]:
    """What the folder of a checkpoint holds, read without a model."""
    path = folder / "checkpoints" / f"step_{step:08d}.optimizer"
    entries = FileSystemReader(path).read_metadata().state_dict_metadata
    state = {key: torch.empty(tuple(entry.size)) for key, entry in entries.items()}
    dcp.load(state, checkpoint_id=path, no_dist=True)
    return state


def assert_same_run(a: Path, b: Path) -> None:
    """Bit for bit: every loss that both logged, and the final weights."""
    assert losses(a) == losses(b)
    assert all(torch.equal(w, weights(b)[name]) for name, w in weights(a).items())


def _config(state: dict) -> ModelConfig:
    values = state["recipe"]["model"]
    return ModelConfig(**{k: tuple(v) if isinstance(v, list) else v for k, v in values.items()})


# ---- what a run writes --------------------------------------------------------------------------


def test_files_of_a_run(finished_run: Path) -> None:
    assert sorted(p.name for p in finished_run.iterdir()) == [
        ".lock",
        "checkpoints",
        "config.yaml",
        "log.jsonl",
        "tensorboard",
    ]
    files = sorted(p.name for p in (finished_run / "checkpoints").iterdir())
    kinds = ("optimizer", "pth")
    assert files == ["last.pth", *(f"step_{n:08d}.{kind}" for n in range(1, 9) for kind in kinds)]
    assert (finished_run / "checkpoints" / "last.pth").resolve().name == "step_00000008.pth"


def test_log_has_every_figure(finished_run: Path) -> None:
    records = read_log(finished_run / "log.jsonl")
    assert [r["event"] for r in (records[0], records[-1])] == ["start", "end"]
    lines = [r for r in records if r["event"] == "train"]
    assert [r["step"] for r in lines] == list(range(1, 9))
    for line in lines:
        assert line["images_per_second"] > 0 and 0 <= line["data_wait"] <= 1
        assert (
            0.05 < line["peak_memory_gib"] < 64 and line["grad_norm"] > 0 and line["skipped"] == 0
        )
    assert lines[0]["lr"] == 0 and max(r["lr"] for r in lines) == pytest.approx(1e-3)
    assert lines[-1]["epoch"] == 2
    assert lines[-1]["loss"] != lines[0]["loss"]


def test_tensorboard_agrees_with_the_log(finished_run: Path) -> None:
    events = EventAccumulator(str(finished_run / "tensorboard"))
    events.Reload()
    got = {e.step: e.value for e in events.Scalars("train/loss")}
    assert got == pytest.approx(losses(finished_run), rel=1e-6)
    assert "train/images_per_second" in events.Tags()["scalars"]


def test_checkpoint_holds_the_whole_state(finished_run: Path) -> None:
    state = torch.load(finished_run / "checkpoints" / "step_00000005.pth", weights_only=True)
    assert state["step"] == 5 and state["epoch"] == 1.25 and state["steps_per_epoch"] == 4
    assert set(state) >= {
        "model",
        "scaler",
        "recipe",
        "greenmim",
        "format",
        "version",
    }
    assert state["recipe"]["model"]["image_size"] == [96, 64]
    model = GreenMIM(_config(state))
    trained = {name: p.shape for name, p in model.named_parameters() if p.requires_grad}
    stored = moments(finished_run, 5)
    assert {key.split("/")[1] for key in stored} == {"step", "exp_avg", "exp_avg_sq"}
    assert {k.split("/")[0]: t.shape for k, t in stored.items() if k.endswith("_sq")} == trained
    assert {float(t) for key, t in stored.items() if key.endswith("/step")} == {5.0}


def test_loss_falls(tiny: Path, photos: Path, tmp_path: Path) -> None:
    """One picture, always the same crop: to be learnt by heart."""
    (tmp_path / "one").mkdir()
    shutil.copy(photos / "0.png", tmp_path / "one")
    more = ("--data.repeats", "12", "--data.crop-scale", "[1,1]", "--data.crop-ratio", "[1.3,1.34]")
    more += ("--data.flip", "0", "--model.norm-pix-loss", "false")
    more += ("--epochs", "20", "--optim.lr", "5e-3")
    assert main(command(tiny, tmp_path / "one", tmp_path / "run", *more)) == 0
    found = list(losses(tmp_path / "run").values())
    assert sum(found[-10:]) < 0.75 * sum(found[:10])


def test_learning_rate_is_scaled_and_printed(
    tiny: Path, photos: Path, tmp_path: Path, capsys
) -> None:
    more = (
        "--optim.lr",
        "null",
        "--optim.base-lr",
        "0.1024",
        "--optim.base-batch",
        "256",
        "--optim.accumulate",
        "2",
        "--schedule.min-lr",
        "0.0256",
        "--schedule.warmup-epochs",
        "0",
    )
    assert main(command(tiny, photos, tmp_path / "run", *more)) == 0
    assert (
        "learning rate 0.102 for 256 images per update x 6/256 = 0.0024, final 0.0006"
        in capsys.readouterr().out
    )
    found = [r["lr"] for r in read_log(tmp_path / "run" / "log.jsonl") if r["event"] == "train"]
    assert (
        len(found) == 4
        and found[0] == pytest.approx(0.0024)
        and 0.0006 < found[-1] < found[-2] < found[0]
    )


def test_accumulation_equals_a_larger_batch(
    tiny: Path, photos: Path, tmp_path: Path, monkeypatch
) -> None:
    one_mask = np.array([True, False, False, True, True, False])
    monkeypatch.setattr("greenmim.masking.random_visible", lambda *_, **__: one_mask)
    for name, batch, parts in (("whole", "6", "1"), ("parts", "3", "2")):
        more = ("--data.batch-size", batch, "--optim.accumulate", parts, "--epochs", "3")
        assert main(command(tiny, photos, tmp_path / name, *more)) == 0
    whole, parts = losses(tmp_path / "whole"), losses(tmp_path / "parts")
    assert len(whole) == 6 and parts == pytest.approx(whole, rel=1e-5)


def test_gray_alpha_and_other_pictures_train(tiny: Path, tmp_path: Path) -> None:
    folder = tmp_path / "mixed"
    folder.mkdir()
    for index, mode in enumerate(("L", "LA", "RGBA", "P", "CMYK", "I;16")):
        suffix = "tif" if mode == "CMYK" else "png"
        Image.linear_gradient("L").convert(mode).save(folder / f"{index}.{suffix}")
    assert main(command(tiny, folder, tmp_path / "run", "--epochs", "1", "--mask-per-image")) == 0
    records = read_log(tmp_path / "run" / "log.jsonl")
    assert records[-1]["event"] == "end" and records[-1]["unreadable"] == 0
    assert "per_image: true" in (tmp_path / "run" / "config.yaml").read_text()


@pytest.mark.parametrize("workers", ["0", "2"])
def test_corrupt_images_are_skipped_counted_and_named_once(
    workers: str, tiny: Path, photos: Path, tmp_path: Path, capsys
) -> None:
    folder = tmp_path / "photos"
    shutil.copytree(photos, folder)
    whole = (folder / "0.png").read_bytes()
    (folder / "1.png").write_bytes(whole[: len(whole) // 2])
    (folder / "cats" / "2.png").write_text("no picture")
    assert main(command(tiny, folder, tmp_path / "run", "--data.workers", workers)) == 0
    records = read_log(tmp_path / "run" / "log.jsonl")
    named = [Path(r["path"]).name for r in records if r["event"] == "unreadable_image"]
    assert sorted(named) == ["1.png", "2.png"]
    assert records[-1]["unreadable"] == 2
    assert capsys.readouterr().out.count("cannot read") == 2


def test_as_a_program(tiny: Path, photos: Path, tmp_path: Path) -> None:
    """`python -m greenmim` outside of the repository: plain lines, exit code 0."""
    done = subprocess.run(
        [
            sys.executable,
            "-m",
            "greenmim",
            *command(tiny, photos, tmp_path / "run", "--data.workers", "1"),
        ],
        capture_output=True,
        text=True,
        cwd=tmp_path,
        env=environment(),
        timeout=120,
    )
    assert done.returncode == 0, done.stderr
    assert done.stderr == ""
    assert done.stdout.count("img/s") == 8 and "finished: 2 epochs, 8 updates" in done.stdout


def environment() -> dict[str, str]:
    path = os.pathsep.join(filter(None, (str(REPOSITORY), os.environ.get("PYTHONPATH"))))
    return {**os.environ, "PYTHONPATH": path, "OMP_NUM_THREADS": "1"}


# ---- stopping and going on ----------------------------------------------------------------------


@pytest.fixture
def stop_after(monkeypatch: pytest.MonkeyPatch):
    """Send this process a signal during the n-th update."""

    def arrange(updates: int, number: int = signal.SIGTERM) -> None:
        done = 0
        real = RunLog.step_done

        def step_done(log: RunLog) -> None:
            nonlocal done
            done += 1
            if done == updates:
                os.kill(os.getpid(), number)
            real(log)

        monkeypatch.setattr(RunLog, "step_done", step_done)

    return arrange


@pytest.mark.parametrize(
    ("workers", "more"),
    [
        ("0", ()),
        ("2", ()),
        ("0", ("--mask-per-image", "--optim.accumulate", "2", "--optim.clip", "0.5")),
    ],
    ids=["workers-0", "workers-2", "accumulate"],
)
def test_stop_and_resume_is_exact(
    workers: str,
    more: tuple[str, ...],
    tiny: Path,
    photos: Path,
    tmp_path: Path,
    stop_after,
    capsys,
) -> None:
    options = ("--data.workers", workers, "--epochs", "3", *more)
    assert main(command(tiny, photos, tmp_path / "whole", *options)) == 0
    stop_after(3)
    assert main(command(tiny, photos, tmp_path / "parts", *options)) == 75
    assert "SIGTERM received: saved" in capsys.readouterr().out
    assert list(losses(tmp_path / "parts")) == [1, 2, 3]
    assert main(command(tiny, photos, tmp_path / "parts", *options, "--resume")) == 0
    assert "resumed after update 3" in capsys.readouterr().out
    assert_same_run(tmp_path / "whole", tmp_path / "parts")


def test_resume_after_a_crash_drops_what_was_logged_after_the_checkpoint(
    finished_run: Path, tiny: Path, photos: Path, tmp_path: Path
) -> None:
    crashed = tmp_path / "crashed"
    shutil.copytree(finished_run, crashed, symlinks=True)
    for step in (6, 7, 8):
        (crashed / "checkpoints" / f"step_{step:08d}.pth").unlink()
    (crashed / "checkpoints" / "last.pth").unlink()
    with open(crashed / "log.jsonl", "a") as log:
        log.write('{"event": "train", "st')  # cut off in the middle of a line
    assert main(command(tiny, photos, crashed, "--resume")) == 0
    steps = [r["step"] for r in read_log(crashed / "log.jsonl") if r["event"] == "train"]
    assert steps == list(range(1, 9))
    assert_same_run(finished_run, crashed)


def test_resume_from_a_chosen_checkpoint_into_a_new_folder(
    finished_run: Path, tiny: Path, photos: Path, tmp_path: Path
) -> None:
    chosen = str(finished_run / "checkpoints" / "step_00000002.pth")
    assert main(command(tiny, photos, tmp_path / "new", "--resume", chosen)) == 0
    assert list(losses(tmp_path / "new")) == [3, 4, 5, 6, 7, 8]
    whole = losses(finished_run)
    assert all(loss == whole[step] for step, loss in losses(tmp_path / "new").items())


def test_resume_without_a_run_starts_one_and_a_finished_run_is_left_alone(
    tiny: Path, photos: Path, tmp_path: Path, capsys
) -> None:
    arguments = command(
        tiny, photos, tmp_path / "run", "--resume", "--epochs", "1", "--schedule.warmup-epochs", "0"
    )
    assert main(arguments) == 0
    assert "starts from the beginning" in capsys.readouterr().out
    before = (tmp_path / "run" / "log.jsonl").read_bytes()
    assert main(arguments) == 0
    assert "is finished (1 epochs)" in capsys.readouterr().out
    assert (tmp_path / "run" / "log.jsonl").read_bytes() == before


def test_new_values_on_resume_count_and_are_told(
    finished_run: Path, tiny: Path, photos: Path, tmp_path: Path, capsys
) -> None:
    chosen = str(finished_run / "checkpoints" / "step_00000004.pth")
    more = ("--resume", chosen, "--optim.weight-decay", "0.2", "--data.batch-size", "6")
    assert main(command(tiny, photos, tmp_path / "new", *more)) == 0
    text = capsys.readouterr().out
    changed = "data.batch_size 3 -> 6, optim.weight_decay 0.05 -> 0.2"
    assert f"changed since the checkpoint: {changed}\n" in text
    assert "2 updates now, 4 in the checkpoint" in text and "epoch 1.00" in text
    state = torch.load(tmp_path / "new" / "checkpoints" / "last.pth", weights_only=True)
    assert state["step"] == 4 and state["recipe"]["optim"]["weight_decay"] == 0.2


@pytest.mark.parametrize(("number", "code"), [(signal.SIGUSR1, 75), (signal.SIGINT, 130)])
def test_other_signals(
    number: int, code: int, tiny: Path, photos: Path, tmp_path: Path, stop_after
) -> None:
    before = signal.getsignal(number)
    stop_after(2, number)
    assert main(command(tiny, photos, tmp_path / "run")) == code
    assert (tmp_path / "run" / "checkpoints" / "step_00000002.pth").is_file()
    assert signal.getsignal(number) is before


def test_sigterm_to_the_whole_process_group(tiny: Path, photos: Path, tmp_path: Path) -> None:
    """As a scheduler does it: the loader's workers get the signal too and must live on."""
    run = tmp_path / "run"
    process = subprocess.Popen(
        [
            sys.executable,
            "-m",
            "greenmim",
            *command(tiny, photos, run, "--epochs", "5000", "--data.workers", "2"),
        ],
        env=environment(),
        cwd=tmp_path,
        start_new_session=True,
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
    )
    try:
        deadline = time.monotonic() + 90
        while not (run / "log.jsonl").exists() or '"train"' not in (run / "log.jsonl").read_text():
            assert time.monotonic() < deadline and process.poll() is None
            time.sleep(0.1)
        os.killpg(process.pid, signal.SIGTERM)
        _, errors = process.communicate(timeout=60)
    finally:
        if process.poll() is None:
            process.kill()
    assert process.returncode == 75, errors
    stopped = [r for r in read_log(run / "log.jsonl") if r["event"] == "stopped"]
    assert stopped[0]["signal"] == "SIGTERM"
    state = torch.load(run / "checkpoints" / "last.pth", weights_only=True)
    assert state["step"] == stopped[0]["step"]


# ---- checkpoints kept ---------------------------------------------------------------------------


def test_rotation_keeps_the_newest_and_the_milestones(tmp_path: Path) -> None:
    folder = RunFolder(tmp_path)
    folder.checkpoints.mkdir()
    keep = CheckpointConfig(keep_last=2, keep_every_epochs=2)
    for step in range(3, 40, 3):
        save(folder, step, keep)
    for suffix in ("pth", "optimizer"):
        kept = sorted(int(p.stem[5:]) for p in folder.checkpoints.glob(f"step_*.{suffix}"))
        assert kept == [6, 12, 18, 24, 30, 36, 39]
    assert folder.newest_checkpoint().name == "step_00000039.pth"


def test_a_checkpoint_that_cannot_be_written_leaves_the_old_one(
    tmp_path: Path, monkeypatch
) -> None:
    folder = RunFolder(tmp_path)
    folder.checkpoints.mkdir()
    save(folder, 1, CheckpointConfig())

    def full(*_: object, **__: object) -> None:
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(os, "fsync", full)
    assert "No space left" in save(folder, 2, CheckpointConfig())
    assert folder.newest_checkpoint().name == "step_00000001.pth"
    whole = ["last.pth", "step_00000001.optimizer", "step_00000001.pth"]
    assert sorted(p.name for p in folder.checkpoints.iterdir()) == whole


# ---- losses that are not finite -----------------------------------------------------------------


@pytest.fixture
def poison(monkeypatch: pytest.MonkeyPatch):
    """Make the loss of chosen forward passes (counted from 1) not a number."""

    def arrange(*chosen: int) -> None:
        calls = 0
        real = GreenMIM.forward

        def forward(self, *args, **kwargs):
            nonlocal calls
            calls += torch.is_grad_enabled()  # operations are counted without
            out = real(self, *args, **kwargs)
            if calls in chosen:
                out = out._replace(loss=out.loss * float("nan"))
            return out

        monkeypatch.setattr(GreenMIM, "forward", forward)

    return arrange


def test_an_update_that_is_not_finite_is_skipped(
    tiny: Path, photos: Path, tmp_path: Path, poison
) -> None:
    poison(3, 8)  # the last one, too: the end of a run is saved whatever happened
    more = ("--checkpoint.every-steps", "1", "--checkpoint.keep-last", "8")
    assert main(command(tiny, photos, tmp_path / "run", *more)) == 0

    def state(step: int) -> dict:
        return torch.load(
            tmp_path / "run" / "checkpoints" / f"step_{step:08d}.pth", weights_only=True
        )

    def steps(step: int) -> set[float]:
        found = moments(tmp_path / "run", step).items()
        return {float(t) for key, t in found if key.endswith("/step")}

    before, after, earlier = state(7)["model"], state(8)["model"], state(6)["model"]
    assert all(torch.equal(w, after[name]) for name, w in before.items())
    assert any(not torch.equal(w, earlier[name]) for name, w in before.items())
    assert steps(2) == {2.0} and steps(4) == {3.0} and steps(7) == steps(8) == {6.0}
    assert not (tmp_path / "run" / "checkpoints" / "step_00000003.pth").exists()
    assert all(torch.isfinite(w).all() for w in state(8)["model"].values())
    records = [r for r in read_log(tmp_path / "run" / "log.jsonl") if r["event"] == "train"]
    assert [r["skipped"] for r in records] == [0, 0, 1, 1, 1, 1, 1, 2]
    assert records[2]["loss"] is None and records[3]["loss"] is not None
    for line in (tmp_path / "run" / "log.jsonl").read_text().splitlines():
        json.loads(line, parse_constant=lambda name: pytest.fail(f"{name} is not JSON"))


def test_a_run_stops_after_many_in_a_row_with_advice(
    tiny: Path, photos: Path, tmp_path: Path, poison, capsys
) -> None:
    poison(2, 4, 5, 6)
    assert main(command(tiny, photos, tmp_path / "run", "--max-skipped", "3")) == 3
    text = capsys.readouterr().out
    assert (
        "stopped after update 6: the loss or gradient of the last 3 updates was" in text
        and "--optim.base-lr" in text
    )
    # Not that of the fourth update, at the end of an epoch.
    assert "step_00000002.pth" not in text and "is from before it" not in text
    assert not list((tmp_path / "run" / "checkpoints").glob("*.pth"))


def test_a_run_that_diverges_keeps_its_sound_checkpoints(
    tiny: Path, photos: Path, tmp_path: Path, poison, capsys
) -> None:
    """It goes on to skip for long, and saves nothing of it; a lone skip delays a save."""
    argv = command(tiny, photos, tmp_path / "run", "--epochs", "8", "--max-skipped", "9")
    argv += ["--checkpoint.every-steps", "2", "--checkpoint.keep-last", "2"]
    poison(4, *range(10, 33))
    assert main(argv) == 3
    names = sorted(path.name for path in (tmp_path / "run" / "checkpoints").glob("step_*.pth"))
    assert names == ["step_00000006.pth", "step_00000008.pth"]
    records = read_log(tmp_path / "run" / "log.jsonl")
    assert [r["step"] for r in records if r["event"] == "checkpoint"] == [2, 5, 6, 8]
    said = capsys.readouterr().out
    assert "step_00000008.pth is from before it, --resume continues there" in said


def test_a_stop_at_a_skipped_update_is_saved_and_removes_nothing(
    tiny: Path, photos: Path, tmp_path: Path, poison, monkeypatch
) -> None:
    poison(3)
    real = train.Trainer.update

    def update(self, step: int) -> bool:
        if step == 3:
            os.kill(os.getpid(), signal.SIGTERM)
        return real(self, step)

    monkeypatch.setattr(train.Trainer, "update", update)
    argv = command(tiny, photos, tmp_path / "run", "--checkpoint.every-steps", "1")
    assert main([*argv, "--checkpoint.keep-last", "1"]) == 75
    names = sorted(path.name for path in (tmp_path / "run" / "checkpoints").glob("step_*.pth"))
    assert names == ["step_00000002.pth", "step_00000003.pth"]


def test_weights_that_are_not_finite_are_never_saved(
    tiny: Path, photos: Path, tmp_path: Path, poison, monkeypatch, capsys
) -> None:
    """At the last update, which is saved though it was skipped."""
    poison(8)
    real = train.Trainer.update

    def update(self, step: int) -> bool:
        done = real(self, step)
        if step == 8:
            next(self.run.model.parameters()).data.fill_(float("nan"))
        return done

    monkeypatch.setattr(train.Trainer, "update", update)
    assert main(command(tiny, photos, tmp_path / "run", "--checkpoint.keep-last", "1")) == 3
    names = [path.name for path in (tmp_path / "run" / "checkpoints").glob("step_*.pth")]
    assert names == ["step_00000004.pth"]
    text = capsys.readouterr().out
    assert (
        "stopped after update 8: the loss or gradient of the last update was" in text
        and "step_00000004.pth is from before it" in text
    )


# ---- parts --------------------------------------------------------------------------------------


def test_weight_decay_groups(finished_run: Path) -> None:
    state = torch.load(finished_run / "checkpoints" / "last.pth", weights_only=True)
    model = GreenMIM(_config(state))
    names = {id(p): name for name, p in model.named_parameters() if p.requires_grad}
    optimizer = make_optimizer(decay_groups(model), OptimConfig())
    decayed, kept = ([names[id(p)] for p in group["params"]] for group in optimizer.param_groups)
    assert all(name.endswith("weight") and "norm" not in name for name in decayed)
    assert any("relative_position_bias_table" in name for name in kept)
    assert "mask_token" in kept and not any(name.endswith(".bias") for name in decayed)
    assert len(decayed) + len(kept) == len(names)
    assert [group["weight_decay"] for group in optimizer.param_groups] == [0.05, 0.0]


def test_backend_of_the_recipe_is_used(
    tiny: Path, photos: Path, tmp_path: Path, monkeypatch
) -> None:
    seen = set()
    real = train.Trainer._state
    monkeypatch.setattr(
        train.Trainer, "_state", lambda *args: seen.add(backend_in_force()) or real(*args)
    )
    more = ("--epochs", "1", "--backend", "reference")
    assert main(command(tiny, photos, tmp_path / "a", *more)) == 0
    assert seen == {"reference"}
    monkeypatch.setenv("GREENMIM_BACKEND", "reference")
    seen.clear()
    assert main(command(tiny, photos, tmp_path / "b", "--epochs", "1")) == 0
    assert seen == {"reference"}  # "auto" in the recipe leaves the environment's choice alone

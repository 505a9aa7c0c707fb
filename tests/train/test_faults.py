"""What happens to a run: killed anywhere, disks that are full, losses that are not finite."""

from __future__ import annotations

import ctypes
import os
import random
import resource
import shutil
import signal
import sys
import time
from pathlib import Path

import pytest
import torch
from crew import EVERY, Crew, losses, records, run_crew, wait_for, weights

from greenmim.data.images import find_images
from greenmim.data.sampler import EpochSampler
from greenmim.mim import GreenMIM
from greenmim.training.log import read_log
from greenmim.training.run_folder import RunFolder, read_run_checkpoint

pytestmark = pytest.mark.slow


def assert_same_run(a: Path, b: Path) -> None:
    assert losses(a) == losses(b)
    assert all(torch.equal(w, weights(b)[name]) for name, w in weights(a).items())


# ---- killed -------------------------------------------------------------------------------------


def die_in_a_save(rank: int) -> None:
    """Kill this process before it changes its checkpoint folder for the n-th time."""
    left = int(os.environ["DIE_AT"])

    def hook(event: str, arguments: tuple) -> None:
        nonlocal left
        if event == "open" and not arguments[2] & (os.O_WRONLY | os.O_RDWR):
            return  # a resume reads
        if event in ("open", "os.rename", "os.remove", "os.mkdir", "os.symlink", "shutil.rmtree"):
            if "/checkpoints/" in str(arguments[0]):
                left -= 1
                if left == 0:
                    os.kill(os.getpid(), signal.SIGKILL)

    sys.addaudithook(hook)


def test_killed_at_twenty_moments_it_goes_on_from_the_last_whole_checkpoint(
    resumable, tmp_path: Path
) -> None:
    """Ten times at random, ten times at a random step of a save; then it is as if never killed."""
    more = ("--epochs", "70", "--checkpoint.keep-last", "2")
    run_crew(resumable("whole", 1, *more), 1, tmp_path / "outputs")
    run, rng = tmp_path / "killed", random.Random(5)
    folder, places = RunFolder(run), [*range(1, 25)]
    rng.shuffle(places)
    kills, reached = 0, 0
    moments = ["anywhere", "in a save"] * 10
    while kills < 20:
        in_save = moments[kills] == "in a save"
        options = {}
        if in_save:  # the places of the first save after a resume, and some of the second
            options = {"setup": die_in_a_save, "environment": {"DIE_AT": str(places[kills])}}
        seen = len(losses(run)) if (run / "log.jsonl").exists() else 0
        with Crew(resumable("killed", 1, *more), 1, tmp_path, **options) as crew:
            if not in_save:
                if kills:
                    log = run / "log.jsonl"
                    wait_for(lambda log=log, seen=seen: len(log.read_bytes().splitlines()) > seen)
                time.sleep(rng.uniform(0.0, 0.3))
                os.kill(crew.processes[0].pid, signal.SIGKILL)
            assert crew.wait() == [-signal.SIGKILL], crew.text()
        kills += 1
        newest = folder.newest_checkpoint()
        if newest is not None:
            step = read_run_checkpoint(newest)["step"]
            assert step >= reached, "a whole checkpoint was lost"
            logged = max(losses(run), default=0)
            assert logged - step <= EVERY, "more than one interval was lost"
            reached = step
    assert reached > 2 * EVERY
    run_crew(resumable("killed", 1, *more), 1, tmp_path / "outputs")
    assert records(run, "start")[0]["step"] == 0
    assert_same_run(tmp_path / "whole", run)
    left = {path.suffix for path in folder.checkpoints.iterdir()}
    assert left == {".pth", ".optimizer"} and len(list(folder.checkpoints.iterdir())) == 5


def test_a_damaged_newest_checkpoint_is_passed_over_and_told(resumable, tmp_path: Path) -> None:
    text = run_crew(resumable("run", 1), 1, tmp_path / "a")
    newest = tmp_path / "run" / "checkpoints" / "step_00000004.pth"
    newest.write_bytes(newest.read_bytes()[:5000])
    before = losses(tmp_path / "run")
    text = run_crew(resumable("run", 1), 1, tmp_path / "b")
    assert "step_00000004.pth cannot be read" in text and "resumed after update 2" in text
    assert losses(tmp_path / "run") == before
    aside = tmp_path / "run" / "checkpoints" / "set_aside_1"
    assert (aside / "step_00000004.pth").is_file()  # nothing of the user's is removed


# ---- signals ------------------------------------------------------------------------------------


def test_a_signal_to_one_process_stops_all_at_the_same_update(resumable, tmp_path: Path) -> None:
    more = ("--epochs", "20")
    run_crew(resumable("whole", 2, *more), 2, tmp_path / "outputs")
    run, done = tmp_path / "run", 0
    for number in (signal.SIGTERM, signal.SIGUSR1):
        with Crew(resumable("run", 2, *more), 2, tmp_path) as crew:
            wait_for(lambda n=done: (run / "log.jsonl").exists() and len(losses(run)) > n + 2)
            os.kill(crew.processes[1].pid, number)
            assert crew.wait() == [75, 75], crew.text() + crew.text(1)
        stopped = records(run, "stopped")[-1]
        assert stopped["signal"] == number.name and done < stopped["step"] < 40
        done = stopped["step"]
        assert f"step_{done:08d}.pth; repeat the command with --resume" in crew.text()
    run_crew(resumable("run", 2, *more), 2, tmp_path / "outputs")
    assert_same_run(tmp_path / "whole", run)


# ---- disks --------------------------------------------------------------------------------------


def small_files(rank: int) -> None:
    """The file system lets the last process write no file beyond 100 kB, as a full disk would."""
    if rank == int(os.environ.get("WORLD_SIZE", "1")) - 1:
        resource.setrlimit(resource.RLIMIT_FSIZE, (100_000, resource.RLIM_INFINITY))


@pytest.mark.parametrize("size", [1, 2])
def test_a_disk_that_takes_no_more_leaves_the_old_checkpoints(
    size: int, resumable, tmp_path: Path
) -> None:
    run, more = tmp_path / "run", ("--epochs", "4")
    run_crew(resumable("run", size), size, tmp_path / "outputs")
    whole = {p: p.read_bytes() for p in (run / "checkpoints").rglob("*") if p.is_file()}
    with Crew(resumable("run", size, *more), size, tmp_path, setup=small_files) as crew:
        assert crew.wait() == [2] * size, crew.text() + crew.text(size - 1)
    errors = [line for line in crew.text().splitlines() if line.startswith("greenmim: error")]
    assert len(errors) == 1 and "File too large" in errors[0] and "--resume" in errors[0]
    assert "step_00000006.pth could not be written" in crew.text()  # told; it tried once more
    assert "step_00000008.pth could not be written" in errors[0]
    assert size == 1 or "error" not in crew.text(1)  # told once
    assert {p: p.read_bytes() for p in (run / "checkpoints").rglob("*") if p.is_file()} == whole
    text = run_crew(resumable("run", size, *more), size, tmp_path / "outputs")
    assert "resumed after update 4" in text


def powerless(rank: int) -> None:
    """Even root has to mind permissions without its capabilities."""
    header, data = (ctypes.c_uint32 * 2)(0x20080522, 0), (ctypes.c_uint32 * 6)()
    assert ctypes.CDLL(None).capset(header, data) == 0


@pytest.mark.parametrize(("size", "locked"), [(1, "."), (1, "checkpoints"), (2, "checkpoints")])
def test_a_folder_that_must_not_be_written_leaves_the_old_checkpoints(
    size: int, locked: str, resumable, tmp_path: Path
) -> None:
    run = tmp_path / "run"
    run_crew(resumable("run", size), size, tmp_path / "outputs")
    whole = {p: p.read_bytes() for p in (run / "checkpoints").rglob("*") if p.is_file()}
    argv = resumable("run", size, "--epochs", "4")
    (run / locked).chmod(0o555)
    try:
        with Crew(argv, size, tmp_path, setup=powerless) as crew:
            assert crew.wait() == [2] * size, crew.text()
    finally:
        (run / locked).chmod(0o755)
    errors = [line for line in crew.text().splitlines() if line.startswith("greenmim: error")]
    wanted = "no permission in" if locked == "." else "Permission denied"
    assert len(errors) == 1 and wanted in errors[0] and str(run) in errors[0], crew.text()
    assert {p: p.read_bytes() for p in (run / "checkpoints").rglob("*") if p.is_file()} == whole


# ---- images and losses --------------------------------------------------------------------------


def test_corrupt_images_of_any_process_are_named_and_counted(
    resumable, photos: Path, tmp_path: Path
) -> None:
    data = tmp_path / "data"
    shutil.copytree(photos, data)
    for name in ("1.png", "cats/2.png", "dogs/big/5.png"):
        (data / name).write_bytes((data / name).read_bytes()[:300])
    # Every image once, so that no process sees all of them.
    more = ("--epochs", "1", "--data.repeats", "1", "--data.batch-size", "1")
    for size in (1, 2):
        text = run_crew(resumable(str(size), size, *more, data=data), size, tmp_path / "outputs")
        named = [Path(r["path"]).name for r in records(tmp_path / str(size), "unreadable_image")]
        assert sorted(named) == ["1.png", "2.png", "5.png"]
        events = [r["event"] for r in read_log(tmp_path / str(size) / "log.jsonl")]
        # Told while the run goes on, not at its end.
        assert events.index("unreadable_image") < len(events) - 1 - events[::-1].index("train")
        assert text.count("another image takes its place") == 3 and "3 unreadable images" in text
    # The neighbour that stands in is the same, whoever reads.
    ours, theirs = losses(tmp_path / "1"), losses(tmp_path / "2")
    assert ours == pytest.approx(theirs, rel=2e-6)


def poison(rank: int) -> None:
    """The last process has a loss that is not a number at its forward passes POISON."""
    if rank != int(os.environ.get("WORLD_SIZE", "1")) - 1:
        return
    chosen = {int(number) for number in os.environ["POISON"].split(",")}
    calls, real = 0, GreenMIM.forward

    def forward(self, *args, **kwargs):
        nonlocal calls
        calls += 1
        out = real(self, *args, **kwargs)
        return out._replace(loss=out.loss * float("nan")) if calls in chosen else out

    GreenMIM.forward = forward


@pytest.mark.parametrize("strategy", ["ddp", "fsdp"])
def test_all_processes_skip_an_update_that_one_finds_not_finite(
    strategy: str, resumable, photos: Path, tmp_path: Path
) -> None:
    more = ("--strategy", strategy, "--checkpoint.every-steps", "1", "--checkpoint.keep-last", "9")
    options = {"setup": poison, "environment": {"POISON": "4"}}
    text = run_crew(resumable("run", 2, *more), 2, tmp_path / "outputs", **options)
    run = tmp_path / "run"

    def at(step: int) -> dict[str, torch.Tensor]:
        path = run / "checkpoints" / f"step_{step:08d}.pth"
        return torch.load(path, weights_only=True)["model"]

    # The run's end is saved whatever happened.
    assert all(torch.equal(w, at(4)[name]) for name, w in at(3).items())
    assert any(not torch.equal(w, at(3)[name]) for name, w in at(2).items())
    assert all(w.isfinite().all() for w in at(4).values())
    (skipped,) = records(run, "skipped")
    # Micro-batch 1 is the other process's: three of the six images are under suspicion.
    assert skipped["step"] == 4 and skipped["micro_batches"] == [1]
    sampler = EpochSampler(6, 3, repeats=2, epochs=2, rank=1, world_size=2)
    names = list(find_images(photos))
    files = [str(photos / names[item.position % 6]) for item in list(sampler)[3]]
    assert skipped["files"] == files
    assert "update 4 was skipped" in text and skipped["files"][0] in text
    assert [r["skipped"] for r in records(run, "train")] == [0, 0, 0, 1]
    assert [r["loss"] is None for r in records(run, "train")] == [False, False, False, True]


def test_all_processes_stop_with_advice_after_many_in_a_row(resumable, tmp_path: Path) -> None:
    options = {"setup": poison, "environment": {"POISON": "2,4,5,6"}}
    more = ("--epochs", "8", "--max-skipped", "3")
    with Crew(resumable("run", 2, *more), 2, tmp_path, **options) as crew:
        assert crew.wait() == [3, 3], crew.text()
    assert "stopped after update 6: the loss or gradient of the last 3 updates was" in crew.text()
    assert "--optim.base-lr" in crew.text() and "is from before it" in crew.text()

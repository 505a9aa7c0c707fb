"""What is told after an update: read late and in order, complete, and decided on the device."""

from __future__ import annotations

import errno
import io
import math
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch

from greenmim.data.images import REST_IS_USED
from greenmim.data.sampler import EpochSampler
from greenmim.guards import UserError
from greenmim.launch import World
from greenmim.processes import Processes, Report, Reports
from greenmim.recipe import DataConfig, Recipe
from greenmim.training.log import LogFile, RunLog, cut_log, make_trackers, read_log
from greenmim.training.train import Trainer

CPU = torch.device("cpu")


def send(reports: Reports, step: int, losses: list[float], norm: float = 1.0, **more) -> bool:
    parts = [torch.tensor(loss, dtype=torch.bfloat16) for loss in losses]
    return bool(reports.send(step, parts, torch.tensor(norm), **more))


def test_reports_come_late_and_in_order() -> None:
    reports = Reports(Processes(World(), CPU), accumulate=2)
    assert not send(reports, 1, [1.0, 2.0], 0.5)
    assert send(reports, 2, [1.0, math.inf], unreadable=True)
    assert send(reports, 3, [1.0, 1.0], math.nan, stop=True)
    assert list(reports.read(0)) == []
    (first,) = reports.read(1)
    assert (first.step, first.loss, first.grad_norm) == (1, 1.5, 0.5)
    assert not (first.skipped or first.stop or first.unreadable)
    second, third = reports.read(9)
    assert second.skipped and second.unreadable and not second.stop and math.isnan(second.loss)
    assert second.bad_micro_batches() == [1]
    assert third.skipped and third.stop and third.bad_micro_batches() == [0, 1]
    assert list(reports.read(9)) == []


def test_a_gradient_scaler_may_overflow_while_it_finds_its_scale() -> None:
    reports = Reports(Processes(World(), CPU), accumulate=1)
    assert not send(reports, 1, [1.0], math.inf, scale=torch.tensor(1.0))
    assert send(reports, 2, [math.nan], scale=torch.tensor(65536.0))
    assert send(reports, 3, [1.0], math.nan, scale=torch.tensor(0.5))  # not for its scale
    assert not send(reports, 4, [1.0], 1.0, scale=torch.tensor(0.5))


class TwoProcesses(Processes):
    """The second of two processes; the first one's numbers are added as the collective would."""

    def __init__(self, other: list[float]) -> None:
        super().__init__(World(1, 1, 2), CPU)
        self.other = torch.tensor(other)

    def sum_(self, tensor: torch.Tensor) -> torch.Tensor:
        return tensor.add_(self.other)


def test_losses_stand_in_the_order_of_the_global_batch() -> None:
    # Losses of micro-batches 0 to 3, half of the norm, unreadable, stop.
    reports = Reports(TwoProcesses([1.0, 0.0, 3.0, 0.0, 0.25, 0.0, 1.0]), accumulate=2)
    assert not send(reports, 1, [2.0, 4.0], 0.5)
    (report,) = reports.read(1)
    assert report.losses == [1.0, 2.0, 3.0, 4.0] and report.grad_norm == 0.5 and report.stop
    reports = Reports(TwoProcesses([1.0, 0.0, math.nan, 0.0, 0.25, 0.0, 0.0]), accumulate=2)
    assert send(reports, 1, [2.0, 4.0], 0.5)
    (report,) = reports.read(1)
    assert report.bad_micro_batches() == [2]


def test_files_of_an_update_are_named_without_a_new_order(monkeypatch) -> None:
    """An order of millions of images takes seconds, and an update has many micro-batches."""
    orders, real = [], EpochSampler._new_order
    monkeypatch.setattr(
        EpochSampler, "_new_order", lambda self, epoch: orders.append(epoch) or real(self, epoch)
    )
    sampler = EpochSampler(40, 2, epochs=2, accumulate=2, world_size=2)
    seen = list(sampler)
    named = [sampler.items(step, micro) for step in range(5, 10) for micro in (0, 2)]
    assert named == seen[10:20] and orders == [0, 1]
    assert sampler.items(0, 0) == seen[0] and orders == [0, 1, 0]


# ---- the log on a full disk ---------------------------------------------------------------------


@pytest.fixture
def recipe(tmp_path: Path) -> Recipe:
    return Recipe(work_dir=str(tmp_path), data=DataConfig(root="x"))


class FullDisk(io.FileIO):
    """A file that takes half a line, then no more, and is in trouble when it is closed, too."""

    def write(self, data: bytes) -> int:
        super().write(data[:10])
        raise OSError(errno.ENOSPC, "No space left on device")

    def close(self) -> None:
        super().close()
        raise OSError(errno.ESTALE, "Stale file handle")


def test_a_log_on_a_full_disk_is_told_and_its_lines_wait(
    tmp_path: Path, capsys, monkeypatch
) -> None:
    with RunLog(tmp_path / "log.jsonl", [], 0, 0, 10) as log:
        log.event("start", step=0)
        log._file._file.close()
        log._file._file = FullDisk(tmp_path / "log.jsonl", "ab")
        with monkeypatch.context() as patch:
            patch.setattr(Path, "open", lambda path, mode, buffering: FullDisk(path, mode))
            log.event("train", step=1)
            log.event("train", step=2)
    assert [r["event"] for r in read_log(tmp_path / "log.jsonl")] == ["start", "train", "train"]
    text = capsys.readouterr().out
    assert text.count("log.jsonl could not be written: No space left") == 1


def test_what_others_write_into_a_log_stays(tmp_path: Path, monkeypatch) -> None:
    """The holder of a folder that was given away, say; also between a failure and the next try."""
    path = tmp_path / "log.jsonl"
    ours, theirs = LogFile(path), LogFile(path)
    assert ours.write("train", {"step": 1}) is None
    for step in (11, 12):
        assert theirs.write("train", {"step": step}) is None
    assert ours.write("train", {"step": 2}) is None
    ours._file.close()
    ours._file = FullDisk(path, "ab")
    assert ours.write("train", {"step": 3}) == "No space left on device"
    path.write_bytes(path.read_bytes()[:-10])  # as if nothing had got through
    assert theirs.write("train", {"step": 13}) is None
    assert ours.write("train", {"step": 4}) is None
    assert [r["step"] for r in read_log(path)] == [1, 11, 12, 2, 13, 3, 4]
    path.unlink()  # by the user
    assert ours.write("train", {"step": 5}) is None and ours.close() is None


def test_a_log_that_a_power_cut_damaged(tmp_path: Path) -> None:
    path = tmp_path / "log.jsonl"
    path.write_bytes(
        b'{"event": "train", "step": 1}\n\xff\xfe\x00{"event": "train"}\n{"step": 3}\n'
    )
    assert [r["step"] for r in read_log(path)] == [1]
    assert [r["step"] for r in cut_log(path, 2)] == [1]
    assert path.read_text() == '{"event": "train", "step": 1}\n'


def test_what_is_said_of_files_that_cannot_be_read(tmp_path: Path, capsys) -> None:
    failures = [("a.png", "cut short"), ("b.tar", f"cut short; {REST_IS_USED}")]
    with RunLog(tmp_path / "log.jsonl", [], 0, 0, 10) as log:
        for _ in range(2):
            log.unreadable(failures)
    text = capsys.readouterr().out
    assert text.count("cannot read a.png (cut short); another image takes its place\n") == 1
    assert text.count("cannot read b.tar (cut short; what is left is used)\n") == 1


def test_the_norm_in_the_log_is_of_updates_that_had_one() -> None:
    """A scaler skips those that overflowed by itself, and their norm is infinite."""
    rows = []
    run = SimpleNamespace(
        sampler=SimpleNamespace(images_per_update=2), learning_rate=float, epoch=float, flops=1.0,
        processes=SimpleNamespace(world=World(), device=torch.device("cpu")),
    )  # fmt: skip
    for norms, expected in (((1.0, math.inf, 3.0), 2.0), ((math.inf,), math.nan)):
        reports = [Report(n, [1.0], norm, False, False, False) for n, norm in enumerate(norms)]
        trainer = SimpleNamespace(
            run=run, unlogged=reports, window_start=0.0, window_waited=0.0, skipped=0,
            _loader_bytes=lambda: 0, log=SimpleNamespace(train=lambda _, row: rows.append(row)),
        )  # fmt: skip
        Trainer._log_window(trainer, 1, 1.0, 0.0)
        assert rows[-1]["grad_norm"] == pytest.approx(expected, nan_ok=True)


def test_a_log_that_cannot_be_opened_is_a_clear_error(tmp_path: Path) -> None:
    (tmp_path / "log.jsonl").symlink_to(tmp_path / "nowhere" / "log.jsonl")
    with pytest.raises(UserError, match=r"log.jsonl could not be written: No such file"):
        RunLog(tmp_path / "log.jsonl", [], 0, 0, 10)


def test_a_tracker_that_fails_does_not_end_the_run(recipe: Recipe, tmp_path: Path, capsys) -> None:
    (tracker,) = trackers = make_trackers(tmp_path, recipe, 0)
    with RunLog(tmp_path / "log.jsonl", trackers, 0, 0, 10) as log:

        def scalars(step: int, group: str, values: dict[str, float]) -> None:
            raise OSError(28, "No space left on device")

        tracker.scalars = scalars
        values = dict.fromkeys(
            ("loss", "grad_norm", "lr", "epoch", "images_per_second", "model_tflops", "data_wait"),
            0.5,
        )
        for step in (1, 2):
            memory = {"peak_memory_gib": 1.0, "loader_memory_gib": 0.1}
            log.train(step, {**values, **memory, "skipped": 0})
    assert len(read_log(tmp_path / "log.jsonl")) == 2
    text = capsys.readouterr().out
    assert text.count("TensorBoard is left out from here on: [Errno 28] No space left") == 1

"""The command that runs everything on a GPU: its parts fail, end and are left out each alone."""

from __future__ import annotations

import os
import time

import pytest
import torch

from benchmarks import gpu_check
from benchmarks.gpu_check import Part

GOOD = Part("good", ("-c", "print('fine')"), 60)
BAD = Part("bad", ("-c", "print('why'); raise SystemExit(1)"), 60)
SLOW = Part("slow", ("-c", "import time; print('begun', flush=True); time.sleep(60)"), 2)
ANYWHERE = Part("anywhere", ("-c", "print('fine')"), 60, needs_gpu=False)


def states(table):
    return {name: row["state"] for name, row in table.items()}


def test_a_part_that_fails_does_not_keep_the_others_from_running():
    saved = []
    table = gpu_check.check(
        (BAD, SLOW, GOOD), 5, True, lambda table: saved.append(dict(states(table)))
    )
    assert states(table) == {"bad": "failed", "slow": "failed: ran out of time", "good": "passed"}
    assert table["bad"]["said"] == ["why"] and table["slow"]["said"] == ["begun"]
    # Each part's end is written at once.
    assert [list(s.values()).count("not reached") for s in saved] == [2, 1, 0]


def test_without_a_gpu_only_what_needs_none_runs():
    table = gpu_check.check((GOOD, ANYWHERE), 5, False, lambda table: None)
    assert states(table) == {"good": "not reached: needs a GPU", "anywhere": "passed"}


def test_what_does_not_fit_is_left_out_and_said():
    table = gpu_check.check((GOOD,), 0.01, True, lambda table: None)
    assert states(table) == {"good": "not reached: no time left"}


def test_what_a_part_started_ends_with_it(tmp_path):
    file = tmp_path / "child"
    code = (
        "import subprocess, sys, time\n"
        "child = subprocess.Popen([sys.executable, '-c', 'import time; time.sleep(600)'])\n"
        f"open({str(file)!r}, 'w').write(str(child.pid))\n"
        "time.sleep(600)\n"
    )
    row = gpu_check.run_part(Part("slow", ("-c", code), 3), 60)
    assert row["state"] == "failed: ran out of time"
    with pytest.raises(ProcessLookupError):
        for _ in range(100):  # until it is reaped
            os.kill(int(file.read_text()), 0)
            time.sleep(0.1)


def test_parts_leave_the_time_that_a_later_one_has_reserved():
    part = Part("steps", ("-c", "print('fine')"), 60, reserved=59)
    table = gpu_check.check((GOOD, part), 1, True, lambda table: None)
    assert states(table) == {"good": "not reached: no time left", "steps": "passed"}


def test_whether_the_modules_work_is_tried(monkeypatch):
    """Without a GPU the CUDA backend does not, and the reason is the table's."""
    row = gpu_check.run_part(gpu_check.TRY, 60)
    assert (row["state"] == "passed") == gpu_check.is_built()
    if not torch.cuda.is_available():
        assert row["state"] == "failed" and row["said"]
    assert (gpu_check.ROOT / gpu_check.BUILD.arguments[0]).exists()


def test_parts_by_name():
    assert gpu_check.chosen_parts("") == gpu_check.PARTS
    assert [p.name for p in gpu_check.chosen_parts("tune,tests")] == ["tune", "tests"]
    with pytest.raises(ValueError, match="GPU_CHECK_PARTS names speed; the parts are environment"):
        gpu_check.chosen_parts("speed")


def test_the_files_of_the_parts_are_there():
    for part in gpu_check.PARTS:
        for argument in part.arguments:
            if argument.startswith("tests/") or argument == "benchmarks":
                assert (gpu_check.ROOT / argument).exists(), argument
            if argument.startswith("benchmarks."):
                assert (gpu_check.ROOT / (argument.replace(".", "/") + ".py")).exists()

"""The stress that a GPU is put to finds what it is there for; here on a CPU's backends."""

from __future__ import annotations

import os
import pathlib
import subprocess
import sys

import numpy as np
import pytest
import torch

from greenmim_kernels._triton.launch import tile_of
from greenmim_kernels.testing import Case, make_partition, run
from tests.kernels.stress import (
    CLASSES,
    SMALL,
    fresh_problems,
    main,
    random_case,
    same_bits,
    small_case,
)

pytestmark = pytest.mark.usefixtures("one_thread")
(CASE,) = SMALL


@pytest.mark.parametrize("backend", ["cpp", "reference"])
def test_what_is_right_and_steady_passes(backend):
    assert same_bits(CASE, backend, "cpu", 20) == 20
    assert fresh_problems(1, backend, "cpu", until=0.0, draw=small_case) == 1


def planted(at: int, change):
    """A run whose results are changed at the `at`-th call."""
    calls = []

    def changed(inputs):
        results = run(inputs)
        calls.append(None)
        return {**results, **change(results)} if len(calls) == at else results

    return changed


@pytest.mark.parametrize("name", ["out", "grad_qkv", "grad_table"])
def test_a_bit_that_differs_once_is_seen(name):
    def last_bit(results):
        value = results[name].clone()
        value.view(torch.int32).flatten()[-1] ^= 1
        return {name: value}

    with pytest.raises(AssertionError, match=f"of 20 runs .* {{'{name}': 1}}"):
        same_bits(CASE, "cpp", "cpu", 20, planted(7, last_bit))


def test_a_read_that_comes_too_early_is_seen():
    """It finds what the run before has left in the same memory."""
    kept = []

    def stale(inputs):
        kept.append(run(inputs))
        return kept[-2] if len(kept) == 9 else kept[-1]

    with pytest.raises(AssertionError, match="of 20 runs .*'out': 1"):
        same_bits(CASE, "cpp", "cpu", 20, stale)


def test_fresh_problems_are_of_kernels_that_are_compiled_already():
    def constants(case):
        part = make_partition(case)
        tile = tile_of(part.group_size)
        return case.head_dim, case.num_heads, part.window_size, tile, case.per_image, case.dtype

    rng = np.random.default_rng(0)
    drawn = {constants(random_case(rng, head_dim)) for head_dim in (16, 32, 64) for _ in range(40)}
    assert drawn <= set(map(constants, CLASSES)) and len(drawn) > 6


@pytest.mark.parametrize("factor", [1.001, float("nan")])
def test_results_that_are_steady_and_wrong_are_seen(factor):
    def wrong(inputs):
        results = run(inputs)
        return {**results, "grad_qkv": results["grad_qkv"] * factor}

    with pytest.raises(AssertionError, match="grad_qkv: error"):
        same_bits(CASE, "cpp", "cpu", 3, wrong)


def test_a_fresh_problem_that_is_wrong_is_named():
    def row_too_far(results):
        return {"out": results["out"].roll(1, 1)}

    with pytest.raises(AssertionError, match=r"64x64-stage3-.*, values \d+: out: error"):
        fresh_problems(0, "cpp", "cpu", float("inf"), planted(3, row_too_far), small_case)


def test_the_classes_are_swin_s_and_those_beside_it():
    found = {(case.head_dim, case.window_size, case.per_image) for case in CLASSES}
    assert {(d, w, False) for d in (16, 32, 64) for w in (7, 14)} <= found
    assert {(32, 7, True), (32, 14, True)} <= found
    assert all(case.capacity and case.channels == 128 for case in CLASSES)
    assert {case.dtype for case in CLASSES} == {torch.bfloat16}
    assert isinstance(CLASSES[0], Case)


def test_a_backend_that_fails_fails_the_command(tmp_path, capsys):
    arguments = ["--device", "cpu", "--small", "--processes", "1", "--seconds", "0"]
    assert main(["--backend", "nonsense", *arguments]) == 1
    assert "unknown backend 'nonsense'" in capsys.readouterr().out


def test_triton_in_the_interpreter():
    pytest.importorskip("triton")
    command = [sys.executable, "-m", "tests.kernels.stress", "--backend", "triton"]
    command += ["--device", "cpu", "--small", "--processes", "1", "--seconds", "0"]
    command += ["--repeats", "2"]
    root = pathlib.Path(__file__).resolve().parents[2]
    environment = {**os.environ, "TRITON_INTERPRET": "1"}
    done = subprocess.run(command, cwd=root, env=environment, capture_output=True, text=True)
    assert done.returncode == 0, done.stdout + done.stderr
    assert done.stdout.count("'passed': True") == 2

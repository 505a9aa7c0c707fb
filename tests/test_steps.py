"""The step benchmarks: every variant trains the same, what is wrong is not timed."""

from __future__ import annotations

import dataclasses
import time
import types

import pytest
import torch

from benchmarks import naive_model, step_processes, step_profile, steps
from benchmarks.environment import earlier, put, write_json
from benchmarks.measure import Rates
from benchmarks.naive import SpreadGroupAttention
from benchmarks.step_processes import (
    Ended,
    StepProcess,
    checked_step,
    in_child,
    load_reference,
    save_reference,
)
from benchmarks.step_variants import Expected, Problem, Step, Variant, reference, variants
from greenmim import ModelConfig

from .train import crew

SMALL = ModelConfig(
    image_size=224, window_size=7, embed_dim=16, depths=(2, 2, 1, 1), num_heads=(1, 2, 4, 8),
    decoder_dim=32, decoder_heads=2,
)  # fmt: skip
PROBLEM = Problem("small", SMALL, 2, "fp32")
SMALL_V2 = dataclasses.replace(SMALL, image_size=256, window_size=8, encoder="swinv2")
PROBLEM_V2 = Problem("small-v2", SMALL_V2, 2, "fp32")
PROBLEM_TWINS = Problem("small-twins", dataclasses.replace(SMALL, encoder="twins_svt"), 2, "fp32")
PROBLEMS = [PROBLEM, PROBLEM_V2, PROBLEM_TWINS]
RATES = Rates(1e10, {"float32": 1e11})


pytestmark = [pytest.mark.usefixtures("one_thread"), pytest.mark.slow]


def eager_variants() -> list[Variant]:
    return [v for v in variants("cpu") if not v.compiled]


@pytest.fixture(scope="module")
def expected() -> dict[bool, Expected]:
    """Of GreenMIM's and of SimMIM's step."""
    return {dense: reference(PROBLEM, dense, "cpu") for dense in (False, True)}


@pytest.mark.parametrize("problem", PROBLEMS, ids=lambda problem: problem.name)
def test_all_variants_have_the_reference_s_gradients_and_train(problem, request):
    if problem is PROBLEM:
        expected = request.getfixturevalue("expected")
    else:
        expected = {dense: reference(problem, dense, "cpu") for dense in (False, True)}
        # Every block learns: a gradient that comes through no norm would be right by chance.
        assert all(grad.any() for grad in expected[False].gradients.values())
    weights = []
    for variant in eager_variants():
        step = Step(problem, variant, "cpu")
        errors = step.errors(expected[variant.kind == "dense"])
        assert max(errors) < 1e-5, (variant, errors)
        step.count = 0
        for _ in range(3):
            step()
        if variant.kind != "dense":
            weights.append(list(step.model.blocks())[1].mlp.fc1.weight.detach())
    assert len(weights) == 4
    for other in weights[1:]:  # AdamW's first steps are of the gradient's sign: 1e-4 each
        assert (other - weights[0]).abs().mean() < 2e-6


@pytest.mark.parametrize("problem", PROBLEMS, ids=lambda problem: problem.name)
def test_the_spread_naive_step_is_the_naive_step(problem):
    naive, spread = (
        Step(problem, Variant(kind, kind), "cpu") for kind in ("naive", "naive-spread")
    )
    for step in (naive, spread):
        step.loss()
    for name, parameter in naive.trained.items():
        torch.testing.assert_close(spread.trained[name].grad, parameter.grad, msg=name)
    for pair in (
        spread.inputs[0][1].base.attentions
        if problem is PROBLEM_TWINS
        else (spread.inputs[0][1].attentions)
    ):
        assert all(isinstance(one, SpreadGroupAttention) for one, _ in pair)


@pytest.mark.parametrize("precision", ["bf16", "fp16"])
def test_16_bit_steps_are_within_their_limits(precision, expected):
    problem = dataclasses.replace(PROBLEM, precision=precision)
    for variant in eager_variants():
        if variant.backend == "cpp" and precision == "fp16":
            continue  # the CPU's kernels have no float16
        row, step = checked_step(problem, variant, "cpu", expected[variant.kind == "dense"])
        assert step is not None, row


def wrong_latent(monkeypatch):
    real = naive_model.NaiveGreenMIM._encode
    monkeypatch.setattr(naive_model.NaiveGreenMIM, "_encode", lambda *a: 1.01 * real(*a))


def no_gradient_of_tables(monkeypatch):
    _without_gradients(monkeypatch, "relative_position_bias_table")


def no_gradient_of_one_late_weight(monkeypatch):
    _without_gradients(monkeypatch, "encoder.layers.3.blocks.0.mlp.fc1.weight")


def _without_gradients(monkeypatch, end):
    real = Step.errors

    def errors(self, expected):
        for name, weight in self.trained.items():
            if self.variant.kind == "naive" and name.endswith(end):
                weight.register_hook(torch.zeros_like)
        return real(self, expected)

    monkeypatch.setattr(Step, "errors", errors)


def a_batch_that_stays(monkeypatch):
    """As of a graph that ignores its inputs."""
    real = Step._inputs

    def inputs(self, forward):
        found = real(self, forward)
        return [found[0]] * len(found) if self.variant.kind == "naive" else found

    monkeypatch.setattr(Step, "_inputs", inputs)


@pytest.mark.parametrize(
    "plant",
    [wrong_latent, no_gradient_of_tables, no_gradient_of_one_late_weight, a_batch_that_stays],
)
def test_a_wrong_step_is_not_timed(plant, monkeypatch, expected):
    plant(monkeypatch)
    naive, cpp = (v for v in eager_variants() if v.name in ("naive", "cpp"))
    row, step = checked_step(PROBLEM, naive, "cpu", expected[False])
    assert "not timed" in row["reason"] and not row["checked"] and step is None
    row, step = checked_step(PROBLEM, cpp, "cpu", expected[False])
    assert "reason" not in row and row["checked"] and step is not None


def test_a_step_has_its_moments_before_anything_is_recorded():
    step = Step(PROBLEM, eager_variants()[0], "cpu")
    assert set(step.optimizer.state) == set(step.trained.values())
    for state in step.optimizer.state.values():
        assert state["step"] == 0 and not state["exp_avg"].any() and not state["exp_avg_sq"].any()
    assert step.optimizer.param_groups[0]["lr"] == 1e-4
    assert all(p.grad is None for p in step.trained.values())


def test_simmim_s_loss_is_that_of_hidden_pixels():
    step = Step(PROBLEM, next(v for v in variants("cpu") if v.kind == "dense"), "cpu")
    images, visible = step.inputs[0]
    images.requires_grad_()
    with torch.no_grad():
        prediction = _prediction(step.model.dense, images, visible)
    error = (prediction - images.detach()).abs()
    hidden = [(u // 7, u % 7) for u in range(49) if not visible[u]]
    cells = [error[:, :, 32 * h : 32 * h + 32, 32 * w : 32 * w + 32] for h, w in hidden]
    loss = step.model(images, plan=visible, loss_only=True).loss
    torch.testing.assert_close(loss, torch.stack(cells).mean())


def _prediction(simmim, images, visible):
    """The pixels that it predicts, from its loss: the derivative of |x - y| is its sign."""
    pixels = {}
    real = torch.nn.functional.pixel_shuffle

    def shuffled(x, side):
        pixels["out"] = real(x, side)
        return pixels["out"]

    torch.nn.functional.pixel_shuffle = shuffled
    try:
        simmim(images, visible)
    finally:
        torch.nn.functional.pixel_shuffle = real
    return pixels["out"]


@pytest.fixture
def forked(monkeypatch):
    """Children are forks of a process that has imported torch, which takes seconds in each.

    In `test_a_process_that_dies_says_so` they begin as those of the benchmark do.
    """
    context = types.SimpleNamespace(get_context=lambda method: crew.context)
    monkeypatch.setattr(step_processes, "multiprocessing", context)


@pytest.mark.usefixtures("forked")
def test_variants_take_turns_in_processes_of_their_own():
    broken = Variant("broken", "ours", "no such backend")
    chosen = [broken, *(v for v in variants("cpu") if v.name in ("naive", "cpp"))]
    rows: list[dict] = []
    steps.measured_rows([(PROBLEM, v) for v in chosen], "cpu", 2, RATES, rows.append)
    assert [row["variant"] for row in rows] == ["broken", "naive", "cpp"]
    assert "no such backend" in rows[0]["reason"] and "seconds" not in rows[0]
    for row in rows[1:]:
        assert row["checked"] and row["rounds"] == 2
        assert row["images_per_second"] > 0 and row["floor_ms"] > 0
        assert row["page_faults"] >= 0
    assert rows[1]["to_naive"] == {"median": 1, "p20": 1, "p80": 1}


def test_the_first_step_of_a_turn_is_not_counted(monkeypatch):
    calls: list[tuple[str, int]] = []

    class Process:
        def __init__(self, problem, variant, file):
            self.row, self.name = {"parameters": 1, "variant": variant.name}, variant.name

        def __call__(self, count=1):
            calls.append((self.name, count))
            return [(100.0, 1000), *[(1.0, 5), (2.0, 5), (3.0, 8)][: count - 1]]

        def close(self):
            pass

    monkeypatch.setattr(steps, "StepProcess", Process)
    monkeypatch.setattr(steps, "PAUSE", 0)
    chosen = [(v, None) for v in variants("cpu") if v.name in ("naive", "cpp")]
    rows = list(steps._in_turn(PROBLEM, chosen, 8, RATES))
    warm_up, turns = calls[:2], [("naive", steps.TURN), ("cpp", steps.TURN)]
    assert [name for name, _ in warm_up] == ["naive", "cpp"]
    rounds = [calls[i : i + 2] for i in range(2, len(calls), 2)]
    assert len(rounds) == 8 and all(sorted(a) == sorted(turns) for a in rounds)
    assert turns in rounds and turns[::-1] in rounds  # neither always follows the other
    assert [row["seconds"] for row in rows] == [2, 2]  # the mean of three
    assert rows[0]["page_faults"] == 6


def test_a_variant_that_dies_leaves_the_others_their_samples(monkeypatch):
    """Before it is ready, warming up, or between two turns."""

    class Process:
        def __init__(self, problem, variant, file):
            self.row, self.turns = {"parameters": 1, "variant": variant.name}, 0
            self.last = {"begins": 0, "warms": 1, "turns": 2}.get(variant.name, 99)
            self()

        def __call__(self, count=1):
            self.turns += 1
            if self.turns > self.last:
                raise Ended("it died")
            return [(2.0, 5)] * count

        def close(self):
            pass

    monkeypatch.setattr(steps, "StepProcess", Process)
    monkeypatch.setattr(steps, "PAUSE", 0)
    chosen = [(Variant(name), None) for name in ("begins", "naive", "warms", "turns", "cpp")]
    rows = {row["variant"]: row for row in steps._in_turn(PROBLEM, chosen, 3, RATES)}
    assert set(rows) == {"begins", "naive", "warms", "turns", "cpp"}
    for name in ("begins", "warms", "turns"):
        assert rows[name]["reason"] == "it died" and "seconds" not in rows[name]
    for name in ("naive", "cpp"):
        assert rows[name]["rounds"] == 3 and rows[name]["to_naive"]["median"] == 1


def test_ratios_are_taken_round_by_round():
    # The second round is slow for both.
    ratio = steps.spread_of_ratio([2.0, 20.0, 2.0], [1.0, 10.0, 1.0])
    assert ratio == {"median": 2, "p20": 2, "p80": 2}


def test_a_process_that_dies_says_so(tmp_path, capfd):
    file = tmp_path / "expected.pt"
    assert in_child(save_reference, PROBLEM, False, "cpu", file) is None
    assert load_reference(file).loss > 0
    process = StepProcess(PROBLEM, eager_variants()[0], file)
    process._child.process.kill()
    with pytest.raises(Ended, match="ended with exit code -9"):
        process()
    process.close()


@pytest.mark.usefixtures("forked")
def test_a_child_that_takes_too_long_is_ended():
    start = time.monotonic()
    with pytest.raises(Ended, match="longer than 1 s"):
        in_child(_sleep, seconds=1)
    assert time.monotonic() - start < 30


def _sleep(connection):
    time.sleep(600)


@pytest.mark.usefixtures("forked")
@pytest.mark.skipif(torch.cuda.is_available(), reason="is about a machine without a GPU")
def test_a_gpu_that_fails_leaves_a_reason_for_each_variant(tmp_path):
    chosen = [v for v in variants("cuda") if v.name in ("naive", "simmim")]
    rows: list[dict] = []
    steps.measured_rows([(PROBLEM, v) for v in chosen], "cuda", 1, RATES, rows.append)
    assert {row["variant"] for row in rows} == {"naive", "simmim"}
    assert all("no reference: RuntimeError" in row["reason"] for row in rows)
    file = tmp_path / "expected.pt"
    assert in_child(save_reference, PROBLEM, False, "cpu", file) is None
    row = in_child(steps._on_gpu, PROBLEM, chosen[0], file, 1, RATES, 1)
    assert row["variant"] == "naive" and row["reason"].startswith("RuntimeError")


@pytest.mark.parametrize("at_once", [False, True])
def test_on_a_gpu_one_is_timed_after_the_other(monkeypatch, at_once):
    """All begin at once and wait; what ends or dies makes room, and nobody else works meanwhile."""
    log: list[tuple[str, str]] = []

    class Child:
        def __init__(self, work, *arguments):
            is_variant = work is steps.when_told
            self.name = arguments[2].name if is_variant else "reference"
            self.row = {"variant": self.name, "checked": True} if is_variant else None
            log.append(("begins", self.name))

        def say(self, what):
            log.append((what, self.name))

        def hear(self, seconds=None):
            if self.name == "cuda":
                raise Ended("its process ended")
            if self.name == "simmim":
                return {**self.row, "reason": "wrong"}
            return self.row

        def close(self):
            if ("ends", self.name) not in log:
                log.append(("ends", self.name))

    monkeypatch.setattr(steps, "Child", Child)
    names = ["naive", "cuda", "simmim", "cuda-graphed"]
    known = {v.name: v for v in variants("cuda")}
    rows: list[dict] = []
    chosen = [(PROBLEM, known[n]) for n in names]
    steps.measured_rows(chosen, "cuda", 1, RATES, rows.append, at_once=at_once)
    assert log[:6] == [("begins", n) for n in (*names, "reference", "reference")]
    ready = {n: [("get ready", n)] for n in names}
    timed = {n: [("go", n)] if n in ("naive", "cuda-graphed") else [] for n in names}
    ends = {n: [("ends", n)] for n in names}
    if at_once:  # what fails ends before anything is timed
        order = [ready[n] for n in names] + [ends.pop("cuda")]
        order += [timed[n] + ends[n] for n in names if n in ends]
    else:
        order = [ready[n] + timed[n] + ends[n] for n in names]
    assert log[6:] == [("ends", "reference"), *sum(order, [])]
    assert [row["variant"] for row in rows] == names
    assert [row.get("reason") for row in rows] == [None, "its process ended", "wrong", None]


def test_knapsacks_hold_all_windows_and_fill_up():
    counts = [30, 20, 29, 19, 49, 1, 10, 39]
    groups = naive_model.knapsacks(counts, 49)
    assert sorted(window for group in groups for window in group) == list(range(8))
    assert all(sum(counts[i] for i in group) <= 49 for group in groups)
    assert len(groups) == 5  # 197 tokens do not fit into four
    assert sum(counts[i] for i in groups[0]) == 49


def test_rows_stay_until_they_are_measured_again(tmp_path):
    file = tmp_path / "steps.json"
    environment = {"commit": "a", "device": "x"}
    rows = [{"model": "m", "variant": v, "run": 1} for v in ("one", "two")]
    write_json(file, {"environment": environment, "rows": rows})
    kept = earlier(file, environment)["rows"]
    for variant in ("one", "three"):
        put(kept, {"model": "m", "variant": variant, "run": 2}, ("model", "variant"))
    assert [(row["variant"], row["run"]) for row in kept] == [("one", 2), ("two", 1), ("three", 2)]
    put(kept, {"model": "m", "variant": "one", "reason": "no time was left"}, ("model", "variant"))
    assert kept[0]["run"] == 2  # a figure stays
    put(kept, {"model": "m", "variant": "one", "reason": "wrong, not timed"}, ("model", "variant"))
    assert "run" not in kept[0]
    assert earlier(file, {**environment, "commit": "b"}) == {}
    assert earlier(file, {**environment, "commit": "b"}, of_any_commit=True)["rows"] == rows
    assert earlier(file, {**environment, "device": "y"}, of_any_commit=True) == {}
    assert earlier(tmp_path / "none.json", environment) == {}


def test_the_variants_of_a_gpu_are_all_there():
    found = {v.name: v for v in variants("cuda")}
    assert {"naive", "naive, planning in the step", "simmim", "cuda", "cuda-compiled",
            "cuda-graphed", "triton-graphed", "reference"} <= set(found)  # fmt: skip
    assert dataclasses.asdict(found["cuda-graphed"])["graphed"]
    assert found["naive, rows spread"].kind == "naive-spread"
    assert [v.name for v in found.values() if v.recompute] == ["cuda-graphed, pointwise recomputed"]


def test_a_profile_sorts_the_operators_by_kind(monkeypatch):
    found = step_profile.profile(Step(PROBLEM, eager_variants()[0], "cpu"))
    assert set(found) == {*step_profile.KINDS, step_profile.REST}
    assert found["products"] > 0 and found["attention"] > 0 and found["optimiser"] > 0
    rounds = iter([{**dict.fromkeys(found, 1.0), "GELU": gelu} for gelu in (3.0, 9.0, 4.0)])
    monkeypatch.setattr(step_profile, "profile", lambda step: next(rounds))
    taken = step_profile.in_turn({"a": lambda: None}, rounds=3)
    assert taken == {"a": {**dict.fromkeys(found, 1.0), "GELU": 4.0}}
    assert step_profile.kind_of("greenmim::onednn_linear_backward") == "copies and sums"
    assert step_profile.kind_of("greenmim::group_window_attention_backward") == "attention"
    assert step_profile.kind_of("aten::gelu_backward") == "GELU"
    assert step_profile.kind_of("aten::empty") == step_profile.REST
    kernels = {
        "void pytorch_flash::flash_fwd_kernel<Flash_fwd_kernel_traits<cutlass::bfloat16_t>>": 1.0,
        "fmha_cutlassF_bf16_aligned_64x64_rf_sm80": 2.0,
        "void cutlass::Kernel2<cutlass_80_tensorop_bf16_s16816gemm>": 4.0,
    }
    found = step_profile.by_kind({name: {"ms": ms} for name, ms in kernels.items()})
    assert found["attention"] == 3.0 and found["products"] == 4.0

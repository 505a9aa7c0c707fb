"""The step benchmarks: every variant trains the same, what is wrong is not timed."""

from __future__ import annotations

import dataclasses

import pytest

from benchmarks import naive_model, step_profile, steps
from benchmarks.environment import write_json
from benchmarks.measure import Rates
from benchmarks.step_processes import StepProcess, checked_step
from benchmarks.step_variants import Problem, Step, Variant, reference, variants
from greenmim import ModelConfig

SMALL = ModelConfig(
    image_size=224, window_size=7, embed_dim=16, depths=(2, 2, 1, 1), num_heads=(1, 2, 4, 8),
    decoder_dim=32, decoder_heads=2,
)  # fmt: skip
PROBLEM = Problem("small", SMALL, 2, "fp32")
RATES = Rates(1e10, {"float32": 1e11})


pytestmark = pytest.mark.usefixtures("one_thread")


def eager_variants() -> list[Variant]:
    return [v for v in variants("cpu") if not v.compiled]


def test_all_variants_have_the_reference_s_loss_and_train():
    weights, expected = [], reference(PROBLEM, "cpu")
    for variant in eager_variants():
        step = Step(PROBLEM, variant, "cpu")
        errors = step.errors(expected)
        assert errors is None or (errors[0] < 1e-5 and errors[1] < 1e-4), (variant, errors)
        step.count = 0
        for _ in range(3):
            step()
        if variant.kind != "dense":
            weights.append(step.model.encoder.layers[0].blocks[1].mlp.fc1.weight.detach())
    assert len(weights) == 4
    for other in weights[1:]:  # AdamW's first steps are of the gradient's sign: 1e-4 each
        assert (other - weights[0]).abs().mean() < 2e-6


def test_a_wrong_step_is_not_timed(monkeypatch):
    expected = reference(PROBLEM, "cpu")
    real = naive_model.NaiveGreenMIM._encode
    monkeypatch.setattr(naive_model.NaiveGreenMIM, "_encode", lambda *a: 1.01 * real(*a))
    found = {v.name: checked_step(PROBLEM, v, "cpu", expected) for v in eager_variants()}
    row, step = found["naive"]
    assert "not timed" in row["reason"] and not row["checked"] and step is None
    row, step = found["cpp"]
    assert "reason" not in row and row["checked"] and step is not None


def test_variants_take_turns_in_processes_of_their_own():
    broken = Variant("broken", "ours", "no such backend")
    chosen = [broken, *(v for v in variants("cpu") if v.name in ("naive", "cpp"))]
    rows: list[dict] = []
    steps.measured_rows(PROBLEM, chosen, "cpu", 2, RATES, rows.append)
    assert [row["variant"] for row in rows] == ["broken", "naive", "cpp"]
    assert "no such backend" in rows[0]["reason"] and "seconds" not in rows[0]
    for row in rows[1:]:
        assert row["checked"] and row["rounds"] == 2
        assert row["images_per_second"] > 0 and row["floor_ms"] > 0
        assert row["page_faults"] >= 0


def test_a_process_that_dies_says_so(capfd):
    process = StepProcess(PROBLEM, eager_variants()[0], reference(PROBLEM, "cpu"))
    process._process.kill()
    with pytest.raises(RuntimeError, match="'naive' ended with exit code -9"):
        process()


def test_knapsacks_hold_all_windows_and_fill_up():
    counts = [30, 20, 29, 19, 49, 1, 10, 39]
    groups = naive_model.knapsacks(counts, 49)
    assert sorted(window for group in groups for window in group) == list(range(8))
    assert all(sum(counts[i] for i in group) <= 49 for group in groups)
    assert len(groups) == 5  # 197 tokens do not fit into four
    assert sum(counts[i] for i in groups[0]) == 49


def test_rows_of_other_problems_are_kept_where_the_code_is_the_same(tmp_path):
    file = tmp_path / "steps.json"
    environment = {"commit": "a", "device": "x"}
    rows = [{"model": "one"}, {"model": "two"}]
    write_json(file, {"environment": environment, "rows": rows})
    assert steps.rows_to_keep(file, environment, {"one"}) == [{"model": "two"}]
    assert steps.rows_to_keep(file, {**environment, "commit": "b"}, {"one"}) == []
    assert steps.rows_to_keep(tmp_path / "none.json", environment, set()) == []


def test_the_variants_of_a_gpu_are_all_there():
    found = {v.name: v for v in variants("cuda")}
    assert {"naive", "naive, planning in the step", "simmim", "cuda", "cuda-compiled",
            "cuda-graphed", "triton-graphed", "reference"} <= set(found)  # fmt: skip
    assert dataclasses.asdict(found["cuda-graphed"])["graphed"]
    assert [v.name for v in found.values() if v.recompute] == ["cuda-graphed, pointwise recomputed"]


def test_a_profile_sorts_the_operators_by_kind():
    found = step_profile.profile(Step(PROBLEM, eager_variants()[0], "cpu"))
    assert set(found) == {*step_profile.KINDS, step_profile.REST}
    assert found["products"] > 0 and found["attention"] > 0 and found["optimiser"] > 0
    assert step_profile.kind_of("greenmim::group_window_attention_backward") == "attention"
    assert step_profile.kind_of("aten::gelu_backward") == "GELU"
    assert step_profile.kind_of("aten::empty") == step_profile.REST

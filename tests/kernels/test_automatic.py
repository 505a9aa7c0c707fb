"""The table by which "auto" chooses between a GPU's two backends."""

from __future__ import annotations

import pytest
import torch

from benchmarks import choose
from greenmim_kernels import automatic, backends
from greenmim_kernels.testing import Case

TABLE = {
    "device": "a GPU",
    "classes": {
        "attention-short-32-16bit": {"backend": "triton", "cuda_ms": 2.0, "triton_ms": 1.0},
        "group_gather": {"backend": "cuda", "cuda_ms": 1.0, "triton_ms": 3.0},
    },
}


@pytest.fixture
def gpu(monkeypatch):
    """As on a machine where both backends of a GPU work."""
    monkeypatch.setattr(automatic, "table", lambda: TABLE)
    usable = backends._why_unusable
    monkeypatch.setattr(
        backends,
        "_why_unusable",
        lambda name, device=None: None if name in ("cuda", "triton") else usable(name, device),
    )
    monkeypatch.setattr(backends, "_cuda_fits", lambda *question: question[-1] <= 31**2)
    monkeypatch.setattr(torch.cuda, "current_device", lambda: 0)


def chosen(operator="group_window_attention", dtype=torch.bfloat16, **sizes) -> str:
    return backends.choose_backend(operator, torch.device("cuda"), dtype, **sizes)


def test_auto_follows_the_table(gpu):
    assert chosen(head_dim=32, group_size=64, table_rows=169) == "triton"
    assert chosen(head_dim=32, group_size=65, table_rows=169) == "cuda"  # long, and not measured
    assert chosen(head_dim=32, group_size=64, table_rows=169, dtype=torch.float32) == "cuda"
    assert chosen("group_gather") == "cuda"


def test_auto_passes_over_what_a_backend_cannot_do(gpu):
    assert chosen(head_dim=32, group_size=128, table_rows=1089) == "triton"
    assert chosen(head_dim=30, group_size=64, table_rows=225) == "triton"
    assert chosen(head_dim=30, group_size=256, table_rows=961) == "triton"
    assert chosen(head_dim=23, group_size=64, table_rows=169) == "reference"
    assert chosen(head_dim=32, group_size=64, table_rows=169, dtype=torch.float64) == "reference"


def test_a_forced_backend_does_not_look_at_the_table(gpu):
    for name in ("cuda", "triton"):
        with backends.use_backend(name):
            assert chosen(head_dim=32, group_size=64, table_rows=169) == name
    with (
        backends.use_backend("cuda"),
        pytest.raises(ValueError, match="no room on this GPU for groups of 400"),
    ):
        chosen(head_dim=32, group_size=400, table_rows=1521)


def test_reasons(gpu):
    reason = automatic.choice("group_window_attention", torch.bfloat16, 32, 64).reason
    assert reason == "triton takes 0.50 of cuda's time on a GPU"
    assert "not measured" in automatic.choice("group_scatter", torch.bfloat16).reason


def test_the_shipped_table_holds_known_classes_and_what_was_measured():
    table = automatic.table()
    assert set(table["classes"]) <= set(automatic.choices())
    assert bool(table["device"]) == bool(table["classes"])
    for row in table["classes"].values():
        times = {name: row[f"{name}_ms"] for name in ("cuda", "triton")}
        assert row["backend"] == min(times, key=times.__getitem__)


def test_it_does_not_break_a_graph():
    def by_choice(x):
        found = automatic.choice("group_window_attention", x.dtype, x.shape[-1], x.shape[0])
        return x + 1 if found.backend == "cuda" else x

    compiled = torch.compile(by_choice, fullgraph=True, dynamic=True, backend="eager")
    for shape in ((64, 32), (65, 16)):
        x = torch.zeros(shape)
        assert torch.equal(compiled(x), x + 1)


def test_the_measurement_takes_the_faster_one_and_refuses_different_results(monkeypatch):
    small = Case(image_size=(64, 64), batch=1, num_heads=1)
    monkeypatch.setattr(choose, "problem_of", lambda *_: choose.make_inputs(small, device="cpu"))
    monkeypatch.setattr(choose, "BACKENDS", ("cuda", "triton"))
    real = {"cuda": "cpp", "triton": "reference"}
    force = choose.gk.use_backend
    current = []

    def use_backend(name):
        current.append(name)
        return force(real.get(name, name))

    monkeypatch.setattr(choose.gk, "use_backend", use_backend)
    row = choose.measure("attention-short-32-fp32", 1, lambda f: 1.0 + (current[-1] == "cuda"))
    assert row == {"backend": "triton", "cuda_ms": 2.0, "triton_ms": 1.0}
    monkeypatch.setattr(
        choose, "work_of", lambda *_: lambda: {"out": torch.ones(1) * (current[-1] == "cuda")}
    )
    with pytest.raises(RuntimeError, match="cuda and triton differ in out"):
        choose.measure("attention-short-32-fp32", 1, lambda f: 1.0)

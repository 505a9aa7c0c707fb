"""What a GPU should take: the page is the script's, plans the kernels', a GPU's run explained."""

from __future__ import annotations

import json
import subprocess
import sys

import pytest

pytest.importorskip("timm")

from benchmarks import predicted
from benchmarks.predicted import Problem


def test_the_page_is_what_the_figures_say():
    assert predicted.PAGE.read_text() == predicted.page(), "run python -m benchmarks.predicted"


@pytest.mark.parametrize("slots", [16, 32, 48, 64])
def test_blocks_are_shared_as_the_kernels_do(slots, monkeypatch):
    import pathlib

    import torch

    monkeypatch.syspath_prepend(pathlib.Path(__file__).parent / "kernels")
    from emulated import plan

    groups = -(-768 // slots)
    # The emulator holds two blocks on each of 132 processors.
    share = predicted.cuda_share(256, 4, groups, 768, slots, 2 * 132)
    assert [row["share"] for row in plan(torch.bfloat16, 32, slots, 7)] == [share, share]


def test_no_block_has_more_than_its_share_of_the_images():
    for row in predicted.rows():
        problem = Problem(row["stage"], row["batch"], row["capacity"])
        for backend in predicted.BACKENDS:
            kernel, blocks, images = predicted.plan_of(backend, problem, row["pass"])
            tiles = problem.heads * problem.filled * problem.batch
            assert tiles <= blocks * images < tiles + blocks, (row, backend)
            if backend == "cuda":  # one wave
                assert blocks <= kernel.resident * predicted.PROCESSORS
            # Nothing is faster than a copy.
            assert row[backend] > row["copy"]


@pytest.mark.parametrize(("stage", "capacity"), predicted.LONG_GROUPS)
@pytest.mark.parametrize("block", [16, 32, 64])
def test_tiles_of_long_groups_cover_every_pair(stage, capacity, block):
    problem = Problem(stage, 2, capacity, window=14)
    assert problem.slots > 64
    found, expected = problem.tiles(block), []
    for window in problem._part.window_id[0]:
        alike = (window[:, None] == window) & (window >= 0)
        for rows in alike.split(block):
            if rows.any():
                (columns,) = rows.any(0).nonzero(as_tuple=True)
                start = int(columns[0]) - int(columns[0]) % 16
                expected.append((int(columns[-1]) - start) // block + 1)
    assert found == expected


def test_windows_of_14_are_as_fast_as_the_design_says():
    for batch in predicted.BATCHES:
        for stage, capacity in predicted.LONG_GROUPS:
            problem = Problem(stage, batch, capacity, window=14)
            share = {
                which: problem.copy(which) / predicted.long_microseconds(problem, which)
                for which in predicted.PASSES
            }
            assert 0.415 <= share["forward"] < 0.655 and 0.165 <= share["backward"] < 0.285, share


def test_what_was_measured_is_what_is_predicted_at_that_rate_of_a_copy():
    file = predicted.ROOT / "benchmarks" / "results" / "nvidia-h200" / "operators.json"
    rows = predicted.beside(json.loads(file.read_text()))
    assert len(rows) == 32
    # Triton's programs of 16 slots wait less than their way through the code says.
    bounds = {"cuda": (0.9, 1.2), "triton": (0.69, 1.25)}
    for row in rows:
        least, most = bounds[row["backend"]]
        assert least <= row["ms"] / row["predicted_ms"] <= most, row


def test_reports_are_written_without_triton():
    code = "import sys; sys.modules['triton'] = None; from benchmarks import predicted, report"
    code += "; next(predicted.rows())"
    subprocess.run([sys.executable, "-c", code], cwd=predicted.ROOT, check=True)


def test_measured_stands_beside_predicted():
    row = {
        "peer": "greenmim-cuda", "operator": "group_window_attention", "study": "stages",
        "dtype": "bfloat16", "pass": "forward", "per_image": False, "stage": 1, "batch": 128,
        "capacity": True, "shifted": False, "ms": 0.08, "case": "",
    }  # fmt: skip
    changes = {"peer": "naive"}, {"dtype": "float32"}, {"pass": "both"}, {"shifted": True}
    others = [{**row, **change} for change in changes]
    result = {
        "environment": {"device": "NVIDIA H100 80GB HBM3"},
        "rates": {"copy_bytes_per_second": 4e12},
        "rows": [row, *others, {"peer": "greenmim-triton"}],
    }
    (found,) = predicted.beside(result)
    expected = predicted.microseconds("cuda", Problem(1, 128, True), "forward", 4e12)
    assert found["predicted_ms"] == pytest.approx(expected / 1e3)
    assert f"{80 / expected:.2f} |" in predicted.beside_table(result)
    assert predicted.beside_table({**result, "rows": others}) == ""
    for device in ("NVIDIA A100-SXM4-80GB", "NVIDIA B200", "NVIDIA GeForce RTX 4090", "AMD EPYC"):
        assert predicted.beside({**result, "environment": {"device": device}}) == [], device

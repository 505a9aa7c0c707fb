"""The suite sees what it is there for: what is slow, what is wrong, what is out of date."""

from __future__ import annotations

import dataclasses
import json
import re
import subprocess
import sys
import time
from types import SimpleNamespace

import pytest
import torch
from PIL import Image

from benchmarks import conftest, costs, environment, loader, peers, plots, report, swap, tables
from benchmarks.cases import SELECTIONS, select
from benchmarks.convolution import conv_inputs
from benchmarks.measure import Rates, Sampler, Timing, measure
from benchmarks.naive import NaiveGroupAttention, SpreadGroupAttention
from benchmarks.operators import Bench, extra_bytes, timed_row
from benchmarks.peers import PEERS, Unable
from benchmarks.traffic import work_of
from greenmim import ModelConfig
from greenmim.planning import Planner
from greenmim_kernels.testing import Case, make_partition, visible_tokens

RATES = Rates(1e10, {"float32": 1e11})


pytestmark = pytest.mark.usefixtures("one_thread")


def tiny(operator: str = "group_window_attention"):
    return next(p for p in select("tiny", "cpu") if p.operator == operator)


def peer_named(name: str):
    return next(peer for peer in PEERS if peer.name == name)


def test_samples_are_ordered_and_set_up_each_time():
    calls = []
    timing = measure(
        [lambda: calls.append("a"), lambda: calls.append("b")],
        rounds=6, warmup=1, setups=[lambda: calls.append("s")],
    )  # fmt: skip
    assert calls == ["s", "a", "b"] * 7
    assert timing.n == 6 and 0 < timing.p20 <= timing.median <= timing.p80
    with pytest.raises(ValueError, match="no samples"):
        Timing.of([])


def test_a_planted_slowdown_is_seen():
    bench, peer = Bench(tiny(), "cpu"), peer_named("greenmim-cpp")
    rows: list[dict] = []
    for _ in range(2):
        # Ten times what it took without, on a machine that is as busy as it is.
        late = max(0.05, 0.01 * rows[0]["ms"]) if rows else 0.0

        def make(operator, inputs, late=late):
            function = peers.ours(operator, inputs)

            def slowed(x, table):
                time.sleep(late)
                return function(x, table)

            return slowed

        slow = dataclasses.replace(peer, make=make)
        bench._functions.clear()
        sampler = bench.prepare(slow, "both").sampler
        sampler = Sampler(sampler.calls[:2], "cpu", sampler.setups[:2])
        prepared = dataclasses.replace(bench.prepare(slow, "both"), sampler=sampler)
        timing = Timing.of([sampler() for _ in range(5)])
        rows.append(timed_row(bench.row(slow, "both"), timing, prepared, RATES, bench))
    assert rows[1]["ms"] >= 1000 * late and rows[1]["fraction"] < rows[0]["fraction"] / 2
    old, new = ({"rows": [row]} for row in rows)
    (line,) = report.compare(old, new)
    assert "greenmim-cpp both" in line and "times the time" in line
    assert not report.compare(new, old)


def test_what_is_timed_runs_in_its_backend():
    """Not only what is checked."""
    seen = []

    def make(operator, inputs):
        function = peers.ours(operator, inputs)

        def noted(x, table):
            out = function(x, table)
            seen.append(out.grad_fn.name() if out.grad_fn else None)
            return out

        return noted

    names = {}
    for backend in ("cpp", "reference"):
        bench = Bench(tiny("block_diagonal_attention"), "cpu")
        peer = dataclasses.replace(peer_named("greenmim-cpp"), make=make, backend=backend)
        sampler = bench.prepare(peer, "forward").sampler
        seen.clear()
        sampler()
        names[backend] = set(seen)
    assert all(len(found) == 1 for found in names.values())
    assert "greenmim" in names["cpp"].pop() and "greenmim" not in names["reference"].pop()


def test_a_planted_wrong_result_is_not_timed():
    bench = Bench(tiny(), "cpu")

    def make(operator, inputs):
        function = peers.naive(operator, inputs)
        return lambda x, table: function(x, table) * 1.01

    wrong = dataclasses.replace(peer_named("naive"), make=make)
    with pytest.raises(Unable, match="wrong, not timed"):
        bench.prepare(wrong, "both")
    ours = dataclasses.replace(peer_named("greenmim-cpp"), make=make)
    with pytest.raises(AssertionError):  # our own: the run fails
        Bench(tiny(), "cpu").prepare(ours, "both")


def test_peers_in_16_bits_may_round_but_not_err():
    problem = tiny()
    case = dataclasses.replace(problem.case, dtype=torch.bfloat16, mask_ratio=0.25)
    problem = dataclasses.replace(problem, case=case)
    bench = Bench(problem, "cpu")
    for name in ("naive", "padded-sdpa"):
        bench.check(peer_named(name), with_gradients=True)

    def make(operator, inputs):
        function = peers.naive(operator, inputs)
        return lambda x, table: function(x, table.roll(1, 0))  # the bias of the neighbour

    wrong = dataclasses.replace(peer_named("naive"), make=make, name="shifted")
    with pytest.raises(Unable, match="wrong, not timed"):
        bench.check(wrong, with_gradients=True)


def test_a_wrong_gradient_is_not_timed_either():
    class Twice(torch.autograd.Function):
        @staticmethod
        def forward(ctx, x):
            return x.clone()

        @staticmethod
        def backward(ctx, grad):
            return 2 * grad

    def make(operator, inputs):
        function = peers.naive(operator, inputs)
        return lambda x, table: function(x, Twice.apply(table))

    wrong = dataclasses.replace(peer_named("naive"), make=make)
    with pytest.raises(Unable, match="grad_table"):
        Bench(tiny(), "cpu").prepare(wrong, "both")


@pytest.mark.parametrize("operator", peers.OPERATORS)
def test_every_peer_of_a_cpu_is_right_or_says_why_not(operator):
    bench = Bench(tiny(operator), "cpu")
    for peer in bench.problem.peers:
        if peer.compiles:  # minutes
            continue
        try:
            bench.check(peer, with_gradients=True)
        except Unable as reason:
            assert peer.name in ("varlen", "xformers"), (peer.name, reason)


@pytest.mark.parametrize("capacity", [False, True])
def test_the_spread_naive_path_adds_little_to_one_row(capacity):
    """Pairs that do not count, of absent tokens too, take all rows of the table in turn."""
    case = Case(stage=1, batch=1, num_heads=1, capacity=capacity)
    bench = Bench(dataclasses.replace(tiny(), case=case), "cpu")
    part = bench.inputs.part
    most = {
        kind: int(kind(part).bias_index.bincount(minlength=part.table_rows).max())
        for kind in (NaiveGroupAttention, SpreadGroupAttention)
    }
    # What is left is near the mean.
    pairs = part.token_index.numel() * part.group_size
    assert most[NaiveGroupAttention] > pairs / 2
    assert most[SpreadGroupAttention] < 5 * pairs / part.table_rows
    for name in peers.NAIVE:
        bench.check(peer_named(name), with_gradients=True)


def test_naive_peers_stand_beside_ours_where_the_naive_path_does():
    for selection in ("short", "table", "rest"):
        for problem in select(selection, "cuda"):
            names = {peer.name for peer in problem.peers}
            if problem.study in ("stages", "shapes") and "naive" in names:
                assert "naive-spread" in names, str(problem)
    assert set(peers.NAIVE) <= set(plots.COLOURS) & set(plots.NAMES)


def test_extra_memory_is_what_is_held_beyond_the_results():
    bench = Bench(tiny(), "cpu")
    small, large = (extra_bytes(bench, peer_named(name)) for name in ("greenmim-cpp", "naive"))
    assert 0 <= small < large / 2


def test_limits_by_hand():
    problem = tiny()
    inputs = Bench(problem, "cpu").inputs
    batch, tokens, width = inputs.qkv.shape
    forward = work_of(problem.operator, inputs, "forward")
    index = 4 * 4 * inputs.part.token_index.numel()  # index, window and two coordinates
    table = inputs.table.numel() * 4
    assert forward.bytes == batch * tokens * (width + width // 3) * 4 + table + index
    assert RATES.floor(1e10, 1e12, "float32") == (10.0, "matrix")
    assert RATES.floor(2e10, 1e11, "float32") == (2.0, "copy")


def test_selections_are_what_they_say():
    for selection in SELECTIONS:
        problems = select(selection, "cuda")
        assert len({str(problem) for problem in problems}) > 5
        assert all(problem.peers for problem in problems)
    with pytest.raises(ValueError, match="no selection"):
        select("everything", "cpu")
    full = {str(problem.case) for problem in select("full", "cuda")}
    wanted = Case(stage=4, num_heads=48, batch=128, window_size=14, image_size=(512, 512),
                  mask_ratio=0.9, dtype=torch.float16, per_image=True)  # fmt: skip
    assert str(wanted) in full
    for selection in ("short", "default", "table"):
        stages = [p.case for p in select(selection, "cuda") if p.study == "stages"]
        for capacity in (False, True):
            assert {1, 2, 3, 4} == {case.stage for case in stages if case.capacity == capacity}


@pytest.mark.parametrize("stage", [1, 2, 3, 4])
@pytest.mark.parametrize("per_image", [False, True])
@pytest.mark.parametrize("shifted", [False, True])
def test_a_case_with_capacity_has_the_partition_of_a_step(stage, per_image, shifted):
    case = Case(stage=stage, shifted=shifted, per_image=per_image, capacity=True, batch=3)
    part = make_partition(case)
    grids = visible_tokens(case).reshape(-1, *case.grid)
    units = grids[:, :: case.scale, :: case.scale].reshape(len(grids), -1)
    plan = Planner(ModelConfig())(units)
    planned = plan.partitions[stage - 1][shifted]
    assert part.num_groups == planned.num_groups
    assert all(map(torch.equal, part.tensors, planned.tensors))


@pytest.mark.parametrize("stage", [1, 2, 3, 4])
@pytest.mark.parametrize("per_image", [False, True])
def test_the_convolution_has_the_neighbours_of_a_step(stage, per_image):
    case = Case(stage=stage, per_image=per_image, batch=3)
    inputs = conv_inputs(case, "cpu")
    grids = visible_tokens(case).reshape(-1, *case.grid)
    units = grids[:, :: case.scale, :: case.scale].reshape(len(grids), -1)
    planner = Planner(ModelConfig(encoder="twins_svt"))
    assert torch.equal(inputs.neighbours, planner(units).neighbours[stage - 1])
    assert (inputs.places.numpy() == planner.positions(units, case.scale)).all()
    bench = Bench(dataclasses.replace(tiny("sparse_depthwise_conv"), case=case), "cpu")
    for name in ("dense", "dense-last", "gather-einsum", "greenmim-cpp"):
        bench.check(peer_named(name), with_gradients=True)


def test_the_best_of_flex_attention_s_blocks_counts():
    found = result()
    row = {**found["rows"][0], "floor_ms": 0.5}
    found["rows"] = [{**row, "peer": f"flex-{block}", "ms": ms} for block, ms in
                     ((128, 9.0), (32, 3.0), (16, 4.0))]  # fmt: skip
    table = tables.stages_table(found)
    for line in ("flex-128 | 9.00 ms", "flex-16 | 4.00 ms", "*limit* | 0.500 ms"):
        assert f"| {line} |" in table
    assert "| flex |" not in table  # which is one of those
    (best,) = (row for row in tables.measured_rows(found) if row["peer"] == "flex")
    assert best["ms"] == 3.0


@pytest.mark.parametrize("block", peers.FLEX_BLOCKS)
def test_flex_attention_s_tiles_fit_its_blocks(block, monkeypatch):
    """With the defaults of an H100 no backward pass can be made for blocks of 16 and 32."""
    choices = pytest.importorskip("torch._inductor.choices").InductorChoices
    monkeypatch.setattr(torch.cuda, "get_device_capability", lambda *_: (9, 0))
    monkeypatch.setattr(
        choices, "get_flex_attention_bwd_configs", choices.get_flex_attention_bwd_configs
    )
    monkeypatch.setattr(peers, "_flex_block", block)
    peers._tiles_that_fit(choices)
    peers._tiles_that_fit(choices)  # once only
    (found,) = choices().get_flex_attention_bwd_configs(32, torch.bfloat16, "cuda")
    for size in (found.block_m1, found.block_n1, found.block_m2, found.block_n2):
        assert 16 <= size and block % size == 0
    options = peers.flex_options(block)
    if block == 128:
        assert options is None
    else:
        assert {value for name, value in options.items() if "BLOCK" in name} == {block}


def result(**changes) -> dict:
    """An operators.json of two peers and three sizes."""
    row = {"study": "stages", "operator": "group_window_attention", "case": "c", "stage": 1,
           "shifted": False, "batch": 8, "tokens": 768, "image": [224, 224], "dtype": "float32",
           "pass": "both", "flops": 10**9, "bytes": 10**8, "extra_bytes": 10**6, "p20_ms": 1.0,
           "p80_ms": 1.1, "fraction": 0.5}  # fmt: skip
    rows = []
    for peer, ms in (("greenmim-cpp", 2.0), ("naive", 6.0)):
        rows += [row | {"peer": peer, "ms": ms, "pass": which} for which in
                 ("both", "forward", "backward")]  # fmt: skip
        rows += [row | {"peer": peer, "ms": ms * k**1.5, "study": "batch", "batch": k}
                 for k in (1, 2, 4)]  # fmt: skip
    rows.append({"study": "stages", "peer": "varlen", "reason": "varlen_attn runs on CUDA only"})
    described = {"device": "a CPU", "driver": None, "threads": 2, "torch": "2", "triton": None,
                 "commit": "0" * 40, "dirty": False}  # fmt: skip
    rates = {"copy_bytes_per_second": 1e10, "matrix_flops_per_second": {"float32": 1e11}}
    return {"environment": described | changes, "rates": rates, "rows": rows}


def test_tables_and_plots_of_a_result(tmp_path):
    found = result()
    assert "| greenmim-cpp | 2.00 ms (50%) |" in tables.stages_table(found)
    assert "| naive | 6.00 ms |" in tables.stages_table(found)
    assert "varlen_attn runs on CUDA only" in tables.reasons_table(found)
    assert tables.growth(found, "batch")["naive"][2] == pytest.approx(1.5)
    written = plots.draw(found, tmp_path)
    assert {file.name for file in written} == {
        f"{name}.{suffix}"
        for name in ("speedup", "memory", "roofline", "growth")
        for suffix in ("png", "svg")
    }
    assert all(5_000 < file.stat().st_size < 200_000 for file in written)
    (tmp_path / "operators.json").write_text(json.dumps(found))
    assert "in brackets" in report.page(tmp_path).lower()


def test_the_loader_is_measured_as_a_run_has_it(tmp_path, monkeypatch):
    pytest.importorskip("skimage")
    monkeypatch.setattr(loader, "BATCH", 8)
    monkeypatch.setattr(loader, "PATHS", dict(list(loader.PATHS.items())[:3:2]))
    monkeypatch.setattr(loader, "SOURCES", {"folder": "{}"})
    monkeypatch.setattr(loader, "DEFAULT", "reduced, float32")
    made = []
    real = loader.make_loader
    monkeypatch.setattr(loader, "make_loader", lambda *a, **k: made.append(a) or real(*a, **k))
    found = {"need": 700.0, "need_of": "a model", "rows": [], "bytes_per_image": {}, "psnr_db": {}}
    loader.measure(tmp_path, 1000, 0.1, found)
    assert {Image.open(file).size for file in tmp_path.glob("*.jpg")} == {(1000, 750)}
    assert [row["path"] for row in found["rows"]] == ["decoded whole, float32", "reduced, float32"]
    assert made and all(arguments[3] == 1 for arguments in made)  # a process of its own
    for row in found["rows"]:
        assert row["batch"] == 8 and row["batches"] >= loader.LEAST
        # Whatever else runs, a process has no more time than there is.
        busy = row["images_per_second"] * row["cpu_seconds_per_image"]
        assert 0 < busy < 1.5 and row["p20"] <= row["p80"]
        assert row["cores"] == pytest.approx(700 / row["images_per_second"])
    text = tables.loader_table(found)
    size = found["bytes_per_image"]["1000"] / 1e3
    assert f"| 1000 px, {size:.0f} kB | reduced, float32 |" in text and "for 700 images/s" in text
    assert "that of a model" in text and "dB at 1000 px" in text


def test_nothing_is_reduced_of_pictures_that_are_no_larger(tmp_path, monkeypatch):
    pytest.importorskip("skimage")
    names = ("images_per_second", "p20", "p80", "cpu_seconds_per_image")
    monkeypatch.setattr(loader, "rate_of", lambda *_: dict.fromkeys(names, 1.0))
    found = {"need": 7.0, "need_of": None, "rows": [], "bytes_per_image": {}, "psnr_db": {}}
    loader.measure(tmp_path, 500, 0.1, found)
    assert len(found["rows"]) == 4 and not found["psnr_db"]
    assert not any("reduced" in row["path"] for row in found["rows"])
    widths = {max(Image.open(file).size) for file in tmp_path.glob("*.jpg")}
    assert max(widths) == 500 and 451 in widths  # one is smaller, and stays so


def test_the_need_is_that_of_a_step_at_twice_its_least_time():
    (told,) = re.findall(r"(\d+) images per second", costs.TABLE.read_text())
    assert loader.needed() == pytest.approx(int(told) / 2, rel=1e-3)


def test_a_smaller_batch_where_shared_memory_forces_it(tmp_path, monkeypatch):
    Image.new("RGB", (300, 300)).save(tmp_path / "a.jpg")
    room = 3 * 20 * 224 * 224 * 3  # two batches on their way and one that is held, of 20 in 8 bits
    monkeypatch.setattr("greenmim.data.loader.os.statvfs", lambda _: SimpleNamespace(
        f_bavail=room, f_frsize=1, f_blocks=1))  # fmt: skip
    assert loader.largest_batch(str(tmp_path), {"augment_on_device": True}) == 16
    assert loader.largest_batch(str(tmp_path), {"augment_on_device": False}) == 4


def test_a_file_older_than_the_code_is_called_so():
    first, *_, last = subprocess.run(
        ["git", "log", "--format=%H", "--", "csrc"], cwd=environment.ROOT, capture_output=True,
        text=True,
    ).stdout.split() or [None, None]  # fmt: skip
    if first is None or first == last:
        pytest.skip("a clone without history")
    head = subprocess.run(
        ["git", "rev-parse", "HEAD"], cwd=environment.ROOT, capture_output=True, text=True
    ).stdout.strip()
    assert report.staleness("operators.json", result(commit=head)) is None
    old = report.staleness("operators.json", result(commit=last))
    assert old and last[:9] in old and "has changed since" in old
    assert report.staleness("operators.json", result(commit="1" * 40)) is None  # git cannot tell


def test_the_suite_runs_as_it_is_called(tmp_path):
    file = tmp_path / "rows.json"
    command = [sys.executable, "-m", "pytest", "-q", "-p", "no:cacheprovider", "benchmarks",
               "--selection", "tiny", "--rounds", "2", "--out", str(file),
               "-k", "stages and not per_image and both and (cpp or varlen)"]  # fmt: skip
    done = subprocess.run(command, cwd=environment.ROOT, capture_output=True, text=True)
    assert done.returncode == 0, done.stdout + done.stderr
    rows = json.loads(file.read_text())["rows"]
    assert [row["peer"] for row in rows] == ["greenmim-cpp", "varlen"]
    assert rows[0]["checked"] and rows[0]["ms"] > 0 and 0 < rows[0]["fraction"] < 2
    assert "CUDA only" in rows[1]["reason"] and "ms" not in rows[1]
    # Another selection keeps them, and one without time says so, taking no figure's place.
    command[command.index("-k") + 1] = "stages and not per_image and both and (cpp or naive-spread)"
    done = subprocess.run([*command, "--minutes", "0"], cwd=environment.ROOT, capture_output=True)
    assert done.returncode == 0
    now = json.loads(file.read_text())
    assert [row["peer"] for row in now["rows"]] == ["greenmim-cpp", "varlen", "naive-spread"]
    assert now["rows"][0]["ms"] == rows[0]["ms"] and "commit" in now["rows"][0]
    late = now["rows"][2]
    assert late["reason"] == "no time was left" and not late["checked"]
    assert "| naive-spread | 1 | no time was left |" in tables.reasons_table(now)
    assert tables.stages_table(now) and report.compare(now, now) == []


def test_tiny_sizes_are_written_where_they_are_asked_for_alone(monkeypatch, tmp_path):
    monkeypatch.setattr(conftest, "folder_of", lambda device: tmp_path)
    monkeypatch.setattr(conftest, "measure_rates", lambda *_: RATES)
    monkeypatch.setattr(conftest, "keep_freed_memory", lambda: None)
    for selection in ("tiny", "short"):
        options = SimpleNamespace(
            threads=None, minutes=1, rounds=1, selection=selection, out=None, anew=False
        )
        results = conftest.Results(SimpleNamespace(option=options))
        results.add(dict.fromkeys(conftest.ROW, "x"))
        assert (tmp_path / "operators.json").exists() == (selection == "short")


def test_swaps_that_are_not_measured_again_stay(tmp_path):
    file, where = tmp_path / "swap.json", {"device": "X", "commit": "1" * 40, "dirty": False}
    rows = [{"problem": name} for name in ("timm-swin-t-224", "monai-swinvit-64", "gone")]
    then = {"environment": where, "libraries": {"timm": "1", "monai": "1"}, "rows": rows}
    file.write_text(json.dumps(then))
    now = {"environment": {**where, "commit": "2" * 40}, "libraries": {"timm": "1", "monai": "2"}}
    (row,) = swap.kept_rows(file, now)  # of the versions that are there
    assert row == {"problem": "timm-swin-t-224", "commit": "1" * 40, "dirty": False}
    assert swap.kept_rows(tmp_path / "none.json", now) == []


def test_rows_without_a_commit_are_told(monkeypatch):
    found = result(commit=None)
    found["rows"][0]["commit"] = "1" * 40
    assert "Measured at 111111111: naive" not in tables.measured_at(found, found["rows"], str)
    found = result()
    found["rows"][0]["commit"] = None
    said = tables.measured_at(found, found["rows"], lambda row: row["peer"])
    assert said == "\nMeasured at an unknown commit: greenmim-cpp.\n"
    monkeypatch.setenv("PATH", "")
    assert environment.changed_since("1" * 40) is None  # no git


def test_steps_are_compared_too():
    row = {"model": "m", "variant": "v", "images_per_second": 10.0, "p20": 9.9, "p80": 10.1}
    slow = row | {"images_per_second": 5.0, "p20": 4.9, "p80": 5.1}
    assert report.compare({"rows": [row]}, {"rows": [slow]}) == ["m v: 2.00 times the time"]
    assert report.compare({"rows": [slow]}, {"rows": [row]}) == []
    gone = {"model": "m", "variant": "v", "reason": "it died"}
    assert report.compare({"rows": [row]}, {"rows": [gone]}) == ["m v: it died"]


@pytest.mark.parametrize(
    ("error", "said"),
    [(RuntimeError(), "RuntimeError"), (ValueError("\n no room\n here"), "ValueError: no room")],
)
def test_a_reason_is_one_line_also_of_an_error_without_words(error, said):
    assert environment.first_line(error) == said


def test_the_readme_s_table_of_results_that_are_not_whole(tmp_path):
    """A run that was ended, a variant that failed, a machine with other results alone."""
    where = {"device": "X", "commit": "1" * 40, "dirty": False}
    stage = {"study": "stages", "stage": 1, "shifted": False, "pass": "both", "case": "c"}
    step = {"model": "base-224", "batch": 4, "precision": "bf16"}
    files = {
        "a/operators.json": {
            "environment": where,
            "rows": [
                {**stage, "peer": "greenmim-cuda", "ms": 1.0},
                {**stage, "peer": "flex-16", "ms": 2.0},
            ],
        },
        "b/steps.json": {
            "environment": where,
            "rows": [
                {**step, "variant": "naive", "reason": "no time was left"},
                {**step, "variant": "cuda", "images_per_second": 3.0},
            ],
        },
        "c/swap.json": {"environment": where, "rows": []},
    }
    for name, content in files.items():
        (tmp_path / name).parent.mkdir()
        (tmp_path / name).write_text(json.dumps(content))
    assert report.summary_table(tmp_path).count("\n") == 2  # its head
    files["a/operators.json"]["rows"].append({**stage, "peer": "naive", "ms": 50.0})
    files["b/steps.json"]["rows"] = [
        {**step, "variant": name, "images_per_second": speed}
        for name, speed in (("naive", 2.0), ("cuda", 3.0), ("simmim", 1.0))
    ]
    for name, content in files.items():
        (tmp_path / name).write_text(json.dumps(content))
    table = report.summary_table(tmp_path)
    assert "| 50.00 ms | 2.00 ms (FlexAttention) | **1.00 ms** | 50x |" in table
    assert "training step, images/s | 2 | 1 (SimMIM) | **3** | 1.5x |" in table
    # Ratios to the faster naive path, and a word where there is one alone.
    assert table.count("¹") == 2 and "docs/benchmarks.md#in-plain-words" in table
    files["a/operators.json"]["rows"].append({**stage, "peer": "naive-spread", "ms": 12.0})
    rows = files["b/steps.json"]["rows"]
    rows[0]["joules_per_image"] = rows[1]["joules_per_image"] = rows[2]["joules_per_image"] = 4.0
    rows[1]["commit"] = "2" * 40
    more = {"images_per_second": 9.0, "joules_per_image": 1.0}
    rows += [{**step, **more, "variant": name} for name in ("triton-graphed", "cuda-compiled")]
    rows.append({**step, "variant": "naive, rows spread", "images_per_second": 2.5})
    for name, content in files.items():
        (tmp_path / name).write_text(json.dumps(content))
    table = report.summary_table(tmp_path)
    assert "| 12.00 ms | 2.00 ms (FlexAttention) | **1.00 ms** | 12x |" in table
    assert "¹" not in table
    assert "training step, images/s | 2.5 | 1 (SimMIM) | **3** | 1.2x |" in table
    # Energy is that of a way that the table has.
    assert "energy of an image |" not in table  # not known of the spread path
    rows[-1]["joules_per_image"] = 4.0
    (tmp_path / "b/steps.json").write_text(json.dumps(files["b/steps.json"]))
    table = report.summary_table(tmp_path)
    assert "energy of an image | 4.000 J | 4.000 J (SimMIM) | **4.000 J** | 1x less |" in table
    assert "X: the steps are of several commits" in table
    assert "cuda 222222222" in table and "simmim 111111111" in table

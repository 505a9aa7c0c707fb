"""The commands that run everything on a GPU: parts fail, end, wait and are left out each alone, and
one that is killed half-way leaves what it had."""

from __future__ import annotations

import dataclasses
import importlib
import json
import os
import pathlib
import signal
import subprocess
import sys
import tarfile
import textwrap
import time

import pytest

from benchmarks import gpu_check
from benchmarks.gpu_check import CALLS, Part
from greenmim_kernels import automatic

pytestmark = pytest.mark.slow
GOOD = Part("good", ("-c", "print('fine')"), 60)
BAD = Part("bad", ("-c", "print('why'); raise SystemExit(1)"), 60)
SLOW = Part("slow", ("-c", "import time; print('begun', flush=True); time.sleep(60)"), 2)
ANYWHERE = Part("anywhere", ("-c", "print('fine')"), 60, needs_gpu=False)
SKIPPING = Part("skipping", ("-c", "print('a'); print('no tool'); raise SystemExit(77)"), 60)


def states(table):
    return {name: row["state"] for name, row in table.items()}


def checked(*parts, minutes=5.0, has_gpu=True, save=lambda table: None, **more):
    return gpu_check.check(parts, minutes, has_gpu, save, **more)


def after(part: Part, *others: Part, **changes) -> Part:
    return dataclasses.replace(part, after=tuple(other.name for other in others), **changes)


def test_a_part_that_fails_does_not_keep_the_others_from_running():
    saved = []
    parts = (BAD, after(SLOW, BAD, seconds=3), after(GOOD, SLOW))
    parts = (dataclasses.replace(BAD, seconds=1), *parts[1:])
    table = checked(*parts, save=lambda table: saved.append(dict(states(table))))
    assert states(table) == {"bad": "failed", "slow": "ran out of time", "good": "passed"}
    assert table["bad"]["said"] == ["why"] and table["slow"]["said"][0] == "begun"
    # Each part's end is written at once.
    assert [list(s.values()).count("not reached") for s in saved] == [2, 1, 0]


def test_a_part_that_has_nothing_to_do_says_why():
    assert states(checked(SKIPPING)) == {"skipping": "skipped: no tool"}


def test_a_part_waits_for_those_before_it(tmp_path):
    file = str(tmp_path / "made")
    slow = Part("slow", ("-c", f"import time; time.sleep(2); open({file!r}, 'w')"), 30)
    reader = Part("reader", ("-c", f"open({file!r})"), 30)
    assert states(checked(slow, after(reader, slow)))["reader"] == "passed"


def test_parts_that_do_not_wait_for_each_other_run_at_the_same_time():
    sleep = ("-c", "import time; time.sleep(3)")
    parts = [Part(name, sleep, 30) for name in ("a", "b", "c")]
    last = after(dataclasses.replace(GOOD, name="last"), *parts)
    start = time.monotonic()
    table = checked(*parts, last)
    assert set(states(table).values()) == {"passed"}
    assert time.monotonic() - start < 8


def test_a_part_has_the_time_that_those_before_it_left():
    sleep = Part("sleep", ("-c", "import time; time.sleep(4)"), 2)
    table = checked(dataclasses.replace(GOOD, seconds=8), after(sleep, GOOD))
    assert states(table)["sleep"] == "passed"  # until the tenth second, not two


def test_without_a_gpu_only_what_needs_none_runs():
    table = checked(GOOD, ANYWHERE, has_gpu=False)
    assert states(table) == {"good": "not reached: needs a GPU", "anywhere": "passed"}


def test_what_does_not_fit_is_left_out_and_said():
    assert states(checked(GOOD, minutes=0.01)) == {"good": "not reached: no time left"}


def test_more_minutes_are_more_time_for_each_part():
    sleep = Part("sleep", ("-c", "import time; time.sleep(4)"), 2)
    assert states(checked(sleep, stretch=10.0)) == {"sleep": "passed"}


STUBBORN = """
import signal, subprocess, sys, time
child = subprocess.Popen([sys.executable, '-c', 'import signal, time\\n'
    'signal.signal(signal.SIGINT, signal.SIG_IGN)\\n'
    'time.sleep(600)'])
open({file!r}, 'w').write(str(child.pid))
signal.signal(signal.SIGINT, lambda *_: print('told', flush=True))
time.sleep(600)
time.sleep(600)
"""


def gone(pid: int) -> bool:
    for _ in range(100):  # until it is reaped
        try:
            os.kill(pid, 0)
        except ProcessLookupError:
            return True
        time.sleep(0.1)
    return False


def test_a_part_is_told_first_and_ends_with_all_that_it_started(tmp_path, monkeypatch):
    monkeypatch.setattr(gpu_check, "GRACE", 2.0)
    file = tmp_path / "child"
    code = STUBBORN.format(file=str(file))
    row = gpu_check.run_part(Part("slow", ("-c", code), 60), 3)
    assert row["state"] == "ran out of time" and row["said"] == ["told"]
    assert 5 <= row["seconds"] < 20
    assert gone(int(file.read_text()))


def test_of_tests_that_ran_out_of_time_it_is_known_what_failed_and_why(tmp_path):
    file = tmp_path / "test_slow.py"
    file.write_text(
        "import time\ndef test_a(): assert 1 == 2, 'planted'\ndef test_b(): time.sleep(60)\n"
    )
    part = Part("tests", (*gpu_check.PYTEST, "-p", "no:benchmark", str(file)), 60)
    before = signal.signal(signal.SIGINT, signal.default_int_handler)  # in the background: ignored
    try:
        row = gpu_check.run_part(part, 8)
    finally:
        signal.signal(signal.SIGINT, before)
    assert row["state"] == "ran out of time"
    assert "planted" in "\n".join(row["said"])
    assert any(name.endswith("::test_a") for name in row["failed"])


def test_ended_itself_it_ends_what_it_started(tmp_path):
    file = tmp_path / "pid"
    part = f"import os, time; open({str(file)!r}, 'w').write(str(os.getpid())); time.sleep(600)"
    code = textwrap.dedent(f"""
        import signal, sys
        from benchmarks import gpu_check
        from benchmarks.gpu_check import Part
        signal.signal(signal.SIGTERM, lambda *_: sys.exit(3))
        parts = (Part("a", ("-c", {part!r}), 60), Part("b", ("-c", "1"), 60, after=("a",)))
        gpu_check.check(parts, 5, True, lambda table: None)
    """)
    process = subprocess.Popen([sys.executable, "-c", code], cwd=gpu_check.ROOT)
    while not file.exists() or not file.read_text():
        time.sleep(0.1)
    process.send_signal(signal.SIGTERM)
    assert process.wait(30) == 3
    assert gone(int(file.read_text()))


def test_parts_by_name():
    parts, _ = CALLS["first"]
    assert gpu_check.chosen(parts, "") == parts
    names = [p.name for p in gpu_check.chosen(parts, "steps,stress-triton")]
    # With what they cannot do without, also through parts that are left out.
    assert names == ["partition", "build-cuda", "build-cpu", "stress-triton", "steps"]
    assert [p.name for p in gpu_check.chosen(parts, "warm")] == ["partition", "warm"]
    with pytest.raises(ValueError, match="GPU_CHECK_PARTS names speed; the parts are partition"):
        gpu_check.chosen(parts, "speed")


@pytest.mark.parametrize("call", CALLS)
def test_all_parts_fit_into_their_call(call):
    parts, minutes = CALLS[call]
    assert minutes == {"first": 5, "second": 8, "third": 8.5}[call]
    # Whatever failed: the parts that repeat it as well.
    failed = {part.name: {"state": "failed"} for part in CALLS["first"][0]}
    for some in (parts, gpu_check.parts_of(call, failed)):
        last = max(finish for _, finish in gpu_check.plan(some).values())
        assert last + gpu_check.START + gpu_check.GRACE <= 60 * minutes
        names = [part.name for part in some]
        for number, part in enumerate(some):
            assert set(part.after) <= set(names[:number])


@pytest.mark.parametrize("call", CALLS)
def test_what_measures_runs_alone(call):
    failed = {part.name: {"state": "failed"} for part in CALLS["first"][0]}
    parts = gpu_check.parts_of(call, failed)
    before: dict[str, set[str]] = {}  # a part: all that it waits for, also through others
    for part in parts:
        before[part.name] = set(part.after).union(*(before[name] for name in part.after))
    others = set(before) - {part.name for part in gpu_check.BUILDS}  # those need no GPU
    measuring = {"operators", "steps", "steps-512", "steps-encoders", "tune", "choose", "counters",
                 "swap"}  # fmt: skip
    for name in measuring & others:
        for other in others - {name}:
            assert other in before[name] or name in before[other], (name, other)


def test_the_second_call_repeats_what_failed_in_the_first():
    earlier = {
        "build-cuda": {"state": "failed"},  # is built again anyway
        "warm": {"state": "passed"},
        "stress-triton": {"state": "failed: ran out of time"},
        "tests-cuda": {"state": "failed", "failed": ["tests/a.py::test_b[c]"]},
    }
    parts = {part.name: part for part in gpu_check.parts_of("second", earlier)}
    repeated = [name for name in parts if name.endswith("-again")]
    assert repeated == ["stress-triton-again", "tests-cuda-again"]
    first = {part.name: part for part in CALLS["first"][0]}
    assert parts["stress-triton-again"].arguments == first["stress-triton"].arguments
    assert parts["tests-cuda-again"].arguments[-1] == "tests/a.py::test_b[c]"
    # What needs no build runs beside it, before anything is measured.
    assert parts["stress-triton-again"].after == ("partition",)
    assert "stress-triton-again" in parts["tune"].after
    assert "tests-cuda-again" in parts["choose"].after
    late = {"state": gpu_check.OUT_OF_TIME, "failed": ["a.py::test_a"], "passed": ["a.py::test_b"]}
    (again,) = gpu_check.again({"tests-cuda": late})
    # What failed and what was not reached: all but what passed.
    assert again.arguments == (*first["tests-cuda"].arguments, "--deselect=a.py::test_b")
    earlier = {"tests-triton": {"state": "failed: ran out of time", "passed": ["a.py::test_b"]}}
    (again,) = gpu_check.again(earlier)
    assert again.arguments == (*first["tests-triton"].arguments, "--deselect=a.py::test_b")
    measured = {name: {"state": "failed"} for name in ("operators", "steps", "warm")}
    assert gpu_check.again(measured) == ()  # it would overwrite what was measured
    assert gpu_check.parts_of("second", {}) == CALLS["second"][0]


def test_the_tests_that_failed_are_known_by_name(tmp_path):
    file = tmp_path / "test_some.py"
    file.write_text("import pytest\n@pytest.mark.parametrize('x', [1, 2])\n"
                    "def test_x(x):\n    assert x == 1\ndef test_y(missing): pass\n")  # fmt: skip
    row = gpu_check.run_part(Part("tests", (*gpu_check.PYTEST, str(file)), 60), 60)
    assert row["state"] == "failed"
    assert [name.split("::")[1] for name in row["failed"]] == ["test_x[2]", "test_y"]
    assert [name.split("::")[1] for name in row["passed"]] == ["test_x[1]"]


def test_results_come_in_two_files_and_unpack_in_the_root(tmp_path, monkeypatch):
    results = tmp_path / "root" / "benchmarks" / "results"
    folder, out = results / "a-gpu", tmp_path / "out"
    folder.mkdir(parents=True)
    monkeypatch.setattr(gpu_check, "ROOT", tmp_path / "root")
    monkeypatch.setattr(gpu_check, "RESULTS", results)
    for name in (*gpu_check.WRITTEN, *(f"benchmarks/results/a-gpu/{n}.json" for n in range(20))):
        (tmp_path / "root" / name).parent.mkdir(parents=True, exist_ok=True)
        (tmp_path / "root" / name).write_text("{}")
    calls = {"first": {"parts": {"warm": {"state": "failed"}}}}
    (folder / "gpu_check.json").write_text(json.dumps({"calls": calls}))
    for _ in range(2):
        gpu_check.pack(folder, out)
    assert sorted(file.name for file in out.iterdir()) == ["gpu_check.json", "results.tar.gz"]
    with tarfile.open(out / "results.tar.gz") as archive:
        names = archive.getnames()
    assert set(gpu_check.WRITTEN) < set(names) and len(names) == 23
    # A second call finds what failed, its own device's, else another's; it is not its own then.
    assert gpu_check.calls_so_far(folder) == calls
    for name in ("a-gpu", "another"):
        assert gpu_check.first_parts(results / name) == calls["first"]["parts"]
    assert gpu_check.calls_so_far(results / "another") == {}


@pytest.mark.parametrize(
    ("cuda", "driver", "said"),
    [
        (None, None, "was built without CUDA"),
        ("13.0", None, "no NVIDIA driver was found"),
        ("13.0", "470.1", "(CUDA 13.0) finds no GPU with driver 470.1"),
    ],
)
def test_without_a_gpu_it_says_why_and_builds_nothing(cuda, driver, said, monkeypatch, capsys):
    monkeypatch.setattr(gpu_check.torch.cuda, "is_available", lambda: False)
    monkeypatch.setattr(gpu_check.torch.version, "cuda", cuda)
    monkeypatch.setattr(gpu_check, "driver", lambda: driver)
    monkeypatch.setattr(gpu_check, "check", lambda *_, **__: pytest.fail("it began"))
    assert gpu_check.main(["first"]) == 2
    error = capsys.readouterr().err
    assert said in error and error.count("\n") == 1


def test_a_call_on_another_gpu_saves_its_own_parts_alone(tmp_path, monkeypatch, capsys):
    """And one whose time ran out says how to have more."""
    parts = {"stress-triton": {"state": "failed"}}
    other = tmp_path / "other" / "gpu_check.json"
    other.parent.mkdir()
    other.write_text(json.dumps({"calls": {"first": {"parts": parts}}}))
    monkeypatch.setattr(gpu_check, "RESULTS", tmp_path)
    monkeypatch.setattr(gpu_check, "folder_of", lambda device: tmp_path / "own")
    monkeypatch.setattr(gpu_check, "describe", lambda *_: {"device": "own"})
    monkeypatch.setattr(gpu_check, "why_no_gpu", lambda: None)
    for name, value in (
        ("is_available", True), ("get_device_name", "own"), ("get_device_capability", (9, 0))
    ):  # fmt: skip
        monkeypatch.setattr(gpu_check.torch.cuda, name, lambda value=value: value)
    monkeypatch.setattr(gpu_check.signal, "signal", lambda *_: None)
    monkeypatch.delenv("OUT", raising=False)

    def check(parts, minutes, has_gpu, save, stretch, **variables):
        table = {part.name: {"state": gpu_check.OUT_OF_TIME} for part in parts}
        assert "stress-triton-again" in table  # it failed elsewhere
        save(table)
        return table

    monkeypatch.setattr(gpu_check, "check", check)
    assert gpu_check.main(["second"]) == 1
    assert list(gpu_check.calls_so_far(tmp_path / "own")) == ["second"]
    said = capsys.readouterr().out
    assert "GPU_CHECK_MINUTES=16" in said and "failed" not in said


@pytest.mark.parametrize("call", CALLS)
def test_a_dry_run_says_what_would_run(call):
    done = subprocess.run(
        [sys.executable, "-m", "benchmarks.gpu_check", call, "--dry-run"],
        cwd=gpu_check.ROOT, capture_output=True, text=True,
    )  # fmt: skip
    assert done.returncode == 0, done.stderr
    names = [line.split()[0] for line in done.stdout.splitlines()]
    # A committed result of some device may have parts that failed.
    assert [name for name in names if not name.endswith("-again")] == [
        part.name for part in CALLS[call][0]
    ]


def test_before_anything_is_built_it_starts():
    """On a machine where nothing is, the first thing that it does is to build."""
    code = textwrap.dedent("""
        import sys
        class Unbuilt:
            def find_spec(self, name, *_):
                if name == "greenmim_kernels._planner":
                    raise ImportError(f"{name} is not built")
        sys.meta_path.insert(0, Unbuilt())
        from benchmarks import gpu_check
        raise SystemExit(gpu_check.main(["first", "--dry-run"]))
    """)
    done = subprocess.run(
        [sys.executable, "-c", code], cwd=gpu_check.ROOT, capture_output=True, text=True
    )
    assert done.returncode == 0 and "build-cuda" in done.stdout, done.stderr


def test_a_table_that_cannot_be_saved_ends_nothing(capsys):
    def full(table):
        raise OSError("no space left on the device")

    assert states(checked(GOOD, save=full)) == {"good": "passed"}
    assert "the table was not saved: OSError: no space left" in capsys.readouterr().out


MODULES = {
    part.arguments: part
    for parts, _ in CALLS.values()
    for part in parts
    if part.arguments[0] == "-m" and part.arguments[1] != "pytest"
}
SUITES = {
    part.arguments for parts, _ in CALLS.values() for part in parts if part.arguments[1] == "pytest"
}


@pytest.mark.parametrize("part", MODULES.values(), ids=lambda part: part.name)
def test_the_command_lines_of_the_parts_are_understood(part, capsys):
    _, module, *arguments = (text.format(seconds=9, minutes=0.5) for text in part.arguments)
    assert importlib.import_module(module).main([*arguments, "--dry-run"]) == 0
    assert capsys.readouterr().out


# Each part's tests in a fork of one process that has imported what they need.
COLLECT_EACH = """
import gc, json, os, sys
for name in ("jsonargparse", "submitit"):  # as on a machine with what the kernels need alone
    sys.modules[name] = None
import hypothesis, pytest, timm, torch
gc.freeze()  # what is imported is not looked through for garbage, which would copy it
parts = json.loads(sys.argv[1])
for arguments in parts:
    if os.fork() == 0:
        os._exit(pytest.main([*arguments[2:], "--collect-only", "-q"]))
    _, status = os.wait()
    if status:
        raise SystemExit(f"{arguments}: {os.waitstatus_to_exitcode(status)}")
"""


def test_the_tests_of_the_parts_are_found():
    assert len(SUITES) >= 6
    parts = json.dumps(list(SUITES)).replace("{minutes}", "1")
    command = [sys.executable, "-c", COLLECT_EACH, parts]
    done = subprocess.run(command, cwd=gpu_check.ROOT, capture_output=True, text=True)
    assert done.returncode == 0, done.stdout[-1500:] + done.stderr  # 5 where there are none


# --- a part that is killed half-way ---------------------------------------------------------------

# What a part does on a GPU, on small problems of a CPU: backends by the names of others, a clock
# that takes a second.
AS_ON_A_GPU = """
import dataclasses, pathlib, shutil, sys, time
import torch
from benchmarks import choose, environment, measure, steps, tune
from greenmim_kernels import automatic, testing
from greenmim_kernels._triton import launch
folder = pathlib.Path({folder!r})
small = testing.make_inputs(testing.Case(image_size=(64, 64), batch=1, num_heads=1, head_dim=16))
def folder_of(device):
    return folder
def clock(call, rounds=0):
    call()
    time.sleep(1)
    return measure.Timing.of([1e-3])
for module in (choose, tune, steps):
    module.folder_of = folder_of
for module in (choose, tune):
    module.measure_graph, module.DEVICE = clock, "cpu"
    module.problem_of = lambda *_: small
automatic.table()  # what is shipped
shutil.copy(launch.TABLE, folder)
automatic.TABLE, launch.TABLE = folder / "automatic_table.json", folder / "launch_table.json"
"""
CHOOSE = """
import contextlib
choose.gk.available_backends = dict
real = choose.gk.use_backend
named = {"cuda": "cpp", "triton": "reference"}
choose.gk.use_backend = lambda name: real(named.get(name, name))
choose.ROUNDS = 1
raise SystemExit(choose.main([]))
"""
TUNE = """
tune.reference_of = lambda name, inputs: (inputs.qkv,)
tune.runner = lambda name, inputs: lambda: [inputs.qkv]
tune.candidates = lambda name: [dataclasses.replace(tune.table()[name], stages=7)]
tune.resident = lambda *_: 5
raise SystemExit(tune.main(["--only=-32-16bit"]))
"""
STEPS = """
def rows(chosen, device, rounds, rates, save, until, at_once):
    for problem, variant in chosen:
        time.sleep(1)
        save({"model": problem.name, "batch": 1, "precision": "bf16", "variant": variant.name,
              "reason": "a trial"})
steps.measured_rows = rows
steps.measure_rates = lambda *_: measure.Rates(1.0, {})
raise SystemExit(steps.main([]))
"""


def killed_half_way(tmp_path: pathlib.Path, arguments: tuple[str, ...], file: str, done) -> dict:
    """The content of a file once a part was ended when `done(content)` was first true."""
    process = subprocess.Popen(
        [sys.executable, *arguments], cwd=gpu_check.ROOT, stdout=subprocess.PIPE, text=True,
        stderr=subprocess.STDOUT, start_new_session=True,
    )  # fmt: skip
    try:
        while process.poll() is None:
            if (tmp_path / file).exists() and done(json.loads((tmp_path / file).read_text())):
                break
            time.sleep(0.05)
        assert process.poll() is None, process.communicate()[0]
    finally:
        gpu_check._signal(process, signal.SIGTERM)
    assert process.wait(10) == -signal.SIGTERM
    process.stdout.close()
    return json.loads((tmp_path / file).read_text())


def on_a_gpu(tmp_path: pathlib.Path, code: str) -> tuple[str, str]:
    return "-c", AS_ON_A_GPU.format(folder=str(tmp_path)) + code


def test_no_class_is_begun_when_the_time_is_over(tmp_path):
    arguments = on_a_gpu(tmp_path, CHOOSE.replace("main([])", "main(['--minutes', '0'])"))
    row = gpu_check.run_part(Part("choose", arguments, 60), 60)
    assert row["state"] == "passed" and row["said"][0].endswith("not reached")


def test_choose_keeps_the_classes_done(tmp_path):
    arguments = on_a_gpu(tmp_path, CHOOSE)
    found = killed_half_way(tmp_path, arguments, "choose.json", lambda c: len(c["classes"]) == 2)
    names = ["attention-short-32-16bit", "attention-long-32-16bit"]  # Swin's first
    assert list(found["classes"]) == names
    table = json.loads((tmp_path / "automatic_table.json").read_text())
    shipped = automatic.table()
    assert table["device"] != shipped["device"] and set(shipped["classes"]) <= set(table["classes"])
    for name, row in table["classes"].items():
        assert row["backend"] in ("cuda", "triton")
        if row["cuda_ms"] != 1.0:  # not measured here: as it was, and it says where
            assert row == {**shipped["classes"][name], "device": shipped["device"]}
    here = {name for name, row in table["classes"].items() if row["cuda_ms"] == 1.0}
    assert here and here <= set(names)


def test_tune_keeps_the_classes_done_and_a_whole_table(tmp_path):
    pytest.importorskip("triton")
    from greenmim_kernels._triton import launch

    arguments = on_a_gpu(tmp_path, TUNE)
    found = killed_half_way(tmp_path, arguments, "tune.json", lambda c: len(c["classes"]) == 3)
    assert list(found["classes"])[:2] == ["bwd-64-32-16bit", "fwd-64-32-16bit"]
    table = json.loads((tmp_path / "launch_table.json").read_text())
    shipped = json.loads(launch.TABLE.read_text())
    assert set(shipped) <= set(table)
    # Older devices keep the launches that they had.
    for name in set(table) - set(shipped):
        assert table[name] == shipped[name.removesuffix("@80")]
    tuned = {name for name, row in table.items() if row["stages"] == 7 and row["resident"] == 5}
    assert set(found["classes"]) <= tuned


def test_tune_takes_another_launch_for_a_gain_alone():
    """Also where a GPU holds another number of programs than the one that was tuned before."""
    pytest.importorskip("triton")
    from benchmarks import tune
    from greenmim_kernels._triton import launch

    shipped = launch.Launch(warps=4, stages=2, block=64, resident=3)
    other = {"warps": 8, "stages": 2, "block": 64, "resident": 1, "ms": 0.999}
    same = {"warps": 4, "stages": 2, "block": 64, "resident": 2, "ms": 1.0}
    refused = {"warps": 4, "stages": 2, "block": 64, "resident": 3, "refused": "no"}
    assert tune.best_of([other, same], shipped) == (same, "as shipped")
    assert tune.best_of([{**other, "ms": 0.9}, same], shipped)[0]["warps"] == 8
    assert tune.best_of([other, refused], shipped) == (other, "")
    assert tune.best_of([{"refused": "no"}], shipped) == ({"refused": "no"}, "")


def test_steps_keep_the_variants_done(tmp_path):
    arguments = on_a_gpu(tmp_path, STEPS)
    found = killed_half_way(tmp_path, arguments, "steps.json", lambda c: len(c["rows"]) == 2)
    assert [row["variant"] for row in found["rows"]] == ["naive", "naive, memory kept"]


def test_the_table_keeps_the_rows_done(tmp_path):
    arguments = (*gpu_check.PYTEST, "benchmarks", "--selection", "tiny", "--rounds", "5")
    arguments += ("--out", str(tmp_path / "operators.json"))
    found = killed_half_way(tmp_path, arguments, "operators.json", lambda c: len(c["rows"]) > 1)
    assert all("ms" in row or "reason" in row for row in found["rows"])


def test_stress_keeps_what_it_found(tmp_path):
    arguments = ("-m", "tests.kernels.stress", "--backend", "cpp", "--device", "cpu", "--small",
                 "--processes", "1", "--seconds", "600", "--repeats", "3",
                 "--out", str(tmp_path / "stress.json"))  # fmt: skip
    found = killed_half_way(tmp_path, arguments, "stress.json", lambda c: bool(c["rows"]))
    assert [row["passed"] for row in found["rows"]] == [True]


# --- what the hardware counts ---------------------------------------------------------------------

NCU = """#!/bin/sh
for last; do case $previous in --log-file) file=$last;; esac; previous=$last; done
{body}
"""
STALL = "smsp__average_warps_issue_stalled_wait_per_issue_active.ratio"
CSV = f"""==PROF== Connected to process 1
"ID","Kernel Name","gpu__time_duration.sum","{STALL}"
"","","ns","inst"
"0","attention_forward_kernel","40,500","1.65"
"1","group_attention_bwd_kernel","80,100","0.00"
"""


@pytest.fixture
def ncu(tmp_path, monkeypatch):
    """Put an ncu on PATH that does `body`."""
    from benchmarks import counters

    monkeypatch.setattr(counters, "folder_of", lambda device: tmp_path)

    def put(body: str) -> int:
        file = tmp_path / "bin" / "ncu"
        file.parent.mkdir(exist_ok=True)
        file.write_text(NCU.format(body=body))
        file.chmod(0o755)
        monkeypatch.setenv("PATH", f"{file.parent}:{os.environ['PATH']}")
        return counters.main([])

    return put


def test_counters_are_kept_by_kernel(ncu, tmp_path):
    assert ncu(f"cat > $file <<'END'\n{CSV}END") == 0
    kernels = json.loads((tmp_path / "counters.json").read_text())["kernels"]
    assert (
        kernels
        == [
            {"kernel": "attention_forward_kernel", "nanoseconds": 40500, "stalls": {"wait": 1.65}},
            {"kernel": "group_attention_bwd_kernel", "nanoseconds": 80100, "stalls": {}},
        ]
        * 2
    )  # of both backends


def test_counters_keep_the_backends_done(tmp_path):
    ncu = tmp_path / "bin" / "ncu"
    ncu.parent.mkdir()
    body = f"case $last in cuda) cat > $file <<'END'\n{CSV}END\n;; *) sleep 600;; esac"
    ncu.write_text(NCU.format(body=body))
    ncu.chmod(0o755)
    code = f"""
import os, pathlib
from benchmarks import counters
counters.folder_of = lambda device: pathlib.Path({str(tmp_path)!r})
os.environ["PATH"] = {str(ncu.parent)!r} + ":" + os.environ["PATH"]
raise SystemExit(counters.main([]))
"""
    found = killed_half_way(tmp_path, ("-c", code), "counters.json", lambda c: bool(c["kernels"]))
    assert len(found["kernels"]) == 2


def test_counters_that_may_not_be_read_are_said(ncu, capsys, tmp_path):
    refused = "==ERROR== ERR_NVGPUCTRPERM - no permission"
    assert ncu(f"echo '{refused}'; exit 1") == gpu_check.SKIPPED_CODE
    assert capsys.readouterr().out.splitlines()[-1] == f"ncu may not count here: {refused}"
    assert ncu("echo 'something else'; exit 1") == 1
    assert not (tmp_path / "counters.json").exists()


def test_no_ncu_is_said(monkeypatch, capsys):
    from benchmarks import counters

    monkeypatch.setattr(counters.shutil, "which", lambda *_, **__: None)
    assert counters.main([]) == gpu_check.SKIPPED_CODE == counters.SKIPPED
    assert "there is no ncu" in capsys.readouterr().out

"""Fused attention on the CPU against the naive grouped path: time and extra memory.

    python -m benchmarks.cpu_attention [--threads 2] [--batch 8] [--rounds 15] [--no-save]

One layer of Swin-B (window 7, three quarters of the units hidden) at each stage, fp32, forward +
backward. Both are checked against the fp64 reference first, then timed in the same process: each by
itself, round after round, and once more taking turns, where each finds the caches full of the
other's arrays. Extra memory is the peak minus inputs, outputs and gradients of the inputs; it is
measured twice: from PyTorch's record of tensor allocations, and from the peak of the process's
resident memory, which also sees the kernels' own scratch space.
"""

from __future__ import annotations

import argparse
import gc
import os
import pathlib
import statistics
import subprocess
import sys
import time

# The profiler's own messages would drown the table; it reads this when torch is imported.
os.environ.setdefault("KINETO_LOG_LEVEL", "99")

import torch

import greenmim_kernels as gk
from greenmim_kernels.host_memory import keep_freed_memory
from greenmim_kernels.testing import Case, Inputs, assert_within_budget, make_inputs, run

from .environment import describe, folder_of, write_json
from .naive import NaiveGroupAttention

# Group size 49, as the published method packs at stages 1 and 2.
STAGES = [
    Case(stage=1, num_heads=4, group_size=49),
    Case(stage=1, num_heads=4, group_size=49, shifted=True),
    Case(stage=2, num_heads=8, group_size=49),
    Case(stage=3, num_heads=16, group_size=49),
    Case(stage=4, num_heads=32, group_size=49),
]


def make(case: Case, batch: int) -> tuple[Inputs, dict]:
    case = Case(**{**case.__dict__, "batch": batch})
    inputs = make_inputs(case)
    return inputs, {"fused": gk.group_window_attention, "naive": NaiveGroupAttention(inputs.part)}


def check(inputs: Inputs, peers: dict) -> None:
    """No timing of a wrong result."""
    with gk.use_backend("reference"):
        plain, exact = run(inputs), run(inputs.to(torch.float64))
    for attention in peers.values():
        assert_within_budget(run(inputs, attention), plain, exact)


def time_in_turn(inputs: Inputs, peers: dict, rounds: int) -> dict[str, dict]:
    """Milliseconds of forward and backward; the peers take turns within every round."""
    seconds: dict[str, list[tuple[float, float]]] = {name: [] for name in peers}
    qkv, table = (t.detach().requires_grad_() for t in (inputs.qkv, inputs.table))
    for _ in range(rounds + 3):
        for name, attention in peers.items():
            start = time.perf_counter()
            out = attention(qkv, table, inputs.part, inputs.num_heads)
            middle = time.perf_counter()
            torch.autograd.grad(out, (qkv, table), inputs.grad_out)
            end = time.perf_counter()
            seconds[name].append((middle - start, end - middle))
            del out
    rows = {}
    for name, pairs in seconds.items():
        forward, backward = zip(*pairs[3:], strict=True)
        total = sorted(f + b for f, b in pairs[3:])
        rows[name] = {
            "forward_ms": 1e3 * statistics.median(forward),
            "backward_ms": 1e3 * statistics.median(backward),
            "total_ms": 1e3 * statistics.median(total),
            "total_ms_p20": 1e3 * total[len(total) // 5],
            "total_ms_p80": 1e3 * total[len(total) * 4 // 5],
        }
    return rows


def results_bytes(inputs: Inputs) -> int:
    """Output and input gradients: what any implementation must allocate."""
    return sum(t.numel() * t.element_size() for t in (inputs.grad_out, inputs.qkv, inputs.table))


def extra_tensor_bytes(inputs: Inputs, attention) -> int:
    """Peak of allocated tensor memory during one run, beyond results, from the profiler."""
    run(inputs, attention)
    gc.collect()
    with torch.profiler.profile(profile_memory=True) as profile:
        run(inputs, attention)
    held = peak = 0
    events = profile.profiler.kineto_results.events()
    for event in sorted(events, key=lambda e: e.start_ns()):
        if event.name() == "[memory]":
            held += event.nbytes()
            peak = max(peak, held)
    return peak - results_bytes(inputs)


def extra_resident_bytes(inputs: Inputs, attention) -> int:
    """Peak of the process's resident memory during one run, beyond results (Linux).

    To be called in a process where malloc returns memory to the system (see `resident_row`).
    """
    run(inputs, attention)
    gc.collect()

    def status(field: str) -> int:
        for line in pathlib.Path("/proc/self/status").read_text().splitlines():
            if line.startswith(field + ":"):
                return int(line.split()[1]) * 1024
        raise RuntimeError(f"/proc/self/status has no {field}")

    pathlib.Path("/proc/self/clear_refs").write_text("5")  # sets the peak back to now
    before = status("VmRSS")
    results = run(inputs, attention)
    peak = status("VmHWM")
    del results
    return peak - before - results_bytes(inputs)


def resident_row(stage: int, name: str, batch: int, threads: int) -> int:
    """extra_resident_bytes in a fresh process, whose freed memory goes back at once."""
    environment = {**os.environ, "MALLOC_MMAP_THRESHOLD_": "65536", "MALLOC_TRIM_THRESHOLD_": "0"}
    command = [sys.executable, "-m", "benchmarks.cpu_attention", "--resident", str(stage), name,
               "--batch", str(batch), "--threads", str(threads)]  # fmt: skip
    done = subprocess.run(command, env=environment, capture_output=True, text=True, check=True)
    return int(done.stdout)


def main(argv: list[str] | None = None) -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--threads", type=int, default=2)
    parser.add_argument("--batch", type=int, default=8)
    parser.add_argument("--rounds", type=int, default=15)
    parser.add_argument("--no-save", action="store_true", help="print only")
    parser.add_argument("--resident", nargs=2, metavar=("CASE", "PEER"), help=argparse.SUPPRESS)
    options = parser.parse_args(argv)
    torch.set_num_threads(options.threads)
    if options.resident:
        inputs, peers = make(STAGES[int(options.resident[0])], options.batch)
        print(extra_resident_bytes(inputs, peers[options.resident[1]]))
        return

    keep_freed_memory()
    result = {"environment": describe(options.threads), "rows": []}
    print(
        f"{'case':<58}{'naive ms':>10}{'fused ms':>10}{'faster':>9}{'in turn':>9}"
        f"{'memory':>9}{'RSS':>8}"
    )
    for number, case in enumerate(STAGES):
        inputs, peers = make(case, options.batch)
        check(inputs, peers)
        timing = {}
        for name, attention in peers.items():
            timing |= time_in_turn(inputs, {name: attention}, options.rounds)
        in_turn = time_in_turn(inputs, peers, options.rounds)
        for name, attention in peers.items():
            timing[name]["extra_tensor_bytes"] = extra_tensor_bytes(inputs, attention)
            timing[name]["extra_resident_bytes"] = resident_row(
                number, name, options.batch, options.threads
            )
        naive, fused = timing["naive"], timing["fused"]
        row = {
            "case": str(Case(**{**case.__dict__, "batch": options.batch})),
            "num_groups": inputs.part.num_groups,
            "group_size": inputs.part.group_size,
            "peers": timing,
            "in_turn": in_turn,
            "speedup": naive["total_ms"] / fused["total_ms"],
            "speedup_in_turn": in_turn["naive"]["total_ms"] / in_turn["fused"]["total_ms"],
            "memory_share": fused["extra_tensor_bytes"] / naive["extra_tensor_bytes"],
            "resident_share": fused["extra_resident_bytes"] / naive["extra_resident_bytes"],
        }
        result["rows"].append(row)
        print(
            f"{row['case']:<58}{naive['total_ms']:>10.2f}{fused['total_ms']:>10.2f}"
            f"{row['speedup']:>8.1f}x{row['speedup_in_turn']:>8.1f}x"
            f"{row['memory_share']:>9.1%}{row['resident_share']:>8.1%}",
            flush=True,
        )
    if not options.no_save:
        file = folder_of(result["environment"]["device"]) / "cpu_attention.json"
        write_json(file, result)
        print(f"written to {file}")


if __name__ == "__main__":
    main()

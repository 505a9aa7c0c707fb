"""Where the time of a training step goes on a CPU: the naive path's beside ours.

    python -m benchmarks.step_profile [--threads 2]

Time of each operator without those it calls, from PyTorch's profiler, summed by kind; the median of
some steps, taken in turn. The profiler itself takes some time, so the sums are more than
`benchmarks.steps` gives. All keep the memory that they free (`greenmim_kernels.host_memory`), which
the naive path alone would not.
"""

from __future__ import annotations

import argparse
import os
import statistics
import sys

os.environ.setdefault("KINETO_LOG_LEVEL", "99")  # read when torch is imported

import torch

from greenmim_kernels.host_memory import keep_freed_memory

from .environment import describe, folder_of, write_json
from .step_variants import CPU_PROBLEMS, Step, variants

ROUNDS = 15
KINDS = {
    "products": ("aten::mm", "aten::addmm", "mkldnn::_linear_pointwise", "convolution"),
    "attention": ("group_window_attention", "aten::bmm", "softmax", "masked_fill", "aten::index",
                  "index_put", "aten::cat", "scaled_dot_product"),
    # An MLP's operator has the transposed copy of a gradient in the pass of GELU.
    "GELU": ("gelu", "greenmim::onednn_mlp"),
    "norms": ("layer_norm", "var_mean"),
    "optimiser": ("_fused_adamw", "Optimizer.", "linalg_vector_norm"),
    "copies and sums": ("aten::copy_", "aten::add", "aten::sum", "aten::mul", "aten::fill_",
                        "aten::mse_loss", "aten::sub", "aten::div", "aten::pow",
                        "greenmim::onednn_linear"),
}  # fmt: skip
REST = "everything else"


def kind_of(name: str) -> str:
    """The kind of an operator."""
    for kind, parts in KINDS.items():
        if any(part in name for part in parts):
            return kind
    return REST


def profile(step: Step) -> dict[str, float]:
    """Milliseconds of each kind in one step."""
    sums = dict.fromkeys((*KINDS, REST), 0.0)
    with torch.profiler.profile() as profiler:
        step()
    for event in profiler.key_averages():
        sums[kind_of(event.key)] += event.self_cpu_time_total / 1e3
    del profiler, event
    # What the profiler has noted lies where a step's tensors were: take their memory anew.
    step()
    return sums


def in_turn(steps: dict[str, Step], rounds: int = ROUNDS) -> dict[str, dict[str, float]]:
    """Of each step and kind the median; they take turns, as other work comes and goes."""
    taken: dict[str, list[dict[str, float]]] = {name: [] for name in steps}
    for _ in range(rounds):
        for name, step in steps.items():
            step()
            taken[name].append(profile(step))
    return {
        name: {kind: statistics.median(sums[kind] for sums in found) for kind in (*KINDS, REST)}
        for name, found in taken.items()
    }


def main(argv: list[str] | None = None) -> int:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--threads", type=int, default=torch.get_num_threads())
    parser.add_argument("--no-save", action="store_true", help="print only")
    options = parser.parse_args(argv)
    torch.set_num_threads(options.threads)
    keep_freed_memory()
    problem = CPU_PROBLEMS[0]
    result = {"environment": describe(options.threads), "problem": problem.name,
              "batch": problem.batch, "precision": problem.precision}  # fmt: skip
    chosen = [v for v in variants("cpu") if v.keeps_memory and not v.compiled]
    result["steps"] = in_turn({v.name: Step(problem, v, "cpu") for v in chosen})
    for kind in (*KINDS, REST):
        row = "".join(f"{step[kind]:>10.1f}" for step in result["steps"].values())
        print(f"{kind:<20}{row} ms")
    if not options.no_save:
        write_json(folder_of(result["environment"]["device"]) / "step_profile.json", result)
    return 0


if __name__ == "__main__":
    sys.exit(main())

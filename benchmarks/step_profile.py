"""Where the time of a training step goes: the naive path's beside ours.

    python -m benchmarks.step_profile [--threads 2]
    python -m benchmarks.step_profile --variant "cuda-graphed, not compiled"    # on a GPU

On a CPU, time of each operator without those it calls, from PyTorch's profiler, summed by kind; the
median of some steps, taken in turn. The profiler itself takes some time, so the sums are more than
`benchmarks.steps` gives. All keep the memory that they free (`greenmim_kernels.host_memory`), which
the naive path alone would not.

On a GPU, time of each kernel, summed by kind and by name; what a step takes beyond their sum is
between kernels, or waits for the host.
"""

from __future__ import annotations

import argparse
import itertools
import os
import statistics
import sys

os.environ.setdefault("KINETO_LOG_LEVEL", "99")  # read when torch is imported

import torch

from greenmim_kernels.host_memory import keep_freed_memory

from .environment import describe, earlier, folder_of, write_json
from .measure import measure
from .step_variants import CPU_PROBLEMS, CUDA_PROBLEMS, Step, variants

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
GPU_STEPS = 5
LONGEST = 40  # kernels that are listed
# Of kernels' names; "pointwise" is the compiler's, with norms and sums of columns among it.
GPU_KINDS = {
    "pointwise, compiled": ("triton_",),
    # Before products: FlashAttention's kernels name cutlass, too.
    "attention": ("flash", "fmha", "sdpa", "attention", "table_gradient", "softmax", "add_rows"),
    "products": ("gemm", "cutlass", "nvjet", "xmma", "cublas", "splitK", "convolve"),
    "norms": ("layer_norm", "LayerNorm", "GammaBeta"),
    "GELU": ("gelu", "Gelu"),
    "optimiser": ("multi_tensor", "fused_adam", "FusedAdam", "foreach", "lpnorm", "norm_kernel"),
    "copies and sums": ("copy", "elementwise", "cat", "Cat", "fill", "reduce", "mem", "Mem",
                        "index", "scatter", "gather"),
}  # fmt: skip


def kind_of(name: str, kinds: dict[str, tuple[str, ...]] = KINDS) -> str:
    """The kind of an operator, or of a kernel: the first that its name fits."""
    for kind, parts in kinds.items():
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


def kernels_of(step: Step) -> dict:
    """Milliseconds of a step on a GPU: as a whole, by kind of kernel and by kernel."""
    taken = measure(step, "cuda", rounds=10)
    activities = [torch.profiler.ProfilerActivity.CUDA]
    with torch.profiler.profile(activities=activities) as profiler:
        for _ in range(GPU_STEPS):
            step()
        torch.cuda.synchronize()
    kernels: dict[str, dict] = {}
    for event in profiler.key_averages():
        if event.self_device_time_total > 0:
            milliseconds = event.self_device_time_total / 1e3 / GPU_STEPS
            kernels[event.key] = {"ms": milliseconds, "calls": event.count / GPU_STEPS}
    return {
        "step_ms": 1e3 * taken.median,
        "kernels_ms": sum(one["ms"] for one in kernels.values()),
        "launches": sum(one["calls"] for one in kernels.values()),
        "kinds": by_kind(kernels),
        "longest": dict(
            itertools.islice(sorted(kernels.items(), key=lambda item: -item[1]["ms"]), LONGEST)
        ),
    }


def by_kind(kernels: dict[str, dict]) -> dict[str, float]:
    """Milliseconds of each kind of kernel."""
    sums = dict.fromkeys((*GPU_KINDS, REST), 0.0)
    for name, one in kernels.items():
        sums[kind_of(name, GPU_KINDS)] += one["ms"]
    return sums


def on_gpu(problem_name: str, names: list[str], is_saved: bool) -> None:
    problem = next(one for one in CUDA_PROBLEMS if one.name == problem_name)
    environment = describe(torch.get_num_threads(), "cuda")
    file = folder_of(environment["device"]) / "step_kernels.json"
    rows = earlier(file, environment).get("rows", [])
    for variant in variants("cuda"):
        if variant.name not in names:
            continue
        found = kernels_of(Step(problem, variant, "cuda"))
        row = {"problem": problem.name, "batch": problem.batch, "variant": variant.name, **found}
        of = (problem.name, variant.name)
        rows = [*(one for one in rows if (one["problem"], one["variant"]) != of), row]
        print(f"{variant.name}: {row['step_ms']:.2f} ms, of which {row['kernels_ms']:.2f} in"
              f" {row['launches']:.0f} kernels")  # fmt: skip
        for kind, milliseconds in row["kinds"].items():
            print(f"  {kind:<20}{milliseconds:8.3f} ms")
        for name, one in row["longest"].items():
            print(f"    {one['ms']:8.3f} ms {one['calls']:6.0f}  {name[:90]}")
        if is_saved:
            write_json(file, {"environment": environment, "rows": rows})


def main(argv: list[str] | None = None) -> int:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--threads", type=int, default=torch.get_num_threads())
    parser.add_argument("--problem", default="base-224", help="of a GPU")
    parser.add_argument("--variant", nargs="+", default=["cuda-graphed, not compiled"])
    parser.add_argument("--no-save", action="store_true", help="print only")
    options = parser.parse_args(argv)
    if torch.cuda.is_available():
        on_gpu(options.problem, options.variant, not options.no_save)
        return 0
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

"""Compile the shipped launches without a GPU and read what the assembler says of them.

    python -m greenmim_kernels._triton.ahead_of_time      # rewrite static_figures.json beside it

Triton compiles for any architecture on any machine; registers, spills and memory accesses are read
from the cubin with the tools in Triton's own wheel.
"""

from __future__ import annotations

import json
import multiprocessing
import os
import pathlib
import re
import subprocess
import tempfile

import triton
from triton.backends.compiler import GPUTarget
from triton.compiler import ASTSource

from . import long_groups as long
from .group_gather import copy_rows_kernel
from .group_window_attention import group_attention_bwd_kernel, group_attention_fwd_kernel
from .launch import launch_table

FIGURES = pathlib.Path(__file__).parent / "static_figures.json"
ARCHITECTURES = (80, 90, 100)
# Bytes of shared memory a program may have: sm_80, sm_90, sm_100.
SHARED_LIMIT = {80: 166_912, 90: 232_448, 100: 232_448}
KERNELS = {
    "fwd": group_attention_fwd_kernel,
    "bwd": group_attention_bwd_kernel,
    "fwd-long": long.long_attention_fwd_kernel,
    "bwd_query-long": long.long_attention_bwd_query_kernel,
    "bwd_key-long": long.long_attention_bwd_key_kernel,
    "bwd_table-long": long.long_attention_bwd_table_kernel,
}
# Windows of 7 in one tile, of 14 in a loop; heads as in Swin-B at stage 1.
NUM_HEADS = 4
_INTEGER_POINTERS = ("p_rows", "p_window", "p_coords", "p_index")
_FLOAT_POINTERS = ("p_table", "p_lse", "p_scale")


def _type(name: str, element: str) -> str:
    if name in _INTEGER_POINTERS:
        return "*i32"
    if name in _FLOAT_POINTERS:
        return "*fp32"
    if name == "p_partial":
        return "*i64"
    if name.startswith("p_"):
        return f"*{element}"
    return "fp32" if name.startswith("scale") else "i32"


def compile_launch(name: str, architecture: int, **flags):
    """The compiled kernel of one class of the launch table, or a variant by its constants."""
    kernel_name, tile, head_dim, precision = name.split("-")
    long_tile = tile == "long"
    function = KERNELS[f"{kernel_name}-long" if long_tile else kernel_name]
    side = 14 if long_tile else 7
    launch = launch_table()[name]
    values = {
        "NUM_HEADS": NUM_HEADS,
        "HEAD_DIM": int(head_dim),
        "COORD_WIDTH": 2 * side - 1,
        "OFFSET": 2 * side * (side - 1),
        "TABLE_ROWS": (2 * side - 1) ** 2,
        "BLOCK": launch.block,
        "HAS_TABLE": True,
        "GATHERED": False,
        "PER_IMAGE": False,
        "NEED_QKV": True,
        "NEED_TABLE": True,
        "PRECISION": "ieee",
        **flags,
    }
    element = "fp32" if precision == "fp32" else "bf16"
    return _compile(function, values, element, architecture, launch.warps, launch.stages)


def compile_copy(architecture: int, **flags):
    """The compiled kernel of gather and scatter."""
    values = {"BLOCK_SLOTS": 16, "BLOCK_CHANNELS": 128, "SCATTER": False, "PER_IMAGE": False}
    return _compile(copy_rows_kernel, {**values, **flags}, "bf16", architecture, 4, 2)


def _compile(function, values: dict, element: str, architecture: int, warps: int, stages: int):
    constants = {n: values[n] for n in function.arg_names if n in values}
    signature = {
        n: "constexpr" if n in constants else _type(n, element) for n in function.arg_names
    }
    # What the launcher finds out at run time: tensors are aligned to 16 bytes.
    aligned = {
        (i,): [["tt.divisibility", 16]]
        for i, n in enumerate(function.arg_names)
        if n.startswith("p_")
    }
    source = ASTSource(fn=function, signature=signature, constexprs=constants, attrs=aligned)
    return triton.compile(
        source,
        target=GPUTarget("cuda", architecture, 32),
        options={"num_warps": warps, "num_stages": stages},
    )


def inspect(compiled) -> dict[str, int]:
    """Registers, spills, shared memory, and counts of wide loads and tensor core products."""
    tools = pathlib.Path(triton.__file__).parent / "backends" / "nvidia" / "bin"
    with tempfile.NamedTemporaryFile(suffix=".cubin") as file:
        file.write(compiled.asm["cubin"])
        file.flush()

        def dump(*options: str) -> str:
            command = [str(tools / "cuobjdump"), *options, file.name]
            return subprocess.run(command, capture_output=True, text=True, check=True).stdout

        usage = re.search(r"REG:(\d+) STACK:(\d+) SHARED:\d+ LOCAL:(\d+)", dump("-res-usage"))
        # nvdisasm lies beside cuobjdump, which looks for it on PATH.
        os.environ["PATH"] = f"{tools}{os.pathsep}{os.environ['PATH']}"
        code = dump("-sass")
    count = {
        "spill_loads": r"\bLDL",
        "spill_stores": r"\bSTL",
        "tensor_core": r"\b(?:HMMA|HGMMA|UTCHMMA)",
        "loads_16_bytes": r"\bLDG\.E\.128|\bLDGSTS\.E\.\S*128",
    }
    return {
        "registers": int(usage[1]),
        "shared_bytes": compiled.metadata.shared,
        **{name: len(re.findall(pattern, code)) for name, pattern in count.items()},
    }


def _figures_of(name: str) -> tuple[str, dict[str, dict[str, int]]]:
    return name, {str(arch): inspect(compile_launch(name, arch)) for arch in ARCHITECTURES}


def compile_all() -> dict[str, dict[str, dict[str, int]]]:
    """{class: {architecture: figures}} of the whole launch table, on all cores."""
    context = multiprocessing.get_context("spawn")
    with context.Pool(min(len(os.sched_getaffinity(0)), 8)) as pool:
        return dict(sorted(pool.imap_unordered(_figures_of, launch_table())))


def main() -> None:
    content = {"triton": triton.__version__, "launches": compile_all()}
    beside = FIGURES.with_suffix(".tmp")
    beside.write_text(json.dumps(content, indent=1) + "\n")
    beside.replace(FIGURES)


if __name__ == "__main__":
    main()

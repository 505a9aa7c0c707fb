"""Compile the shipped launches without a GPU, and read what the assembler made of them.

    python -m greenmim_kernels._triton.ahead_of_time      # rewrite static_figures.json beside it

Triton compiles for any architecture on any machine; registers, spills and memory accesses are read
from the cubin with the tools in Triton's own wheel. Figures are kept per version of Triton, with a
digest of the code they depend on, so that tests need not compile everything. (For sm_100 ptxas
sometimes uses one register more or less for the same input, so no test compiles for it.)
"""

from __future__ import annotations

import ast
import hashlib
import json
import multiprocessing
import os
import pathlib
import re
import subprocess
import sys
import tempfile
from typing import Any

import triton
from triton.backends.compiler import GPUTarget
from triton.compiler import ASTSource

from . import long_groups as long
from .group_gather import copy_rows_kernel
from .group_window_attention import group_attention_bwd_kernel, group_attention_fwd_kernel
from .launch import launch_table, write_json
from .machine_code import instructions, overwritten_operands, product_loops, proxy_fence
from .primitives import Partition, Rows
from .sparse_depthwise_conv import conv_kernel, conv_sums_kernel
from .table_gradient import BLOCK_PROGRAMS, BLOCK_ROWS, add_rows_kernel

FIGURES = pathlib.Path(__file__).parent / "static_figures.json"
ARCHITECTURES = (80, 90, 100)
# Bytes of shared memory a program may have: sm_80, sm_90, sm_100.
SHARED_LIMIT = {80: 166_912, 90: 232_448, 100: 232_448}
# Modules that the figures depend on: the table's kernels, how they are compiled and read.
SOURCES = (
    "ahead_of_time",
    "group_window_attention",
    "long_groups",
    "machine_code",
    "primitives",
    "table_gradient",
)
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
_TYPES = {
    "part": Partition(*["*i32"] * 4),
    "p_index": "*i32",
    "p_table": "*fp32",
    "p_expanded": "*fp32",
    "p_lse": "*fp32",
    "p_slot_lse": "*fp32",
    "p_slot_delta": "*fp32",
    "p_partial": "*i64",
    "p_power": "*fp32",
    "p_weight": "*fp32",
    "p_bias": "*fp32",
    "p_sums": "*fp32",
    "p_neighbours": "*i32",
    "scale": "fp32",
    "scale_log2": "fp32",
}


def kernel_of(name: str):
    """The kernel of a class of the launch table."""
    kernel_name, tile, *_ = name.split("-")
    return KERNELS[f"{kernel_name}-long" if tile == "long" else kernel_name]


def compile_launch(name: str, architecture: int, **flags):
    """The compiled kernel of one class of the launch table; `flags` replace its constants."""
    _, tile, head_dim, precision = name.split("-")
    function = kernel_of(name)
    side = 14 if tile == "long" else 7
    launch = launch_table(architecture)[name]
    values = {
        "NUM_HEADS": NUM_HEADS,
        "DIM": int(head_dim),
        "HEAD_DIM": int(head_dim),
        "TABLE_ROWS": (2 * side - 1) ** 2,
        "BLOCK": launch.block,
        "HAS_TABLE": True,
        "GATHERED": False,
        "PACKED": True,
        "p_pad": None,
        "p_partial_pad": None,
        "PER_IMAGE": False,
        "NEED_QKV": True,
        "NEED_TABLE": True,
        "PRECISION": "ieee",
        **flags,
    }
    # The operators pass None for arguments that a variant does not use.
    is_expanded = tile == "long" and values["HAS_TABLE"] and not values["PER_IMAGE"]
    if is_expanded or not values["HAS_TABLE"]:
        values["p_table"] = None
    if not is_expanded:
        values["p_expanded"] = None
    if not values["NEED_TABLE"]:
        values |= {"p_partial": None, "p_power": None}
    element = "fp32" if precision == "fp32" else "bf16"
    return _compile(function, values, element, architecture, launch.warps, launch.stages)


def compile_copy(architecture: int, **flags):
    """The compiled kernel of gather and scatter."""
    values = {"BLOCK_SLOTS": 16, "BLOCK_CHANNELS": 128, "SCATTER": False, "PER_IMAGE": False}
    return _compile(copy_rows_kernel, {**values, **flags}, "bf16", architecture, 4, 2)


def compile_expand_bias(architecture: int, **flags):
    """The compiled kernel that writes the expanded bias."""
    values = {"NUM_HEADS": NUM_HEADS, "GATHERED": False, "QUERIES": 16, "KEYS": 128}
    return _compile(long.expand_bias_kernel, {**values, **flags}, "bf16", architecture, 4, 3)


def compile_conv(architecture: int, element: str = "bf16", **flags):
    """The compiled kernel of the convolution of visible tokens."""
    values = {"BLOCK_TOKENS": 8, "BLOCK_CHANNELS": 128, "FLIP": False, "PER_IMAGE": False}
    return _compile(conv_kernel, {**values, **flags}, element, architecture, 4, 3)


def compile_conv_sums(architecture: int, element: str = "bf16", **flags):
    """The compiled kernel of the gradients of the convolution's weights and bias."""
    values = {"BLOCK_TOKENS": 2, "BLOCK_CHANNELS": 64, "PER_IMAGE": False}
    return _compile(conv_sums_kernel, {**values, **flags}, element, architecture, 4, 3)


def compile_add_rows(architecture: int, first: bool, last: bool):
    """The compiled kernel that adds the programs' rows: one of two passes, or the only one."""
    values = {
        "NUM_HEADS": NUM_HEADS,
        "TABLE_ROWS": 169,
        "BLOCK_PROGRAMS": BLOCK_PROGRAMS,
        "BLOCK_ROWS": BLOCK_ROWS,
        "HAS_POWERS": first,
        "LAST": last,
    }
    types = {"p_from": "*i64" if first else "*fp64", "p_to": "*fp32" if last else "*fp64"}
    return _compile(add_rows_kernel, values, "fp32", architecture, 4, 3, types)


def _compile(
    function,
    values: dict,
    element: str,
    architecture: int,
    warps: int,
    stages: int,
    types: dict[str, Any] | None = None,
):
    types = {**_TYPES, **(types or {})}
    constants = {n: values[n] for n in function.arg_names if n in values}
    signature: dict[str, Any] = {}
    attributes: dict[tuple[int, ...], list] = {}
    rows = Rows(f"*{element}", "i32", "i32", "i32")
    types |= dict.fromkeys(("q", "k", "v", "grad_q", "grad_k", "grad_v"), rows)
    for i, name in enumerate(function.arg_names):
        if name in constants:
            signature[name] = "constexpr"
            continue
        signature[name] = type_ = types.get(name, f"*{element}" if name[:2] == "p_" else "i32")
        # What Triton's launcher specializes on at run time: tensors are aligned to 16 bytes; the
        # channels of a copy and the strides of rows are multiples of 16.
        elements = dict(enumerate(type_)) if isinstance(type_, tuple) else {None: type_}
        for j, element_type in elements.items():
            if element_type[0] == "*" or name == "channels" or type_ is rows:
                attributes[(i,) if j is None else (i, j)] = [["tt.divisibility", 16]]
    if values.get("GATHERED"):
        signature["part"] = signature["part"]._replace(token_index="constexpr")
        at = (function.arg_names.index("part"), 0)
        constants[at] = None
        del attributes[at]
    source = ASTSource(fn=function, signature=signature, constexprs=constants, attrs=attributes)
    return triton.compile(
        source,
        target=GPUTarget("cuda", architecture, 32),
        options={"num_warps": warps, "num_stages": stages},
    )


def inspect(compiled) -> dict:
    """A kernel's registers, spills, shared memory, instructions, and faults of `machine_code`."""
    tools = pathlib.Path(triton.__file__).parent / "backends" / "nvidia" / "bin"
    with tempfile.NamedTemporaryFile(suffix=".cubin") as file:
        file.write(compiled.asm["cubin"])
        file.flush()

        # nvdisasm lies beside cuobjdump, which looks for it on PATH.
        environment = {**os.environ, "PATH": f"{tools}{os.pathsep}{os.environ['PATH']}"}

        def dump(*options: str) -> str:
            command = [str(tools / "cuobjdump"), *options, file.name]
            done = subprocess.run(
                command, capture_output=True, text=True, check=True, env=environment
            )
            return done.stdout

        registers = re.findall(r"REG:(\d+) STACK:\d+ SHARED:\d+ LOCAL:\d+", dump("-res-usage"))[0]
        sass = dump("-sass")
    code = instructions(sass)
    count = {
        "spill_loads": r"\bLDL",
        "spill_stores": r"\bSTL",
        "tensor_core": r"\b(?:HMMA|HGMMA|UTCHMMA)",
        "loads_16_bytes": r"\bLDG\.E\.128|\bLDGSTS\.E\.\S*128",
    }
    return {
        "registers": int(registers),
        "shared_bytes": compiled.metadata.shared,
        **{name: len(re.findall(pattern, sass)) for name, pattern in count.items()},
        "instructions": len(code),
        "loops": product_loops(code),
        "overwritten_operands": len(overwritten_operands(code)),
        "proxy_fence": proxy_fence(compiled.asm["ptx"]),
    }


def figures_of(name: str, architectures: tuple[int, ...] = ARCHITECTURES) -> dict[str, dict]:
    """{architecture: figures} of one class of the launch table."""
    return {str(arch): inspect(compile_launch(name, arch)) for arch in architectures}


def compile_all() -> dict[str, dict[str, dict]]:
    """{class: {architecture: figures}} of the whole launch table, on up to 8 cores."""
    names = sorted(launch_table(90))
    context = multiprocessing.get_context("spawn")
    with context.Pool(min(len(os.sched_getaffinity(0)), 8)) as pool:
        return dict(zip(names, pool.map(figures_of, names, chunksize=1), strict=True))


def sources_digest() -> str:
    """A digest of the code and launches behind the figures, without comments and docstrings.

    It is the same in every version of Python.
    """
    launches = [
        (architecture, name, launch.block, launch.warps, launch.stages)
        for architecture in ARCHITECTURES
        for name, launch in sorted(launch_table(architecture).items())
    ]
    code = [_code((FIGURES.parent / f"{name}.py").read_text()) for name in SOURCES]
    return hashlib.sha256(repr((launches, code)).encode()).hexdigest()


def _code(source: str) -> str:
    """A program without comments, docstrings and layout."""
    tree = ast.parse(source)
    for node in ast.walk(tree):
        if isinstance(node, (ast.Module, ast.ClassDef, ast.FunctionDef)):
            if ast.get_docstring(node) is not None:
                node.body = node.body[1:] or [ast.Pass()]
    # ast.dump leaves out empty fields from Python 3.13 on; functions have type_params from 3.12 on.
    options: dict[str, Any] = {"show_empty": True} if sys.version_info >= (3, 13) else {}
    return ast.dump(tree, **options).replace(", type_params=[]", "")


def committed_figures() -> dict[str, dict]:
    """{version of Triton: {"sources": digest, "launches": {class: {architecture: figures}}}}."""
    return json.loads(FIGURES.read_text())


def main() -> None:
    found = {"sources": sources_digest(), "launches": compile_all()}
    write_json(FIGURES, dict(sorted({**committed_figures(), triton.__version__: found}.items())))


if __name__ == "__main__":
    main()

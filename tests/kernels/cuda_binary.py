"""What the compiler made of the CUDA kernels: registers, spills, shared memory, wide accesses.

The figures stand in cuda_figures.json beside this file, so that a change shows in a diff;
`python tests/kernels/cuda_binary.py` rewrites it from the built module.
"""

from __future__ import annotations

import importlib.util
import itertools
import json
import pathlib
import re
import shutil
import subprocess
from collections import Counter

import torch
from emulated import LARGE, SMALL, plan, toolkit

from greenmim_kernels._triton.machine_code import instructions, loop_length

FIGURES = pathlib.Path(__file__).parent / "cuda_figures.json"
# Of instructions, by their names.
COUNTED = {
    "tensor_core": re.compile(r"HMMA\."),
    "spills": re.compile(r"(LDL|STL)\b"),
    "reads_16_bytes": re.compile(r"(LDGSTS|LDG)\.[A-Z0-9.]*128\b"),
    "writes_16_bytes": re.compile(r"STG\.[A-Z0-9.]*128\b"),
    "lets_next_start": re.compile(r"PREEXIT\b"),
    "waits_for_last": re.compile(r"ACQBULK\b"),
}
TOUCHES_MEMORY = re.compile(r"(LDG|LDGSTS|STG|ACQBULK)\b")
# Whose code is read, as all would take minutes: one of each that the sources tell apart. Of the
# others there are registers and stack.
READ = ("80", "90", "100")


def module() -> pathlib.Path | None:
    import greenmim_kernels

    return next(pathlib.Path(greenmim_kernels.__file__).parent.glob("_C_cuda.*so"), None)


def cuobjdump() -> str | None:
    """The tool that reads cubins: of the toolkit, or the one that triton ships."""
    if found := toolkit("cuobjdump"):
        return found
    if spec := importlib.util.find_spec("triton"):
        folder = pathlib.Path(spec.origin).parent / "backends" / "nvidia" / "bin"
        return shutil.which("cuobjdump", path=str(folder))
    return None


def short_name(symbol: str) -> str | None:
    """From a mangled name, such as attention_forward-bfloat16-32-short; None if it is not ours."""
    names = (
        r"attention_(?:forward|backward_long|backward)|row_copy|table_gradient"
        r"|sparse_depthwise_conv"
    )
    found = re.search(rf"cuda\d+({names})_kernel(I.*?E)?E?v", symbol)
    if found is None:
        return None
    parts = [found[1]]
    arguments = found[2] or ""
    if found[1] == "table_gradient":  # from partial sums or from sums of runs, to which of the two
        kinds = {"IffE": "whole", "IfdE": "runs", "IdfE": "of_runs"}
        return f"{found[1]}-{kinds[arguments]}"
    for mark, name in (("__nv_bfloat16", "bfloat16"), ("__half", "float16"), ("If", "float32"),
                       ("uint4", "16bytes"), ("Ij", "4bytes"), ("It", "2bytes")):  # fmt: skip
        if mark in arguments:
            parts.append(name)
            break
    parts += re.findall(r"Li(\d+)E", arguments)
    words = {
        "row_copy": (("scatter", "gather"),),
        "attention_forward": (("short", "long"), ("", "general"), ("", "over-heads")),
        "attention_backward": (("", "general"), ("", "over-heads")),
        "attention_backward_long": (("", "general"),),
        "sparse_depthwise_conv": (("", "backward"),),
    }
    flags = re.findall(r"Lb(\d)E", arguments)
    for pair, flag in zip(words.get(found[1], ()), flags, strict=True):
        parts.append(pair[int(flag)])
    return "-".join(filter(None, parts))


def figures(binary: pathlib.Path, tool: str) -> dict[str, dict[str, dict]]:
    """{kernel: {architecture: {"registers", "stack_bytes"}}}; and `code_figures`, where the
    architecture is one of READ or none of them was built."""
    result: dict[str, dict[str, dict]] = {}
    usage = subprocess.run(
        [tool, "-res-usage", str(binary)], capture_output=True, text=True, check=True
    )
    architecture = name = ""
    for line in usage.stdout.splitlines():
        if found := re.match(r"arch = sm_(\w+)", line):
            architecture = found[1]
        elif found := re.match(r"\s*Function (\S+):", line):
            name = short_name(found[1])
        elif name and (found := re.search(r"REG:(\d+) STACK:(\d+).*LOCAL:(\d+)", line)):
            result.setdefault(name, {})[architecture] = {
                "registers": int(found[1]),
                "stack_bytes": int(found[2]) + int(found[3]),
            }
    built = {architecture for rows in result.values() for architecture in rows}
    for architecture in sorted(built & set(READ) or built):
        command = [tool, "-sass", "-arch", f"sm_{architecture}", str(binary)]
        code = subprocess.run(command, capture_output=True, text=True, check=True).stdout
        for function in code.split("Function : ")[1:]:
            symbol, _, body = function.partition("\n")
            if name := short_name(symbol):
                result[name][architecture].update(code_figures(body))
    return result


def code_figures(code: str) -> dict:
    """What is counted in a kernel's code, and its first instruction that touches the device's
    memory or waits for the last kernel."""
    found = instructions(code)
    names = Counter(one.operation for one in found)
    return {
        **{
            key: sum(number for name, number in names.items() if pattern.match(name))
            for key, pattern in COUNTED.items()
        },
        "instructions": len(found),
        "loop": loop_length(found),
        "first_access": next(
            (touch[1] for one in found if (touch := TOUCHES_MEMORY.match(one.operation))), ""
        ),
    }


def shared_memory() -> dict[str, dict[str, int]]:
    """{problem: {"forward", "backward": bytes of a block, "strips": of it backward}}."""
    rows = {}
    for precision, dtype in (("16bit", torch.bfloat16), ("fp32", torch.float32)):
        for head_dim in (16, 32, 64):
            for slots, window in ((16, 7), (32, 7), (48, 7), (64, 7), (208, 14), (256, 16)):
                for limit, per_image in itertools.product((LARGE, SMALL), (False, True)):
                    forward, backward = plan(dtype, head_dim, slots, window, limit, per_image)
                    name = f"{precision}-{head_dim}-{slots}slots-window{window}"
                    rows[f"{name}{'-per_image' * per_image}-of{limit}"] = {
                        "forward": forward["shared_bytes"],
                        "backward": backward["shared_bytes"],
                        "strips": backward["strips"],
                    }
    return rows


def compiler() -> str:
    """The release of nvcc, such as "13.0"."""
    nvcc = toolkit("nvcc")
    if nvcc is None:
        return "none"
    done = subprocess.run([nvcc, "--version"], capture_output=True, text=True)
    found = re.search(r"release (\d+\.\d+)", done.stdout)
    return found[1] if found else "none"


def main() -> None:
    content = {
        "nvcc": compiler(),
        "kernels": figures(module(), cuobjdump()),
        "shared_memory": shared_memory(),
    }
    FIGURES.write_text(json.dumps(content, indent=None, separators=(",", ":")).replace(
        '},"', '},\n"').replace("}},", "}},\n") + "\n")  # fmt: skip


if __name__ == "__main__":
    main()

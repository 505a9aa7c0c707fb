"""A file imports only from lower floors (DESIGN.md, section 3), and the kernels stand alone."""

from __future__ import annotations

import ast
import json
import pathlib
import subprocess
import sys

import pytest

ROOT = pathlib.Path(__file__).resolve().parent.parent

# Lowest first; a module may import from floors below its own only. Modules of one floor do not
# know each other.
FLOORS = [
    ["greenmim_kernels._C_partition", "greenmim_kernels._C", "greenmim_kernels._C_cuda"],
    ["greenmim_kernels._libraries", "greenmim_kernels._ops"],
    ["greenmim_kernels._planner"],
    [
        "greenmim_kernels.partition",
        "greenmim_kernels.neighbours",
        "greenmim_kernels.reference",
        "greenmim_kernels.host_memory",
    ],
    ["greenmim_kernels.automatic", "greenmim_kernels.windows"],
    ["greenmim_kernels.backends"],
    ["greenmim_kernels._triton"],
    [
        "greenmim_kernels._triton.primitives",
        "greenmim_kernels._triton.launch",
        "greenmim_kernels._triton.machine_code",
        "greenmim_kernels._triton.table_gradient",
    ],
    [
        "greenmim_kernels._triton.group_window_attention",
        "greenmim_kernels._triton.long_groups",
        "greenmim_kernels._triton.group_gather",
        "greenmim_kernels._triton.sparse_depthwise_conv",
    ],
    ["greenmim_kernels._triton.operators", "greenmim_kernels._triton.ahead_of_time"],
    ["greenmim_kernels.ops"],
    ["greenmim_kernels.functional"],
    ["greenmim_kernels.modules", "greenmim_kernels.testing", "greenmim_kernels.onednn"],
    ["greenmim_kernels.integrations.grids", "greenmim_kernels.integrations.readers"],
    ["greenmim_kernels.integrations.attention"],
    ["greenmim_kernels.integrations.blocks", "greenmim_kernels.layers"],
    ["greenmim_kernels.integrations.kinds"],
    ["greenmim_kernels.integrations.fuse"],
    ["greenmim_kernels.integrations"],
    ["greenmim_kernels"],
    ["greenmim.config", "greenmim.masking", "greenmim.guards", "greenmim.messages"],
    ["greenmim.planning"],
    ["greenmim.encoders.visible"],
    ["greenmim.encoders.shifted_windows"],
    ["greenmim.encoders.swin", "greenmim.encoders.swinv2", "greenmim.encoders.twins_svt"],
    ["greenmim.encoders"],
    ["greenmim.mim"],
    ["greenmim.checkpoint", "greenmim.flops", "greenmim.sharded"],
    ["greenmim.classifier"],
    ["greenmim"],
    ["greenmim.recipe", "greenmim.launch", "greenmim.initial"],
    ["greenmim.finetune_recipe"],
    ["greenmim.presets"],
    ["greenmim.data"],
    ["greenmim.data.decode"],
    ["greenmim.data.images"],
    ["greenmim.data.sampler"],
    ["greenmim.data.tars"],
    ["greenmim.data.sources"],
    ["greenmim.data.dataset"],
    ["greenmim.data.loader", "greenmim.pictures"],
    ["greenmim.data.held_out"],
    ["greenmim.data.labelled"],
    ["greenmim.processes"],
    ["greenmim.evaluation"],
    ["greenmim.evaluation.sweep", "greenmim.evaluation.classifiers"],
    ["greenmim.evaluation.held_out", "greenmim.evaluation.features"],
    ["greenmim.evaluation.accuracy"],
    ["greenmim.evaluation.classification"],
    ["greenmim.training"],
    ["greenmim.training.log"],
    [
        "greenmim.training.folder_lock",
        "greenmim.training.passes",
        "greenmim.training.profile",
        "greenmim.training.task",
    ],
    [
        "greenmim.training.run_folder",
        "greenmim.training.pretraining",
        "greenmim.training.finetuning",
    ],
    ["greenmim.training.startup"],
    ["greenmim.training.train", "greenmim.training.dry_run"],
    ["greenmim.training.slurm"],
    ["greenmim.tools"],
    ["greenmim.tools.loading"],
    ["greenmim.tools.doctor", "greenmim.tools.measured"],
    [
        "greenmim.tools.reconstruct",
        "greenmim.tools.evaluate",
        "greenmim.tools.classify",
        "greenmim.tools.export",
        "greenmim.tools.convert",
    ],
    ["greenmim.cli"],
    ["greenmim.__main__"],
]


def floor_of() -> dict[str, int]:
    return {name: number for number, floor in enumerate(FLOORS) for name in floor}


def modules() -> dict[str, pathlib.Path]:
    found = {}
    for package in ("greenmim_kernels", "greenmim"):
        for path in sorted((ROOT / package).rglob("*.py")):
            parts = path.relative_to(ROOT).with_suffix("").parts
            name = ".".join(parts[:-1] if parts[-1] == "__init__" else parts)
            found[name] = path
    return found


def imports(name: str, path: pathlib.Path, known: set[str]) -> set[str]:
    """Our own modules that a file imports anywhere in it."""
    package = name.split(".") if path.name == "__init__.py" else name.split(".")[:-1]
    found = set()
    for node in ast.walk(ast.parse(path.read_text())):
        if isinstance(node, ast.Import):
            found |= {alias.name for alias in node.names}
        elif isinstance(node, ast.ImportFrom):
            base = package[: len(package) - node.level + 1] if node.level else []
            module = ".".join([*base, *(node.module.split(".") if node.module else [])])
            for alias in node.names:
                inner = f"{module}.{alias.name}"
                found.add(inner if inner in known else module)
    return {module for module in found if module in known}


def upward(floors: dict[str, int], graph: dict[str, set[str]]) -> list[str]:
    return [
        f"{name} (floor {floors[name]}) imports {target} (floor {floors[target]})"
        for name, targets in graph.items()
        for target in sorted(targets)
        if floors[target] >= floors[name]
    ]


def test_every_module_has_a_floor_and_imports_only_from_below():
    floors = floor_of()
    found = modules()
    known = set(floors)
    missing = sorted(set(found) - known)
    assert not missing, f"give these modules a floor: {missing}"
    graph = {name: imports(name, path, known) for name, path in found.items()}
    assert not upward(floors, graph)
    assert graph["greenmim_kernels.functional"] >= {
        "greenmim_kernels.ops",
        "greenmim_kernels.partition",
    }
    # Lazily, when the dispatcher runs it; and the trainer sees the package only from above.
    assert "greenmim_kernels._triton.operators" in graph["greenmim_kernels.ops"]


def test_an_upward_import_is_seen():
    floors = floor_of()
    graph = {"greenmim_kernels.reference": {"greenmim_kernels.ops"}}
    assert len(upward(floors, graph)) == 1


# What a machine with a GPU runs, with nothing installed but torch, timm and pytest.
ON_A_GPU = [
    *("benchmarks.steps", "benchmarks.operators", "benchmarks.cases", "benchmarks.gpu_check"),
    *("benchmarks.tune", "benchmarks.choose", "benchmarks.warm", "benchmarks.counters"),
    *("benchmarks.swap", "tests.kernels.stress"),
]
UNWANTED = {
    "greenmim_kernels": ["timm", "torchvision", "jsonargparse", "tensorboard", "matplotlib"],
    "greenmim_kernels.integrations": ["timm", "torchvision", "transformers", "monai"],
    "greenmim_kernels.testing": ["timm", "jsonargparse", "tensorboard", "matplotlib"],
    "greenmim": ["jsonargparse", "tensorboard", "matplotlib", "tqdm.rich"],
    **dict.fromkeys(
        ON_A_GPU, ["jsonargparse", "tensorboard", "matplotlib", "submitit", "skimage", "tqdm.rich"]
    ),
}
# Each import in a fork of one process that has torch.
IMPORT_EACH = """
import gc, importlib, json, os, sys, traceback
import torch._dynamo  # which imports of torch end in
gc.freeze()  # what is imported is not looked through for garbage, which would copy it
read, write = os.pipe()
for module, unwanted in json.loads(sys.argv[1]).items():
    if os.fork() == 0:
        error = ""
        sys.modules.update(dict.fromkeys(unwanted))
        try:
            importlib.import_module(module)
        except BaseException:
            error = traceback.format_exc()[-1500:]
        os.write(write, json.dumps([module, error]).encode() + b"\\n")
        os._exit(0)
    os.wait()
os.close(write)
print(os.fdopen(read).read())
"""


@pytest.fixture(scope="module")
def import_errors(made_once) -> dict[str, str]:
    def import_each(folder: pathlib.Path) -> None:
        command = [sys.executable, "-c", IMPORT_EACH, json.dumps(UNWANTED)]
        done = subprocess.run(command, cwd=ROOT, capture_output=True, text=True)
        assert done.returncode == 0, done.stderr[-1500:]
        (folder / "errors").write_text(done.stdout)

    lines = (made_once("imports", import_each) / "errors").read_text().split("\n")[:-2]
    return dict(map(json.loads, lines))


@pytest.mark.parametrize("module", UNWANTED)
def test_what_an_import_must_not_need(module, import_errors):
    assert import_errors[module] == ""

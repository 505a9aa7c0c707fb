"""Nothing that the packages load can run code: no call in them would let it."""

from __future__ import annotations

import ast
import pathlib

import pytest

ROOT = pathlib.Path(__file__).resolve().parents[1]
FILES = sorted(
    file for name in ("greenmim", "greenmim_kernels") for file in (ROOT / name).rglob("*.py")
)
# Called by these names, they run or unpickle what they are given.
RUN = {"eval", "exec", "compile", "__import__"}
OF_MODULES = {
    "pickle": {"load", "loads"}, "marshal": {"load", "loads"}, "shelve": {"open"},
    "yaml": {"load", "load_all", "unsafe_load", "unsafe_load_all", "full_load", "full_load_all"},
    "joblib": {"load"}, "dill": {"load", "loads"}, "cloudpickle": {"load", "loads"},
    "os": {"system", "popen"}, "runpy": {"run_path", "run_module"},
}  # fmt: skip
# A class that reads pickles is one of names that may be found in them (`_MetadataUnpickler`).
UNPICKLERS = {"greenmim/sharded.py": 1}


def dangers(source: str) -> list[str]:
    """What in Python code would run what a file holds, each with its line."""
    found = []

    def add(node: ast.AST, what: str) -> None:
        found.append(f"line {node.lineno}: {what}")

    for node in ast.walk(ast.parse(source)):
        if isinstance(node, ast.ImportFrom) and node.module in OF_MODULES:
            for alias in node.names:
                if alias.name in OF_MODULES[node.module]:
                    add(node, f"{node.module}.{alias.name}")
        if isinstance(node, ast.Attribute) and isinstance(node.value, ast.Name):
            if node.attr in OF_MODULES.get(node.value.id, ()):
                add(node, f"{node.value.id}.{node.attr}")
            if (node.value.id, node.attr) == ("pickle", "Unpickler"):
                add(node, "pickle.Unpickler")
        if not isinstance(node, ast.Call):
            continue
        options = {keyword.arg: keyword.value for keyword in node.keywords}
        called = ast.unparse(node.func)
        if called in RUN:
            add(node, called)
        if called in ("torch.load", "torch.serialization.load"):
            safe = options.get("weights_only")
            if not (isinstance(safe, ast.Constant) and safe.value is True):
                add(node, "torch.load without weights_only=True")
        for name in ("allow_pickle", "shell", "trust_remote_code"):
            value = options.get(name)
            if value is not None and not (isinstance(value, ast.Constant) and value.value is False):
                add(node, f"{name}={ast.unparse(value)}")
    return found


@pytest.mark.parametrize("file", FILES, ids=lambda file: str(file.relative_to(ROOT)))
def test_no_call_runs_what_a_file_holds(file):
    found = dangers(file.read_text())
    allowed = UNPICKLERS.get(str(file.relative_to(ROOT)), 0)
    assert [what.partition(": ")[2] for what in found] == ["pickle.Unpickler"] * allowed


@pytest.mark.parametrize(
    "planted",
    [
        "torch.load(path)",
        "torch.load(path, weights_only=False)",
        "torch.load(path, weights_only=trusted)",
        "pickle.loads(data)",
        "read = pickle.load",
        "from pickle import loads",
        "class Reader(pickle.Unpickler): pass",
        "yaml.load(text, Loader=yaml.Loader)",
        "yaml.unsafe_load(text)",
        "eval(text)",
        "exec(compile(text, name, 'exec'))",
        "np.load(path, allow_pickle=True)",
        "subprocess.run(command, shell=True)",
        "os.system(command)",
        "load_dataset(name, trust_remote_code=True)",
    ],
)
def test_a_planted_one_is_found(planted):
    assert dangers(planted)


def test_what_is_safe_is_none():
    safe = ("torch.load(p, weights_only=True)", "yaml.safe_load(t)", "json.loads(t)",
            "np.load(p, allow_pickle=False)", "model.eval()", "re.compile(p)")  # fmt: skip
    assert not any(map(dangers, safe))

"""What is said of an error, also of one without words or with many lines."""

from __future__ import annotations

import ast
import pathlib
import subprocess
import sys

import pytest

from greenmim import guards
from greenmim.guards import first_line, one_line


@pytest.mark.parametrize("error", [RuntimeError(), RuntimeError("\n  \n")])
def test_an_error_without_words_is_told_by_its_type(error):
    assert first_line(error) == one_line(error) == "RuntimeError"


def test_an_error_of_several_lines_becomes_one():
    error = ValueError("\n no room\n  in /dev/shm\n")
    assert first_line(error) == "no room"
    assert one_line(error) == "no room in /dev/shm"


# Of a process in which packages of the extra "train" are not there.
ABSENT = """
import sys
class Others:
    def __init__(self, finder):
        self.finder = finder
    def __getattr__(self, name):
        return getattr(self.finder, name)
    def find_spec(self, name, *more):
        absent = name.partition(".")[0] in {names!r}
        return None if absent else self.finder.find_spec(name, *more)
sys.meta_path[:] = map(Others, sys.meta_path)
"""
COMMAND = """
from greenmim.__main__ import main
sys.argv = {argv!r}
raise SystemExit(main())
"""


def without(names: list[str], *argv: str) -> subprocess.CompletedProcess[str]:
    code = ABSENT.format(names=names) + COMMAND.format(argv=["greenmim", *argv])
    return subprocess.run([sys.executable, "-c", code], capture_output=True, text=True)


@pytest.mark.parametrize(
    ("names", "argv", "missing"),
    [
        (["jsonargparse"], ["pretrain", "--help"], "jsonargparse"),
        (["timm"], ["knn", "--help"], "timm"),
        (["safetensors"], ["reconstruct", "--help"], "safetensors"),
    ],
)
def test_a_command_that_misses_a_package_says_so_in_a_line(names, argv, missing):
    done = without(names, *argv)
    advice = f"This needs {missing}, which is not installed: pip install 'greenmim[train]'."
    assert done.returncode == 2 and done.stdout == ""
    assert done.stderr == f"greenmim: error: {advice}\n"


def test_another_module_that_is_missing_is_an_error_like_any():
    for name in ("timm.layers.gone", "greenmim.gone", "wandb", None):
        assert guards.missing_package(ModuleNotFoundError("no", name=name)) is None


@pytest.mark.parametrize("argv", [["--debug", "pretrain"], ["pretrain", "--debug"]])
def test_debug_shows_the_traceback_of_the_whole_command(argv):
    done = without(
        [], *argv, "--data.root=/nowhere", "--work-dir=runs", "--device=cpu", "--dry-run"
    )
    assert done.returncode == 1 and "Traceback" in done.stderr
    assert "UserError: " in done.stderr.splitlines()[-1]


def test_the_doctor_needs_the_kernels_alone():
    done = without(list(guards._TRAIN), "doctor")
    assert done.returncode == 0, done.stderr
    assert "backends" in done.stdout and "cpp" in done.stdout


def test_a_model_without_timm_says_what_to_install():
    code = ABSENT.format(names=["timm"]) + "from greenmim import GreenMIM"
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True)
    assert "pip install 'greenmim[train]'" in done.stderr.splitlines()[-1]


def test_the_packages_of_the_extra_are_known():
    """Each that the package imports anywhere and that the kernels' requirements do not bring."""
    root = pathlib.Path(guards.__file__).parent.parent
    imported = set()
    for path in (root / "greenmim").rglob("*.py"):
        for node in ast.walk(ast.parse(path.read_text())):
            if isinstance(node, ast.Import):
                imported |= {alias.name.partition(".")[0] for alias in node.names}
            elif isinstance(node, ast.ImportFrom) and not node.level:
                imported.add(node.module.partition(".")[0])
    optional = {
        "wandb",
        "webdataset",
        "pillow_heif",
        "datasets",
        "triton",
    }  # these say it themselves
    ours = {"greenmim", "greenmim_kernels", "torch", "numpy"}
    assert imported - sys.stdlib_module_names - ours - optional == set(guards._TRAIN) - {
        "tensorboard"
    }

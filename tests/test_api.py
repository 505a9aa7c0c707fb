"""The documentation of every public name: there, with its parameters, errors and shapes."""

from __future__ import annotations

import importlib
import inspect
import re
import subprocess
import sys
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parent.parent
MODULES = ("greenmim_kernels", "greenmim_kernels.integrations", "greenmim")


def public() -> Iterator[tuple[str, Callable]]:
    """Names and what they are: what packages say is public, with public methods and properties."""
    for module in map(importlib.import_module, MODULES):
        for name in module.__all__:
            found = getattr(module, name)
            yield f"{module.__name__}.{name}", found
            for member, value in vars(found).items() if inspect.isclass(found) else ():
                value = getattr(value, "fget", getattr(value, "__func__", value))
                if inspect.isfunction(value) and not member.startswith("_"):
                    yield f"{module.__name__}.{name}.{member}", value


def problem(found: Callable) -> str | None:
    """What is missing in its docstring."""
    text = found.__doc__
    if not text:  # of its own: not a base's
        return "it has no docstring"
    if re.search(r"^ *\[[^]]*\]:|`~", text, re.M):  # Markdown takes such a line for a link's target
        return "pages would lose a line that begins with [...]:, or show the ~ of a link"
    sections = dict(re.findall(r"^(\w+):\n(.*?)(?=^\w|\Z)", inspect.cleandoc(text), re.M | re.S))
    told = sections.get("Args", "") + sections.get("Attributes", "")
    names = {
        name for line in re.findall(r"^    (\w[\w, ]*):", told, re.M) for name in line.split(", ")
    }
    wanted = set(inspect.signature(found).parameters) - {"self", "cls"}
    if missing := wanted - names:
        return f"Args lack {', '.join(sorted(missing))}"
    if strangers := names - wanted if "Args" in sections and "Attributes" not in sections else ():
        return f"Args have {', '.join(sorted(strangers))}, which are no parameters"
    if found.__module__ == "greenmim_kernels.functional" and "Raises" not in sections:
        return "an operator says what it raises"
    return None


@pytest.mark.parametrize(("name", "found"), [pytest.param(*pair, id=pair[0]) for pair in public()])
def test_every_public_name_is_documented(name, found):
    assert problem(found) is None, f"{name}: {problem(found)}"


def nothing(x, y=1):
    pass


@pytest.mark.parametrize(
    ("docstring", "module", "wrong"),
    [
        (None, "", "no docstring"),
        (
            "Of x.\n\n    Args:\n        x, y: of shape\n            [B, N]: both.\n    ",
            "",
            "lose a line",
        ),
        ("Of x.\n\n    Args:\n        x: y: [B, N].\n    ", "", "Args lack y"),
        ("Of x.\n\n    Args:\n        x, y, z: sizes.\n    ", "", "Args have z"),
        ("Of x.\n\n    Args:\n        x, y: sizes.\n    ", "greenmim_kernels.functional", "raises"),
    ],
)
def test_what_is_missing_is_found(docstring, module, wrong, monkeypatch):
    monkeypatch.setattr(nothing, "__doc__", docstring)
    monkeypatch.setattr(nothing, "__module__", module)
    assert wrong in problem(nothing)


def test_pages_are_built(tmp_path):
    """As `make docs` builds them: each public name has its place on one."""
    pytest.importorskip("pdoc", reason="pdoc is not installed (the extra docs)")
    (command,) = re.findall(r"-m (pdoc .*)", (ROOT / "Makefile").read_text())
    words = command.replace("build/docs", str(tmp_path)).split()
    done = subprocess.run([sys.executable, "-m", *words], cwd=ROOT, capture_output=True, text=True)
    assert done.returncode == 0 and "not resolve" not in done.stderr, done.stderr[-1500:]
    built = "".join(page.read_text() for page in tmp_path.rglob("*.html"))
    for name, _ in public():
        place = re.sub(r"^greenmim(_kernels(\.integrations)?)?\.", "", name)
        assert f'id="{place}"' in built, name

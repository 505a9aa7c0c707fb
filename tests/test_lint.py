"""Style, types and spelling, as `make lint` looks at them; pre-commit runs the same versions."""

from __future__ import annotations

import importlib.util
import re
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parent.parent
LINT = (ROOT / "Makefile").read_text().partition("\nlint:")[2].partition("\n\n")[0]
COMMANDS = re.findall(r"\$\(RUN\) -m (.*)", LINT)
PINS = dict(re.findall(r'"(ruff|mypy|codespell)==([\d.]+)"', (ROOT / "pyproject.toml").read_text()))


@pytest.mark.parametrize(
    "command", [pytest.param(c, marks=pytest.mark.slow if c == "mypy" else ()) for c in COMMANDS]
)
def test_nothing_is_found(command):
    module, *options = command.split()
    if importlib.util.find_spec(module) is None:
        pytest.skip(f"{module} is not installed (the extra test)")
    done = subprocess.run([sys.executable, "-m", module, *options], cwd=ROOT, capture_output=True)
    assert done.returncode == 0, (done.stdout + done.stderr).decode()[-3000:]


def test_versions_are_the_same_everywhere():
    assert set(PINS) == {command.split()[0].removesuffix("_lib") for command in COMMANDS}
    hooks = (ROOT / ".pre-commit-config.yaml").read_text()
    for name, version in re.findall(r"(ruff|codespell)==([\d.]+)", hooks):
        assert version == PINS[name], name
